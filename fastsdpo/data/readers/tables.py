"""Reads tables with a message, or a question and its answer, in each row: a conversation's rows become one record.

Rows of a conversation need not stand together. They are kept in a temporary database on the disk (`sqlite3`, in
the folder for temporary files) until all files have been read. Then they come out conversation by conversation, in
the order of their times or else of the file; memory holds one conversation at a time.

A conversation goes on in another file if its rows there are later, and its id is none that a counter gives, which
may name another conversation there. Otherwise what was said before an answer is not known, and that part is left
out. So is a conversation of which a row cannot be read.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fastsdpo.data.answers import NOTE_KEYS
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.messages import CALL_KEYS, FILE_KEYS, SYSTEM_KEYS
from fastsdpo.data.readers.chains import ChainKey, chain_key, read_chain
from fastsdpo.data.readers.exports import read_librechat, read_oasst
from fastsdpo.data.readers.trees import named
from fastsdpo.data.readers.values import CONVERSATION_ID_KEYS, conversation, decoded, identifier
from fastsdpo.data.record_fields import record_time
from fastsdpo.data.records import Entry, GroupedRows, Problem
from fastsdpo.data.times import oldest_first

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


def row_key(record: Any) -> RowKey | None:
    """Returns a function record -> conversation id if the given record is a row as those above; else None."""
    if not isinstance(record, Mapping):
        return None
    if all(key in record for key in TREE_COLUMNS) and "replies" not in record:
        return lambda row: identifier(row, ("message_tree_id",))
    name = next((key for key in ID_COLUMNS if isinstance(record.get(key), (str, int)) and record[key] != ""), None)
    if name is None or (_columns(record) or _pair(record)) is None:
        return None
    topics = ("topicId",) if name == "sessionId" else ()  # LobeChat: a session has many conversations

    def key(row: Any) -> str | None:
        session, topic = identifier(row, (name,)), identifier(row, topics)
        return session if session is None or topic is None else f"{session}:{topic}"

    return key


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
    """Reads the rows of one conversation, each a message or a question with its answer, an OpenAssistant tree, or a
    chain of calls."""
    first = record["rows"][0]
    if chain_key(first) is not None:
        yield from read_chain(record["rows"], record["name"], all_branches)
        return
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


def group_rows(entries: Iterable[Entry], find_key: Callable[[Any], RowKey | None], store: RowStore) -> Iterator[Entry]:
    """Yields a file's entries; if its first record is one message, its rows go to the store.

    Args:
        find_key: takes the first record, and returns a function record -> conversation id, or None if records
            are not single messages.
    """
    entries, gap = iter(entries), False
    store.begin_file()
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
        if gap:
            store.add_gap()
        if (problem := store.add(entry, key)) is not None:
            yield problem
        break
    else:
        return
    for entry in entries:
        if entry.problem is not None:
            store.add_gap()
            yield entry
        elif (problem := store.add(entry, key)) is not None:
            yield problem


class RowPart(NamedTuple):
    """The rows of a conversation in one file: its place, the rows in order, their times or None, their numbers."""

    where: str
    rows: list[Any]
    times: list[float] | None
    first: int
    last: int


class RowStore:
    """Rows of files that are read one after another, on the disk. It is a context manager.

    Args:
        parse: record -> conversations.
    """

    def __init__(self, parse: Callable[[Any], Iterable[Conversation]]):
        self._parse = parse
        self._number = self._file = 0
        self._gaps: list[int] = []  # the numbers of the rows before which a damaged one stood
        self._database: Any = None

    def begin_file(self) -> None:
        """Notes that what is added from now on is of the next file."""
        self._file += 1
        self._number += 1  # so that a gap at the end of a file is not before the first row of the next

    def add(self, entry: Entry, key: RowKey) -> Entry | None:
        """Keeps a row; an entry with the problem where it names no conversation, or itself among calls of a chain."""
        name = key(entry.record) if isinstance(entry.record, Mapping) else None
        chained = isinstance(key, ChainKey)
        if name is None and chained:
            return entry
        if name is None:
            return Entry(entry.where, None, Problem("wrong layout", "a row must name its conversation"))
        try:  # dates and the like are no types of JSON; they are not read
            data = json.dumps(entry.record, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            self.add_gap()
            return Entry(entry.where, None, Problem("wrong layout", f"a row must be JSON: {error}"))
        if self._database is None:
            import sqlite3

            self._database = sqlite3.connect("")  # a temporary file, gone when it is closed
            self._database.execute(
                "CREATE TABLE row (name TEXT, own TEXT, number INTEGER, file INTEGER, place TEXT, data TEXT)"
            )
        root = (ChainKey.previous(entry.record) or name) if chained else name
        values = (root, name if chained else None, self._number, self._file, entry.where, data)
        self._database.execute("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?)", values)
        self._number += 1
        return None

    def add_gap(self) -> None:
        """Notes that a row stood here which cannot be read."""
        if self._number not in self._gaps[-1:]:
            self._gaps.append(self._number)

    def conversations(self) -> Iterator[Entry]:
        """A record for each conversation, in the order of their first rows."""
        if self._database is None:
            return
        self._name_chains()
        self._database.execute("CREATE INDEX by_name ON row (name, number)")
        found = self._database.execute(
            "SELECT row.name, own IS NOT NULL, number, file, place, data FROM row JOIN "
            "(SELECT name, MIN(number) AS first FROM row GROUP BY name) AS named USING (name) ORDER BY first, number"
        )
        for (name, chained), of_name in itertools.groupby(found, key=operator.itemgetter(0, 1)):
            if chained:  # their links or times say the order, in all files
                rows = [*of_name]
                part = RowPart(rows[0][4], [json.loads(data) for *_, data in rows], None, rows[0][2], rows[-1][2])
                yield self._entry(name, part)
                continue
            parts = []
            for _, of_file in itertools.groupby(of_name, key=operator.itemgetter(3)):
                rows = [*of_file]
                ordered, times = _in_time([json.loads(data) for *_, data in rows])
                parts.append(RowPart(rows[0][4], ordered, times, rows[0][2], rows[-1][2]))
            yield from self._entries(name, parts)

    def _name_chains(self) -> None:
        """Gives calls that go on from others the name of the first one."""
        self._database.execute("CREATE INDEX by_own ON row (own) WHERE own IS NOT NULL")
        step = (
            "UPDATE row SET name = (SELECT name FROM row AS before WHERE before.own = row.name) WHERE own IS NOT NULL "
            "AND EXISTS (SELECT 1 FROM row AS before WHERE before.own = row.name AND before.name != row.name)"
        )
        for _ in range(64):  # each step doubles how far a name has come; of a circle it has no end
            if not self._database.execute(step).rowcount:
                break

    def _entries(self, name: str, parts: list[RowPart]) -> Iterator[Entry]:
        """The records of a conversation with rows in these files: one, where the rows go on from file to file."""
        if len(parts) > 1 and all(part.times for part in parts):
            parts.sort(key=lambda part: part.times or [])
        whole, begun, problems = parts[0], self._first(name, parts[0]), []
        for part in parts[1:]:
            if whole.times and part.times and whole.times[-1] < part.times[0] and _is_unique(name):
                numbers = (min(whole.first, part.first), max(whole.last, part.last))
                whole = RowPart(whole.where, whole.rows + part.rows, whole.times + part.times, *numbers)
            elif self._first(name, part) == begun:  # it begins there anew: it may be there twice
                problems.append(self._entry(name, part))
            else:
                text = (
                    f"conversation {name!r:.60} has rows in another file too ({parts[0].where}), and times and id do "
                    "not say that these go on from there; put the rows of a conversation into one file, or prepare "
                    "each file alone if they number their conversations anew"
                )
                problems.append(Entry(part.where, None, Problem("rows in several files", text)))
        yield self._entry(name, whole)
        yield from problems

    def _entry(self, name: str, part: RowPart) -> Entry:
        """The record of the rows, or a problem where one of them may be missing."""
        gap = bisect_left(self._gaps, part.first)
        if gap < len(self._gaps) and self._gaps[gap] <= part.last:
            text = "a damaged row may be of this conversation"
            return Entry(part.where, None, Problem("a row may be missing", text))
        return Entry(part.where, GroupedRows(name=name, rows=part.rows))

    def _first(self, name: str, part: RowPart) -> tuple[str, str] | None:
        """The first message that is no system message."""
        try:
            for conversation in self._parse(GroupedRows(name=name, rows=part.rows[:4])):
                said = ((m["role"], m["content"].strip()) for m in conversation.messages if m["role"] != "system")
                return next(said, None)
        except (TypeError, ValueError):
            pass
        return None

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *error: object) -> None:
        if self._database is not None:
            self._database.close()


def _in_time(rows: list[Any]) -> tuple[list[Any], list[float] | None]:
    """The rows of a conversation in the order of their times, and these; as they are, and None, if one has none."""
    times = [time for row in rows if (time := record_time(row)) is not None]
    if len(times) < len(rows):
        return ([*oldest_first(rows)] if not times else rows), None
    pairs = [*zip(times, rows)]
    if times[0] > times[-1] and times == sorted(
        times, reverse=True
    ):  # so that those of the same time are turned around too
        pairs.reverse()
    pairs.sort(key=lambda pair: pair[0])
    return [row for _, row in pairs], [time for time, _ in pairs]


def _is_unique(name: str) -> bool:
    """Whether no counter gives such an id (a UUID, a time), so that in another file it means the same conversation."""
    runs = re.findall(r"[a-z]+|[A-Z]+|[1-9]\d*", name)
    return len(runs) >= 8 or sum(len(run) for run in runs if run.isdigit()) >= 8
