"""Reads records from text that is not JSON: tables (CSV, TSV) and vLLM's request log, one at a time."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fastsdpo.data.records import Entry, Problem, why_no_text
from fastsdpo.lazy import needed

TABLE_SUFFIXES = (".csv", ".tsv")
DELIMITERS = (",", ";", "\t", "|")


def table_records(path: Path, progress: Callable[[int], None], max_record_bytes: int) -> Iterator[Entry]:
    """Yields the rows of a table as ``{column: text}``; its first row names the columns.

    Args:
        progress: called with the number of bytes of the file that are read.
        max_record_bytes: a longer cell is a problem.
    """
    with open(path, "rb") as file:
        try:
            # The limit is the process's: only ever raised.
            csv.field_size_limit(max(csv.field_size_limit(), max_record_bytes))
            text = _text(file, path)
            lines = _Lines(text)
            if (why := why_no_text(lines.first or "")) is not None:
                yield Entry(str(path), None, Problem("damaged file", why, records=0))
                return
            reader = csv.reader(lines, delimiter=_delimiter(path, lines))
            header = next(reader, [])
            if not any(header):
                yield Entry(str(path), None, Problem("damaged file", "the file is empty", records=0))
                return
            if len(set(header)) != len(header):
                yield Entry(str(path), None, Problem("damaged file", "two columns have one name", records=0))
                return
            yield from _rows(reader, header, path, lambda: progress(file.tell()))
        except (OSError, EOFError, zlib.error, *_zstd_errors()) as error:
            yield Entry(
                str(path), None, Problem("damaged file", f"the compressed data is damaged: {error}", records=0)
            )


def _rows(reader: Any, header: list[str], path: Path, report: Callable[[], None]) -> Iterator[Entry]:
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Entry(where, None, Problem("not CSV", f"not CSV: {error}"))
            continue
        if row is None:
            return
        report()
        if not row:
            continue
        if len(row) != len(header):
            text = f"the row has {len(row)} cells, the first one {len(header)}"
            yield Entry(where, None, Problem("not CSV", text))
            continue
        try:
            "".join(row).encode()
        except UnicodeEncodeError:
            yield Entry(where, None, Problem("invalid UTF-8", "invalid UTF-8; save the file as UTF-8"))
            continue
        yield Entry(where, dict(zip(header, row)))


class _Lines:
    """Lines of a text, the first of which can be seen before it is taken."""

    def __init__(self, text: IO[str]):
        self._text = text
        self.first: str | None = text.readline()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, self.first = (self._text.readline() if self.first is None else self.first), None
        if not line:
            raise StopIteration
        return line


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _delimiter(path: Path, lines: _Lines) -> str:
    if ".tsv" in map(str.lower, path.suffixes):
        return "\t"
    first = lines.first or ""
    return max(DELIMITERS, key=first.count)


def _text(file: IO[bytes], path: Path) -> IO[str]:
    """The text of a file, decompressed; bytes that are not UTF-8 are kept as lone surrogates."""
    stream: Any = file
    if path.suffix.lower() == ".gz":
        stream = gzip.GzipFile(fileobj=file)
    elif path.suffix.lower() == ".zst":
        with needed("zstandard", path):
            import zstandard
        stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")


# vLLM writes the prompt as Python's repr, on one line. https://docs.vllm.ai (--enable-log-requests)
_REQUEST = re.compile(
    r"(?:Received request|Request) (\S+?)(?: details)?: prompt: ('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
)
_PEEK_BYTES = 1 << 18


def is_vllm_log(path: Path) -> bool:
    """Whether a text file is a log in which vLLM wrote requests."""
    if path.suffix not in (".log", ".txt", "") or not path.is_file():  # of a pipe, what is read is gone
        return False
    with open(path, "rb") as file:
        return _REQUEST.search(file.read(_PEEK_BYTES).decode(errors="replace")) is not None


def vllm_log_records(path: Path, progress: Callable[[int], None]) -> Iterator[Entry]:
    """Yields ``{"request_id", "prompt"}`` for each request in vLLM's log; other lines are passed over.

    The prompt has the whole history; the answer to it is in the prompt of the next request.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            progress(file.tell())
            match = _REQUEST.search(line.decode(errors="replace"))
            if match is None:
                continue
            where = f"{path}:{number}"
            try:
                yield Entry(where, {"request_id": match[1], "prompt": ast.literal_eval(match[2])})
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                yield Entry(where, None, Problem("damaged line", f"the prompt cannot be read: {error}"))
