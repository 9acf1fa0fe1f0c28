"""What `prepare` writes while it reads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsdpo.data.merging import MANY_EACH, ONE_EACH, Merged, RecordKeys, merge
from fastsdpo.data.records import DamagedRecord, LoadReport

INDEX_ENTRY = struct.Struct("<QI?")
KEY_BLOCK = struct.Struct("<BI")  # which list, keys
BLOCK_KEYS = 1 << 13
KEY_LISTS = (*ONE_EACH, *MANY_EACH)


def read_state(partial: Path, settings: dict) -> dict | None:
    """The state of an interrupted run with these settings, or None."""
    try:
        state = json.loads((partial / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(state, dict) or state.get("settings") != settings:
        return None
    for name, size in state["sizes"].items():
        path = partial / name
        if not path.exists() or path.stat().st_size < size:
            return None
    return state


class Spool:
    """The partial folder: kept rows, their index and keys, and the state. A context manager; locks it."""

    def __init__(self, partial: Path, state: dict | None):
        partial.mkdir(parents=True, exist_ok=True)
        self.folder = partial
        self._lock = _lock(partial)
        self.dropped: Counter = Counter(state["dropped"] if state else {})
        self.left_out: Counter = Counter(state["left_out"] if state else {})
        self.report: dict = state["report"] if state else {}
        self.complete: bool = state["complete"] if state else False
        self.offsets, self.starts, self.single = array("Q"), array("Q"), bytearray()
        self.rows, self.looked_at, self.enough = 0, 0, False
        if state is None:
            (partial / "state.json").unlink(missing_ok=True)
        names = ("spool.jsonl", "index.bin", "keys.bin")
        sizes = state["sizes"] if state else {}
        self._files = {name: _open_cut(partial / name, sizes.get(name, 0)) for name in names}
        self._blocks = {name: array("Q") for name in KEY_LISTS}
        self._numbers = {name: array("I") for name in MANY_EACH}  # of each key's record
        self._files["index.bin"].seek(0)
        for offset, count, single in INDEX_ENTRY.iter_unpack(self._files["index.bin"].read()):
            self._index(offset, count, single)
        self.size = self._files["spool.jsonl"].seek(0, os.SEEK_END)

    def _index(self, offset: int, count: int, single: bool) -> None:
        self.offsets.append(offset)
        self.starts.append(self.rows)
        self.single.append(single)
        self.rows += count

    def add(self, rows: list[bytes], keys: RecordKeys, single: bool) -> None:
        """The rows of one record, and their keys."""
        data = b"".join(rows)
        self._files["spool.jsonl"].write(data)
        self._files["index.bin"].write(INDEX_ENTRY.pack(self.size, len(rows), single))
        for name, block in self._blocks.items():
            block.extend(getattr(keys, name))
            if name in MANY_EACH:
                numbers = self._numbers[name]
                numbers.extend([len(self.offsets)] * (len(block) - len(numbers)))
            if len(block) >= BLOCK_KEYS:
                self._write_block(name)
        self._index(self.size, len(rows), single)
        self.size += len(data)

    def _write_block(self, name: str) -> None:
        block, numbers = self._blocks[name], self._numbers.get(name, array("I"))
        header = KEY_BLOCK.pack(KEY_LISTS.index(name), len(block))
        self._files["keys.bin"].write(header + block.tobytes() + numbers.tobytes())
        del block[:], numbers[:]

    def _keys(self, name: str, part: int, parts: int) -> Iterator[tuple[int, int]]:
        """The keys of a list of `RecordKeys` with this remainder, and their records' or rows' numbers."""
        first = 0
        with open(self.folder / "keys.bin", "rb") as file:
            while header := file.read(KEY_BLOCK.size):
                which, size = KEY_BLOCK.unpack(header)
                many = KEY_LISTS[which] in MANY_EACH
                block, numbers = array("Q"), array("I")
                if KEY_LISTS[which] != name:
                    skipped = block.itemsize + (numbers.itemsize if many else 0)
                    file.seek(size * skipped, os.SEEK_CUR)
                    continue
                block.fromfile(file, size)
                if many:
                    numbers.fromfile(file, size)
                numbered = zip(block, numbers if many else range(first, first + size))
                first += size
                yield from [item for item in numbered if item[0] % parts == part]

    def _flush(self) -> None:
        for name, block in self._blocks.items():
            if block:
                self._write_block(name)
        for file in self._files.values():
            file.flush()

    def merge(self) -> Merged:
        """The records so far, merged."""
        self._flush()
        return merge(self._keys, self.starts, self.single, self.rows)

    def save(self, settings: dict, report: LoadReport) -> None:
        self._flush()
        sizes = {}
        for name, file in self._files.items():
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        state = {
            "settings": settings,
            "complete": self.complete,
            "sizes": sizes,
            "dropped": self.dropped,
            "left_out": self.left_out,
            "report": vars(report),
        }
        with atomic_file(self.folder / "state.json") as file:
            file.write(json.dumps(state).encode())

    def read(self, record: int) -> bytes:
        """The rows of a record, as they were added."""
        after = record + 1
        end = self.offsets[after] if after < len(self.offsets) else self.size
        self._files["spool.jsonl"].seek(self.offsets[record])
        return self._files["spool.jsonl"].read(end - self.offsets[record])

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        # Buffered rows that cannot be written (the disk is full) are not lost: resuming reads again.
        for file in (*self._files.values(), self._lock):
            with contextlib.suppress(OSError):
                file.close()
        if kind is DamagedRecord:  # the sources have to change before this can go on
            shutil.rmtree(self.folder, ignore_errors=True)


def _open_cut(path: Path, size: int) -> Any:
    """Opens for reading and writing at the end, cut to `size` bytes."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    file.truncate(size)
    file.seek(0, os.SEEK_END)
    return file


def _lock(folder: Path) -> Any:
    """Keeps a second run away from the folder; the system lifts it when the process ends."""
    file = open(folder / "lock", "wb")  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # not on Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise FileExistsError(f"prepare: another run is writing to {folder}") from None
    return file


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Any]:
    """A file that appears at `path` whole and on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # folders cannot be opened on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
