"""What can be said about files before torch is imported, and before a model is loaded."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from fastsdpo.data import HindsightTemplate, load_interactions


def check_folder(folder: str, allowed: bool) -> None:
    """Raises ValueError where nothing can be written there, or the folder holds a run and that is not ``allowed``."""
    _check_writable(Path(folder))
    used = Path(folder, "report.json").exists() or any(Path(folder).glob("checkpoint-*"))
    if used and not allowed:
        raise ValueError(f"{folder} holds a run; pass --resume to go on with it, or --overwrite")


def check_resume(resume: str | bool | None) -> None:
    """Raises ValueError where ``--resume`` names a checkpoint that is not there."""
    if isinstance(resume, str) and not Path(resume, "trainer_state.json").is_file():
        raise ValueError(f"--resume must name a checkpoint's folder, such as RUN/checkpoint-100, got {resume!r}")


def check_file(file: str | Path | None, source: str | Path | None, flag: str = "--output") -> None:
    """Raises ValueError where no file can be written there, or it is the one that is read."""
    if file is None:
        return
    if Path(file).is_dir():
        raise ValueError(f"{flag} must be a file, but {file} is a folder")
    if source is not None and Path(file).resolve() == Path(source).resolve():
        raise ValueError(f"{flag} must be another file than what is read, got {file} for both")
    _check_writable(Path(file).absolute().parent, flag)


def _check_writable(folder: Path, flag: str = "--output") -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{flag} must be a folder, but {there} is a file")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"{flag}: nothing can be written in {there}: {error.strerror}") from error


def check_data(data: str | list[str], held_out: str | None, *, stream: bool = False) -> None:
    """Reads the first interaction of each source, but of what can be read once only.

    Args:
        stream: the first process alone reads ``data``, which may be ``-``.

    Raises:
        OSError, TypeError, ValueError: there is none, with file and line.
    """
    files = data if isinstance(data, list) else [data]
    if not stream and "-" in files:
        raise ValueError("- (standard input) needs --stream")
    if stream and "-" in files and len(files) > 1:
        raise ValueError("- (standard input) must be given alone")
    if stream and int(os.environ.get("RANK", 0)):
        files = []
    for file in [*files, *([] if held_out is None else [held_out])]:
        if file != "-" and not Path(file).is_fifo():
            next(load_interactions(file), None)


def check_template(options: argparse.Namespace) -> None:
    """Raises ValueError where --template is given and is none."""
    if getattr(options, "template", None) is not None:
        HindsightTemplate.parse(options.template)


def held_out(options: argparse.Namespace) -> str | None:
    """The held-out file: as given, or where `fastsdpo prepare --eval-fraction` puts it beside one file."""
    if options.eval_data is not None:
        return options.eval_data
    if isinstance(options.data, list):
        return None
    data = Path(options.data)
    if data.is_dir():
        return None
    beside = data.with_name(f"{data.stem}.eval{data.suffix}")
    return str(beside) if beside.is_file() else None
