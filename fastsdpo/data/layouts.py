"""Parses records with a list of messages, and interaction rows: the layouts of most data."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from fastsdpo.data.answers import ROW_FIELDS, Turns, read_turns, row_fields
from fastsdpo.data.interactions import Conversation, Interaction, add_system, parse_history, parse_message
from fastsdpo.data.messages import SYSTEM_KEYS, not_text
from fastsdpo.data.readers.values import CONVERSATION_ID_KEYS as CONVERSATION_ID_KEYS
from fastsdpo.data.readers.values import RECORD_ID_KEYS as RECORD_ID_KEYS
from fastsdpo.data.readers.values import decoded, identifier, with_system

# Where a record keeps its messages, and what that layout is called: OpenAI `messages`, WildChat and
# WildFeedback `conversation`, ShareGPT `conversations` (its first form: `items`), WildFeedback's
# annotations `history`.
FORMATS = {
    "messages": "openai",
    "conversation": "wildchat",
    "conversations": "sharegpt",
    "items": "sharegpt",
    "history": "wildfeedback",
}
MESSAGE_KEYS = tuple(FORMATS)
INTERACTION_KEYS = ("prompt", "completion", "user_response")
# Images and the like beside the messages, where the text has a placeholder (LLaVA, LLaMA-Factory).
_FILES = {"image": "<image>", "images": "<image>", "videos": "<video>", "audios": "<audio>"}
BESIDE = frozenset((*SYSTEM_KEYS, *_FILES))
# All that is read of such a record: the columns that a table of many others needs.
PLAIN_KEYS = frozenset(
    (*MESSAGE_KEYS, *INTERACTION_KEYS, *SYSTEM_KEYS, *CONVERSATION_ID_KEYS, *RECORD_ID_KEYS, *_FILES, *ROW_FIELDS)
    + ("language",)
)


def parse_conversation(record: Any) -> Conversation:
    """Parses a record with a list of messages, such a list, or an interaction row.

    Raises:
        TypeError, ValueError: the record has none of these layouts, or a malformed message; the text says which.
    """
    if isinstance(record, list):
        turns = read_turns(record, "messages")
        return Conversation(turns.messages, answer_fields=turns.fields, format="list")
    if not isinstance(record, Mapping):
        raise TypeError(f"a record must be a JSON object, got {type(record).__name__}")
    # A table of several layouts has all columns in every row: the one that is filled counts.
    filled = next((key for key in MESSAGE_KEYS if record.get(key)), None)
    if all(record.get(key) if filled else key in record for key in INTERACTION_KEYS):
        return _row_conversation(record)
    for key in [filled] if filled else MESSAGE_KEYS:
        if record.get(key) is not None:
            return _messages_conversation(record, key)
    hint = "; is this a list of messages without the list around it?" if "role" in record else ""
    raise TypeError(
        f"a record must have one of {', '.join(MESSAGE_KEYS)}, or {', '.join(INTERACTION_KEYS)}; "
        f"got the keys {', '.join(map(reprlib.repr, list(record)[:8])) or '(none)'}{hint}"
    )


def _language(record: Mapping) -> str | None:
    language = record.get("language")
    return language if isinstance(language, str) else None


def _row_conversation(record: Mapping) -> Conversation:
    row = parse_interaction(record)
    messages = [
        *row.prompt,
        {"role": "assistant", "content": row.completion},
        {"role": "user", "content": row.followup},
    ]
    own = row.conversation_id is None
    name = row.id if own else row.conversation_id
    return Conversation(messages, name, _language(record), True, row.id, own, fields=row.fields, format="interactions")


def _messages_conversation(record: Mapping, key: str) -> Conversation:
    messages = record[key]
    messages = decoded(messages) if isinstance(messages, str) else messages
    turns = read_turns(messages, key)
    if any(len(message) > 2 and _has_children(message) for message in messages):
        raise ValueError(f"{key} must be one branch of a conversation, got a tree of them; read it with --reader")
    if not BESIDE.isdisjoint(record):
        turns = with_system(record, turns)
        _mark_files(record, turns)
    name = identifier(record, CONVERSATION_ID_KEYS)
    own = name is None
    return Conversation(
        turns.messages,
        identifier(record, RECORD_ID_KEYS) if own else name,
        _language(record),
        own_id=own,
        answer_fields=turns.fields,
        format="ai-sdk" if messages and "parts" in messages[0] else FORMATS[key],
    )


def _has_children(message: Mapping) -> bool:
    """Whether a message says that several others follow it (Hugging Face's chat-ui)."""
    found = message.get("children")
    return isinstance(found, (list, tuple)) and len(found) > 1


def _mark_files(record: Mapping, turns: Turns) -> None:
    """Gives the messages to which a record has images or the like the role that says so."""
    for key, placeholder in _FILES.items():
        if not record.get(key):
            continue
        asked = [n for n, m in enumerate(turns.messages) if m["role"] == "user"]
        shown = [n for n in asked if placeholder in turns.messages[n]["content"]]
        for number in shown or asked[:1]:
            turns.messages[number] = {**turns.messages[number], "role": "user file"}


def parse_interaction(record: Any) -> Interaction:
    """Parses an interaction row; a TypeError or ValueError says what is wrong with it."""
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
        if key == "completion" and isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]  # as TRL has it
        value = {"role": role, "content": value} if isinstance(value, str) else value
        try:
            message = parse_message(value)
            if (what := not_text(value, message["role"])) is not None:
                raise ValueError(f"must be text alone, got {what}, which would be missing in it")
            if message["role"] != role:
                raise ValueError(f"role must be {role}, got {message['role']}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{key}: {error}") from None
        texts[key] = message["content"]
    return Interaction(
        prompt=add_system(record, parse_history(decoded(record["prompt"]), "prompt")),
        completion=texts["completion"],
        followup=texts["user_response"],
        id=identifier(record, ("id",)),
        conversation_id=identifier(record, CONVERSATION_ID_KEYS),
        fields={} if ROW_FIELDS.isdisjoint(record) else row_fields(record),
    )
