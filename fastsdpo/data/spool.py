"""The folder in which `prepare` keeps what it has read, until the output is written.

    rows-*.jsonl    rows of the kept records, a file for each process that reads
    keys.bin        blocks of keys, each of one list of `RecordKeys`
    settings.json   of the run
    lock            held by the run

In memory stay some 30 bytes for each record.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from fastsdpo.data.merging import MANY_EACH, ONE_EACH, Merged, RecordKeys, merge

KEY_BLOCK = struct.Struct("<BI")  # which list, keys
BLOCK_KEYS = 1 << 13
KEY_LISTS = (*ONE_EACH, *MANY_EACH)
_LOWEST_BYTE = 0 if sys.byteorder == "little" else array("Q").itemsize - 1


def read_settings(folder: Path) -> object:
    """The settings of the run that left the folder; None where there is none."""
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Batch:
    """Records of which the rows were written to a file: one after another, without a gap.

    Attributes:
        sizes: bytes of each record's rows.
        counts: how many they are.
        single: of each record, 1 where it is one interaction out of a conversation.
        keys: of the records.
    """

    def __init__(self):
        self.sizes, self.counts, self.single = array("Q"), array("I"), bytearray()
        self.keys = RecordKeys()

    def add(self, size: int, count: int, single: bool) -> None:
        """A record, whose keys are there already."""
        self.sizes.append(size)
        self.counts.append(count)
        self.single.append(single)

    def __len__(self) -> int:
        return len(self.sizes)


class Spool:
    """Kept rows and their keys. A context manager: the folder is removed at its end.

    Attributes:
        starts: of each record, the number of its first row; at the end the number of all rows.
        single: of each record, 1 where it is one interaction out of a conversation.

    Raises:
        FileExistsError: another run uses the folder.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = _lock(folder)
        for path in folder.glob("rows-*"):  # of a run that was killed
            path.unlink()
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        self._keys = open(folder / "keys.bin", "wb")  # noqa: SIM115
        self._files: list[IO[bytes]] = []  # of rows, opened to be read
        self._ends: list[int] = []  # of what is known of each
        self._name = secrets.token_hex(8)  # no process that a killed run has left writes to its files
        self.starts, self.single = array("Q", [0]), bytearray()
        self._places, self._sizes, self._of_file = array("Q"), array("Q"), array("H")
        self._blocks = {name: array("Q") for name in KEY_LISTS}
        self._numbers = {name: array("I") for name in MANY_EACH}  # of each key's record

    def __len__(self) -> int:
        """The records."""
        return len(self.single)

    def add_file(self) -> Path:
        """A new empty file for rows. The batches of the n-th one are added as those of file n."""
        path = self.folder / f"rows-{self._name}-{len(self._files)}.jsonl"
        path.touch()
        self._files.append(open(path, "rb", buffering=0))  # noqa: SIM115
        self._ends.append(0)
        return path

    def add(self, batch: Batch, file: int = 0) -> None:
        """The next records of a file, whose rows are in it; they follow all that were added before."""
        first = len(self)
        *places, self._ends[file] = itertools.accumulate(batch.sizes, initial=self._ends[file])
        self._places.extend(places)
        self._sizes.extend(batch.sizes)
        self._of_file.extend([file] * len(batch))
        self.single += batch.single
        self.starts.extend([*itertools.accumulate(batch.counts, initial=self.starts[-1])][1:])
        for name, block in self._blocks.items():
            block.extend(getattr(batch.keys, name))
            if name in MANY_EACH:
                numbers = map(itertools.repeat, itertools.count(first), batch.keys.counts[name])
                self._numbers[name].extend(itertools.chain.from_iterable(numbers))
            if len(block) >= BLOCK_KEYS:
                self._write_block(name)

    def _write_block(self, name: str) -> None:
        block, numbers = self._blocks[name], self._numbers.get(name, array("I"))
        header = KEY_BLOCK.pack(KEY_LISTS.index(name), len(block))
        self._keys.write(header + block.tobytes() + numbers.tobytes())
        del block[:], numbers[:]

    def _read_keys(self, name: str, part: int, parts: int) -> Iterator[tuple[Iterable[int], Iterable[int]]]:
        """The keys of a part of a list of `RecordKeys`, and their records' or rows' numbers, by block."""
        first, chosen = 0, bytes(byte % parts == part for byte in range(256))
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
                numbered = numbers if many else range(first, first + size)
                first += size
                if parts == 1:
                    yield block, numbered
                else:
                    lowest = block.tobytes()[_LOWEST_BYTE :: block.itemsize].translate(chosen)
                    yield itertools.compress(block, lowest), itertools.compress(numbered, lowest)

    def merge(self, *, join: bool = True) -> Merged:
        """The records so far, merged; see `merging.merge` for `join`."""
        for name, block in self._blocks.items():
            if block:
                self._write_block(name)
        self._keys.flush()
        return merge(self._read_keys, self.starts, self.single, join=join)

    def times(self) -> array:
        """Of each record its time in microseconds since 1970; empty where no rule asked for times. After `merge`."""
        times = array("Q")
        for found, _ in self._read_keys("times", 0, 1):
            times.extend(found)
        return times

    def read(self, record: int) -> bytes:
        """The rows of a record, as they were written."""
        file = self._files[self._of_file[record]]
        file.seek(self._places[record])
        return file.read(self._sizes[record])

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self._files, self._keys, self._lock):
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
