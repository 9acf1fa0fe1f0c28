"""Reads what a record says beside its messages: fields to keep in the rows, and facts for filter rules."""

from __future__ import annotations

import datetime
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastsdpo.data.interactions import Conversation
from fastsdpo.data.layouts import INTERACTION_KEYS, MESSAGE_KEYS
from fastsdpo.data.messages import SYSTEM_KEYS

# Where a record says when it was made, and by which model; the first that can be read counts.
TIME_KEYS = (
    "timestamp",
    "created_at",
    "create_time",
    "created",
    "createdAt",
    "time",
    "date",
    "start_time",
    "startTime",
)
MODEL_KEYS = ("model", "model_name")
# What a row has anyway, and what would be read as its messages or its system prompt.
NOT_KEPT = ("id", "conversation_id", "turn_id", *INTERACTION_KEYS, *MESSAGE_KEYS, *SYSTEM_KEYS)

_ISO = re.compile(
    r"(\d{4})-?(\d\d)-?(\d\d)(?:[T ]+(\d\d):?(\d\d)(?::?(\d\d)(?:[.,](\d{1,9}))?)?)?\s*(Z|UTC|[+-]\d\d(?::?\d\d)?)?",
    re.I,
)
_NUMBER = re.compile(r"-?\d{9,}(?:\.\d*)?")


def parse_time(value: Any) -> float:
    """Returns a time in any of the usual forms as seconds since 1970 (UTC).

    Args:
        value: ISO 8601 text, a date or datetime, or a number since 1970 in seconds, milliseconds, microseconds
            or nanoseconds, told apart by its size. A date alone is the beginning of the day. A time without a
            zone is UTC.

    Raises:
        ValueError: the value has none of these forms.
    """
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text):
            return parse_time(float(text))
        found = _ISO.fullmatch(text)
        if found:
            return _iso_time(found, value)
    elif isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)).timestamp()
    elif isinstance(value, datetime.date):
        return datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.timezone.utc).timestamp()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        for largest, unit in ((1e11, 1), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9)):
            if abs(value) < largest:
                return value / unit
    raise ValueError(f"a time must be an ISO date or seconds since 1970, got {reprlib.repr(value)}")


def _iso_time(found: re.Match, value: str) -> float:
    *numbers, fraction, zone = found.groups()
    year, month, day, hour, minute, second = (int(number or 0) for number in numbers)
    try:
        moment = datetime.datetime(year, month, day, hour, minute, second, tzinfo=datetime.timezone.utc)
    except ValueError as error:
        raise ValueError(f"a time must be an ISO date or seconds since 1970, got {value!r}: {error}") from None
    seconds = moment.timestamp() + float(f"0.{fraction or 0}")
    if zone and zone[0] in "+-":
        digits = zone[1:].replace(":", "").ljust(4, "0")
        ahead = 3600 * int(digits[:2]) + 60 * int(digits[2:])
        seconds -= -ahead if zone[0] == "-" else ahead
    return seconds


def record_time(record: Any) -> float | None:
    """Returns a record's time, or else its latest message's, in seconds since 1970; None if neither is readable."""
    own = _first_time(record)
    if own is not None:
        return own
    times = [time for message in record_messages(record) if (time := _first_time(message)) is not None]
    return max(times, default=None)


def _first_time(record: Any) -> float | None:
    for key in TIME_KEYS if isinstance(record, Mapping) else ():
        try:
            return parse_time(record.get(key))
        except ValueError:
            continue
    return None


def record_model(record: Any) -> str | None:
    """Returns the model that a record names, or None."""
    found = (record.get(key) for key in MODEL_KEYS) if isinstance(record, Mapping) else ()
    return next((name for name in found if isinstance(name, str) and name), None)


def record_mark(record: Any, name: str) -> bool | None:
    """Whether a record or any of its messages has the mark (``"toxic": true``); None if none has it, true or false."""
    places = (record, *record_messages(record))
    said = [place.get(name) for place in places if isinstance(place, Mapping)]
    said = [mark for mark in said if isinstance(mark, (bool, int))]
    return any(said) if said else None


def record_messages(record: Any) -> Iterable[Any]:
    """Returns the unparsed messages of a record; empty if they are not under a known key."""
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
    "time": (record_time, TIME_KEYS),
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
            value = record.get(name) if isinstance(record, Mapping) else None
            try:
                fields[name] = fields.get(name) if value is None else json_value(value)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
        facts = {name: FACTS[name][0](record) for name in self.facts}
        return replace(conversation, fields=fields, facts=facts)
