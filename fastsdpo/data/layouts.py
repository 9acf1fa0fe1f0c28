"""The layouts of records that are known: a record -> a conversation, a row -> an interaction."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from fastsdpo.data.interactions import (
    Conversation,
    Interaction,
    add_system,
    called_key,
    parse_history,
    parse_message,
    parse_messages,
)

# Where a record keeps its messages: OpenAI `messages`, WildChat and WildFeedback `conversation`,
# ShareGPT `conversations` (its first form: `items`), WildFeedback's annotations `history`.
MESSAGE_KEYS = ("messages", "conversation", "conversations", "items", "history")
INTERACTION_KEYS = ("prompt", "completion", "user_response")
# Where it names its conversation, and where it names itself (in its own source only).
CONVERSATION_ID_KEYS = ("conversation_id", "conversation_hash", "session_id", "thread_id", "chat_id")
RECORD_ID_KEYS = ("id", "uuid")


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
        if key == "completion" and isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]  # as TRL has it
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
