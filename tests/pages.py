"""The documents as tests read them: their code blocks, and the commands in the shell blocks."""

import importlib.util
import itertools
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "MODEL")
ENDS = set("\n;|&<>")


@dataclass(frozen=True)
class Call:
    """One command: its words, the command whose output is piped into it, and the file that takes its output."""

    words: list[str]
    piped: list[str] | None = None
    file: str | None = None


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def calls(block):
    """The commands of a shell block."""
    text = re.sub(r"(^|\s)#.*", "", block.replace("\\\n", " "))
    words = shlex.shlex(text, posix=True, punctuation_chars="\n;|&<>")
    words.whitespace, words.whitespace_split = " \t", True
    found: list[Call] = []
    before = ""
    for is_end, group in itertools.groupby(words, lambda word: set(word) <= ENDS):
        call = list(group)
        if is_end:
            before = "".join(call)
        elif before == ">":
            found[-1] = replace(found[-1], file=call[0])
        else:
            found.append(Call(call, found.pop().words if before == "|" else None))
    return found


def commands(page):
    """The calls of fastsdpo in the page's shell blocks, as arguments; those with ... are no whole ones."""
    for block in blocks(page, "bash"):
        for call in calls(block):
            if call.words[0] == "fastsdpo" and call.words[1:] and "..." not in call.words:
                yield call.words[1:]


def program(package):
    """What starts a package's command of the same name, also where the package lies in a folder of `make peers`."""
    found = importlib.util.find_spec(package)
    beside = Path(found.origin).parents[1] / "bin" / package
    return [sys.executable, str(beside)] if beside.exists() else [shutil.which(package)]
