"""Loads conversations and interactions from files and datasets, one at a time, in bounded memory.

    expand_source -> read_sources -> parse_entries

The first two (sources.py) turn files and datasets into entries: each is a record, or a problem in place of one.
layouts.py knows what a record can look like. Problems are counted and skipped, or raised with ``strict``; their
text names file and line, element or row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from fastsdpo.data.interactions import Conversation, Interaction
from fastsdpo.data.layouts import parse_conversation as parse_conversation
from fastsdpo.data.layouts import parse_interaction as parse_interaction
from fastsdpo.data.readers.registry import RecordParser
from fastsdpo.data.records import MAX_PROBLEMS, Entry, Problem
from fastsdpo.data.records import DamagedRecord as DamagedRecord
from fastsdpo.data.records import LoadReport as LoadReport
from fastsdpo.data.sources import SUFFIXES as SUFFIXES
from fastsdpo.data.sources import expand_source as expand_source
from fastsdpo.data.sources import is_data as is_data
from fastsdpo.data.sources import read_sources

logger = logging.getLogger("fastsdpo.data")

MAX_RECORD_BYTES = 16 << 20

Parsed = TypeVar("Parsed")


def load_conversations(
    source: str | PathLike | Iterable[str | PathLike],
    *,
    strict: bool = False,
    report: LoadReport | None = None,
    config: str | None = None,
    split: str = "train",
    max_record_bytes: int = MAX_RECORD_BYTES,
    parser: RecordParser | None = None,
) -> Iterator[Conversation]:
    """Reads conversations one at a time, in bounded memory.

    Args:
        source: a file (JSON array, JSON Lines, CSV, TSV, Parquet; ``.gz`` or ``.zst`` of all but the
            last), a folder, a glob, a Hugging Face dataset name (streamed), or several of these. The
            layout of each record is told by its keys: OpenAI (``messages``), WildChat and WildFeedback
            (``conversation``), ShareGPT (``conversations``, ``from``/``value``), a bare list of messages,
            an interaction row (``prompt``, ``completion``, ``user_response``), and those in
            ``docs/data.md``. A system prompt beside the messages (``system``, ``system_prompt``, ...) is
            their first message; a record that has two different ones is damaged.
        strict: stop at the first damaged record.
        report: filled with counts and messages while reading.
        config, split: of a Hugging Face dataset.
        max_record_bytes: a longer JSON record is damaged.
        parser: a `fastsdpo.data.RecordParser`, to name the layout or say where a record has its fields; None
            finds the layout of each record by its keys.

    Raises:
        FileNotFoundError: the source does not exist.
        DamagedRecord (a ValueError): with `strict`; the text names file and line, element or row.
        ImportError: a package that the format needs is missing.
    """
    seen = LoadReport() if report is None else report
    parser = RecordParser() if parser is None else parser
    entries = read_sources(expand_source(source), seen, config, split, max_record_bytes, parser=parser)
    return parse_entries(entries, parser, seen, strict=strict, log=report is None)


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
    seen = LoadReport() if report is None else report
    entries = read_sources(expand_source(source), seen, None, "train", max_record_bytes)
    return parse_entries(entries, lambda row: (parse_interaction(row),), seen, strict=strict, log=report is None)


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) for a file of JSON or Parquet, whatever its layout, one at a time.

    Raises:
        DamagedRecord (a ValueError): a text in the file is not a record; the message names its place.
        ImportError: a package that the format needs is missing.
    """
    for where, record, problem in read_sources(expand_source(path), LoadReport(), None, "train", MAX_RECORD_BYTES):
        if problem is not None:
            raise DamagedRecord(f"{where}: {problem.text}")
        yield where, record


def parse_entries(
    entries: Iterable[Entry],
    parse: Callable[[Any], Iterable[Parsed]],
    report: LoadReport,
    *,
    strict: bool,
    log: bool = False,
) -> Iterator[Parsed]:
    """Yields what `parse` returns for each record, and counts records and problems in the report.

    Args:
        parse: returns the items in a record, often one. If it raises TypeError or ValueError, the record counts
            as a problem.
        strict: stop at the first problem.
        log: log problems as warnings, for callers that do not read the report.

    Raises:
        DamagedRecord: with `strict`, at the first problem; the text names its place.
    """
    for where, record, problem in entries:
        report.where = where
        counted = False
        if problem is None:
            try:
                for parsed in parse(record):
                    if not counted:
                        counted = True
                        report.records += 1
                        report.formats[getattr(parsed, "format", "")] += 1
                    yield parsed
                continue
            except (TypeError, ValueError) as error:
                problem = Problem(getattr(error, "kind", "wrong layout"), str(error))
        report.records += 0 if counted else problem.records
        message = f"{where}: {problem.text}"
        if strict:
            raise DamagedRecord(message)
        report.lost_bytes += problem.lost_bytes
        report.add_problem(problem.kind, message)
        if log and report.damaged[problem.kind] <= MAX_PROBLEMS:
            logger.warning("skipped: %s", message)
