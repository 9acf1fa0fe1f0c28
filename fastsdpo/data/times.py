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
    "datetime",
    "send_date",
    "started_at",
    "timestamp_ms",
)
# How a record may write them ("Created At", "CreatedAt", "TIMESTAMP") -> which of them it is.
TIME_NAMES = {
    name: place
    for place, key in enumerate(TIME_KEYS)
    for name in (
        key,
        key[0].upper() + key[1:],
        key.upper(),
        key.replace("_", " ").title(),
        key.title().replace("_", ""),
    )
}

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
    for value in _said(record):
        try:
            return parse_time(value)
        except ValueError:
            continue
    return None


def _said(record: Any) -> list[Any]:
    """What a record has under the names of times, the first of `TIME_KEYS` first."""
    names = [name for name in record if name in TIME_NAMES] if isinstance(record, Mapping) else []
    return [record[name] for name in sorted(names, key=TIME_NAMES.__getitem__)]


def oldest_first(messages: Sequence[Any]) -> Sequence[Any]:
    """Returns messages turned around if, by their times, the newest is the first; any others as they are.

    For that a date need not be one that `parse_time` reads: "3/4/2026, 9:05 PM" is enough, whichever of its numbers
    is the month, if both readings agree.
    """
    if len(messages) < 2 or not _said(messages[0]):
        return messages
    times = [time for message in messages if (time := first_time(message)) is not None]
    orders: list[list[Any]] = [times] if len(times) == len(messages) else []
    if not times:
        texts = [next((text for text in _said(message) if isinstance(text, str)), "") for message in messages]
        read = [[_loose_time(text, month_first) for text in texts] for month_first in (True, False)]
        orders = [order for order in read if None not in order]
    is_turned = [order[0] > order[-1] and order == sorted(order, reverse=True) for order in orders]
    return messages[::-1] if is_turned and all(is_turned) else messages


_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?(?:[.,]\d+)?\s*([ap])?\.?m?\b", re.I)
_MONTH = re.compile(r"\b(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)", re.I)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def _loose_time(text: str, month_first: bool) -> tuple[int, ...] | None:
    """(year, month, day, hour, minute, second) of a date as people write it, to compare it with others; else None."""
    clock, name = _CLOCK.search(text), _MONTH.search(text)
    numbers = [int(number) for number in re.findall(r"\d{1,4}", _CLOCK.sub("", text, count=1))[:3]]
    if name is not None and len(numbers) >= 2:
        numbers = sorted(numbers[:2])  # the day, the year
        year, month, day = numbers[1], _MONTHS.index(name[1].lower()) + 1, numbers[0]
    elif len(numbers) == 3:
        year, month, day = numbers if numbers[0] > 31 else (numbers[2], *numbers[:2][:: 1 if month_first else -1])
    else:
        return None
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return None
    hour, minute, second = (int(part or 0) for part in clock.groups()[:3]) if clock else (0, 0, 0)
    if clock and clock[4]:
        hour = hour % 12 + 12 * (clock[4].lower() == "p")
    return year, month, day, hour, minute, second
