"""``fastsdpo demo-data``: a small file of conversations in which users correct the answers."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from fastsdpo.commands.options import add_quiet_option
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.running import DONE, run_command
from fastsdpo.data.output import atomic_file

NAME = "conversations.jsonl"


def build_parser() -> Parser:
    parser = Parser("demo-data", "Writes 40 short conversations, made up for this package, to try the commands with.")
    parser.add_argument("output", nargs="?", default=NAME, metavar="FILE", help=f"The file to write. Default: {NAME}.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a file that exists.")
    add_quiet_option(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 done, 1 the file exists or cannot be written."""
    parser = build_parser()
    return run_command(parser, write, parser.parse_args(argv))


def write(options: argparse.Namespace) -> int:
    text = files("fastsdpo.data").joinpath("demo.jsonl").read_text("utf-8")
    path = Path(options.output)
    if path.exists() and not options.overwrite and path.read_bytes() != text.encode():
        raise FileExistsError(f"{path} exists and holds something else; pass overwrite=True to replace it")
    with atomic_file(path) as file:
        file.write(text.encode())
    if not options.quiet:
        print(f"{len(text.splitlines())} conversations -> {path}")
    return DONE
