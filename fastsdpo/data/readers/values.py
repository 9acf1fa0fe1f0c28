"""Reads values from records: JSON in text, the first present of several keys, dotted paths, and conversations."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastsdpo.data.answers import Turns, read_turns
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.messages import add_system, show

# Where a record names its conversation, and where it names itself (in its own source only).
CONVERSATION_ID_KEYS = (
    "conversation_id",
    "conversation_hash",
    "session_id",
    "thread_id",
    "chat_id",
    "conversationId",
    "sessionId",
    "threadId",
    "chatId",
)
RECORD_ID_KEYS = ("id", "uuid")


def identifier(record: Any, keys: Iterable[str]) -> str | None:
    """Returns the id under the first of the keys that has one, as valid Unicode, or None."""
    if isinstance(record, Mapping):
        for key in keys:
            value = record.get(key)
            if isinstance(value, (str, int)) and value != "":
                # Ids go into reports and output files, which must be valid Unicode.
                return str(value).encode(errors="replace").decode()
    return None


def decoded(value: Any) -> Any:
    """Decodes a text that is JSON (or a list or dict as Python writes it); returns anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:  # what pandas writes into a CSV file
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def as_mapping(value: Any) -> Mapping:
    """Returns the decoded value if it is an object; else an empty one."""
    value = decoded(value)
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any, name: str) -> Sequence:
    """Returns the decoded value if it is a list; else raises a TypeError that says `name`."""
    value = decoded(value)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {show(value)}")
    return value


def first_item(value: Any) -> Any:
    """Returns the first item of a list, or None."""
    return value[0] if isinstance(value, (list, tuple)) and value else None


def walk(record: Any, path: str) -> Any:
    """Returns the value at a dotted path (``"author.role"``, ``"choices.0.message"``), or None.

    A key that contains dots is found too: ``"attributes.llm.input_messages"``.
    """
    if isinstance(record, Mapping) and path in record:
        return record[path]
    value = record
    for step in path.split("."):
        value = decoded(value)
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, (list, tuple)) and step.lstrip("-").isdecimal():
            place = int(step)
            value = value[place] if -len(value) <= place < len(value) else None
        else:
            return None
    return value


def conversation(
    messages: Sequence[Any],
    name: str,
    *,
    conversation_id: str | None = None,
    record_id: str | None = None,
    language: Any = None,
    system: Mapping | None = None,
) -> Conversation:
    """Makes a `Conversation` of raw messages.

    Args:
        name: what errors call the list.
        conversation_id, record_id: the conversation's id; the record's, if there is no such id.
        system: an object that may have a system prompt under one of `SYSTEM_KEYS`.
    """
    turns = read_turns(messages, name)
    if system:
        turns = with_system(system, turns)
    return of_turns(turns, conversation_id=conversation_id, record_id=record_id, language=language)


def of_turns(
    turns: Turns, *, conversation_id: str | None = None, record_id: str | None = None, language: Any = None
) -> Conversation:
    """Makes a `Conversation` of turns."""
    return Conversation(
        turns.messages,
        record_id if conversation_id is None else conversation_id,
        language if isinstance(language, str) else None,
        own_id=conversation_id is None,
        answer_fields=turns.fields,
    )


def with_system(record: Mapping, turns: Turns) -> Turns:
    """Adds the system prompt as `add_system` does, and moves the answers' fields to their new indexes."""
    messages = add_system(record, turns.messages)
    moved = len(messages) - len(turns.messages)
    if messages is turns.messages or not moved:
        return Turns(messages, turns.fields)
    fields = {index + moved: value for index, value in turns.fields.items()}
    return Turns(messages, fields)
