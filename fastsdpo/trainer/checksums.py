"""Sizes and CRC-32 of a checkpoint's files: noted while they are written, compared when a run goes on.

What writes large files is `torch.save` (optimizers, DeepSpeed's engine), safetensors' `save_file` (weights) and
torch's distributed checkpoint (FSDP2's shards). `Recorder` stands between them and the disk, in each process for the
files that it writes, so that no file of gigabytes is read back after it was written.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from fastsdpo.trainer.place import PLACE_FILE

CHECKSUMS = "checksums.json"
BLOCK = 1 << 20
# Modules that have safetensors' function under a name of their own.
SAVE_FILE = (
    ("safetensors.torch", "save_file"),
    ("transformers.modeling_utils", "safe_save_file"),
    ("peft.peft_model", "safe_save_file"),
)
Sums = dict[str, tuple[int, int]]


class SummedFile(io.BufferedWriter):
    """A file that is written from front to back; its size and CRC-32 go to `sums` under its path when it is closed."""

    def __init__(self, path: str | os.PathLike, sums: Sums):
        super().__init__(io.FileIO(path, "wb"), BLOCK)
        self._place, self._sums = os.path.abspath(path), sums
        self._size = self._crc = 0
        self._straight = True

    def write(self, data: Any) -> int:
        self._crc = zlib.crc32(data, self._crc)
        self._size += memoryview(data).nbytes
        return super().write(data)

    def seek(self, *arguments: Any) -> int:
        self._straight = False  # then it is read back
        return super().seek(*arguments)

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._straight:
                self._sums[self._place] = self._size, self._crc


class Recorder:
    """Notes what this process writes while `recording`.

    Args:
        groups: of processes on the CPU, that nothing else uses: torch's distributed checkpoint then writes in
            threads, from copies of the weights, and `recording` ends before the files are whole. Without one it
            does not; of each there is one thread at a time.

    Attributes:
        sums: by absolute path, bytes and CRC-32.
    """

    def __init__(self, groups: Sequence[Any] = ()):
        self.groups = groups
        self.sums: Sums = {}
        self._writing: list[Future] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module, name in SAVE_FILE:
                if module in sys.modules:
                    stack.enter_context(_replaced(importlib.import_module(module), name, self._save_file))
            stack.enter_context(_replaced(torch, "save", self._save))
            if torch.distributed.is_available():
                checkpoint = importlib.import_module("torch.distributed.checkpoint")
                stack.enter_context(_replaced(checkpoint, "save", self._save_shards))
            yield

    @property
    def done(self) -> bool:
        """Whether all files are whole."""
        return all(future.done() for future in self._writing)

    def wait(self) -> None:
        """Until all files are whole.

        Raises:
            OSError: one cannot be written.
        """
        while self._writing:
            with _os_error():
                self._writing.pop(0).result()

    def _save(self, original: Callable, obj: Any, f: Any, *args: Any, **options: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            return original(obj, f, *args, **options)
        with SummedFile(f, self.sums) as file:
            return original(obj, file, *args, **options)

    def _save_file(self, original: Callable, tensors: dict[str, Tensor], filename: Any, *args: Any, **options: Any):
        original(tensors, filename, *args, **options)
        self.sums[os.path.abspath(filename)] = _sum_safetensors(tensors, filename)

    def _save_shards(self, original: Callable, *args: Any, storage_writer: Any = None, **options: Any) -> Any:
        files = getattr(storage_writer, "fs", None)
        if files is not None:

            @contextmanager
            def create_stream(path: Any, mode: str) -> Iterator[Any]:
                with SummedFile(path, self.sums) if mode == "wb" else open(path, mode) as file:
                    yield file

            files.create_stream = create_stream
        with _os_error():
            if not self.groups:
                return original(*args, storage_writer=storage_writer, **options)
            from torch.distributed.checkpoint import async_save

            number = len(self._writing)
            if number >= len(self.groups):
                self._writing[number - len(self.groups)].result()
            group = self.groups[number % len(self.groups)]
            found: Any = async_save(*args, storage_writer=storage_writer, process_group=group, **options)
            self._writing.append(found)


@contextmanager
def _os_error() -> Iterator[None]:
    """What torch's distributed checkpoint raises in all processes is no `Exception`."""
    if not torch.distributed.is_available():
        yield
        return
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        told = "; ".join(f"process {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise OSError(told) from error


@contextmanager
def _replaced(module: Any, name: str, by: Callable) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, lambda *args, **options: by(original, *args, **options))
    try:
        yield
    finally:
        setattr(module, name, original)


def _sum_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> tuple[int, int]:
    """``(bytes, CRC-32)`` of a file that holds these tensors, of which its header alone is read."""
    with open(path, "rb") as file:
        start = file.read(8)
        start += file.read(int.from_bytes(start, "little"))
    header = json.loads(start[8:])
    header.pop("__metadata__", None)
    size, crc = len(start), zlib.crc32(start)
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy()
        size, crc = size + data.nbytes, zlib.crc32(data, crc)
    return size, crc


def write_checksums(folder: Path, known: Mapping[str, tuple[int, int]]) -> None:
    """Writes `CHECKSUMS` of all files of a folder, which are on the disk afterwards.

    Args:
        known: by path in the folder, bytes and CRC-32 of what was written; other files are read.

    Raises:
        OSError: a file has another size than what was written to it.
    """
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in known:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
            size, crc = known[name]
            if path.stat().st_size != size:
                raise OSError(f"{path} has {path.stat().st_size:,} bytes, and {size:,} were written")
        else:
            size, crc = sum_file(path, sync=True)
        sums[name] = {"bytes": size, "crc32": crc}
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sum_file(path: Path, sync: bool = False) -> tuple[int, int]:
    """``(bytes, CRC-32)`` of a file, which is on the disk afterwards where ``sync``."""
    size = crc = 0
    with open(path, "r+b" if sync else "rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
        if sync:
            os.fsync(file.fileno())
    return size, crc


def damage_of(checkpoint: str | os.PathLike, process: int = 0, processes: int = 1) -> str | None:
    """What differs from the checkpoint's checksums; None: nothing, or it has none to compare with.

    Reads every byte of it, or with several processes this one's share of the files.
    """
    place = Path(checkpoint)
    try:
        sums = json.loads((place / CHECKSUMS).read_text("utf-8"))
        wanted = {name: (int(row["bytes"]), int(row["crc32"])) for name, row in sums.items()}
    except FileNotFoundError:
        # Written by another trainer, or by an older version of this one; or a copy that was not finished.
        if (place / PLACE_FILE).exists():
            return f"{CHECKSUMS} is missing"
        return None if (place / TRAINER_STATE_NAME).exists() else f"{TRAINER_STATE_NAME} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    by_size = sorted(wanted, key=lambda name: (-wanted[name][0], name))
    for name in by_size[process::processes]:
        size, crc = wanted[name]
        path = place / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        try:
            if sum_file(path)[1] != crc:
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None
