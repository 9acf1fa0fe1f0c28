"""What reading gives: records, problems in their place, and a report of both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_PROBLEMS = 20  # messages kept of each kind, so that a report stays small


@dataclass
class LoadReport:
    """What a loader saw; filled while it runs.

    Attributes:
        records: records seen, damaged ones among them.
        damaged: how many were skipped, by kind.
        problems: the first messages of each kind, with file and line, element or row.
        formats: how many were read, by the name of their layout.
        lost_bytes: bytes of JSON text that belong to no whole record.
        bytes_done, bytes_total: progress in the files on disk; the total is None for datasets.
        where: the place of the record that was given out last.
        source: the number of its source, counted from 0.
    """

    records: int = 0
    damaged: Counter = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)
    formats: Counter = field(default_factory=Counter)
    lost_bytes: int = 0
    bytes_done: int = 0
    bytes_total: int | None = None
    where: str = ""
    source: int = 0

    def add_problem(self, kind: str, message: str) -> None:
        self.damaged[kind] += 1
        messages = self.problems.setdefault(kind, [])
        if len(messages) < MAX_PROBLEMS:
            messages.append(message)


@dataclass(frozen=True)
class Problem:
    """Why a record cannot be used: a kind, to count by, and a sentence."""

    kind: str
    text: str
    lost_bytes: int = 0
    records: int = 1  # 0 for what befalls a file, not a record


class Entry(NamedTuple):
    """A place of a source, as a person can find it (file and line, element or row), and what is there.

    Attributes:
        record: what was read; None where there is a problem.
        problem: why there is no record, or None.
    """

    where: str
    record: Any
    problem: Problem | None = None


class DamagedRecord(ValueError):
    """With ``strict``: the first record that cannot be used; the text has its place."""
