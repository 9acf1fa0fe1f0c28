"""A fast parser for the most common records: a name, and text messages by user and assistant in turns.

    {"conversation_id": "c7", "messages": [{"role": "user", "content": "Hi."}, ...], ...}

`RecordParser` reads all other records. For a record that `ordinary` reads, both give the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from fastsdpo.data.json_codec import encode_message
from fastsdpo.data.layouts import BESIDE, CONVERSATION_ID_KEYS, FORMATS, INTERACTION_KEYS, RECORD_ID_KEYS
from fastsdpo.data.merging import whole_turns
from fastsdpo.data.readers.registry import SPECIAL_KEYS

_NOT_ORDINARY = SPECIAL_KEYS | BESIDE | {*INTERACTION_KEYS}


class Ordinary(NamedTuple):
    """A `Conversation` with only the attributes that an ordinary record has.

    Attributes:
        encoded: the messages as JSON.
        first: the index of the first user's message.
    """

    messages: list[dict]
    encoded: list[bytes]
    first: int
    id: str | None
    own_id: bool
    language: str | None
    format: str
    fields: Mapping[str, Any] = {}
    facts: Mapping[str, Any] = {}


@lru_cache(maxsize=256)
def _places(keys: tuple[str, ...]) -> tuple[str, str | None, bool] | None:
    """Where records with these keys have (their messages, their name), and whether it is that of the record; None
    where that takes a look at the values."""
    lists = [key for key in FORMATS if key in keys]
    names = [key for key in CONVERSATION_ID_KEYS if key in keys]
    own = not names
    names = names or [key for key in RECORD_ID_KEYS if key in keys]
    if len(lists) != 1 or len(names) > 1 or not _NOT_ORDINARY.isdisjoint(keys):
        return None
    return lists[0], names[0] if names else None, own


def ordinary(record: Any) -> Ordinary | None:
    """Reads a record as a JSON parser returned it; None if the record is not of the module's form."""
    places = _places(tuple(record)) if type(record) is dict else None
    if places is None:
        return None
    key, id_key, own_id = places
    messages, name = record[key], None if id_key is None else record[id_key]
    if type(messages) is not list or len(messages) < 3 or (id_key is not None and (type(name) is not str or not name)):
        return None
    roles, texts = [], []
    try:
        for message in messages:
            (role_key, role), (content_key, text) = message.items()
            if role_key != "role" or content_key != "content" or type(text) is not str:
                return None
            roles.append(role)
            texts.append(text)
        if (first := whole_turns(roles, texts)) is None:
            return None
        encoded = [*map(encode_message, messages)]
    except (AttributeError, TypeError, ValueError):  # no object, or one of other keys; no valid Unicode
        return None
    if name is not None and not name.isascii():
        name = name.encode(errors="replace").decode()
    language = record.get("language")
    language = language if type(language) is str else None
    return Ordinary(messages, encoded, first, name, own_id, language, FORMATS[key])
