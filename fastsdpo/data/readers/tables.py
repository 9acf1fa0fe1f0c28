"""Reads tables with one message in each row: the rows of one conversation become one record.

Rows of a conversation need not stand together. They are kept in a temporary database on the disk (`sqlite3`, in
the folder for temporary files) until the file has been read. Then they come out conversation by conversation, in
the order of their times or else of the file; memory holds one conversation at a time.
"""

from __future__ import annotations

import json
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
TREE_COLUMNS = ("message_tree_id", "message_id", "parent_id")  # OpenAssistant's

RowKey = Callable[[Any], "str | None"]


class GroupedRows(dict):
    """A record made of rows: ``{"name": ..., "rows": [...]}``, where the name is the conversation's id."""


def row_key(record: Any) -> RowKey | None:
    """Returns a function record -> conversation id if the given record is one message; else None."""
    if not isinstance(record, Mapping):
        return None
    if all(key in record for key in TREE_COLUMNS) and "replies" not in record:
        return lambda row: identifier(row, ("message_tree_id",))
    columns = _columns(record)
    if columns is None:
        return None
    name = columns[0]
    return lambda row: identifier(row, (name,))


def _columns(record: Mapping) -> tuple[str, str, str] | None:
    """The columns of conversation, role and content, or None."""
    name = next((key for key in ID_COLUMNS if isinstance(record.get(key), (str, int)) and record[key] != ""), None)
    role = next((key for key in ROLE_COLUMNS if isinstance(record.get(key), str)), None)
    content = next((key for key in CONTENT_COLUMNS if isinstance(record.get(key), (str, list)) and key != role), None)
    return None if name is None or role is None or content is None else (name, role, content)


def is_table(record: Any) -> bool:
    return isinstance(record, GroupedRows)


def read_table(record: GroupedRows, all_branches: bool) -> Iterator[Conversation]:
    """Reads the rows of one conversation, each a message, or those of an OpenAssistant tree."""
    first = record["rows"][0]
    if isinstance(first.get("isCreatedByUser"), bool) and "messageId" in first:  # LibreChat's collection of messages
        rows = {"conversationId": record["name"], "messages": record["rows"]}
        yield from named(read_librechat(rows, all_branches), "librechat")
        return
    if all(key in first for key in TREE_COLUMNS):
        yield from named(read_oasst({"message_tree_id": record["name"], "tree_rows": record["rows"]}, True), "oasst")
        return
    columns = next((found for found in map(_columns, record["rows"]) if found is not None), None)
    if columns is None:
        raise TypeError(f"rows must have a speaker ({', '.join(ROLE_COLUMNS)}) and a text, got none")
    _, role, content = columns
    kept = frozenset((*NOTE_KEYS, *CALL_KEYS, *FILE_KEYS)) - {role, content}
    messages = [
        {
            **{key: decoded(value) for key, value in row.items() if key in kept},
            "role": row.get(role),
            "content": row.get(content),
        }
        for row in record["rows"]
    ]
    system = {key: first[key] for key in SYSTEM_KEYS if first.get(key)}
    yield conversation(messages, "rows", conversation_id=record["name"], language=first.get("language"), system=system)


def group_rows(entries: Iterable[Entry], find_key: Callable[[Any], RowKey | None]) -> Iterator[Entry]:
    """Yields a file's entries; if its first record is one message, it yields one record for each conversation.

    Args:
        find_key: takes the first record, and returns a function record -> conversation id, or None if records
            are not single messages.
    """
    entries = iter(entries)
    store = None
    for entry in entries:
        if entry.problem is not None:
            yield entry
            continue
        key = find_key(entry.record)
        if key is None:
            yield entry
            yield from entries
            return
        store = _RowStore(key)
        if (problem := store.add(entry)) is not None:
            yield problem
        break
    if store is None:
        return
    with store:
        for entry in entries:
            if entry.problem is not None:
                yield entry
            elif (problem := store.add(entry)) is not None:
                yield problem
        yield from store.conversations()


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
            return Entry(entry.where, None, Problem("wrong layout", f"a row must be JSON: {error}"))
        self._database.execute("INSERT INTO row VALUES (?, ?, ?, ?)", (name, self._number, entry.where, data))
        self._number += 1
        return None

    def conversations(self) -> Iterator[Entry]:
        """A record for each conversation, in the order of their first rows."""
        self._database.execute("CREATE INDEX by_name ON row (name, number)")
        rows = self._database.execute(
            "SELECT row.name, place, data FROM row JOIN "
            "(SELECT name, MIN(number) AS first FROM row GROUP BY name) AS named USING (name) ORDER BY first, number"
        )
        found, where = None, ""
        for name, place, data in rows:
            if found is None or found["name"] != name:
                if found is not None:
                    yield Entry(where, _in_time(found))
                found, where = GroupedRows(name=name, rows=[]), place
            found["rows"].append(json.loads(data))
        if found is not None:
            yield Entry(where, _in_time(found))

    def __enter__(self) -> _RowStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()
