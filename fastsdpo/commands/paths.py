"""What can be said about files before torch is imported, and before a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastsdpo.data import HindsightTemplate, load_interactions


def check_folder(folder: str, allowed: bool) -> None:
    """Raises ValueError where a folder holds a run already and that is not ``allowed``."""
    used = Path(folder, "report.json").exists() or any(Path(folder).glob("checkpoint-*"))
    if used and not allowed:
        raise ValueError(f"{folder} holds a run; pass --resume to go on with it, or --overwrite")


def check_data(*files: str | None) -> None:
    """Reads the first interaction of each file.

    Raises:
        OSError, TypeError, ValueError: there is none, with file and line.
    """
    for file in files:
        if file is not None and not Path(file).is_fifo():  # that can be read once only
            next(load_interactions(file), None)


def check_template(options: argparse.Namespace) -> None:
    """Raises ValueError where --template is given and is none."""
    if getattr(options, "template", None) is not None:
        HindsightTemplate.parse(options.template)


def held_out(options: argparse.Namespace) -> str | None:
    """The held-out file: as given, or where `fastsdpo prepare --eval-fraction` puts it."""
    if options.eval_data is not None:
        return options.eval_data
    data = Path(options.data)
    beside = data.with_name(f"{data.stem}.eval{data.suffix}")
    return str(beside) if beside.is_file() else None
