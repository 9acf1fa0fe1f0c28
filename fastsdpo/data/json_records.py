"""Reads records from JSON text, one at a time; no more text than that of one record is in memory.

The file's name and its first line tell the layout: JSON Lines, one array, or objects one after
another. A line is a record: the bytes are split there, and each line is parsed by itself. In the other
layouts `json.JSONDecoder.raw_decode` finds the end of each record in decoded text; more of the file is
read where the text may only be cut off.

A damaged record costs itself. In JSON Lines reading goes on with the next line; elsewhere with the
next text that is a whole record, wherever it begins. An array that is cut off gives all its whole
elements. Bytes that are not UTF-8 are kept as lone surrogates, so that the text around them can be read.
"""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fastsdpo.data.json_codec import DECODER, decode
from fastsdpo.data.readers.registry import is_record
from fastsdpo.data.records import Entry, Problem, why_no_text
from fastsdpo.lazy import needed

COMPRESSIONS = (".gz", ".zst")
READ_BYTES = 1 << 16  # larger pieces of text are slower: one wide character makes all of a piece wide

_BLANK, _BETWEEN = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")
# With what a value may end where the text is cut off: white space, or a part of a number, name or escape.
_CUT_END = re.compile(r"\s*[-+.\w\\]{0,16}\Z")
_DECODE = DECODER.raw_decode
_OBJECT_START = re.compile(r'\{\s*"')
_OBJECT_OR_LIST_START = re.compile(r'(?:\[\s*)?\{\s*"')
_START_CHARACTERS = 4096  # most characters that are kept for the rest of a start
_FIND_BYTES = 1 << 19  # while looking for the next whole record, longer ones are passed over
_DEEP_CHARACTERS = 1 << 16  # counted as read in a text that is nested too deep


def json_records(path: Path, progress: Callable[[int], None], max_record_bytes: int) -> Iterator[Entry]:
    """Yields the records of a JSON file.

    Args:
        progress: called with the number of bytes of the file that are read.
        max_record_bytes: a longer record is a problem.
    """
    with open(path, "rb") as file:
        text = _Text(file, path, progress)
        why = _unreadable(text)
        if why is None:
            layout = _layout(text, path, max_record_bytes)
            if layout == "lines":
                yield from _lines(text.rest(), path, text.line, max_record_bytes)
            else:
                yield from _elements(text, path, max_record_bytes, layout == "array")
            why = text.damage
        if why is not None:
            yield Entry(str(path), None, Problem("damaged file", why, records=0))


def find_lines(path: Path, max_record_bytes: int) -> tuple[int, int] | None:
    """Finds where the records of JSON Lines begin: (byte in the file, line number). None for other files."""
    if path.suffix.lower() in COMPRESSIONS:
        return None
    with open(path, "rb") as file:
        text = _Text(file, path, lambda done: None)
        if _unreadable(text) is not None or _layout(text, path, max_record_bytes) != "lines":
            return None
        return file.tell() - len(text.rest_of_buffer()), text.line


def split_lines(path: Path, start: int, line: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Splits a file from a byte on into whole lines of about `size` bytes: (start, end, first line number)."""
    with open(path, "rb") as file:
        file.seek(start)
        place = start
        while data := file.read(size):
            end = data.rfind(b"\n") + 1
            if end:
                yield start, place + end, line
                start, line = place + end, line + len(data) - len(data.replace(b"\n", b""))  # bytes.count is slower
            place += len(data)
    if start < place:
        yield start, place, line


def read_lines(
    path: Path, part: tuple[int, int, int], progress: Callable[[int], None], max_record_bytes: int
) -> Iterator[Entry]:
    """Yields the records of a part from `split_lines`; the other arguments are those of `json_records`."""
    start, end, line = part

    def chunks() -> Iterator[bytes]:
        with open(path, "rb") as file:
            file.seek(start)
            while file.tell() < end and (chunk := file.read(min(READ_BYTES, end - file.tell()))):
                progress(file.tell())
                yield chunk

    yield from _lines(chunks(), path, line, max_record_bytes)


class _Text:
    """The text of a file that is not used up yet: ``buffer[start:]``, which begins in line `line`.

    A compressed stream that breaks off ends there, and `damage` says so.
    """

    def __init__(self, file: BinaryIO, path: Path, progress: Callable[[int], None]):
        self.buffer, self.start, self.line = "", 0, 1
        self.damage: str | None = None
        self._file, self._progress = file, progress
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        if path.suffix.lower() == ".gz":
            self._chunks = self._decompressed(lambda: zlib.decompressobj(wbits=31))
        elif path.suffix.lower() == ".zst":
            with needed("zstandard", path):
                import zstandard
            self._chunks = self._decompressed(lambda: zstandard.ZstdDecompressor().decompressobj())
        else:
            self._chunks = iter(lambda: file.read(READ_BYTES), b"")

    def _decompressed(self, new: Callable[[], Any]) -> Iterator[bytes]:
        # Small pieces bound the memory: 1 KiB stands for at most 1 MiB (gzip) or 32 MiB (zstd,
        # where 4 bytes can stand for 128 KiB).
        decompressor, unused, inside, out = new(), b"", False, bytearray()
        while data := unused or self._file.read(1 << 10):
            try:
                unused, inside = b"", True
                out += decompressor.decompress(data)
            except Exception as error:  # zlib.error, zstandard.ZstdError
                self.damage = f"the compressed data is damaged: {error}"
                break
            if len(out) >= READ_BYTES:
                yield bytes(out)
                out.clear()
            if decompressor.eof:  # another stream may follow
                unused, inside = decompressor.unused_data, False
                decompressor = new()
        if inside and self.damage is None:
            self.damage = "the compressed data is cut off"
        if out:
            yield bytes(out)

    def __len__(self) -> int:
        return len(self.buffer) - self.start

    def rest_of_buffer(self) -> bytes:
        """What was read and is not used up, as it is in the file."""
        return self.buffer[self.start :].encode(errors="surrogateescape") + self._decoder.getstate()[0]

    def rest(self) -> Iterator[bytes]:
        """The pieces of all that is not used up, as they are in the file. The text is then at its end."""
        yield self.rest_of_buffer()
        for chunk in self._chunks:
            self._tell()
            yield chunk

    def _tell(self) -> None:
        if self._file.seekable():  # a pipe has no place
            self._progress(self._file.tell())

    def fill(self) -> bool:
        """Reads the next piece; False at the end of the file."""
        chunk = next(self._chunks, b"")
        self.buffer = self.buffer[self.start :] + self._decoder.decode(chunk, not chunk)
        self.start = 0
        self._tell()
        return bool(chunk)

    def read_to(self, size: int) -> None:
        """Reads on until there are `size` characters, or to the end of the file."""
        while len(self) < size and self.fill():
            pass

    def find(self, part: str, start: int = 0) -> int:
        """The index of the first `part` from `start` on; -1 where there is none in the buffer."""
        found = self.buffer.find(part, self.start + start)
        return found if found < 0 else found - self.start

    def take(self, size: int) -> str:
        """The next `size` characters, which are then used up."""
        end = self.start + size
        part = self.buffer[self.start : end]
        self.start = end
        self.line += part.count("\n")
        return part

    def skip(self, blank: re.Pattern[str]) -> int:
        """Takes what matches, reading on; how many characters that is."""
        skipped = 0
        while True:
            match = blank.match(self.buffer, self.start)
            skipped += len(self.take(match.end() - self.start if match else 0))
            if len(self) or not self.fill():
                return skipped


def _unreadable(text: _Text) -> str | None:
    """Takes what is before the content; why there is none that can be read, or None."""
    text.read_to(8)
    if (why := why_no_text(text.buffer)) is not None:
        return why
    if text.buffer[:1] == "\ufeff":
        text.take(1)
    text.skip(_BLANK)
    return None if len(text) else text.damage or "the file is empty"


def _layout(text: _Text, path: Path, limit: int) -> Literal["lines", "array", "objects"]:
    """The layout of a text that begins with its content. The bracket of an array is taken."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    named_lines = name.suffix.lower() in (".jsonl", ".ndjson")
    if not named_lines and text.buffer[text.start] == "[":
        text.take(1)
        return "array"
    while (end := text.find("\n")) < 0 and len(text) < limit and text.fill():
        pass
    line = text.buffer[text.start : len(text.buffer) if end < 0 else text.start + end].rstrip()
    # The name is right, unless the first line opens something that later lines go on with.
    if line == "[":
        text.take(1)
        return "array"
    if named_lines:
        return "objects" if line == "{" else "lines"
    if _parse(line)[1] is None:
        return "lines"
    # The first line may be a damaged one. A line of its own tells: in an object written over several
    # lines none starts with a brace and is whole.
    after = text.buffer[text.start + end + 1 :].split("\n")[:-1] if end >= 0 else []
    whole = (_parse(line)[1] is None for line in after if line.startswith("{"))
    return "lines" if any(whole) else "objects"


def _parse(text: str) -> tuple[Any, Problem | None]:
    """(value, None), or (None, why it is none)."""
    problem = _invalid_bytes(text)
    if problem is not None:
        return None, problem
    try:
        return DECODER.decode(text), None
    except (ValueError, RecursionError) as error:
        return None, Problem("not JSON", _why(error), _count_bytes(text))


def _invalid_bytes(text: str) -> Problem | None:
    """The problem with a text that holds bytes which are not UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = len(text[: error.start].encode())
            return Problem("invalid UTF-8", f"invalid UTF-8 at byte {place}", _count_bytes(text))
    return None


def _why(error: Exception, start: int = 0) -> str:
    """What an error says of the text that begins at character `start`."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos - start}"
    # Else it is a number of too many digits.
    return "not JSON: nested too deep" if isinstance(error, RecursionError) else f"not JSON: {error}"


def _count_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogateescape"))


def _is_longer(text: str, limit: int) -> bool:
    return 4 * len(text) > limit and _count_bytes(text) > limit


def _lines(chunks: Iterator[bytes], path: Path, first: int, limit: int) -> Iterator[Entry]:
    """A record for each line that is not blank; `first` is the number of the first line."""
    place = f"{path}:"
    for line, (data, size) in enumerate(_split(chunks, limit), first):
        if data is None:
            yield Entry(f"{place}{line}", None, Problem("too long", f"longer than {limit:,} bytes", size))
        elif data and not data.isspace():
            try:
                yield Entry(f"{place}{line}", decode(data))
            except ValueError:
                yield Entry(f"{place}{line}", *_parse(data.decode(errors="surrogateescape")))


def _split(chunks: Iterator[bytes], limit: int) -> Iterator[tuple[bytes | None, int]]:
    """(line without its end, its bytes) of each line; None in place of one that is longer than the limit."""
    begun: list[bytes] = []
    size = 0
    for chunk in chunks:
        start = 0
        while end := chunk.find(b"\n", start) + 1:  # several times as fast as bytes.split
            line, start = chunk[start : end - 1], end
            size += len(line)
            yield (b"".join([*begun, line]) if begun else line) if size <= limit else None, size
            begun, size = [], 0
        size += len(chunk) - start
        if size > limit:  # forget what there is and look for its end
            begun = []
        elif start < len(chunk):
            begun.append(chunk[start:])
    yield b"".join(begun) if size <= limit else None, size


def _elements(text: _Text, path: Path, limit: int, is_array: bool) -> Iterator[Entry]:
    """A record for each element of an array, or for each object."""
    index = 0
    while True:
        text.skip(_BETWEEN)
        where, lost = f"{path} element {index} (line {text.line})", 0
        first = text.buffer[text.start : text.start + 1]
        if not first:
            if is_array:
                why = "the array is not closed, though its last element is whole"
                yield Entry(where, None, Problem("cut off", why, records=0))
            return
        if is_array and first == "]":
            text.take(1)
            lost = text.skip(_BLANK)
            if not len(text):
                return
            is_array, problem = False, Problem("not JSON", "text after the end of the array")
        elif first in "{[":
            record, size, problem = _decode(text, limit)
            if problem is None:
                problem = _invalid_bytes(text.take(size))
                yield Entry(where, record if problem is None else None, problem)
                index += 1
                continue
            lost = _count_bytes(text.take(1))
        else:
            byte = first.encode(errors="surrogateescape")[:1]
            problem = Problem("not JSON", f"not JSON: a record cannot start with {byte!r}")
        more, found = _skip_to_record(text, limit, first == "[")
        lost += more
        after = "" if found else "; nothing whole comes after it"
        yield Entry(where, None, Problem(problem.kind, f"{problem.text} ({lost:,} bytes lost{after})", lost))
        index += 1
        if not found:
            return


def _decode(text: _Text, limit: int) -> tuple[Any, int, Problem | None]:
    """(value, its characters, None) of the value that the text begins with; nothing is taken.

    Where there is none: (None, characters that were read for it, why).
    """
    while True:
        try:
            value, end = _DECODE(text.buffer, text.start)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or _CUT_END.match(text.buffer, error.pos)
            if not cut:
                bad = _invalid_bytes(text.buffer[text.start : error.pos + 1])
                return None, error.pos - text.start, bad or Problem("not JSON", _why(error, text.start))
        except RecursionError as error:
            return None, _DEEP_CHARACTERS, Problem("not JSON", _why(error))
        except ValueError as error:
            return None, len(text), Problem("not JSON", _why(error))
        else:
            size = end - text.start
            if not _is_longer(text.buffer[text.start : end], limit):
                return value, size, None
            return None, size, Problem("too long", f"longer than {limit:,} bytes, or not closed")
        size = len(text)
        if size > limit:
            return None, size, Problem("too long", f"longer than {limit:,} bytes, or not closed")
        text.read_to(min(2 * size, limit + 1))
        if len(text) == size:
            return None, size, Problem("cut off", "cut off: the file ends inside it")


def _skip_to_record(text: _Text, limit: int, after_list: bool) -> tuple[int, bool]:
    """Takes all before the next text that is a whole record: (its bytes, whether there is one).

    A list of messages counts as a record only where the damaged one was a list: other records hold
    such lists.
    """
    pattern = _OBJECT_OR_LIST_START if after_list else _OBJECT_START
    lost, start, read = 0, 0, 0
    while True:
        match = pattern.search(text.buffer, text.start + start)
        if match is None:
            # A start may be at the end of the buffer, and its quote not yet read.
            lost += _count_bytes(text.take(max(start, len(text) - _START_CHARACTERS)))
            start = 0
            if not text.fill():
                return lost + _count_bytes(text.take(len(text))), False
            continue
        lost += _count_bytes(text.take(match.start() - text.start))
        value, size, problem = _decode(text, min(limit, _FIND_BYTES))
        problem = problem or _invalid_bytes(text.buffer[text.start : text.start + size])
        if problem is None and is_record(value):
            return lost, True
        # In what is damaged, or a list, there may be a whole record; in another whole object there is none.
        start = size if problem is None and isinstance(value, dict) else 1
        read += size
        # Text that opens objects without end would be read again from each: keep that linear.
        if read > 2 * lost + 4 * _FIND_BYTES:
            lost += _count_bytes(text.take(min(len(text), _FIND_BYTES)))
            start = 0
