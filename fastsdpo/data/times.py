"""Reads times in all usual forms."""

from __future__ import annotations

import datetime
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

# Where a record or a message says when it was made; the first that can be read counts.
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
    "sent_at",
    "createdDateTime",
    "ts",
)

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


def first_time(record: Any) -> float | None:
    """Returns the time that a record or a message says, in seconds since 1970, or None."""
    for key in TIME_KEYS if isinstance(record, Mapping) else ():
        try:
            return parse_time(record.get(key))
        except ValueError:
            continue
    return None


def oldest_first(messages: Sequence[Any]) -> Sequence[Any]:
    """Returns messages turned around if, by their times, the newest is the first; any others as they are."""
    if len(messages) < 3 or first_time(messages[0]) is None:
        return messages
    times = [time for message in messages if (time := first_time(message)) is not None]
    newest_first = len(times) == len(messages) and times[0] > times[-1] and times == sorted(times, reverse=True)
    return messages[::-1] if newest_first else messages
