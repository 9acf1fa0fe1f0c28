"""Turns records into rows and keys: what `prepare` does with each record, in one process or in several.

A batch (spool.py) holds what is kept of some records, and their rows.

Most records take a fast path: `ordinary` reads them, `encode_whole` writes their interactions, and their keys are
made only if they are needed (merging.py). All others take the slow path: `RecordParser`, `extract_interactions`
and `encode_rows`. Both give the same for a record that can take either.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastsdpo.data.answers import CUT, RatingFollowups
from fastsdpo.data.filters import NO_TIME, ConversationFilter
from fastsdpo.data.interactions import Conversation, Interaction, extract_interactions
from fastsdpo.data.json_codec import encode_message
from fastsdpo.data.json_records import read_lines
from fastsdpo.data.loading import MAX_RECORD_BYTES, parse_entries
from fastsdpo.data.merging import whole_turns
from fastsdpo.data.ordinary import Ordinary, ordinary
from fastsdpo.data.output import encode_rows, encode_whole
from fastsdpo.data.readers.registry import RecordParser
from fastsdpo.data.record_fields import RecordFields
from fastsdpo.data.records import DamagedRecord, Entry, LoadReport
from fastsdpo.data.redaction import Redaction
from fastsdpo.data.sources import dataset_records, read_sources
from fastsdpo.data.spool import Batch


@dataclass(frozen=True)
class ReadOptions:
    """Settings of reading records; see `prepare`."""

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
    """A part of the sources for one process: a whole source, some lines of one, or a shard of one.

    Attributes:
        source: the number of the source.
        before: the size of the sources before it, in bytes.
        lines: (first byte, end, number of the first line), or None for the whole source.
        shard: the number of a shard of a Hugging Face dataset, or None for all shards.
    """

    item: Path | str
    source: int
    before: int
    lines: tuple[int, int, int] | None = None
    shard: int | None = None


@dataclass
class ReadReport(LoadReport):
    """A `LoadReport` that also counts what was dropped.

    Attributes:
        dropped: how many records a rule dropped, by rule.
        left_out: how many follow-ups are in no interaction, by reason.
        rating_followups: how many interactions have a text for a rating as follow-up.
    """

    dropped: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)
    rating_followups: int = 0

    def add(self, other: ReadReport) -> None:
        """Adds the report of what was read next."""
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


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Runs the garbage collector less often in the block: a long record's many objects are freed without it."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class BatchReader:
    """Reads sources, or pieces of them, into batches.

    Raises:
        DamagedRecord: with `strict`, at the first record that is damaged or holds no interaction.
        ValueError: the hook of `redact` failed; the text names the record.
    """

    def __init__(self, options: ReadOptions):
        self._options = options
        self._hook = None if options.redact is None else Redaction(options.redact)
        self._short = options.parser.is_plain and options.fields.is_empty and self._hook is None
        self._short = self._short and options.rules.max_history_messages is None
        self._first_source = 0

    def read_sources(self, items: list[Path | str], report: ReadReport) -> Iterator[Batch]:
        """Yields the batches of sources, one after another, to their end or the limit of records."""
        options = self._options
        columns = options.fields.columns
        entries = read_sources(items, report, options.config, options.split, MAX_RECORD_BYTES, columns, options.parser)
        return self._read(entries, report)

    def read_piece(self, piece: Piece, report: ReadReport) -> Iterator[Batch]:
        """Yields the batches of a piece."""
        self._first_source = piece.source
        if piece.shard is not None:
            options = self._options
            return self._read(dataset_records(piece.item, options.config, options.split, piece.shard), report)
        if piece.lines is None:
            return self.read_sources([piece.item], report)

        def progress(done: int) -> None:
            report.bytes_done = done

        return self._read(read_lines(Path(piece.item), piece.lines, progress, MAX_RECORD_BYTES), report)

    def _read(self, entries: Iterable[Entry], report: ReadReport) -> Iterator[Batch]:
        options, batch = self._options, Batch()
        for entry in entries:
            if options.limit is not None and report.records >= options.limit:
                break
            if self._keep_ordinary(entry, report, batch):
                if batch.is_full(report.records):
                    yield batch
                    batch = batch.next()
                continue
            for conversation in parse_entries((entry,), self._parse, report, strict=options.strict):
                self._keep(conversation, report, batch)
                if batch.is_full(report.records):
                    yield batch
                    batch = batch.next()
        yield batch

    def _keep_ordinary(self, entry: Entry, report: ReadReport, batch: Batch) -> bool:
        """Keeps or drops an ordinary record; False for others, with which nothing is done."""
        found = ordinary(entry.record) if self._short else None
        if found is None:
            return False
        report.where = entry.where
        report.records += 1
        report.formats[found.format] += 1
        reason = self._options.rules.reason_to_drop(found)
        if reason is None:
            self._keep_whole(self._name(found, report), found, found.encoded, found.first, batch)
        else:
            report.dropped[reason] += 1
        return True

    def _parse(self, record: Any) -> Iterable[Conversation]:
        found, fields = self._options.parser(record), self._options.fields
        return found if fields.is_empty else (fields.add_to(conversation, record) for conversation in found)

    def _keep(self, conversation: Conversation, report: ReadReport, batch: Batch) -> None:
        """Adds the rows of a conversation to the batch, where it has some to keep."""
        rules = self._options.rules
        if self._hook is not None:
            conversation = self._hook.redact(conversation, report.where)
        said, last = conversation.messages, len(conversation.messages) - 1
        if conversation.answer_fields.get(last, {}).get("left_out") == CUT and not conversation.single:
            batch.keys.add_cut(conversation)
        if self._options.rating_followups is not None:
            conversation = self._options.rating_followups.apply(conversation)
        reason = rules.reason_to_drop(conversation)
        if reason is None and self._options.eval_after is not None and conversation.facts["time"] is None:
            reason = NO_TIME
        if reason is not None:
            report.dropped[reason] += 1
            return
        name = self._name(conversation, report)
        if (first := _first_turn(conversation, rules.max_history_messages)) is not None:
            batch.keys.add_time(conversation, len(batch))
            encoded = [*map(encode_message, conversation.messages)]
            self._keep_whole(name, conversation, encoded, first, batch)
            return
        conversation = self._named(conversation, name)
        interactions = self._extract(conversation, report)
        if not interactions:
            return
        answers = sum(message["role"] == "assistant" for message in conversation.messages)
        rows = encode_rows(interactions, answers - 1 if conversation.single else 0, self._options.layout)
        if said is not conversation.messages:
            # By what was said it may begin a record in which the user did reply.
            conversation = replace(conversation, messages=said)
            report.rating_followups += 1
        batch.keys.add_time(conversation, len(batch))
        batch.add([rows], conversation, interactions)

    def _keep_whole(
        self, name: str, conversation: Conversation | Ordinary, encoded: list[bytes], first: int, batch: Batch
    ) -> None:
        """`_keep` of whole turns (`whole_turns`), of which the first user's message has the index `first`."""
        rows = encode_whole(name, encoded, first, conversation.fields, self._options.layout)
        count = (len(encoded) - first - 1) // 2
        batch.add_light(rows, count, name, conversation.messages, first)

    def _name(self, conversation: Conversation | Ordinary, report: ReadReport) -> str:
        """The conversation's id. The place where it was read, where it has none, keeps its interactions together."""
        name = os.path.basename(report.where) if conversation.id is None else conversation.id
        source = self._first_source + report.source
        # Another source may have given the same name to another record.
        return f"{source}/{name}" if source and conversation.own_id else name

    def _named(self, conversation: Conversation, name: str) -> Conversation:
        """The conversation with ids."""
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


def _first_turn(conversation: Conversation, max_history_messages: int | None) -> int | None:
    """`whole_turns` of a conversation that was read the long way; None where rows need more than that."""
    messages = conversation.messages
    if conversation.single or conversation.answer_fields or max_history_messages is not None or not messages:
        return None
    return whole_turns([m["role"] for m in messages], [m["content"] for m in messages])
