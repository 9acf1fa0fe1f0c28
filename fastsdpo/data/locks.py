"""Lock files that keep two processes from doing the same at once. The system lifts a lock when its process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, wait: bool, taken: str = "") -> Iterator[None]:
    """Holds a lock within the block; the file `path` exists for that time.

    On systems without such locks (Windows, some network disks) no other process is kept out.

    Args:
        wait: wait until another process gives the lock back; else raise.
        taken: the text of the FileExistsError.

    Raises:
        FileExistsError: another process holds the lock, and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = Path(path)
    while True:
        file = open(path, "wb")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            raise FileExistsError(taken) from None
        except OSError:  # a disk without locks
            break
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        file.close()  # the one that had it has just removed the file
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
