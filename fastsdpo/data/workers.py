"""Reads pieces of the sources in several processes, and yields what is read in the order of the pieces.

Files of JSON Lines are cut at line ends into pieces of some 1 MB, Hugging Face datasets into the files that they
are stored in; every other source is one piece. The workers take pieces in turn, and each has at most two, so that
memory stays bounded. A worker sends all that it has read except the rows. When their place in the one file of rows is
known, the worker is told it, and writes the rows there.

The workers are programs of their own (worker.py): they need no ``if __name__ == "__main__"`` in a script that
calls `prepare`, and import no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastsdpo.data.json_records import find_lines, split_lines
from fastsdpo.data.loading import MAX_RECORD_BYTES
from fastsdpo.data.merging import LightRecord, RecordKeys
from fastsdpo.data.readers.registry import RecordParser
from fastsdpo.data.reading import Piece, ReadOptions, ReadReport
from fastsdpo.data.sources import JSON_SUFFIXES, may_have_rows, separate_shards
from fastsdpo.data.spool import Batch, Spool

PIECE_BYTES = 1 << 20
PIECES_EACH = 2  # that a worker has, read or not
PIPE_BYTES = 1 << 18  # room for the keys of a piece, so that a worker need not wait until they are read
MOST_WORKERS = 8  # where nobody says how many
LEAST_BYTES = 32 << 20  # less is read before workers have started


def default_workers(items: Iterable[Path | str], parser: RecordParser) -> int:
    """Returns how many workers to use: one for each core if there is enough to cut into pieces, else 1."""
    items = list(items)
    size = sum(item.stat().st_size for item in items if isinstance(item, Path) and _lines_of(item, parser))
    size += LEAST_BYTES * any(isinstance(item, str) for item in items)  # a dataset, which is downloaded as it is read
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        cores = os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if size >= LEAST_BYTES else 1


def _lines_of(item: Path | str, parser: RecordParser) -> tuple[int, int] | None:
    """`find_lines` of a source; None where one process must read it, as where a record is one message only."""
    if not isinstance(item, Path) or item.suffix.lower() not in JSON_SUFFIXES or not item.is_file():
        return None
    lines = find_lines(item, MAX_RECORD_BYTES)
    return None if lines is None or may_have_rows(item, parser, MAX_RECORD_BYTES) else lines


def can_share(items: Sequence[Path | str], parser: RecordParser) -> bool:
    """Whether several processes can read the sources: not where conversations may have rows in two of them."""
    return len(items) == 1 or sum(may_have_rows(item, parser, MAX_RECORD_BYTES) for item in items) < 2


def cut(items: list[Path | str], options: ReadOptions) -> Iterator[Piece]:
    """Cuts sources into pieces, in order."""
    before, parser = 0, options.parser
    for number, item in enumerate(items):
        lines = _lines_of(item, parser)
        shards = separate_shards(item, options.config, options.split, parser) if isinstance(item, str) else 1
        if shards > 1:
            yield from (Piece(item, number, before, shard=shard) for shard in range(shards))
        elif lines is None:
            yield Piece(item, number, before)
        else:
            for part in split_lines(Path(item), *lines, PIECE_BYTES):
                yield Piece(item, number, before, part)
        before += item.stat().st_size if isinstance(item, Path) else 0


class Workers:
    """Worker processes that read. It is a context manager, at whose end they are stopped.

    Raises:
        ChildProcessError (an OSError): a worker has ended by itself; the text says how.
        Whatever `BatchReader` raises for a piece, when that piece's turn comes.
    """

    def __init__(self, count: int, options: ReadOptions, spool: Spool):
        # Keys must be the same in all of them.
        environment = {**os.environ, "PYTHONHASHSEED": str(random.SystemRandom().randrange(1, 1 << 32))}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._size = spool.size
        try:
            for _ in range(count):
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("worker.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    pipesize=PIPE_BYTES,
                    start_new_session=True,
                )
                self._processes.append(process)
                self._send(process, [*sys.path])
                self._send(process, (options, spool.rows))
        except BaseException:
            self._end()
            raise

    def read(self, pieces: Iterable[Piece], report: ReadReport) -> Iterator[Batch]:
        """Yields the batches in the order of the pieces, and adds them to the report.

        The workers write the rows one after another to the spool's file; at the end all rows are there.
        """
        waiting: deque[tuple[subprocess.Popen[bytes], Piece]] = deque()
        for process, piece in zip(itertools.cycle(self._processes), pieces):
            self._send(process, piece)
            waiting.append((process, piece))
            if len(waiting) == PIECES_EACH * len(self._processes):
                yield from self._answers(*waiting.popleft(), report)
        while waiting:
            yield from self._answers(*waiting.popleft(), report)
        for process in self._processes:  # which answer when they have written what they were told to
            self._send(process, [])
            self._receive(process)

    def _answers(self, process: subprocess.Popen[bytes], piece: Piece, report: ReadReport) -> Iterator[Batch]:
        records = report.records
        while isinstance(answer := self._receive(process), tuple):
            batch, of_piece, done = answer
            self._send(process, self._size)
            self._size += sum(batch.sizes)
            report.records, report.bytes_done = records + of_piece, piece.before + done
            yield batch
        report.records = records
        report.add(answer)

    def keys_of_rows(self, path: Path, lists: Iterable[list[LightRecord]]) -> Iterator[RecordKeys]:
        """Does what `spool.keys_of_rows` does, in the workers."""
        waiting: deque[subprocess.Popen[bytes]] = deque()
        for process, records in zip(itertools.cycle(self._processes), lists):
            self._send(process, records)
            waiting.append(process)
            if len(waiting) == len(self._processes):
                yield self._receive(waiting.popleft())
        yield from map(self._receive, waiting)

    def _send(self, process: subprocess.Popen[bytes], value: Any) -> None:
        assert process.stdin is not None
        try:
            pickle.dump(value, process.stdin)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._lost(process) from None

    def _receive(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout is not None
        try:
            answer = pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._lost(process) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _lost(self, process: subprocess.Popen[bytes]) -> ChildProcessError:
        status = process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ChildProcessError(
            f"prepare: a worker {how} (if there was too little memory, give fewer --workers); nothing was written"
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what is buffered has no reader
                    if pipe is not None:
                        pipe.close()
            process.wait()
