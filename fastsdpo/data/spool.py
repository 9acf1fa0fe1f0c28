"""The folder in which `prepare` keeps what it has read, until the output is written.

    spool.jsonl     rows of the kept records, in the order they were read
    keys.bin        blocks of keys, each of one list of `RecordKeys`
    settings.json   of the run
    lock            held by the run

In memory stay some 20 bytes for each record.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastsdpo.data.merging import MANY_EACH, ONE_EACH, Merged, RecordKeys, merge

KEY_BLOCK = struct.Struct("<BI")  # which list, keys
BLOCK_KEYS = 1 << 13
KEY_LISTS = (*ONE_EACH, *MANY_EACH)


def read_settings(folder: Path) -> object:
    """The settings of the run that left the folder; None where there is none."""
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Spool:
    """Kept rows and their keys. A context manager: the folder is removed at its end.

    Attributes:
        offsets: of each record, the place of its rows in the file.
        starts: of each record, the number of its first row.
        single: of each record, 1 where it is one interaction out of a conversation.

    Raises:
        FileExistsError: another run uses the folder.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = _lock(folder)
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        self._rows = open(folder / "spool.jsonl", "w+b")  # noqa: SIM115
        self._keys = open(folder / "keys.bin", "wb")  # noqa: SIM115
        self.offsets, self.starts, self.single = array("Q"), array("Q"), bytearray()
        self.size, self.rows = 0, 0
        self._blocks = {name: array("Q") for name in KEY_LISTS}
        self._numbers = {name: array("I") for name in MANY_EACH}  # of each key's record

    def add(self, rows: list[bytes], keys: RecordKeys, single: bool) -> None:
        """The rows of one record, and their keys."""
        data = b"".join(rows)
        self._rows.write(data)
        for name, block in self._blocks.items():
            block.extend(getattr(keys, name))
            if name in MANY_EACH:
                numbers = self._numbers[name]
                numbers.extend([len(self.offsets)] * (len(block) - len(numbers)))
            if len(block) >= BLOCK_KEYS:
                self._write_block(name)
        self.offsets.append(self.size)
        self.starts.append(self.rows)
        self.single.append(single)
        self.size += len(data)
        self.rows += len(rows)

    def _write_block(self, name: str) -> None:
        block, numbers = self._blocks[name], self._numbers.get(name, array("I"))
        header = KEY_BLOCK.pack(KEY_LISTS.index(name), len(block))
        self._keys.write(header + block.tobytes() + numbers.tobytes())
        del block[:], numbers[:]

    def _read_keys(self, name: str, part: int, parts: int) -> Iterator[tuple[int, int]]:
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

    def merge(self, *, join: bool = True) -> Merged:
        """The records so far, merged; see `merging.merge` for `join`."""
        for name, block in self._blocks.items():
            if block:
                self._write_block(name)
        self._keys.flush()
        return merge(self._read_keys, self.starts, self.single, self.rows, join=join)

    def times(self) -> array:
        """Of each record its time in microseconds since 1970; empty where no rule asked for times. After `merge`."""
        return array("Q", (time for time, _ in self._read_keys("times", 0, 1)))

    def read(self, record: int) -> bytes:
        """The rows of a record, as they were added."""
        after = record + 1
        end = self.offsets[after] if after < len(self.offsets) else self.size
        self._rows.seek(self.offsets[record])
        return self._rows.read(end - self.offsets[record])

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._rows, self._keys, self._lock):
            with contextlib.suppress(OSError):  # what is buffered may have no room on the disk
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _lock(folder: Path) -> IO[bytes]:
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
