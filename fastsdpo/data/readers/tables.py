"""Reads tables with a message, or a question and its answer, in each row: a conversation's rows become one record.

Rows of a conversation need not stand together. They are kept in a temporary database on the disk (`sqlite3`, in
the folder for temporary files) until the file has been read. Then they come out conversation by conversation, in
the order of their times or else of the file; memory holds one conversation at a time.

Where a row cannot be read, or stands in another file, what was said before an answer is not known. So a conversation
that may have lost a row is left out, and so is a part of one that began in a file before.
"""

from __future__ import annotations

import itertools
import json
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastsdpo.data.answers import NOTE_KEYS
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.messages import CALL_KEYS, FILE_KEYS, SYSTEM_KEYS
from fastsdpo.data.readers.exports import read_librechat, read_oasst
from fastsdpo.data.readers.trees import named
from fastsdpo.data.readers.values import CONVERSATION_ID_KEYS, conversation, decoded, identifier
from fastsdpo.data.record_fields import record_time
from fastsdpo.data.records import Entry, Problem

# The columns of such a table, by the names that they go by.
ID_COLUMNS = (
    *CONVERSATION_ID_KEYS,
    "conversation",
    "dialogue_id",
    "dialog_id",
    "conv_id",
    "thread",
    "session",
    "chat",
)
ROLE_COLUMNS = ("role", "speaker", "sender", "from", "author", "author_role")
CONTENT_COLUMNS = ("content", "text", "message", "value", "utterance", "body")
# Or, in place of a role and a text, what the user said and what the model answered. A column "user" alone may hold a
# name, and "prompt" the whole conversation so far.
QUESTION_COLUMNS = ("question", "user_message", "user_input", "user_query", "user_prompt", "query", "message")
ANSWER_COLUMNS = (
    *("answer", "response", "reply", "assistant_message", "assistant_response", "bot_message", "bot_response"),
    *("ai_message", "ai_response", "model_response", "model_output"),
)
NAMED_PAIRS = (("user", "assistant"), ("human", "assistant"), ("user", "bot"), ("human", "ai"))
TREE_COLUMNS = ("message_tree_id", "message_id", "parent_id")  # OpenAssistant's

RowKey = Callable[[Any], "str | None"]


class GroupedRows(dict):
    """A record made of rows: ``{"name": ..., "rows": [...]}``, where the name is the conversation's id."""


def row_key(record: Any) -> RowKey | None:
    """Returns a function record -> conversation id if the given record is a row as those above; else None."""
    if not isinstance(record, Mapping):
        return None
    if all(key in record for key in TREE_COLUMNS) and "replies" not in record:
        return lambda row: identifier(row, ("message_tree_id",))
    name = next((key for key in ID_COLUMNS if isinstance(record.get(key), (str, int)) and record[key] != ""), None)
    if name is None or (_columns(record) or _pair(record)) is None:
        return None
    return lambda row: identifier(row, (name,))


def _columns(record: Mapping) -> tuple[str, str] | None:
    """The columns of role and content, or None."""
    role = next((key for key in ROLE_COLUMNS if isinstance(record.get(key), str)), None)
    content = next((key for key in CONTENT_COLUMNS if isinstance(record.get(key), (str, list)) and key != role), None)
    return None if role is None or content is None else (role, content)


def _pair(record: Mapping) -> tuple[str, str] | None:
    """The columns of question and answer, or None."""
    for names in ((QUESTION_COLUMNS, ANSWER_COLUMNS), *(((user,), (model,)) for user, model in NAMED_PAIRS)):
        question, answer = (next((key for key in some if isinstance(record.get(key), str)), None) for some in names)
        if question is not None and answer is not None and "user_response" not in record:
            return question, answer
    return None


def is_table(record: Any) -> bool:
    return isinstance(record, GroupedRows)


def read_table(record: GroupedRows, all_branches: bool) -> Iterator[Conversation]:
    """Reads the rows of one conversation, each a message or a question with its answer, or an OpenAssistant tree."""
    first = record["rows"][0]
    if isinstance(first.get("isCreatedByUser"), bool) and "messageId" in first:  # LibreChat's collection of messages
        rows = {"conversationId": record["name"], "messages": record["rows"]}
        yield from named(read_librechat(rows, all_branches), "librechat")
        return
    if all(key in first for key in TREE_COLUMNS):
        yield from named(read_oasst({"message_tree_id": record["name"], "tree_rows": record["rows"]}, True), "oasst")
        return
    columns = next((found for found in map(_columns, record["rows"]) if found is not None), None)
    pair = next((found for found in map(_pair, record["rows"]) if found is not None), None)
    if columns is None and pair is None:
        raise TypeError(f"rows must have a speaker ({', '.join(ROLE_COLUMNS)}) and a text, got none")
    kept = frozenset((*NOTE_KEYS, *CALL_KEYS, *FILE_KEYS)).difference(columns or pair or ())
    messages = []
    for row in record["rows"]:
        notes = {key: decoded(value) for key, value in row.items() if key in kept}
        if columns is not None:
            messages.append({**notes, "role": row.get(columns[0]), "content": row.get(columns[1])})
        elif pair is not None:
            messages.append({"role": "user", "content": row.get(pair[0]) or ""})
            messages.append({**notes, "role": "assistant", "content": row.get(pair[1]) or ""})
    system = {key: first[key] for key in SYSTEM_KEYS if first.get(key)}
    yield conversation(messages, "rows", conversation_id=record["name"], language=first.get("language"), system=system)


def group_rows(entries: Iterable[Entry], find_key: Callable[[Any], RowKey | None]) -> Iterator[Entry]:
    """Yields a file's entries; if its first record is one message, it yields one record for each conversation.

    Args:
        find_key: takes the first record, and returns a function record -> conversation id, or None if records
            are not single messages.
    """
    entries = iter(entries)
    store, gap = None, False
    for entry in entries:
        if entry.problem is not None:
            gap = True
            yield entry
            continue
        key = find_key(entry.record)
        if key is None:
            yield entry
            yield from entries
            return
        store = _RowStore(key)
        if gap:
            store.add_gap()
        if (problem := store.add(entry)) is not None:
            yield problem
        break
    if store is None:
        return
    with store:
        for entry in entries:
            if entry.problem is not None:
                store.add_gap()
                yield entry
            elif (problem := store.add(entry)) is not None:
                yield problem
        yield from store.conversations()


class PartsOfFiles:
    """Finds conversations whose rows stand in several files, which are read one at a time.

    Args:
        parse: record -> conversations.
    """

    def __init__(self, parse: Callable[[Any], Iterable[Conversation]]):
        self._parse = parse
        self._begun: dict[int, tuple[int, str]] = {}  # by the name's hash: that of the first message, the file

    def check(self, entry: Entry, file: str) -> Entry:
        """Returns the entry; with a problem where the rows of its conversation go on from those in another file."""
        if not isinstance(entry.record, GroupedRows):
            return entry
        name, first = entry.record["name"], self._first(entry.record)
        begun, other = self._begun.setdefault(hash(name), (first, file))
        if other == file or begun == first:  # it begins there anew: it may be there twice
            return entry
        text = (
            f"conversation {name!r:.60} has rows in {other} too; put the rows of a conversation into one file, or "
            "prepare each file alone if they number their conversations anew"
        )
        return Entry(entry.where, None, Problem("rows in several files", text))

    def _first(self, record: GroupedRows) -> int:
        """A hash of the first message that is no system message."""
        try:
            for conversation in self._parse(GroupedRows(name=record["name"], rows=record["rows"][:4])):
                said = (m for m in conversation.messages if m["role"] != "system")
                return hash(tuple((m["role"], m["content"].strip()) for m in itertools.islice(said, 1)))
        except (TypeError, ValueError):
            pass
        return 0


def _in_time(record: GroupedRows) -> GroupedRows:
    """The rows of a conversation in the order of their times, if all have one; else as they are."""
    times = [time for row in record["rows"] if (time := record_time(row)) is not None]
    if len(times) == len(record["rows"]) and times != sorted(times):
        latest_first = times == sorted(times, reverse=True)
        pairs = zip(times, record["rows"])
        pairs = reversed([*pairs]) if latest_first else pairs
        record["rows"] = [row for _, row in sorted(pairs, key=lambda pair: pair[0])]
    return record


class _RowStore:
    """Rows on the disk, by conversation."""

    def __init__(self, key: RowKey):
        import sqlite3

        self._key = key
        self._number = 0
        self._gaps: list[int] = []  # the numbers of the rows before which a damaged one stood
        self._database = sqlite3.connect("")  # a temporary file, gone when it is closed
        self._database.execute("CREATE TABLE row (name TEXT, number INTEGER, place TEXT, data TEXT)")

    def add(self, entry: Entry) -> Entry | None:
        """Keeps a row; an entry with the problem where it names no conversation."""
        name = self._key(entry.record) if isinstance(entry.record, Mapping) else None
        if name is None:
            return Entry(entry.where, None, Problem("wrong layout", "a row must name its conversation"))
        try:  # dates and the like are no types of JSON; they are not read
            data = json.dumps(entry.record, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            self.add_gap()
            return Entry(entry.where, None, Problem("wrong layout", f"a row must be JSON: {error}"))
        self._database.execute("INSERT INTO row VALUES (?, ?, ?, ?)", (name, self._number, entry.where, data))
        self._number += 1
        return None

    def add_gap(self) -> None:
        """Notes that a row stood here which cannot be read."""
        if self._number not in self._gaps[-1:]:
            self._gaps.append(self._number)

    def _entry(self, where: str, record: GroupedRows, first: int, last: int) -> Entry:
        """The record of the rows with these numbers, or a problem where one of them may be missing."""
        gap = bisect_left(self._gaps, first)
        if gap < len(self._gaps) and self._gaps[gap] <= last:
            return Entry(where, None, Problem("a row may be missing", "a damaged row may be of this conversation"))
        return Entry(where, _in_time(record))

    def conversations(self) -> Iterator[Entry]:
        """A record for each conversation, in the order of their first rows."""
        self._database.execute("CREATE INDEX by_name ON row (name, number)")
        rows = self._database.execute(
            "SELECT row.name, first, number, place, data FROM row JOIN "
            "(SELECT name, MIN(number) AS first FROM row GROUP BY name) AS named USING (name) ORDER BY first, number"
        )
        for name, group in itertools.groupby(rows, key=operator.itemgetter(0)):
            places = [*group]
            record = GroupedRows(name=name, rows=[json.loads(data) for *_, data in places])
            yield self._entry(places[0][3], record, places[0][1], places[-1][2])

    def __enter__(self) -> _RowStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()
