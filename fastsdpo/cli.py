"""``fastsdpo <command>``: one line per command; each command's module is imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

COMMANDS = {
    "prepare": ("fastsdpo.commands.prepare", "conversations -> interactions.jsonl"),
    "train": ("fastsdpo.commands.train", "train a model on interactions"),
    "online": ("fastsdpo.commands.online", "train a model on a user's reactions to its answers"),
    "chat": ("fastsdpo.commands.chat", "talk to a model that learns from your follow-ups"),
    "eval": ("fastsdpo.commands.eval", "win rate of a model against its base, by rule or judge"),
    "signal": ("fastsdpo.commands.signal", "show the token-level signal of an interaction"),
    "merge": ("fastsdpo.commands.merge", "put a LoRA adapter into its model's weights"),
    "demo-data": ("fastsdpo.commands.demo_data", "write a small file of conversations to try it with"),
    "bench": ("fastsdpo.commands.bench", "time the losses against plain PyTorch on this machine"),
    "doctor": ("fastsdpo.commands.doctor", "check the backends of this machine"),
}
PYTHON = (3, 10)


def _usage() -> str:
    lines = ["usage: fastsdpo <command> [options]", "", "commands:"]
    lines += [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "`fastsdpo <command> --help` lists a command's options; `fastsdpo --version`."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status (2 for an unknown command)."""
    if sys.version_info < PYTHON:
        needed, here = (".".join(map(str, version[:2])) for version in (PYTHON, sys.version_info))
        print(f"fastsdpo needs Python {needed} or newer; this is {here}", file=sys.stderr)
        return 2
    if argv is None:
        argv = sys.argv[1:]
        if not sys.stderr.isatty():  # a bar of another package would be a line for each of its states
            os.environ.setdefault("TQDM_DISABLE", "1")
    if not argv or argv[0] in ("-h", "--help", "help"):
        if argv[1:2] and argv[1] in COMMANDS:  # fastsdpo help train
            return main([argv[1], "--help"])
        print(_usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from fastsdpo._version import __version__

        print(f"fastsdpo {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        said = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}"
        print(f"fastsdpo: unknown command {argv[0]!r}; {said}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[argv[0]][0])
        return int(module.main(argv[1:]) or 0)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "fastsdpo":
            raise
        from fastsdpo.commands.running import describe_error

        print(f"fastsdpo {argv[0]}: {describe_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the command itself was being imported
        print(f"fastsdpo {argv[0]}: stopped at once", file=sys.stderr)
        return 130
