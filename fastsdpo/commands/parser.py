"""The command line: argparse, with defaults in the help, suggestions in the errors, and options from a YAML file.

argparse is kept: it is no dependency and costs no start-up time. What builds a command line from a configuration class
needs `SDPOConfig`, and with it torch, before it can show any help.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

# What other trainers call these options.
ELSEWHERE = {
    "--lr": "--learning-rate",
    "--output-dir": "--output",
    "--out": "--output",
    "--model-name-or-path": "--model",
    "--base-model": "--model",
    "--dataset": "DATA",
    "--streaming": "--stream",
    "--dataset-name": "DATA",
    "--train-file": "DATA",
    "--validation-file": "--eval-data",
    "--eval-dataset": "--eval-data",
    "--lora-r": "--lora",
    "--lora-rank": "--lora",
    "--use-peft": "--lora",
    "--load-in-4bit": "--quantize",
    "--load-in-8bit": "--quantize",
    "--warmup-ratio": "--warmup",
    "--hub-model-id": "--push-to-hub",
    "--gpu": "--device",
    "--port": "--user-url",
    "--yaml": "--config",
    "--name": "--subset",
    "--num-proc": "--workers",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions with their examples as they are written, and the default of every option."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs as wide as the terminal; those with an indented line (examples) as they are."""
        return "\n\n".join(
            part
            if re.search(r"^ ", part, re.MULTILINE)
            else textwrap.fill(part, width, break_long_words=False, break_on_hyphens=False)
            for part in text.strip().replace("``", "`").split("\n\n")
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        told = default is argparse.SUPPRESS or "Default:" in text or action.required
        if told or not action.option_strings or action.nargs == 0:
            return text
        said = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} Default: {'none' if said in (None, '') else said}.".replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """The options of one command of `fastsdpo`.

    `parse_args` gives the options, and in ``given`` those that differ from their defaults, by the names that
    ``--config`` reads.

    Args:
        command: its name, such as "train".
        description: the text above the options.
        settings: names of settings without a flag, which ``--set`` takes; for suggestions.
    """

    def __init__(self, command: str, description: str | None = None, *, settings: Iterable[str] = (), **more: Any):
        super().__init__(
            prog=f"fastsdpo {command}",
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            add_help=False,
            **more,
        )
        self.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="Show this help and stop.")
        self.command, self.settings = command, sorted(settings)

    def add_config_option(self, group: Any = None) -> None:
        """``--config FILE``."""
        (group or self).add_argument(
            "--config",
            metavar="FILE",
            help="A YAML file with options (their names without dashes in front), such as the run.yaml that a run "
            "leaves in its output folder. An option on the command line wins.",
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        argv = list(sys.argv[1:] if args is None else args)
        self._check_names(argv)
        options, more = self.parse_known_args(self._with_config(argv), namespace)
        if more:
            self.error(f"unexpected argument {more[0]!r}")
        if str(getattr(options, "output", None)) == "":  # a shell's variable that is not set; not the current folder
            self.error("--output must name a file or folder, got an empty text")
        options.given = self._given(options)
        return options

    def format_help(self) -> str:
        required = [action for action in self._actions if action.option_strings and action.required]
        named = [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}" for action in required]
        places = [action for action in self._actions if not action.option_strings]
        texts = [f"{action.metavar or action.dest.upper()}{'...' * (action.nargs == '+')}" for action in places]
        optional = [f"[{text}]" if action.nargs in ("?", "*") else text for action, text in zip(places, texts)]
        self.usage = " ".join(["%(prog)s", *optional, *named, "[options]"])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """One line on standard error, and exit status 2."""
        choice = re.match(r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.*)\)$", message)
        if choice is not None:
            name, got, known = choice.groups()
            choices = [text.strip().strip("'") for text in known.split(",")]
            message = f"{name} must be one of {', '.join(choices)}, got {got!r}{did_you_mean(got, choices)}"
        message = re.sub(r"^argument (.+?): invalid int value: ", r"\1 must be a whole number, got ", message)
        message = re.sub(r"^argument (.+?): invalid float value: ", r"\1 must be a number, got ", message)
        message = re.sub(r"^argument (.+?): expected one argument", r"\1 needs a value", message)
        message = re.sub(r"^argument (.+?): expected at least one argument", r"\1 needs at least one value", message)
        message = re.sub(r"^argument (.+?): ", r"\1: ", message)
        message = message.replace("the following arguments are required:", "missing:")
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def flag_of(self, name: str) -> str | None:
        """The flag that sets a name; None: no option has it."""
        for action in self._actions:
            if action.dest == name and action.help != argparse.SUPPRESS:
                return self._flag(action)
        return f"--set {name}" if name in self.settings else None

    def _flag(self, action: argparse.Action) -> str:
        long = [flag for flag in action.option_strings if flag.startswith("--")]
        return (long or action.option_strings or [str(action.metavar or action.dest)])[0]

    def _check_names(self, argv: list[str]) -> None:
        """Before argparse, which would first ask for what is missing because it is misspelled."""
        for text in argv:
            if text == "--":
                return
            flag = text.split("=", 1)[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                self.error(f"unknown option {flag}{self.suggestion(flag)}")

    def suggestion(self, flag: str) -> str:
        """``"; did you mean ...?"``, or nothing."""
        wanted = "--" + flag.strip("-").replace("_", "-")
        known = {
            text: text
            for text, action in self._option_string_actions.items()
            if text.startswith("--") and action.help != argparse.SUPPRESS
        }
        meant = {f"--{name.replace('_', '-')}": f"--set {name}=..." for name in self.settings}
        meant |= {f"--{action.dest.replace('_', '-')}": self._flag(action) for action in self._actions} | known
        positional = [self._flag(action) for action in self._actions if not action.option_strings]
        for other, ours in ELSEWHERE.items():
            if ours in known:
                meant.setdefault(other, ours)
            elif ours == "DATA" and positional:
                meant.setdefault(other, f"{positional[0]}, without a flag")
        found = meant.get(wanted)
        if found is None:
            longer = [text for text in known if text.startswith(wanted)]
            close = longer or difflib.get_close_matches(wanted, known, n=2, cutoff=0.8)
            close = close or difflib.get_close_matches(wanted, meant, n=1, cutoff=0.7)  # settings without a flag
            found = " or ".join(dict.fromkeys(meant[text] for text in close[:3]))
        return f"; did you mean {found}?" if found else ""

    # ---------------------------------------------------------------------------- the YAML file

    def _with_config(self, argv: list[str]) -> list[str]:
        """The options of the file that --config names, before those of the command line, which win."""
        file = None
        for place, text in enumerate(argv):
            if text == "--config" and place + 1 < len(argv):
                file = argv[place + 1]
            elif text.startswith("--config="):
                file = text.partition("=")[2]
        if file is None or "--config" not in self._option_string_actions:
            return argv
        actions = {self._flag(action).strip("-"): action for action in self._actions if action.option_strings}
        flags = {text.split("=", 1)[0] for text in argv if text.startswith("-")}
        tokens = []
        for key, value in self._read_config(file).items():
            name = str(key).replace("_", "-")
            action = actions.get(name)
            if action is not None and name not in ("config", "help"):
                if not flags & set(action.option_strings):
                    tokens += self._tokens(file, name, action, value)
                continue
            for action in self._actions:
                if not action.option_strings and action.dest == key:
                    action.nargs = "*" if action.nargs in ("+", "*") else "?"
                    action.required, action.default = False, value
                    break
            else:
                self.error(f"{file}: unknown option {key!r}{self.suggestion(f'--{name}')}")
        return [*tokens, *argv]

    def _read_config(self, file: str) -> dict[str, Any]:
        try:
            import yaml
        except ImportError:
            self.error("--config needs the package pyyaml; install it with: pip install pyyaml")
        try:
            content = yaml.safe_load(Path(file).read_text("utf-8-sig"))
        except OSError as error:
            self.error(f"--config: {file}: {(error.strerror or str(error)).lower()}")
        except UnicodeDecodeError as error:
            self.error(f"--config: {file} must be UTF-8 text: {error}")
        except yaml.YAMLError as error:
            self.error(f"--config: {file} is not YAML: {' '.join(str(error).split())}")
        if not isinstance(content, dict):
            self.error(f"--config: {file} must hold lines NAME: VALUE, got {type(content).__name__}")
        return content

    def _tokens(self, file: str, name: str, action: argparse.Action, value: Any) -> list[str]:
        """An option of the file as it would be on the command line."""
        flag = f"--{name}"
        if isinstance(value, dict) and name == "set":
            value = [f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items()]
        if value is None or (value is False and not isinstance(action, argparse.BooleanOptionalAction)):
            return []
        if isinstance(value, bool):
            if action.nargs not in (0, "?"):
                self.error(f"{file}: {name} must have a value, got {str(value).lower()}")
            return [flag if value else f"--no-{name}"]
        if action.nargs == 0:
            self.error(f"{file}: {name} must be true or false, got {value!r}")
        values = [str(item) for item in (value if isinstance(value, list) else [value])]
        if action.nargs in ("+", "*"):
            return [flag, *values]
        if len(values) != 1 and not isinstance(action, argparse._AppendAction):
            self.error(f"{file}: {name} must be one value, got {value!r}")
        return [f"{flag}={item}" for item in values]

    def _given(self, options: argparse.Namespace) -> dict[str, Any]:
        """What differs from the defaults, by the names of a configuration file."""
        given = {}
        for action in self._actions:
            if action.help == argparse.SUPPRESS:
                continue  # another name of an option
            value = getattr(options, action.dest, None)
            name = self._flag(action).strip("-") if action.option_strings else action.dest
            default = None if action.default == argparse.SUPPRESS else action.default
            if (value == default and action.option_strings) or value is None or action.dest == "config":
                continue
            given.setdefault(name, str(value) if isinstance(value, Path) else value)
        return given


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """``"; did you mean 'train'?"``, or nothing."""
    close = difflib.get_close_matches(text, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
