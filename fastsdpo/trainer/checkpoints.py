"""Checkpoints that are whole: written aside, summed up, renamed; and found again when a run goes on.

    checkpoint-<step>/    a whole checkpoint; checksums.json holds size and CRC-32 of its files
    checkpoint.part/      one that is being written or deleted; never read

A checkpoint gets its name once everything in it is on the disk, so a run that is killed leaves whole
ones only. The checksums tell what a disk, a copy or a person changed afterwards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

CHECKSUMS = "checksums.json"
PART = "checkpoint.part"
BLOCK = 1 << 20


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


def finish_checkpoint(part: Path, place: Path) -> None:
    """``part`` becomes the checkpoint ``place``, which it replaces."""
    sums = {}
    for path in sorted(path for path in part.rglob("*") if path.is_file()):
        size, crc = _sum(path, sync=True)
        sums[path.relative_to(part).as_posix()] = {"bytes": size, "crc32": crc}
    with open(part / CHECKSUMS, "w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if place.exists():
        delete_checkpoint(place)
    os.replace(part, place)


def delete_checkpoint(place: Path) -> None:
    """Deletes it; a deletion that is interrupted leaves nothing that looks like a checkpoint."""
    old = place.parent / PART / f"{place.name}.old"
    old.parent.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(place, old)
    shutil.rmtree(old)


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


def damage_of(checkpoint: str | os.PathLike) -> str | None:
    """What differs from the checkpoint's checksums; None: nothing, or it has none to compare with.

    Reads every byte of it.
    """
    place = Path(checkpoint)
    try:
        sums = json.loads((place / CHECKSUMS).read_text("utf-8"))
        wanted = {name: (int(row["bytes"]), int(row["crc32"])) for name, row in sums.items()}
    except FileNotFoundError:
        return None  # written by another trainer, or by an older version of this one
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    for name, (size, crc) in wanted.items():
        path = place / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        try:
            if _sum(path)[1] != crc:
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


class FoundCheckpoint(NamedTuple):
    """The newest whole checkpoint, and sentences about the newer ones that are damaged."""

    path: str | None
    damaged: list[str]


def find_checkpoint(folder: str | os.PathLike) -> FoundCheckpoint:
    """The newest checkpoint of a run that is whole."""
    damaged = []
    for place in reversed(list_checkpoints(folder)):
        problem = damage_of(place)
        if problem is None:
            return FoundCheckpoint(str(place), damaged)
        damaged.append(f"checkpoint {place} is damaged: {problem}")
    return FoundCheckpoint(None, damaged)


def _sum(path: Path, sync: bool = False) -> tuple[int, int]:
    """``(bytes, CRC-32)`` of a file, which is on the disk afterwards where ``sync``."""
    size = crc = 0
    with open(path, "r+b" if sync else "rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
        if sync:
            os.fsync(file.fileno())
    return size, crc
