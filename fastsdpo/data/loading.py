"""Conversations from files and datasets, one at a time, in bounded memory.

Every source becomes a stream of events ``(where, record, problem, position)``: a record that was
read, or a problem with a place that a person can find (file and line, element or row). Problems are
counted and skipped, or, with ``strict``, raised. Position is where to go on after this event, so an
interrupted reader can continue (`fastsdpo prepare` does).

JSON is split into records before it is parsed: lines for JSON Lines, and for an array (or objects
one after another) a scan for the brace that closes each element. So one damaged record costs itself:
its text is left out and the next whole record after it is found again, an array that was cut off
gives everything that is whole in it, and nothing larger than a record is ever in memory.
"""

from __future__ import annotations

import glob
import json
import logging
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from fastsdpo.data.interactions import (
    SYSTEM_KEYS,
    Conversation,
    Interaction,
    add_system,
    called_key,
    parse_history,
    parse_message,
    parse_messages,
)

logger = logging.getLogger("fastsdpo.data")

# Where a record keeps its messages: OpenAI `messages`, WildChat and WildFeedback `conversation`,
# ShareGPT `conversations` (its first form: `items`), WildFeedback's annotations `history`.
MESSAGE_KEYS = ("messages", "conversation", "conversations", "items", "history")
INTERACTION_KEYS = ("prompt", "completion", "user_response")
# Where it names its conversation, and where it names itself (in its own source only).
CONVERSATION_ID_KEYS = (
    "conversation_id",
    "conversation_hash",
    "session_id",
    "thread_id",
    "chat_id",
)
RECORD_ID_KEYS = ("id", "uuid")

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
COMPRESSIONS = (".gz", ".zst")

MAX_RECORD_BYTES = 16 << 20
MAX_PROBLEMS = 20  # messages kept of each kind, so that a report stays small
READ_BYTES = 1 << 20


@dataclass
class LoadReport:
    """What a loader saw; filled while it runs.

    Attributes:
        records: records seen, damaged ones among them.
        damaged: how many were skipped, by kind.
        problems: the first messages of each kind, with file and line, element or row.
        lost_bytes: bytes of JSON text that belong to no whole record.
        bytes_done, bytes_total: progress in the files on disk; the total is None for datasets.
        where: the place of the record that was given out last.
        position: where to go on after it.
    """

    records: int = 0
    damaged: Counter = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)
    lost_bytes: int = 0
    bytes_done: int = 0
    bytes_total: int | None = None
    where: str = ""
    position: dict | None = None

    def add_problem(self, kind: str, message: str) -> None:
        self.damaged[kind] += 1
        messages = self.problems.setdefault(kind, [])
        if len(messages) < MAX_PROBLEMS:
            messages.append(message)


@dataclass(frozen=True)
class Problem:
    """Why a record cannot be used: a kind, to count by, and a sentence."""

    kind: str
    text: str
    lost_bytes: int = 0
    records: int = 1  # 0 for what befalls a file, not a record


# (where, record or None, Problem or None, position after it)
Event = tuple[str, Any, "Problem | None", dict]


class DamagedRecord(ValueError):
    """With ``strict``: the first record that cannot be used; the text has its place."""


def load_conversations(
    source: str | PathLike | Iterable[str | PathLike],
    *,
    strict: bool = False,
    report: LoadReport | None = None,
    config: str | None = None,
    split: str = "train",
    max_record_bytes: int = MAX_RECORD_BYTES,
    position: dict | None = None,
) -> Iterator[Conversation]:
    """Reads conversations one at a time, in bounded memory.

    Args:
        source: a file (JSON array, JSON Lines, Parquet; ``.gz`` or ``.zst`` of the first two), a
            folder, a glob, a Hugging Face dataset name (streamed), or several of these. The layout
            of each record is told by its keys: OpenAI (``messages``), WildChat and WildFeedback
            (``conversation``), ShareGPT (``conversations``, ``from``/``value``), a bare list of
            messages, or an interaction row (``prompt``, ``completion``, ``user_response``). A system
            prompt beside the messages (``system``, ``system_prompt``, ...) is their first message; a
            record that has two different ones is damaged.
        strict: stop at the first damaged record.
        report: filled with counts and messages while reading.
        config, split: of a Hugging Face dataset.
        max_record_bytes: a longer JSON record is damaged.
        position: go on after ``report.position`` of an earlier run over the same sources.

    Raises:
        FileNotFoundError: nothing is there.
        DamagedRecord (a ValueError): with `strict`; the text names file and line, element or row.
        ImportError: a package that the format needs is missing.
    """
    return _load(
        _events(source, report, config, split, max_record_bytes, position),
        parse_conversation,
        strict,
        report,
    )


def load_interactions(
    source: str | PathLike | Iterable[str | PathLike],
    *,
    strict: bool = True,
    report: LoadReport | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Interaction]:
    """Reads interaction rows, as `fastsdpo prepare` writes them, one at a time.

    A row has ``prompt`` (a list of messages), ``completion`` and ``user_response`` (messages), each
    message ``{"role", "content"}`` or ``{"from", "value"}``; ``id`` and ``conversation_id`` are
    kept, a system prompt beside the prompt (``system``, ...) is its first message, other keys are
    ignored. Arguments and errors are those of `load_conversations`; here
    `strict` is the default, since a prepared file has no damaged rows.
    """
    return _load(
        _events(source, report, None, "train", max_record_bytes, None),
        parse_interaction,
        strict,
        report,
    )


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file of JSON or Parquet, whatever its layout, one at a time.

    Raises:
        DamagedRecord (a ValueError): the first text that is no record, with its place.
        ImportError: a package that the format needs is missing.
    """
    for where, record, problem, _ in _events(path, None, None, "train", MAX_RECORD_BYTES, None):
        if problem is not None:
            raise DamagedRecord(f"{where}: {problem.text}")
        yield where, record


def is_data(path: Path) -> bool:
    """Whether the ending is that of a file that `read_records` reads."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return name.suffix in SUFFIXES


def _load(
    events: Iterator[Event],
    parse: Callable[[Any], Any],
    strict: bool,
    report: LoadReport | None,
) -> Iterator[Any]:
    log = report is None  # nobody else will tell
    report = LoadReport() if report is None else report
    for where, record, problem, position in events:
        parsed = None
        if problem is None:
            try:
                parsed = parse(record)
            except (TypeError, ValueError) as error:
                problem = Problem("wrong layout", str(error))
        report.records += 1 if problem is None else problem.records
        report.where, report.position = where, position
        if problem is None:
            yield parsed
            continue
        message = f"{where}: {problem.text}"
        if strict:
            raise DamagedRecord(message)
        report.lost_bytes += problem.lost_bytes
        report.add_problem(problem.kind, message)
        if log and report.damaged[problem.kind] <= MAX_PROBLEMS:
            logger.warning("skipped: %s", message)


# Records


def parse_conversation(record: Any) -> Conversation:
    """A record of any known layout -> `Conversation`.

    Raises:
        TypeError, ValueError: no known layout, or a malformed message; the text says which.
    """
    if isinstance(record, list):
        return Conversation(parse_messages(record, "messages"))
    if not isinstance(record, Mapping):
        raise TypeError(f"a record must be a JSON object, got {type(record).__name__}")
    language = record.get("language")
    language = language if isinstance(language, str) else None
    # A table of several layouts has all columns in every row: the one that is filled counts.
    filled = next((key for key in MESSAGE_KEYS if record.get(key)), None)
    if all(record.get(key) if filled else key in record for key in INTERACTION_KEYS):
        row = parse_interaction(record)
        messages = [
            *row.prompt,
            {"role": "assistant", "content": row.completion},
            {"role": "user", "content": row.followup},
        ]
        own = row.conversation_id is None
        name = row.id if own else row.conversation_id
        return Conversation(messages, name, language, True, row.id, own)
    for key in [filled] if filled else MESSAGE_KEYS:
        if record.get(key) is not None:
            messages = add_system(record, parse_messages(record[key], key))
            name = _identifier(record, CONVERSATION_ID_KEYS)
            own = name is None
            name = _identifier(record, RECORD_ID_KEYS) if own else name
            return Conversation(messages, name, language, own_id=own)
    hint = "; is this a list of messages without the list around it?" if "role" in record else ""
    raise TypeError(
        f"a record must have one of {', '.join(MESSAGE_KEYS)}, or {', '.join(INTERACTION_KEYS)}; "
        f"got the keys {', '.join(map(reprlib.repr, list(record)[:8])) or '(none)'}{hint}"
    )


def parse_interaction(record: Any) -> Interaction:
    """An interaction row -> `Interaction`; TypeError or ValueError say what is wrong with it."""
    hint = ""
    if isinstance(record, list) or (isinstance(record, Mapping) and any(key in record for key in MESSAGE_KEYS)):
        hint = "; this looks like a conversation: run `fastsdpo prepare` on the file first"
    if not isinstance(record, Mapping):
        raise TypeError(f"a row must be a JSON object, got {type(record).__name__}{hint}")
    for key in INTERACTION_KEYS:
        if record.get(key) is None:
            raise TypeError(f"an interaction row must have {key!r}{hint}")
    texts = {}
    for key, role in (("completion", "assistant"), ("user_response", "user")):
        value = record[key]
        value = {"role": role, "content": value} if isinstance(value, str) else value
        try:
            message = parse_message(value)
            if (called := called_key(value)) is not None:
                raise ValueError(f"must be text alone, got {called!r}, which would be missing in it")
            if message["role"] != role:
                raise ValueError(f"role must be {role}, got {message['role']}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{key}: {error}") from None
        texts[key] = message["content"]
    return Interaction(
        prompt=add_system(record, parse_history(record["prompt"], "prompt")),
        completion=texts["completion"],
        followup=texts["user_response"],
        id=_identifier(record, ("id",)),
        conversation_id=_identifier(record, CONVERSATION_ID_KEYS),
    )


def _identifier(record: Mapping, keys: Iterable[str]) -> str | None:
    for key in keys:
        if isinstance(record.get(key), (str, int)) and record[key] != "":
            # Ids go into reports and output files, which must be valid Unicode.
            return str(record[key]).encode(errors="replace").decode()
    return None


# Sources


def expand_source(source: str | PathLike | Iterable[str | PathLike]) -> list[Path | str]:
    """Files (as Path, in a fixed order) and dataset names (as str) that a source stands for."""
    if not isinstance(source, (str, PathLike)):
        return [item for part in source for item in expand_source(part)]
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
            return [path]
        found = (file for file in path.rglob("*") if file.is_file() and is_data(file))
        files = sorted(file for file in found if not file.name.startswith("."))
        if not files:
            raise FileNotFoundError(f"folder {path} holds no file that ends in {', '.join(SUFFIXES)}")
        return list(files)
    if path.exists():
        return [path]
    text = str(source)
    if any(character in text for character in "*?["):
        files = sorted(Path(name) for name in glob.glob(text, recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise FileNotFoundError(f"no file matches {text}")
        return list(files)
    is_name = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text)
    if is_name and path.suffix not in (*SUFFIXES, *COMPRESSIONS):
        return [text]
    raise FileNotFoundError(f"no such file: {text}")


def _events(
    source: Any,
    report: LoadReport | None,
    config: str | None,
    split: str,
    max_record_bytes: int,
    position: dict | None,
) -> Iterator[Event]:
    """The events of all sources; each position also says which source it is in."""
    items = expand_source(source)
    sizes = [item.stat().st_size if isinstance(item, Path) else 0 for item in items]
    report = LoadReport() if report is None else report
    if all(isinstance(item, Path) and item.is_file() for item in items):
        report.bytes_total = sum(sizes)
    first = 0 if position is None else position["source"]

    def stream() -> Iterator[Event]:
        for number, item in enumerate(items[first:], first):
            start = None if position is None or number > first else position["inside"]
            before = sum(sizes[:number])

            def progress(done: int, before: int = before) -> None:
                report.bytes_done = before + done

            if isinstance(item, str) or item.is_dir():
                events = _dataset_events(item, config, split, start)
            elif item.suffix == ".parquet":
                events = _parquet_events(item, progress, start)
            else:
                events = _json_events(item, progress, start, max_record_bytes)
            for where, record, problem, inside in events:
                yield where, record, problem, {"source": number, "inside": inside}
            report.bytes_done = before + sizes[number]

    return stream()


def _dataset_events(name: str | Path, config: str | None, split: str, start: dict | None) -> Iterator[Event]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{str(name)!r} is not a file, and to read it as a Hugging Face "
            "dataset needs the package datasets; install it with: pip install datasets"
        ) from error
    if isinstance(name, Path):
        rows = datasets.load_from_disk(str(name))
        rows = rows[split] if isinstance(rows, dict) else rows
    else:
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
        except Exception as error:  # of many libraries: hub, HTTP, parsing
            raise FileNotFoundError(
                f"{name!r} is neither a file nor a dataset that can be loaded: {type(error).__name__}: {error}"
            ) from error
    first = 0 if start is None else start["row"]
    for row, record in enumerate(rows.skip(first), first):
        yield f"{name}[{split}] row {row}", record, None, {"row": row + 1}


def _parquet_events(path: Path, progress: Callable[[int], None], start: dict | None) -> Iterator[Event]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path} needs the package pyarrow; install it with: pip install pyarrow") from error
    first = 0 if start is None else start["row"]
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        problem = Problem("damaged file", f"not a whole Parquet file: {error}", records=0)
        if first == 0:
            yield str(path), None, problem, {"row": 1}
        return
    with file:
        wanted = {
            *MESSAGE_KEYS,
            *INTERACTION_KEYS,
            *SYSTEM_KEYS,
            *CONVERSATION_ID_KEYS,
            *RECORD_ID_KEYS,
            "language",
        }
        columns = [name for name in file.schema_arrow.names if name in wanted]
        total, row = max(1, file.metadata.num_rows), 0
        size = path.stat().st_size
        for group in range(file.metadata.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            if end <= first:
                row = end
                continue
            try:
                for batch in file.iter_batches(64, row_groups=[group], columns=columns):
                    for record in batch.to_pylist():
                        if row >= first:
                            yield f"{path} row {row}", record, None, {"row": row + 1}
                        row += 1
                    progress(size * row // total)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                text = f"rows {row} to {end - 1} cannot be read: {error}"
                problem = Problem("damaged file", text, records=end - row)
                yield f"{path} row {row}", None, problem, {"row": end}
                row = end


# JSON


def _json_events(
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
