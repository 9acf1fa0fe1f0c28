"""What can be said about files before torch is imported, and before a model is loaded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fastsdpo.data import HindsightTemplate, load_interactions


def check_folder(folder: str, allowed: bool) -> None:
    """Raises ValueError where nothing can be written there, or the folder holds a run and that is not ``allowed``."""
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--output must be a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output: nothing may be written in {there}")
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
    if data.is_dir():
        return None
    beside = data.with_name(f"{data.stem}.eval{data.suffix}")
    return str(beside) if beside.is_file() else None
