"""Who may read the files that a run has saved."""

from __future__ import annotations

import os
from pathlib import Path


def open_as_umask(folder: str | os.PathLike) -> None:
    """Gives files that only their owner can read, as safetensors writes them, the rights of any new file."""
    mode = _mode_of_new_files(folder)
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 == 0o600 != mode:
            path.chmod(mode)


def _mode_of_new_files(folder: str | os.PathLike) -> int:
    """By a file without a name: one with a name would stay where the process is killed."""
    try:
        new = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # another system, or file system
        mask = os.umask(0o077)
        os.umask(mask)
        return 0o666 & ~mask
    try:
        return os.fstat(new).st_mode & 0o777
    finally:
        os.close(new)
