"""JSON text -> records, one at a time."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastsdpo.data.layouts import MESSAGE_KEYS
from fastsdpo.data.records import Event, Problem

COMPRESSIONS = (".gz", ".zst")
READ_BYTES = 1 << 20


def json_events(
    path: Path, progress: Callable[[int], None], start: dict | None, max_record_bytes: int
) -> Iterator[Event]:
    """JSON Lines, an array, or objects one after another, told apart by name and first bytes."""
    with open(path, "rb") as file:
        text = _Text(file, path, progress, start)
        index = 0 if start is None else start["index"]
        mode = _json_mode(text, path, max_record_bytes) if start is None else start["mode"]
        pieces: Iterator[Piece] = iter(())
        if mode == "lines":
            pieces = _lines(text, max_record_bytes)
        elif mode in ("array", "objects"):
            if mode == "array" and start is None:
                text.skip(text.find_content() + 1)
            pieces = _elements(text, max_record_bytes, mode == "array")
        elif mode != "end":
            text.damage = mode
        for line, record, problem in pieces:
            where = f"{path}:{line}" if mode == "lines" else f"{path} element {index} (line {line})"
            index += 1 if problem is None else problem.records
            yield where, record, problem, {"mode": mode, "index": index, **text.place()}
        if text.damage:
            problem = Problem("damaged file", text.damage, records=0)
            yield str(path), None, problem, {"mode": "end", "index": index, **text.place()}


def _json_mode(text: _Text, path: Path, max_record_bytes: int) -> str:
    """ "lines", "array" or "objects"; or what is wrong with the whole file."""
    while len(text.buffer) < 3 and text.fill():
        pass
    if text.buffer[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16 text; save it as UTF-8"
    if text.buffer[:3] == b"\xef\xbb\xbf":
        text.skip(3)
    first = text.find_content()
    if first == len(text.buffer):
        return text.damage or "the file is empty"
    while (end := text.buffer.find(b"\n", first)) < 0 and len(text.buffer) < max_record_bytes:
        if not text.fill():
            break
    line = bytes(text.buffer[first : len(text.buffer) if end < 0 else end]).rstrip()
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if name.suffix in (".jsonl", ".ndjson"):
        # The name is right, unless the first line opens something that later lines go on with.
        return {b"[": "array", b"{": "objects"}.get(line, "lines")
    if line[:1] == b"[":
        return "array"
    if _parse_json(line)[1] is None:
        return "lines"
    # The first line may be a damaged one. A line of its own tells: in an object written over several
    # lines none starts with a brace and is whole.
    after = text.buffer[max(end, 0) + 1 :].split(b"\n")[:-1] if end >= 0 else []
    whole = (_parse_json(bytes(line))[1] is None for line in after if line[:1] == b"{")
    return "lines" if any(whole) else "objects"


def _parse_json(data: bytes) -> tuple[Any, Problem | None]:
    """(value, None), or (None, why not)."""
    try:
        return json.loads(data.decode()), None
    except UnicodeDecodeError as error:
        return None, Problem("invalid UTF-8", f"invalid UTF-8 at byte {error.start}", len(data))
    except json.JSONDecodeError as error:
        text = f"not JSON: {error.msg} at character {error.pos}"
    except RecursionError:
        text = "not JSON: nested too deep"
    except ValueError as error:  # a number of too many digits
        text = f"not JSON: {error}"
    return None, Problem("not JSON", text, len(data))


class _Text:
    """The bytes of a file that are not used up yet, decompressed, with their place in the file.

    `buffer[0]` is byte `offset` of the (decompressed) file, in line `line`. A compressed stream
    that breaks off ends there, and `damage` says so.
    """

    def __init__(self, file: Any, path: Path, progress: Callable[[int], None], start: dict | None):
        self.buffer = bytearray()
        self.offset, self.line = 0, 1
        self.damage: str | None = None
        self._file, self._progress = file, progress
        if path.suffix == ".gz":
            self._chunks = self._decompressed(lambda: zlib.decompressobj(wbits=31))
        elif path.suffix == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise ImportError(
                    f"{path} needs the package zstandard; install it with: pip install zstandard"
                ) from error
            self._chunks = self._decompressed(lambda: zstandard.ZstdDecompressor().decompressobj())
        else:
            if start is not None:
                file.seek(start["offset"])
                self.offset = start["offset"]
            self._chunks = iter(lambda: file.read(READ_BYTES), b"")
        if start is not None:
            while self.offset < start["offset"] and (self.buffer or self.fill()):
                self.skip(min(len(self.buffer), start["offset"] - self.offset))
            self.line = start["line"]

    def _decompressed(self, new: Callable[[], Any]) -> Iterator[bytes]:
        # Small pieces bound the memory: 1 KiB stands for at most 1 MiB (gzip) or 32 MiB (zstd,
        # where 4 bytes can stand for 128 KiB).
        decompressor, unused, inside = new(), b"", False
        while data := unused or self._file.read(1 << 10):
            try:
                unused, inside = b"", True
                out = decompressor.decompress(data)
            except Exception as error:  # zlib.error, zstandard.ZstdError
                self.damage = f"the compressed data is damaged: {error}"
                return
            if out:
                yield out
            if decompressor.eof:  # another stream may follow
                unused, inside = decompressor.unused_data, False
                decompressor = new()
        if inside:
            self.damage = "the compressed data is cut off"

    def fill(self) -> bool:
        """Reads the next piece; False at the end."""
        chunk = next(self._chunks, b"")
        self.buffer += chunk
        self._progress(self._file.tell())
        return bool(chunk)

    def skip(self, size: int) -> None:
        self.line += self.buffer.count(b"\n", 0, size)
        self.offset += size
        del self.buffer[:size]

    def find_content(self, blank: bytes = b" \t\r\n") -> int:
        """Index of the first byte that is not blank; the buffer's length where there is none."""
        start = 0
        while True:
            piece = bytes(self.buffer[start : start + 4096])
            content = piece.lstrip(blank)
            start += len(piece) - len(content)
            if content or (start == len(self.buffer) and not self.fill()):
                return start

    def place(self) -> dict:
        return {"offset": self.offset, "line": self.line}


# (line, record, Problem instead)
Piece = tuple[int, Any, "Problem | None"]


def _lines(text: _Text, limit: int) -> Iterator[Piece]:
    more = True
    while more:
        line, searched, lost = text.line, 0, 0
        while (end := text.buffer.find(b"\n", searched)) < 0:
            searched = len(text.buffer)
            if searched > limit:  # too long: forget what there is and look for its end
                lost += searched
                text.skip(searched)
                searched = 0
            if not text.fill():
                more = False
                break
        end = end if more else len(text.buffer)
        data = bytes(text.buffer[:end])
        text.skip(end + 1 if more else end)
        if lost or len(data) > limit:
            problem = Problem("too long", f"longer than {limit:,} bytes", lost + len(data))
            yield line, None, problem
        elif data.strip():
            yield line, *_parse_json(data)


def _elements(text: _Text, limit: int, array: bool) -> Iterator[Piece]:
    while True:
        text.skip(text.find_content(b" \t\r\n,"))
        line, first, end = text.line, bytes(text.buffer[:1]), None
        if not first:
            if array:
                why = "the array is not closed, though its last element is whole"
                yield line, None, Problem("cut off", why, records=0)
            return
        if array and first == b"]":
            text.skip(1)
            if text.find_content() == len(text.buffer):
                return
            array, problem = False, Problem("not JSON", "text after the end of the array")
        elif first in b"{[":
            end, problem = _value_end(text, limit)
        else:
            problem = Problem("not JSON", f"not JSON: a record cannot start with {first!r}")
        if end is not None:
            data = bytes(text.buffer[:end])
            record, problem = _parse_json(data)
            # Where the text is not JSON, whatever its bytes, its braces may match past its end.
            readable = data.decode(errors="replace").encode() if problem else b""
            if problem is None or _parse_json(readable)[1] is None or first == b"[":
                text.skip(end)
                yield line, record, problem
                continue
        assert problem is not None
        lost, found = _find_record(text, limit)
        after = "" if found else "; nothing whole comes after it"
        why = f"{problem.text} ({lost:,} bytes lost{after})"
        yield line, None, Problem(problem.kind, why, lost)
        if not found:
            return


QUOTE, BACKSLASH = b'"\\'
# A string without escapes, at once; else its first quote, and the end is looked for from there.
_STRUCTURE = re.compile(rb'"[^"\\]*"|["{}\[\]]')
_OBJECT_START = re.compile(rb'\{\s*"')
_FIND_BYTES = 1 << 19  # while looking for the next whole record, longer ones are passed over


def _value_end(text: _Text, limit: int) -> tuple[int | None, Problem | None]:
    """Index after the bracket that closes the one at ``buffer[0]``, or why there is none."""
    position, depth, in_string = 0, 0, False
    while position <= limit:
        if in_string:
            quote = text.buffer.find(b'"', position)
            if quote >= 0:
                before = quote - 1
                while text.buffer[before] == BACKSLASH:
                    before -= 1
                in_string = (quote - before) % 2 == 0  # an odd number of backslashes escapes it
                position = quote + 1
                continue
        else:
            match = _STRUCTURE.search(text.buffer, position)
            if match is not None:
                position = match.end()
                mark = text.buffer[match.start()]
                if mark == QUOTE:
                    in_string = position == match.start() + 1
                elif mark in b"{[":
                    depth += 1
                else:
                    depth -= 1
                    if depth == 0:
                        break
                continue
        position = len(text.buffer)
        match = None  # it holds the buffer, which is about to grow
        if position <= limit and not text.fill():
            return None, Problem("cut off", "cut off: the file ends inside it")
    if position > limit:
        return None, Problem("too long", f"longer than {limit:,} bytes, or not closed")
    return position, None


def _find_record(text: _Text, limit: int) -> tuple[int, bool]:
    """Skips to the next text after ``buffer[0]`` that is a whole record: (bytes skipped, found)."""
    begin, position, scanned = text.offset, 1, 0
    while True:
        match = _OBJECT_START.search(text.buffer, position)
        if match is None:
            # The start of an object may be at the end of the buffer and its quote not yet read.
            keep = max(text.buffer.rfind(b"{", position), len(text.buffer) - 4096, position)
            text.skip(min(keep, len(text.buffer)))
            position = 0
            if not text.fill():
                text.skip(len(text.buffer))
                return text.offset - begin, False
            continue
        start, match = match.start(), None
        text.skip(start)
        end, _ = _value_end(text, min(limit, _FIND_BYTES))
        scanned += min(len(text.buffer), _FIND_BYTES) if end is None else end
        position = 1
        if end is not None:
            record, problem = _parse_json(bytes(text.buffer[:end]))
            if problem is None:
                if any(isinstance(record.get(key), list) for key in (*MESSAGE_KEYS, "prompt")):
                    return text.offset - begin, True
                position = end
        # Text that opens objects without end would be scanned again from each: keep that linear.
        if scanned > 2 * (text.offset - begin) + 4 * _FIND_BYTES:
            text.skip(min(len(text.buffer), _FIND_BYTES))
            position = 0
