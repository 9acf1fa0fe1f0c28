"""Reads what a record says beside its messages: fields to keep in the rows, and facts for filter rules."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastsdpo.data.interactions import Conversation
from fastsdpo.data.layouts import INTERACTION_KEYS, MESSAGE_KEYS
from fastsdpo.data.messages import SYSTEM_KEYS
from fastsdpo.data.records import GroupedRows
from fastsdpo.data.times import TIME_NAMES, first_time

# Where a record says by which model it was made.
MODEL_KEYS = ("model", "model_name")
# What a row has anyway, and what would be read as its messages or its system prompt.
NOT_KEPT = ("id", "conversation_id", "turn_id", *INTERACTION_KEYS, *MESSAGE_KEYS, *SYSTEM_KEYS)


def record_time(record: Any) -> float | None:
    """Returns a record's time, or else its latest message's, in seconds since 1970; None if neither is readable."""
    own = first_time(record)
    if own is not None:
        return own
    times = [time for message in record_messages(record) if (time := first_time(message)) is not None]
    return max(times, default=None)


def record_model(record: Any) -> str | None:
    """Returns the model that a record names, or None."""
    found = (record_value(record, key) for key in MODEL_KEYS)
    return next((name for name in found if isinstance(name, str) and name), None)


def record_mark(record: Any, name: str) -> bool | None:
    """Whether a record or any of its messages has the mark (``"toxic": true``); None if none has it, true or false."""
    places = (record, *record_messages(record))
    said = [place.get(name) for place in places if isinstance(place, Mapping)]
    said = [mark for mark in said if isinstance(mark, (bool, int))]
    return any(said) if said else None


def record_value(record: Any, key: str) -> Any:
    """Returns what a record has under a key, or None; of one made of rows, what the last row that has it has."""
    sources = reversed(record["rows"]) if isinstance(record, GroupedRows) else (record,)
    found = (source.get(key) for source in sources if isinstance(source, Mapping))
    return next((value for value in found if value is not None), None)


def record_messages(record: Any) -> Iterable[Any]:
    """Returns the unparsed messages of a record; empty if they are not under a known key."""
    if isinstance(record, GroupedRows):
        return record["rows"]
    if isinstance(record, Mapping):
        record = next((record[key] for key in MESSAGE_KEYS if record.get(key)), ())
    return record if isinstance(record, (list, tuple)) else ()


def json_value(value: Any, depth: int = 0) -> Any:
    """Converts a value for JSON: dates become ISO text, NaN and infinities become null.

    Raises:
        TypeError: JSON has no such type, or the value is nested more than 100 deep.
    """
    if depth > 100:
        raise TypeError("it is nested more than 100 deep")
    if isinstance(value, str):
        return value.encode(errors="replace").decode()  # rows must be valid Unicode
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {json_value(str(key)): json_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item, depth + 1) for item in value]
    raise TypeError(f"JSON cannot have it, got {type(value).__name__}")


# What rules can ask of a record, under the names that `Conversation.facts` has.
FACTS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "time": (record_time, tuple(TIME_NAMES)),
    "model": (record_model, MODEL_KEYS),
    "toxic": (lambda record: record_mark(record, "toxic"), ("toxic",)),
    "redacted": (lambda record: record_mark(record, "redacted"), ("redacted",)),
}


@dataclass(frozen=True)
class RecordFields:
    """Says what is taken from records beside their messages.

    Attributes:
        keep: keys whose values are copied to the rows; null if a record has no such key.
        facts: those of `FACTS` that filter rules ask for.

    Raises:
        ValueError: a key of `keep` cannot be kept.
    """

    keep: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    def __post_init__(self):
        for name in self.keep:
            if not name or name in NOT_KEPT:
                raise ValueError(f"prepare: keep must name keys that rows do not have anyway, got {name!r}")

    @property
    def columns(self) -> Collection[str]:
        """The keys to read from a table that is read by columns."""
        return {*self.keep, *(key for name in self.facts for key in FACTS[name][1])}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is taken."""
        return not self.keep and not self.facts

    def add_to(self, conversation: Conversation, record: Any) -> Conversation:
        """Returns the conversation with its record's fields and facts; TypeError if JSON cannot hold a field."""
        if self.is_empty:
            return conversation
        fields = dict(conversation.fields)
        for name in self.keep:
            value = record_value(record, name)
            try:
                fields[name] = fields.get(name) if value is None else json_value(value)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
        facts = {name: FACTS[name][0](record) for name in self.facts}
        return replace(conversation, fields=fields, facts=facts)
