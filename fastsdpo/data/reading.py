"""Records -> rows and keys: what `prepare` does with each record, in one process or in several.

A batch (spool.py) holds what is kept of some records; their rows are in a file before it is given out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastsdpo.data.answers import RatingFollowups
from fastsdpo.data.filters import NO_TIME, ConversationFilter
from fastsdpo.data.interactions import Conversation, Interaction, extract_interactions, is_blank
from fastsdpo.data.json_records import read_lines
from fastsdpo.data.loading import MAX_RECORD_BYTES, parse_entries
from fastsdpo.data.output import encode_rows, encode_whole
from fastsdpo.data.readers.registry import RecordParser
from fastsdpo.data.record_fields import RecordFields
from fastsdpo.data.records import DamagedRecord, Entry, LoadReport
from fastsdpo.data.redaction import Redaction
from fastsdpo.data.sources import read_sources
from fastsdpo.data.spool import Batch

BATCH_BYTES, BATCH_RECORDS = 1 << 20, 1000  # of rows; of records, kept or not


@dataclass(frozen=True)
class ReadOptions:
    """How records are read; see `prepare`."""

    rules: ConversationFilter
    limit: int | None
    config: str | None
    split: str
    strict: bool
    redact: str | None
    fields: RecordFields
    eval_after: float | None
    layout: str
    parser: RecordParser = field(default_factory=RecordParser)
    rating_followups: RatingFollowups | None = None


class Piece(NamedTuple):
    """A part of the sources: one of them, or some lines of one.

    Attributes:
        source: the number of the source.
        before: bytes of the sources before it.
        lines: (first byte, end, number of the first line), or None for the whole source.
    """

    item: Path | str
    source: int
    before: int
    lines: tuple[int, int, int] | None = None


@dataclass
class ReadReport(LoadReport):
    """A `LoadReport`, and what was dropped.

    Attributes:
        dropped: records that a rule dropped, by rule.
        left_out: follow-ups that are in no interaction, by reason.
        rating_followups: interactions whose follow-up is a rating's wording.
    """

    dropped: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)
    rating_followups: int = 0

    def add(self, other: ReadReport) -> None:
        """Adds what was read next."""
        self.records += other.records
        self.lost_bytes += other.lost_bytes
        self.dropped.update(other.dropped)
        self.left_out.update(other.left_out)
        self.formats.update(other.formats)
        self.rating_followups += other.rating_followups
        for kind, messages in other.problems.items():
            for message in messages:
                self.add_problem(kind, message)
            self.damaged[kind] += other.damaged[kind] - len(messages)


class BatchReader:
    """Sources, or pieces of them -> batches.

    Args:
        rows: where the rows go.

    Raises:
        DamagedRecord: with `strict`, at the first record that is damaged or holds no interaction.
        ValueError: the hook of `redact` failed; the text names the record.
    """

    def __init__(self, options: ReadOptions, rows: BinaryIO):
        self._options, self._file = options, rows
        self._hook = None if options.redact is None else Redaction(options.redact)
        self._first_source = self._kept = 0

    def read_sources(self, items: list[Path | str], report: ReadReport) -> Iterator[Batch]:
        """The batches of sources, one after another, to their end or the limit of records."""
        options = self._options
        columns = options.fields.columns
        entries = read_sources(items, report, options.config, options.split, MAX_RECORD_BYTES, columns, options.parser)
        return self._read(entries, report)

    def read_piece(self, piece: Piece, report: ReadReport) -> Iterator[Batch]:
        """The batches of a piece."""
        self._first_source = piece.source
        if piece.lines is None:
            return self.read_sources([piece.item], report)

        def progress(done: int) -> None:
            report.bytes_done = done

        return self._read(read_lines(Path(piece.item), piece.lines, progress, MAX_RECORD_BYTES), report)

    def _read(self, entries: Iterable[Entry], report: ReadReport) -> Iterator[Batch]:
        options = self._options
        batch, rows, size = Batch(), [], 0
        for conversation in parse_entries(entries, self._parse, report, strict=options.strict, limit=options.limit):
            new = self._keep(conversation, report, batch)
            is_full = report.records % BATCH_RECORDS == 0
            if new:
                rows.append(new)
                size += len(new)
                self._kept += 1
                # Where reading may end early, that is looked at when their number is a power of two.
                is_full = is_full or size >= BATCH_BYTES or not self._kept & (self._kept - 1)
            if is_full:
                self._write(rows)
                yield batch
                batch, rows, size = Batch(), [], 0
        self._write(rows)
        yield batch

    def _parse(self, record: Any) -> Iterable[Conversation]:
        found, fields = self._options.parser(record), self._options.fields
        return found if fields.is_empty else (fields.add_to(conversation, record) for conversation in found)

    def _write(self, rows: list[bytes]) -> None:
        self._file.write(b"".join(rows))
        self._file.flush()

    def _keep(self, conversation: Conversation, report: ReadReport, batch: Batch) -> bytes:
        """The rows of a conversation, which is added to the batch; empty where it has none to keep."""
        rules, layout = self._options.rules, self._options.layout
        if self._hook is not None:
            conversation = self._hook.redact(conversation, report.where)
        said = conversation.messages
        if self._options.rating_followups is not None:
            conversation = self._options.rating_followups.apply(conversation)
        reason = rules.reason_to_drop(conversation)
        if reason is None and self._options.eval_after is not None and conversation.facts["time"] is None:
            reason = NO_TIME
        if reason is not None:
            report.dropped[reason] += 1
            return b""
        conversation = self._named(conversation, report)
        if (found := _whole_turns(conversation, rules.max_history_messages)) is not None:
            count = found[1]
            rows = encode_whole(conversation, *found, layout)
            batch.keys.add_whole(conversation, *found)
        else:
            interactions = self._extract(conversation, report)
            count = len(interactions)
            if not count:
                return b""
            answers = sum(message["role"] == "assistant" for message in conversation.messages)
            rows = encode_rows(interactions, answers - 1 if conversation.single else 0, layout)
            if said is not conversation.messages:
                # By what was said it may begin a record in which the user did reply.
                conversation = replace(conversation, messages=said)
                report.rating_followups += 1
            batch.keys.add(conversation, interactions)
        batch.add(len(rows), count, conversation.single)
        return rows

    def _named(self, conversation: Conversation, report: ReadReport) -> Conversation:
        """The conversation with ids."""
        name, source = conversation.id, self._first_source + report.source
        if name is None:
            # The place where it was read names it, so that its interactions stay together.
            name = os.path.basename(report.where)
        if source and conversation.own_id:
            # Another source may have given the same name to another record.
            name = f"{source}/{name}"
        if name is not conversation.id:
            conversation = replace(conversation, id=name)
        if conversation.single and conversation.interaction_id is None:
            turns = sum(message["role"] == "assistant" for message in conversation.messages)
            conversation = replace(conversation, interaction_id=f"{name}:{turns - 1}")
        return conversation

    def _extract(self, conversation: Conversation, report: ReadReport) -> list[Interaction]:
        """`extract_interactions`; where there are none, that is a problem of the record."""
        left_out: Counter = Counter()
        interactions = extract_interactions(
            conversation, max_history_messages=self._options.rules.max_history_messages, left_out=left_out
        )
        report.left_out.update(left_out)
        if not interactions:
            kind, problem = "no follow-up", "no answer is followed by a user's message"
            if left_out:
                kind = problem = f"nothing but follow-ups {' and '.join(left_out)}"
            message = f"{report.where}: {problem}"
            if self._options.strict:
                raise DamagedRecord(message)
            report.add_problem(kind, message)
        return interactions


def _whole_turns(conversation: Conversation, max_history_messages: int | None) -> tuple[int, int] | None:
    """(number of the first user's message, number of interactions) of most conversations, which need no
    look at single messages: user and assistant take turns, none is silent, and whole histories are kept."""
    messages = conversation.messages
    if conversation.single or conversation.answer_fields or max_history_messages is not None:
        return None
    roles = [message["role"] for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    count = (len(roles) - first - 1) // 2
    if count < 1 or roles[first:] != (["user", "assistant"] * (count + 1))[: len(roles) - first]:
        return None
    for message in messages[first:]:
        text = message["content"]
        if not "!" <= text[:1] <= "~" and is_blank(text):
            return None
    return first, count
