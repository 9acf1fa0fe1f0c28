"""The spool: a temporary folder in which `prepare` keeps what it has read, until the output is written.

    rows-*.jsonl    rows of the kept records, in the order in which they are read
    keys.bin        blocks of keys, each of one list of `RecordKeys`
    settings.json   the settings of the run
    lock            a lock file that the run holds

Memory holds some 30 bytes for each record.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from fastsdpo.data.interactions import Conversation, Interaction
from fastsdpo.data.json_codec import decode
from fastsdpo.data.merging import OF_ROWS, LightRecord, Merged, RecordKeys, find_related, merge

KEY_BLOCK = struct.Struct("<BI")  # which list, keys
BLOCK_KEYS = 1 << 13
LISTS = tuple(RecordKeys().keys)
FLUSHED_BYTES = 1 << 24  # at a time
BLOCK_BYTES = 1 << 18  # of rows, that are joined; larger ones leave the cache before they are written
BATCH_BLOCKS, BATCH_RECORDS = 4, 1000  # in a batch; records kept or not
LIGHT_RECORDS = 200  # whose keys are made at a time
_NO_REST, _NOT_LIGHT = (1 << 64) - 1, (1 << 64) - 2  # no keys, which have 61 bits
_LOWEST_BYTE = 0 if sys.byteorder == "little" else array("Q").itemsize - 1

# `keys_of_rows`, in this process or in others
KeyMaker = Callable[[Path, Iterable["list[LightRecord]"]], Iterator[RecordKeys]]


def read_settings(folder: Path) -> object:
    """Reads the settings of the run that left the folder; None if there are none."""
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Batch:
    """Some records and their rows, one after another.

    Args:
        before: how many records were kept before these.

    Attributes:
        sizes: the size of each record's rows in bytes.
        counts: how many rows each record has.
        single: for each record, 1 if it is one interaction out of a conversation.
        keys: the keys of the records, which are numbered within the batch.
    """

    def __init__(self, before: int = 0):
        self._before = before
        self.sizes, self.counts, self.single = array("Q"), array("I"), bytearray()
        self.rests = array("Q")  # of light records
        self.keys = RecordKeys()
        self._blocks: list[bytes] = []
        self._parts: list[bytes] = []  # of the next block
        self._size = self._count = 0  # of these; of all rows

    def add(self, rows: list[bytes], conversation: Conversation, interactions: list[Interaction]) -> None:
        """Adds a record; `rows` are its rows as parts of bytes."""
        self.keys.add(conversation, interactions, len(self), self._count)
        self._add(rows, len(interactions), conversation.single, _NOT_LIGHT)

    def add_light(self, rows: list[bytes], count: int, name: str, messages: list[dict], first: int) -> None:
        """Adds a light record with `count` interactions; see `RecordKeys.add_light`."""
        rest = self.keys.add_light(name, messages, first, len(self))
        self._add(rows, count, False, _NO_REST if rest is None else rest)

    def _add(self, rows: list[bytes], count: int, single: bool, rest: int) -> None:
        size = sum(map(len, rows))
        self.sizes.append(size)
        self.counts.append(count)
        self.single.append(single)
        self.rests.append(rest)
        self._count += count
        self._parts += rows
        self._size += size
        if self._size >= BLOCK_BYTES:
            self._join()

    def _join(self) -> None:
        self._blocks.append(b"".join(self._parts))
        self._parts, self._size = [], 0

    def is_full(self, read: int) -> bool:
        """Whether the batch is full; `read` is how many records were read for it, kept or not."""
        # Where reading may end early, that is looked at when the number of kept records is a power of two.
        kept = self._before + len(self)
        wanted = len(self) and not kept & (kept - 1)
        return bool(wanted) or len(self._blocks) >= BATCH_BLOCKS or not read % BATCH_RECORDS

    def next(self) -> Batch:
        """Returns an empty batch for the records after these."""
        return Batch(self._before + len(self))

    def take_rows(self) -> list[bytes]:
        """Returns the rows in blocks of bytes, and removes them from the batch."""
        self._join()
        blocks, self._blocks = self._blocks, []
        return blocks

    def __len__(self) -> int:
        return len(self.sizes)


class Spool:
    """Keeps rows and their keys on the disk. It is a context manager, at whose end the folder is removed.

    Args:
        in_order: True if the file of rows may become the output as it is. It is then flushed to the disk while
            it is written, so that there is no wait at the end.

    Attributes:
        rows: the path of the file of rows.
        size: the size of all rows added so far, in bytes.
        starts: for each record, the number of its first row; at the end the number of all rows.
        single: for each record, 1 if it is one interaction out of a conversation.

    Raises:
        FileExistsError: another run uses the folder.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: dict, *, in_order: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = _lock(folder)
        for path in folder.glob("rows-*"):  # of a run that was killed
            path.unlink()
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        self._keys = open(folder / "keys.bin", "wb")  # noqa: SIM115
        # No process that a killed run has left writes to this file.
        self.rows, self.size = folder / f"rows-{secrets.token_hex(8)}.jsonl", 0
        self._writer = open(self.rows, "wb")  # noqa: SIM115
        self._reader = open(self.rows, "rb", buffering=0)  # noqa: SIM115
        self._on_its_way = 0 if in_order and hasattr(os, "posix_fadvise") else None  # bytes that the disk gets
        self.starts, self.single = array("Q", [0]), bytearray()
        self._places, self._rests = array("Q", [0]), array("Q")
        self._blocks = {name: (array("Q"), array("Q")) for name in LISTS}

    def __len__(self) -> int:
        """The records."""
        return len(self.single)

    def add(self, batch: Batch) -> None:
        """Adds the next records. Their rows are written, unless a worker has taken them and writes them itself."""
        self._writer.writelines(batch.take_rows())
        self._writer.flush()
        first, first_row = len(self), self.starts[-1]
        self._places.extend([*itertools.accumulate(batch.sizes, initial=self.size)][1:])
        self.starts.extend([*itertools.accumulate(batch.counts, initial=first_row)][1:])
        self.size = self._places[-1]
        self.single += batch.single
        self._rests += batch.rests
        self._add_keys(batch.keys, first, first_row)
        if self._on_its_way is not None and self.size - self._on_its_way >= FLUSHED_BYTES:
            # Says that these bytes are not needed: Linux begins to write those that were changed, and does not wait.
            size = self.size - self._on_its_way
            os.posix_fadvise(self._reader.fileno(), self._on_its_way, size, os.POSIX_FADV_DONTNEED)
            self._on_its_way = self.size

    def _add_keys(self, keys: RecordKeys, first: int, first_row: int) -> None:
        for name, found in keys.keys.items():
            if found:
                block, numbers = self._blocks[name]
                block += found
                start = first_row if name in OF_ROWS else first
                numbers.extend([number + start for number in keys.numbers[name]])
                if len(block) >= BLOCK_KEYS:
                    self._write_block(name)

    def _write_block(self, name: str) -> None:
        block, numbers = self._blocks[name]
        self._keys.write(KEY_BLOCK.pack(LISTS.index(name), len(block)) + block.tobytes() + numbers.tobytes())
        del block[:], numbers[:]

    def _write_blocks(self) -> None:
        for name, (block, _) in self._blocks.items():
            if block:
                self._write_block(name)
        self._keys.flush()

    def _read_keys(self, name: str, part: int, parts: int) -> Iterator[tuple[Iterable[int], Iterable[int]]]:
        """The keys of a part of a list of `RecordKeys`, and their records' or rows' numbers, by block."""
        chosen = bytes(byte % parts == part for byte in range(256))
        with open(self.folder / "keys.bin", "rb") as file:
            while header := file.read(KEY_BLOCK.size):
                which, size = KEY_BLOCK.unpack(header)
                block, numbers = array("Q"), array("Q")
                if LISTS[which] != name:
                    file.seek(size * (block.itemsize + numbers.itemsize), os.SEEK_CUR)
                    continue
                block.fromfile(file, size)
                numbers.fromfile(file, size)
                if parts == 1:
                    yield block, numbers
                else:
                    lowest = block.tobytes()[_LOWEST_BYTE :: block.itemsize].translate(chosen)
                    yield itertools.compress(block, lowest), itertools.compress(numbers, lowest)

    def complete(self, make_keys: KeyMaker) -> None:
        """Makes all keys of those light records (see merging.py) that may be related to others."""
        self._write_blocks()
        related = find_related(self._read_keys, len(self))
        numbers = itertools.compress(range(len(related)), related)
        records = (self._light_record(number) for number in numbers if self._rests[number] != _NOT_LIGHT)
        lists = iter(lambda: [*itertools.islice(records, LIGHT_RECORDS)], [])
        for keys in make_keys(self.rows, lists):
            self._add_keys(keys, 0, 0)

    def _light_record(self, number: int) -> LightRecord:
        """A light record, which then is light no more."""
        rest, self._rests[number] = self._rests[number], _NOT_LIGHT
        rest = None if rest == _NO_REST else rest
        return LightRecord(number, self.starts[number], self._places[number], self._size_of(number), rest)

    def merge(self, *, join: bool = True) -> Merged:
        """Merges the records so far; see `merging.merge` for `join`."""
        self.complete(keys_of_rows)
        self._write_blocks()
        return merge(self._read_keys, self.starts, self.single, join=join)

    def times(self) -> array:
        """Each record's time in microseconds since 1970; empty if no rule asks for times. Call it after `merge`."""
        times = array("Q")
        for found, _ in self._read_keys("times", 0, 1):
            times.extend(found)
        return times

    def read(self, record: int) -> bytes:
        """Reads the rows of the record with this number, as they were written."""
        self._reader.seek(self._places[record])
        return self._reader.read(self._size_of(record))

    def release_rows(self) -> Path:
        """Returns the file of rows for others to take; the spool no longer uses it."""
        self._writer.close()
        self._reader.close()
        return self.rows

    def _size_of(self, record: int) -> int:
        return self._places[record + 1] - self._places[record]

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._writer, self._reader, self._keys, self._lock):
            with contextlib.suppress(OSError):  # what is buffered may have no room on the disk
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def keys_of_rows(path: Path, lists: Iterable[list[LightRecord]]) -> Iterator[RecordKeys]:
    """Makes all keys of light records from the file of rows, one list of records at a time."""
    with open(path, "rb") as file:
        for records in lists:
            keys = RecordKeys()
            for record in records:
                file.seek(record.place)
                rows = file.read(record.size)
                keys.add_all(record, decode(rows[rows.rfind(b"\n", 0, -1) + 1 :]))
            yield keys


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
