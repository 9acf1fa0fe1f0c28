"""Lists all layouts that are read, and finds the layout of a record by its keys."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastsdpo.data.interactions import Conversation
from fastsdpo.data.layouts import FORMATS, INTERACTION_KEYS, MESSAGE_KEYS, PLAIN_KEYS, parse_conversation
from fastsdpo.data.readers import calls, exports, tables, traces
from fastsdpo.data.readers.chains import chain_key
from fastsdpo.data.readers.mapping import FieldMap, Hook
from fastsdpo.data.readers.trees import named
from fastsdpo.data.readers.values import CONVERSATION_ID_KEYS, RECORD_ID_KEYS, as_list, decoded, first_item
from fastsdpo.data.records import GroupedRows
from fastsdpo.data.times import first_time


@dataclass(frozen=True)
class Reader:
    """A layout.

    Attributes:
        name: what `--format` and the report call the layout.
        title: the program or data set that has it.
        keys: a record of the layout has at least one of these keys.
        matches: tells whether a record (an object) has the layout.
        parse: yields the conversations of a record; those of all branches if its second argument is True.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    matches: Callable[[Any], bool]
    parse: Callable[[Any, bool], Iterable[Conversation]]


def _under(name: str) -> Callable[[Any, bool], Iterator[Conversation]]:
    """Reads the messages under the keys of one plain layout, whatever else the record has."""
    others = {key for key in (*MESSAGE_KEYS, *INTERACTION_KEYS) if FORMATS.get(key, "interactions") != name}

    def parse(record: Any, all_branches: bool) -> Iterator[Conversation]:
        if not isinstance(record, Mapping):
            raise TypeError(f"a record must be a JSON object, got {type(record).__name__}")
        yield parse_conversation({key: value for key, value in record.items() if key not in others})

    return parse


# Where an API's answer has a page of records.
_LISTS = ("data", "traces", "runs", "spans")


def _is_list_of_records(record: Mapping) -> bool:
    return any(isinstance(first_item(record.get(key)), Mapping) for key in _LISTS)


def _read_list(record: Any, all_branches: bool) -> Iterator[Conversation]:
    """A list of messages, or one page of an API's answer: records in a list."""
    if isinstance(record, list):
        yield parse_conversation(record)
        return
    if not isinstance(record, Mapping):
        raise TypeError(f"a record must be a JSON object or a list, got {type(record).__name__}")
    key = next((key for key in _LISTS if isinstance(first_item(record.get(key)), Mapping)), None)
    if key is None:
        raise TypeError(f"a list of records must be under one of {', '.join(_LISTS)}")
    if exports.is_messages(record[key]):
        if first_time(record[key][0]) is None:
            raise ValueError(
                f"{key} are messages without times, which an API may list from the newest on; put them into "
                "'messages' in the order in which they were said"
            )
        names = {name: record[key][0][name] for name in CONVERSATION_ID_KEYS if name in record[key][0]}
        yield parse_conversation({**record, **names, "messages": record[key]})
        return
    found, why = False, None
    for item in as_list(record[key], key):
        try:
            for conversation in parse_any(item, all_branches):
                found = True
                yield conversation
        except traces.NotACall as error:
            why = error
    if not found:
        raise why or TypeError(f"{key} must have a conversation, got none")


READERS = (
    Reader("table", "CSV, Parquet or JSON Lines with rows of messages", (), tables.is_table, tables.read_table),
    Reader("chatgpt", "ChatGPT's export, conversations.json", ("mapping",), exports.is_chatgpt, exports.read_chatgpt),
    Reader("claude", "claude.ai's export", ("chat_messages",), exports.is_claude, exports.read_claude),
    Reader("open-webui", "Open WebUI's export", ("chat",), exports.is_open_webui, exports.read_open_webui),
    Reader(
        "librechat",
        "LibreChat's export",
        ("messagesTree", "conversationId"),
        exports.is_librechat,
        exports.read_librechat,
    ),
    Reader("chatbox", "Chatbox's export", ("chat-sessions-list",), exports.is_chatbox, exports.read_chatbox),
    Reader("openai-batch", "OpenAI's batch files", ("custom_id",), calls.is_batch, calls.read_batch),
    Reader("openai-stored", "OpenAI's stored completions", ("choices",), calls.is_stored, calls.read_stored),
    Reader("mlflow", "traces of MLflow", ("spans",), traces.is_mlflow, traces.read_mlflow),
    Reader("datadog", "spans of Datadog", ("attributes", "data"), traces.is_datadog, traces.read_datadog),
    Reader(
        "proxy",
        "request and response of a proxy",
        (*calls.REQUESTS, *calls.RESPONSES),
        calls.is_proxy,
        calls.read_proxy,
    ),
    Reader("openai-responses", "OpenAI's Responses API", ("output",), calls.is_responses, calls.read_responses),
    Reader("langsmith", "runs of LangSmith", ("inputs",), traces.is_langsmith, traces.read_langsmith),
    Reader("otel", "spans of OpenTelemetry and Phoenix", traces.SPAN_KEYS, traces.is_span, traces.read_span),
    Reader("vllm", "vLLM's request log", ("outputs",), calls.is_vllm, calls.read_vllm),
    Reader("alpaca", "Alpaca with a history", ("instruction",), exports.is_alpaca, exports.read_alpaca),
    Reader(
        "langfuse",
        "traces and observations of Langfuse",
        ("input", "output", "observations"),
        traces.is_langfuse,
        traces.read_langfuse,
    ),
    Reader(
        "gateway",
        "LiteLLM and other gateways: messages and response",
        ("response", "proxy_server_request", "output"),
        calls.is_gateway,
        calls.read_gateway,
    ),
    Reader("oasst", "OpenAssistant's trees", ("message_tree_id",), exports.is_oasst, exports.read_oasst),
    Reader("gemini", "Gemini's contents", ("contents",), calls.is_gemini, calls.read_gemini),
    Reader("arena", "Chatbot Arena's battles", ("conversation_a",), exports.is_arena, exports.read_arena),
    Reader("ultrachat", "UltraChat's lists of texts", ("data",), exports.is_turns, exports.read_turns_of_texts),
    Reader("list", "records or messages in a list", _LISTS, _is_list_of_records, _read_list),
    Reader("langchain", "messages of LangChain", ("messages",), calls.is_langchain, calls.read_langchain),
    Reader("interactions", "rows that prepare writes", INTERACTION_KEYS, lambda _: False, _under("interactions")),
    Reader("openai", "OpenAI's messages", ("messages",), lambda _: False, _under("openai")),
    Reader("ai-sdk", "Vercel's AI SDK: messages with parts", ("messages",), lambda _: False, _under("openai")),
    Reader("wildchat", "WildChat and WildFeedback", ("conversation",), lambda _: False, _under("wildchat")),
    Reader("sharegpt", "ShareGPT", ("conversations", "items"), lambda _: False, _under("sharegpt")),
    Reader("wildfeedback", "WildFeedback's annotations", ("history",), lambda _: False, _under("wildfeedback")),
)
BY_NAME = {reader.name: reader for reader in READERS}
# A record without any of these keys has its messages in a list, or nothing.
SPECIAL_KEYS = frozenset(key for reader in READERS for key in reader.keys) - {*MESSAGE_KEYS, *INTERACTION_KEYS}
BRANCHES = ("active", "all")


def _has_messages(record: Any) -> bool:
    return isinstance(record, Mapping) and any(
        isinstance(decoded(record.get(key)), (list, tuple)) for key in MESSAGE_KEYS
    )


def find_reader(record: Any) -> Reader | None:
    """Finds the reader of a record that is neither a plain list of messages nor an interaction row, or None."""
    if isinstance(record, list):
        return BY_NAME["langchain"] if calls.is_langchain(record) else None
    if not isinstance(record, Mapping):
        return None
    try:
        return next((reader for reader in READERS if reader.matches(record)), None)
    except RecursionError:
        return None


class RecordParser:
    """Parses records into conversations, in a layout that is given or found.

    Args:
        format: the name of a reader; None finds the layout of each record by its keys.
        mapping: says where records of no known layout have what (`FieldMap`).
        reader: the name of the user's own function (`Hook`).
        branches: "active" reads the branch of a tree that was active last; "all" reads each branch as a
            conversation of the same name.

    Raises:
        ValueError: a name is unknown, or more than one of the first three is given.
        ImportError: the function's module cannot be imported.
    """

    def __init__(
        self,
        format: str | None = None,
        mapping: str | None = None,
        reader: str | None = None,
        branches: str = "active",
    ):
        given = {"--format": format, "--map": mapping, "--reader": reader}
        if sum(value is not None for value in given.values()) > 1:
            raise ValueError("--format, --map and --reader exclude each other")
        if format is not None and format not in BY_NAME:
            raise ValueError(f"--format: must be one of {', '.join(sorted(BY_NAME))}; got {format!r}")
        if branches not in BRANCHES:
            raise ValueError(f"--branches: must be one of {', '.join(BRANCHES)}; got {branches!r}")
        self.format = format
        self.map = None if mapping is None else FieldMap(mapping)
        self.hook = None if reader is None else Hook(reader)
        self.all_branches = branches == "all"
        self.is_plain = format is None and mapping is None and reader is None

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that decide the result, in types of JSON; empty if layouts are found by their keys."""
        found = {
            "format": self.format,
            "map": self.map and self.map.text,
            "reader": self.hook and self.hook.version,
            "branches": "all" if self.all_branches else None,
        }
        return {key: value for key, value in found.items() if value is not None}

    def row_key(self, record: Any) -> tables.RowKey | None:
        """Returns a function record -> conversation id if each record is one message; None if it holds more."""
        if self.map is not None:
            return self.map.row_key(record)
        if self.hook is not None:
            return self.hook.row_key(record)
        if self.format in (None, "openai-responses", "proxy") and (chain := chain_key(record)) is not None:
            return chain
        if self.format not in (None, "table", "oasst"):
            return None
        if self.format is None and (find_reader(record) is not None or _has_messages(record)):
            return None
        return tables.row_key(record)

    def columns(self, names: Iterable[str], more: Collection[str] = ()) -> list[str] | None:
        """Chooses which of a table's columns to read: those the layouts need, and `more`. None: all.

        For lists of messages and interaction rows only the needed columns are read, since others can be large.
        """
        names = list(names)
        if not self.is_plain or not SPECIAL_KEYS.isdisjoint(names):
            return None
        if not any(key in names for key in (*MESSAGE_KEYS, "completion")):
            return None
        return [name for name in names if name in PLAIN_KEYS or name in more]

    def __call__(self, record: Any) -> Iterable[Conversation]:
        """The conversations of a record.

        Raises:
            TypeError, ValueError: no known layout, or a malformed record; the text says which and how.
        """
        if self.is_plain:
            if type(record) is dict and SPECIAL_KEYS.isdisjoint(record):
                messages = next((record[key] for key in MESSAGE_KEYS if record.get(key)), None)
                first = messages[0] if type(messages) is list else None
                if (type(first) is dict and ("role" in first or "from" in first)) or (
                    messages is None and "user_response" in record
                ):
                    return (parse_conversation(record),)
            return self._guarded(parse_any(record, self.all_branches))
        if self.map is not None:
            return self._guarded(named(self.map.parse(record), "map"))
        if self.hook is not None:
            return self._guarded(named(self.hook.parse(record), f"reader {self.hook.name}"))
        reader = BY_NAME[str(self.format)]
        if not isinstance(record, Mapping) and reader.name not in ("list", "langchain"):
            raise TypeError(f"a record of the format {reader.name} must be a JSON object, got {type(record).__name__}")
        if isinstance(record, GroupedRows):
            reader = BY_NAME["table"]
        elif reader.name == "table":
            raise TypeError(f"a row must name its conversation ({', '.join(tables.ID_COLUMNS[:5])}, ...)")
        return self._guarded(named(reader.parse(record, self.all_branches), reader.name))

    @staticmethod
    def _guarded(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
        """The conversations; an error where there is none, or where the record is nested too deep."""
        found = False
        try:
            for conversation in conversations:
                found = True
                yield conversation
        except RecursionError:
            raise ValueError("the record is nested too deep") from None
        if not found:
            raise TypeError("the record must have a conversation, got none")


def parse_any(record: Any, all_branches: bool = False) -> Iterator[Conversation]:
    """Yields the conversations of a record of any layout."""
    reader = find_reader(record)
    if reader is not None:
        yield from named(reader.parse(record, all_branches), reader.name)
        return
    try:
        yield parse_conversation(record)
    except TypeError as error:
        if isinstance(record, Mapping) and not any(record.get(key) for key in MESSAGE_KEYS):
            lists = [key for key, value in record.items() if exports.is_messages(decoded(value))]
            if len(lists) == 1:  # under a key of the user's own, which leaves no doubt
                yield parse_conversation({**record, "messages": record[lists[0]]})
                return
            told = [key for key in list(record)[:30] if isinstance(key, str) and len(key) < 60 and key not in _IDS]
            raise TypeError(f"{error}; {_advice(() if 'role' in record else tuple(told))}") from None
        raise


_IDS = frozenset((*CONVERSATION_ID_KEYS, *RECORD_ID_KEYS))  # which tell nothing of a layout


@lru_cache(maxsize=64)
def _advice(keys: tuple[str, ...]) -> str:
    """The nearest layout to a record with these keys, which is of none, and what helps."""
    known = {key: reader for reader in reversed(READERS) for key in reader.keys}
    near = [match for key in keys for match in difflib.get_close_matches(key, known, n=1, cutoff=0.85)]
    found = ""
    if near:
        reader = known[near[0]]
        found = f"the nearest layout is {reader.name} ({reader.title}), which has {near[0]!r}; "
    return f"{found}name a layout with --format, say where things are with --map, or give a function with --reader"


def is_record(value: Any) -> bool:
    """Whether a value found somewhere in damaged text is a whole record."""
    if isinstance(value, list):
        first = first_item(value)
        return isinstance(first, dict) and bool(first.keys() & {"role", "from"})
    if any(isinstance(value.get(key), list) for key in (*MESSAGE_KEYS, "prompt")):
        return True
    return not SPECIAL_KEYS.isdisjoint(value) and find_reader(value) is not None
