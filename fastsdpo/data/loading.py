"""Conversations from files and datasets, one at a time, in bounded memory.

Every source becomes a stream of events ``(where, record, problem, position)``: a record that was
read, or a problem with a place that a person can find (file and line, element or row). Problems are
counted and skipped, or, with ``strict``, raised. Position is where to go on after this event, so an
interrupted reader can continue (`fastsdpo prepare` does).

JSON is split into records before it is parsed: lines for JSON Lines, and for an array (or objects
one after another) a scan for the brace that closes each element. So one damaged record costs itself:
its text is left out and the next whole record after it is found again, an array that was cut off
gives everything that is whole in it, and nothing larger than a record is ever in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from fastsdpo.data.interactions import Conversation, Interaction
from fastsdpo.data.layouts import parse_conversation as parse_conversation
from fastsdpo.data.layouts import parse_interaction as parse_interaction
from fastsdpo.data.records import MAX_PROBLEMS, Event, Problem
from fastsdpo.data.records import DamagedRecord as DamagedRecord
from fastsdpo.data.records import LoadReport as LoadReport
from fastsdpo.data.sources import SUFFIXES as SUFFIXES
from fastsdpo.data.sources import events
from fastsdpo.data.sources import expand_source as expand_source
from fastsdpo.data.sources import is_data as is_data

logger = logging.getLogger("fastsdpo.data")

MAX_RECORD_BYTES = 16 << 20


def load_conversations(
    source: str | PathLike | Iterable[str | PathLike],
    *,
    strict: bool = False,
    report: LoadReport | None = None,
    config: str | None = None,
    split: str = "train",
    max_record_bytes: int = MAX_RECORD_BYTES,
    position: dict | None = None,
) -> Iterator[Conversation]:
    """Reads conversations one at a time, in bounded memory.

    Args:
        source: a file (JSON array, JSON Lines, Parquet; ``.gz`` or ``.zst`` of the first two), a
            folder, a glob, a Hugging Face dataset name (streamed), or several of these. The layout
            of each record is told by its keys: OpenAI (``messages``), WildChat and WildFeedback
            (``conversation``), ShareGPT (``conversations``, ``from``/``value``), a bare list of
            messages, or an interaction row (``prompt``, ``completion``, ``user_response``). A system
            prompt beside the messages (``system``, ``system_prompt``, ...) is their first message; a
            record that has two different ones is damaged.
        strict: stop at the first damaged record.
        report: filled with counts and messages while reading.
        config, split: of a Hugging Face dataset.
        max_record_bytes: a longer JSON record is damaged.
        position: go on after ``report.position`` of an earlier run over the same sources.

    Raises:
        FileNotFoundError: nothing is there.
        DamagedRecord (a ValueError): with `strict`; the text names file and line, element or row.
        ImportError: a package that the format needs is missing.
    """
    return _load(
        events(source, report, config, split, max_record_bytes, position),
        parse_conversation,
        strict,
        report,
    )


def load_interactions(
    source: str | PathLike | Iterable[str | PathLike],
    *,
    strict: bool = True,
    report: LoadReport | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Interaction]:
    """Reads interaction rows, as `fastsdpo prepare` writes them, one at a time.

    A row has ``prompt`` (a list of messages), ``completion`` and ``user_response`` (messages), each
    message ``{"role", "content"}`` or ``{"from", "value"}``; ``id`` and ``conversation_id`` are
    kept, a system prompt beside the prompt (``system``, ...) is its first message, other keys are
    ignored. Arguments and errors are those of `load_conversations`; here
    `strict` is the default, since a prepared file has no damaged rows.
    """
    return _load(
        events(source, report, None, "train", max_record_bytes, None),
        parse_interaction,
        strict,
        report,
    )


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file of JSON or Parquet, whatever its layout, one at a time.

    Raises:
        DamagedRecord (a ValueError): the first text that is no record, with its place.
        ImportError: a package that the format needs is missing.
    """
    for where, record, problem, _ in events(path, None, None, "train", MAX_RECORD_BYTES, None):
        if problem is not None:
            raise DamagedRecord(f"{where}: {problem.text}")
        yield where, record


def _load(
    events: Iterator[Event],
    parse: Callable[[Any], Any],
    strict: bool,
    report: LoadReport | None,
) -> Iterator[Any]:
    log = report is None  # nobody else will tell
    report = LoadReport() if report is None else report
    for where, record, problem, position in events:
        parsed = None
        if problem is None:
            try:
                parsed = parse(record)
            except (TypeError, ValueError) as error:
                problem = Problem("wrong layout", str(error))
        report.records += 1 if problem is None else problem.records
        report.where, report.position = where, position
        if problem is None:
            yield parsed
            continue
        message = f"{where}: {problem.text}"
        if strict:
            raise DamagedRecord(message)
        report.lost_bytes += problem.lost_bytes
        report.add_problem(problem.kind, message)
        if log and report.damaged[problem.kind] <= MAX_PROBLEMS:
            logger.warning("skipped: %s", message)
