"""Folders of checkpoints: found, finished, deleted; and whether there is room for one.

    checkpoint-<step>/    a whole checkpoint; checksums.json holds size and CRC-32 of its files (checksums.py)
    checkpoint.part/      one that is being written or deleted; never read

The name comes last, so a run that is killed leaves whole checkpoints only.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from fastsdpo.trainer.checksums import BLOCK, damage_of, write_checksums
from fastsdpo.trainer.file_rights import open_as_umask

PART = "checkpoint.part"


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns whatever a full or failing disk raises into an OSError that names ``what``."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        raise OSError(f"{what} cannot be written: {error}") from error


def check_output_folder(folder: str | os.PathLike, needed: int) -> None:
    """Finds out now whether a folder can be written to and has room for ``needed`` bytes.

    Raises:
        OSError: it cannot, or has not; the text says which.
    """
    with writing(f"the output folder {folder}"):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(BLOCK))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the output folder {folder} has {free / 1e6:,.0f} MB free, and what will be saved takes "
            f"at least {needed / 1e6:,.0f} MB"
        )


def check_saved_model(folder: str | os.PathLike) -> None:
    """Raises OSError where a folder holds no weights, of a model or of an adapter."""
    if not any(any(Path(folder).glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt")):
        raise OSError(f"the model was not saved: {folder} holds no weights")


def finish_checkpoint(part: Path, place: Path, written: Mapping[str, tuple[int, int]]) -> None:
    """``part`` becomes the checkpoint ``place``, which it replaces.

    Args:
        written: as `write_checksums` takes them.
    """
    open_as_umask(part)
    write_checksums(part, written)
    old = _put_aside(place) if place.exists() else None
    os.replace(part, place)
    if old is not None:  # deleted last: it takes time, and may be the only one
        shutil.rmtree(old)


def delete_checkpoint(place: Path) -> None:
    """Deletes it; a deletion that is interrupted leaves nothing that looks like a checkpoint."""
    shutil.rmtree(_put_aside(place))


def _put_aside(place: Path) -> Path:
    """Where a checkpoint lies from now on, to be deleted."""
    old = place.parent / PART / f"{place.name}.old"
    old.parent.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(place, old)
    return old


def delete_old_checkpoints(folder: Path, keep: int | None, best: str | None) -> None:
    """Deletes all but the newest ``keep`` checkpoints and the ``best``; None keeps all."""
    if keep is None or keep <= 0:
        return
    found = list_checkpoints(folder)
    protected = {place.name for place in found[-1:]} | ({Path(best).name} if best else set())
    spare = [place for place in found if place.name not in protected]
    wanted = max(keep, len(found) - len(spare))
    for place in spare[: max(0, len(found) - wanted)]:
        delete_checkpoint(place)


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The folders ``checkpoint-<step>``, oldest step first."""
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


class FoundCheckpoint(NamedTuple):
    """The newest whole checkpoint, and sentences about the newer ones that are damaged."""

    path: str | None
    damaged: list[str]


def find_checkpoint(places: Iterable[Path], damage: Callable[[Path], str | None] = damage_of) -> FoundCheckpoint:
    """The first checkpoint that is whole."""
    damaged = []
    for place in places:
        problem = damage(place)
        if problem is None:
            return FoundCheckpoint(str(place), damaged)
        damaged.append(f"checkpoint {place} is damaged: {problem}")
    return FoundCheckpoint(None, damaged)
