"""Files that keep two processes from doing the same at once; the system lifts a lock when its process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, wait: bool, taken: str = "") -> Iterator[None]:
    """Holds the lock file `path`, which is there as long.

    Where the system has no such locks (Windows, some network disks) nothing is kept out.

    Args:
        wait: until another process gives it back.
        taken: what `FileExistsError` says where another has it, and that is not waited for.
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
