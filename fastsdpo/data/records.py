"""What readers yield: records, problems in place of records, and a report of both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# How files begin that hold no text, or text in another way; bytes that are not UTF-8 are lone surrogates.
_NOT_TEXT = (
    ("\udcff\udcfe", "UTF-16 text; save it as UTF-8"),
    ("\udcfe\udcff", "UTF-16 text; save it as UTF-8"),
    ("[\0", "UTF-16 text; save it as UTF-8"),
    ("{\0", "UTF-16 text; save it as UTF-8"),
    ("PK\3\4", "a ZIP file; unpack it"),
    ("\x1f\udc8b", "compressed by gzip; give its name the ending .gz"),
    ("(\udcb5/\udcfd", "compressed by zstd; give its name the ending .zst"),
    ("BZh91AY", "compressed by bzip2; unpack it"),
    ("PAR1", "a Parquet file; give its name the ending .parquet"),
)
MAX_PROBLEMS = 20  # messages kept of each kind, so that a report stays small


@dataclass
class LoadReport:
    """What a loader has read; it is filled while the loader runs.

    Attributes:
        records: how many records were seen, damaged ones included.
        damaged: how many records were skipped, by kind of problem.
        problems: the first error messages of each kind, with file and line, element or row.
        formats: how many records were read, by the name of their layout.
        lost_bytes: how many bytes of JSON text belong to no whole record.
        bytes_done, bytes_total: progress in the files on disk, in bytes; the total is None for datasets.
        where: the place of the record that was yielded last.
        source: the number of that record's source, counted from 0.
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
    """Says why a record cannot be used: a kind to count by, and a sentence."""

    kind: str
    text: str
    lost_bytes: int = 0
    records: int = 1  # 0 for what befalls a file, not a record


class Entry(NamedTuple):
    """A place in a source, named so that a person can find it (file and line, element or row), and what is there.

    Attributes:
        record: what was read; None where there is a problem.
        problem: why there is no record, or None.
    """

    where: str
    record: Any
    problem: Problem | None = None


class GroupedRows(dict):
    """A record made of rows: ``{"name": ..., "rows": [...]}``, where the name is the conversation's id."""


class DamagedRecord(ValueError):
    """Raised with ``strict`` for the first record that cannot be used; the text names its place."""


def why_no_text(start: str) -> str | None:
    """Says why a file that begins so cannot be read as text, and what helps; None if it can."""
    return next((why for begin, why in _NOT_TEXT if start.startswith(begin)), None)
