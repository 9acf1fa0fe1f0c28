"""Selects from WildChat and WildFeedback as the code published with the paper does.

Its rules are those of https://github.com/lasgroup/user_interactions (2026-02), rebuilt, including those that
lose or bend something (docs/paper-data.md says which, and what the presets ``wildchat`` and
``wildfeedback`` do in their place):

- Only the data set's own form is read: WildChat's ``role``/``content``, WildFeedback's ``from``/``value``.
  Messages of other speakers are passed over, and what stands on both sides of them moves together.
- WildChat's texts lose the white space around them, and messages without text are passed over, before
  anything is counted. WildFeedback's stay as they are.
- A history is the last messages, from the first user's among them on; of several messages of one speaker
  in a row the first is kept. WildChat's must end with a user's message.
- Conversations are taken in the order in which `datasets` shuffles the rows of the whole data set. One in
  which no interaction is found counts among the wanted number.

Nothing is merged: a conversation that is there twice is taken twice. The order is known only when all sources
have been read; until then kept rows lie in temporary files (spool.py). Memory holds some 50 bytes for each kept
record and, while the order is made, some 25 bytes for each record that was read.
"""

from __future__ import annotations

import itertools
import reprlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from fastsdpo.data.filters import NO_TIME
from fastsdpo.data.interactions import Conversation, Interaction
from fastsdpo.data.layouts import CONVERSATION_ID_KEYS
from fastsdpo.data.loading import MAX_RECORD_BYTES, parse_entries
from fastsdpo.data.output import encode_rows
from fastsdpo.data.reading import ReadOptions, ReadReport
from fastsdpo.data.redaction import Redaction
from fastsdpo.data.sources import read_sources
from fastsdpo.data.spool import Batch
from fastsdpo.lazy import needed

if TYPE_CHECKING:
    from pathlib import Path

    from fastsdpo.data.filters import ConversationFilter
    from fastsdpo.data.progress import ProgressBar
    from fastsdpo.data.spool import Spool

OTHER = "other"  # the role of messages that are passed over, where they count for the limits
WILDCHAT_ROLES = {"user": "user", "assistant": "assistant"}
WILDFEEDBACK_ROLES = {"human": "user", "gpt": "assistant"}

# Why follow-ups are left out; the last two the published preparation keeps, in rows that cannot be read.
NO_QUESTION = "to an answer without a question"
ENDS_WITH_ANSWER = "with a history that ends with an answer"
NO_ANSWER = "to an answer without text"


def parse_published(record: Any, data_set: str) -> Conversation:
    """Parses a record of WildChat or WildFeedback into the messages that the rules count.

    Args:
        data_set: ``"wildchat"`` or ``"wildfeedback"``.

    Raises:
        TypeError, ValueError: it is not such a record, or a message is not text; the text says which.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"a record must be a JSON object, got {type(record).__name__}")
    wildchat = data_set == "wildchat"
    keys = ("conversation",) if wildchat else ("conversations", "conversation")
    if not any(key in record for key in keys):
        raise TypeError(
            f"a record must have {' or '.join(keys)}, got the keys {', '.join(map(reprlib.repr, list(record)[:8]))}"
        )
    found = next((record[key] for key in keys if record.get(key)), [])
    if not isinstance(found, (list, tuple)):
        raise TypeError(f"{keys[-1]} must be a list of messages, got {type(found).__name__}")
    speaker, text = ("role", "content") if wildchat else ("from", "value")
    if found and not any(isinstance(message, Mapping) and message.get(speaker) for message in found):
        raise TypeError(
            f"{keys[-1]} must have messages with {speaker!r} and {text!r}: the preset paper-{data_set} reads no "
            f"others; the preset {data_set} does"
        )
    read = _wildchat_messages if wildchat else _wildfeedback_messages
    texts = [(_text(m, speaker, place), _text(m, text, place)) for place, m in enumerate(found)]
    language = record.get("language")
    name = next((record[key] for key in CONVERSATION_ID_KEYS if isinstance(record.get(key), str)), None)
    name = name.encode(errors="replace").decode() if wildchat and name else None
    return Conversation(
        list(read(texts)), name, language if isinstance(language, str) else None, format=f"paper-{data_set}"
    )


def _text(message: Any, key: str, place: int) -> str:
    value = message.get(key) if isinstance(message, Mapping) else message
    if not isinstance(message, Mapping) or (value and not isinstance(value, str)):
        raise TypeError(f"message {place}: {key} must be text, got {type(value).__name__}")
    text = value or ""
    if not text.isascii():
        text.encode()  # a lone surrogate is a ValueError
    return text


def _wildchat_messages(texts: list[tuple[str, str]]) -> Iterator[dict]:
    for speaker, text in texts:
        role = WILDCHAT_ROLES.get(speaker.strip().lower())
        if role is not None and text.strip():
            yield {"role": role, "content": text.strip()}


def _wildfeedback_messages(texts: list[tuple[str, str]]) -> Iterator[dict]:
    for speaker, text in texts:
        yield {"role": WILDFEEDBACK_ROLES.get(speaker, OTHER), "content": text}


def published_interactions(
    conversation: Conversation, max_history_messages: int | None, left_out: Counter, *, wildchat: bool
) -> list[Interaction]:
    """Returns the interactions of a conversation from `parse_published`; ids are ``<conversation>_<message>``."""
    messages, interactions = conversation.messages, []
    for place, (answer, followup) in enumerate(itertools.pairwise(messages)):
        if (answer["role"], followup["role"]) != ("assistant", "user"):
            continue
        prompt = _history(messages[:place], max_history_messages)
        if not prompt or (wildchat and prompt[-1]["role"] != "user"):
            left_out[NO_QUESTION] += 1
        elif prompt[-1]["role"] != "user":
            left_out[ENDS_WITH_ANSWER] += 1
        elif not answer["content"]:
            left_out[NO_ANSWER] += 1
        else:
            name = f"{conversation.id}_{place}"
            texts = answer["content"], followup["content"]
            interactions.append(Interaction(prompt, *texts, name, conversation.id, conversation.fields))
    return interactions


def _history(messages: list[dict], most: int | None) -> list[dict]:
    """The last so many messages with a text, from a user's on; of those of one speaker in a row, the first."""
    said = [message for message in messages if message["role"] != OTHER and message["content"].strip()]
    said = said[len(said) - most :] if most is not None and most < len(said) else said
    kept: list[dict] = []
    for message in said:
        if message["role"] == "user" if not kept else message["role"] != kept[-1]["role"]:
            kept.append(message)
    return kept


class Job(Protocol):
    """The attributes of a `prepare` run that the reader needs."""

    items: list[Path | str]
    rules: ConversationFilter
    seed: int
    options: ReadOptions


class PublishedReader:
    """Reads sources into the spool, for filters with `published` set.

    Attributes:
        report: what was read, and what of it is not in the spool, by reason.
        places: for each record in the spool, its number among all records that were read.
    """

    def __init__(self, job: Job, spool: Spool):
        self.job, self.spool = job, spool
        self.report = ReadReport()
        self._redaction = None if job.options.redact is None else Redaction(job.options.redact)
        self.places = array("Q")

    def read(self, bar: ProgressBar) -> None:
        """Reads the sources to their end: the order is that of all records, kept or not."""
        options, report = self.job.options, self.report
        columns = options.fields.columns
        entries = read_sources(self.job.items, report, options.config, options.split, MAX_RECORD_BYTES, columns)
        for conversation in parse_entries(entries, self._parse, report, strict=options.strict):
            self._keep(conversation, report.records - 1)
            bar.update()
            if options.limit is not None and report.records >= options.limit:
                return

    def _parse(self, record: Any) -> tuple[Conversation]:
        return (self.job.options.fields.add_to(parse_published(record, str(self.job.rules.published)), record),)

    def _keep(self, conversation: Conversation, place: int) -> None:
        rules, wildchat = self.job.rules, self.job.rules.published == "wildchat"
        if self._redaction is not None:
            conversation = self._redaction.redact(conversation, self.report.where)
        reason = rules.reason_to_drop(conversation)
        if reason is None and self.job.options.eval_after is not None and conversation.facts["time"] is None:
            reason = NO_TIME
        if reason is None and not conversation.messages:
            reason = "no messages"
        if reason is not None:
            self.report.dropped[reason] += 1
            return
        if conversation.id is None:
            conversation = replace(conversation, id=str(place))
        interactions = published_interactions(
            conversation, rules.max_history_messages, self.report.left_out, wildchat=wildchat
        )
        rows, batch = encode_rows(interactions, 0, self.job.options.layout), Batch()
        batch.keys.add_time(conversation, 0)
        batch.add([rows], conversation, interactions)
        self.spool.add(batch)
        self.places.append(place)

    def order(self) -> array:
        """Returns the numbers of the spool's records in the order in which they are taken."""
        if not self.job.rules.shuffle:
            return array("I", range(len(self.places)))
        with needed("numpy", "a preset of the paper"):
            import numpy
        # `datasets.Dataset.shuffle(seed)`: row n of the shuffled data set is row permutation[n].
        permutation = numpy.random.default_rng(self.job.seed).permutation(self.report.records)
        records = numpy.full(self.report.records, -1, dtype=numpy.int64)
        records[numpy.asarray(self.places, dtype=numpy.int64)] = numpy.arange(len(self.places))
        records = records[permutation]
        order = array("I")
        order.frombytes(records[records >= 0].astype(numpy.uint32).tobytes())
        return order
