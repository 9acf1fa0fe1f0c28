"""Writes the output files of `prepare` from its spool, the temporary files with what was read."""

from __future__ import annotations

import contextlib
import json
import os
import random
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastsdpo.data.answers import CUT
from fastsdpo.data.filters import ConversationFilter
from fastsdpo.data.interactions import Interaction
from fastsdpo.data.json_codec import encode, encode_message
from fastsdpo.data.merging import CUT_OFF, TWICE, Merged
from fastsdpo.data.spool import Spool


@dataclass
class PrepareReport:
    """What `prepare` did; it is written as JSON beside the output.

    Attributes:
        output, eval_output: the paths of the files; eval_output is None if nothing was held out.
        conversations, interactions: how many were written to `output`; eval_*: to `eval_output`.
        merged_records: how many kept records were joined to another record's conversation, and so are not
            counted in `conversations`.
        duplicate_interactions: how many interactions were left out because an equal one (same prompt, answer
            and follow-up), or a longer record of the same conversation, is there.
        left_out: how many follow-ups of kept records are in no interaction, by reason; counted before
            records are merged, but for those to an answer of which another record says that it was cut off.
        formats: how many records were read, by the name of their layout.
        rating_followups: how many interactions have a text for a rating as follow-up; counted before merging.
        sizes: the sizes of the files in bytes.
        dropped: how many records a rule dropped, by rule, and how many conversations exceeded a maximum.
        records, damaged, problems, lost_bytes: as in `LoadReport`.
        settings: all settings that decide the result.
        already_done: True if an earlier run with these settings wrote the files, so that nothing was done.
    """

    output: str
    eval_output: str | None
    conversations: int = 0
    interactions: int = 0
    eval_conversations: int = 0
    eval_interactions: int = 0
    merged_records: int = 0
    duplicate_interactions: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    rating_followups: int = 0
    sizes: list[int] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    records: int = 0
    damaged: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    lost_bytes: int = 0
    settings: dict = field(default_factory=dict)
    already_done: bool = False


class NothingKept(Exception):
    """Raised if there is no interaction to write; the files are as before."""


WRITTEN_BYTES = 1 << 20  # at a time: small writes take half as long again

_ROW = b'{"id":%b,"conversation_id":%b,"turn_id":%d,"prompt":['
_ROW_START, _ROW_MIDDLE, _PROMPT = b'{"id":%b:', b'","conversation_id":%b,"turn_id":', b',"prompt":['
_END = b"}\n"
# Around the answer, by the layout of rows.
_ANSWERS = {
    "fastsdpo": (b'],"completion":', b',"user_response":'),
    "trl": (b'],"completion":[', b'],"user_response":'),
}
LAYOUTS = tuple(_ANSWERS)
TRL_KEYS = {"chosen", "rejected", "image", "images", "input_ids", "labels"}  # make other data of a row for TRL


def encode_rows(interactions: list[Interaction], first_turn: int, layout: str = "fastsdpo") -> bytes:
    """Returns a conversation's interactions as JSON lines. A message in many interactions is encoded once.

    Args:
        first_turn: the number of the first interaction within its conversation.
        layout: "trl" writes the answer as a list of one message, which TRL's trainers read.
    """
    encoded: dict[tuple[str, str], bytes] = {}

    def message(role: str, content: str) -> bytes:
        data = encoded.get((role, content))
        if data is None:
            data = encoded[role, content] = encode_message({"role": role, "content": content})
        return data

    before, after = _ANSWERS[layout]
    parts: list[bytes] = []
    for turn, item in enumerate(interactions, first_turn):
        prompt = b",".join([message(m["role"], m["content"]) for m in item.prompt])
        parts += (_ROW % (encode(item.id), encode(item.conversation_id), turn), prompt, before)
        parts += (message("assistant", item.completion), after, message("user", item.followup))
        parts += (_encode_fields(item.fields), _END)
    return b"".join(parts)


def encode_whole(name: str, encoded: list[bytes], first: int, fields: Mapping[str, Any], layout: str) -> list[bytes]:
    """Does what `encode_rows` does for a conversation of whole turns; returns parts of bytes to be joined.

    The interactions are ``(messages[:t], messages[t], messages[t + 1])`` for ``t = first + 1, first + 3, ...``;
    their ids are ``name:0``, ``name:1``, ...

    Args:
        encoded: the messages as JSON.
        first: the index of the first user's message.
        fields: further fields of each row.
    """
    quoted, end = encode(name), _encode_fields(fields) + _END if fields else _END
    start, middle = _ROW_START % quoted[:-1], _ROW_MIDDLE % quoted
    before, after = _ANSWERS[layout]
    with_commas: list[bytes] = []
    for message in encoded:
        with_commas += (message, b",")
    parts: list[bytes] = []
    for turn, answer in enumerate(range(first + 1, len(encoded) - 1, 2)):
        number = b"%d" % turn
        parts += (start, number, middle, number, _PROMPT, *with_commas[: 2 * answer - 1])
        parts += (before, encoded[answer], after, encoded[answer + 1], end)
    return parts


def _encode_fields(fields: Mapping[str, Any]) -> bytes:
    return b"".join([b",%b:%b" % (encode(name), encode(value)) for name, value in fields.items()])


def write_outputs(
    spool: Spool,
    outputs: list[Path],
    rules: ConversationFilter,
    seed: int,
    eval_fraction: float,
    result: PrepareReport,
    *,
    eval_after: float | None = None,
    order: array | None = None,
) -> None:
    """Copies the spool to the outputs in the final order, and counts in `result`.

    Args:
        eval_after: holds out records from this time on (seconds since 1970), in place of a fraction.
        order: the order of all records of the spool, none of which is merged. None: records are merged into
            conversations, which `rules` order.

    Raises:
        NothingKept: there is no interaction to write.
    """
    merged = spool.merge(join=order is None)
    kept = merged.kept  # of each conversation, which the number of its first record stands for
    if cut_off := merged.left_out.count(CUT_OFF):
        result.left_out[CUT] = result.left_out.get(CUT, 0) + cut_off
    if order is None:
        order = array("I", (record for record in range(len(kept)) if kept[record]))
        result.merged_records = len(kept) - len(order) - (_count_cut_whole(spool, merged) if cut_off else 0)
        if rules.shuffle:
            random.Random(seed).shuffle(order)
    result.duplicate_interactions = merged.left_out.count(TWICE)
    order = _wanted(order, kept, rules, result)
    if not order:
        raise NothingKept
    if eval_after is not None:
        order, held_out = _from_then_on(merged, order, spool.times(), eval_after, result)
    else:
        held_out = _held_out(merged.families, order, eval_fraction, seed)
    changed = any(merged.left_out) or merged.renamed
    if order and len(outputs) == 1 and not changed and order == array("I", range(len(kept))):
        result.conversations, result.interactions = len(order), sum(kept)
        rows = spool.release_rows()
        with open(rows, "r+b") as file:
            os.fsync(file.fileno())
        replace_durably(rows, outputs[0])
        return
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(atomic_file(path)) for path in outputs]
        for conversation in order:
            data = _conversation_rows(spool, merged, conversation)
            if merged.families[conversation] in held_out:
                files[1].write(data)
                result.eval_conversations += 1
                result.eval_interactions += kept[conversation]
            else:
                files[0].write(data)
                result.conversations += 1
                result.interactions += kept[conversation]


def _count_cut_whole(spool: Spool, merged: Merged) -> int:
    """How many conversations have nothing left, as their answers were cut off."""
    starts, own = spool.starts, merged.conversations
    return sum(
        1
        for record in range(len(own))
        if own[record] == record
        and not merged.kept[record]
        and merged.left_out.find(CUT_OFF, starts[record], starts[record + 1]) >= 0
    )


def _wanted(order: array, kept: array, rules: ConversationFilter, result: PrepareReport) -> array:
    """The conversations up to where there are enough, without those that have no interaction."""
    chosen, rows = 0, 0
    while chosen < len(order) and not rules.is_enough(chosen, rows):
        count = kept[order[chosen]]
        if rules.max_interactions is not None and rows + count > rules.max_interactions:
            break
        chosen, rows = chosen + 1, rows + count
    if chosen < len(order):
        result.dropped["over the wanted number"] = len(order) - chosen
    wanted = array("I", (conversation for conversation in order[:chosen] if kept[conversation]))
    if len(wanted) < chosen:
        result.dropped["without an interaction, among the wanted number"] = chosen - len(wanted)
    return wanted


def _from_then_on(
    merged: Merged, order: array, times: array, eval_after: float, result: PrepareReport
) -> tuple[array, set[int]]:
    """(the conversations without those from `eval_after` on whose family begins before it, the families to hold out)

    A conversation is from the time of its latest record.

    Raises:
        ValueError: nothing is held out, or nothing is left.
    """
    first = round(eval_after * 1e6)
    late = bytearray(any(times[record] >= first for record in merged.records(c)) for c in order)
    early = {merged.families[conversation] for conversation, is_late in zip(order, late) if not is_late}
    held_out = {merged.families[conversation] for conversation in order} - early
    kept = [c for c, is_late in zip(order, late) if not is_late or merged.families[c] in held_out]
    if not early or not held_out:
        raise ValueError(
            f"prepare: eval_after must leave conversations on both sides, got {sum(late):,} of {len(order):,} from "
            f"then on, {len(order) - len(kept):,} of them with a prompt that an earlier conversation has"
        )
    if len(kept) < len(order):
        result.dropped["from the held-out time, with a prompt from before it"] = len(order) - len(kept)
    return array("I", kept), held_out


def _held_out(families: array, order: array, eval_fraction: float, seed: int) -> set[int]:
    """The families to hold out, so that their conversations are as near to the share as can be.

    Raises:
        ValueError: with any family held out, the share would be further off than with none.
    """
    if not eval_fraction:
        return set()
    count = len(order)
    wanted = round(eval_fraction * count)
    if not wanted:
        raise ValueError(
            f"prepare: eval_fraction must hold out a conversation, got {eval_fraction} of {count:,}; take more"
        )
    sizes = array("I", [0]) * len(families)
    for conversation in order:
        sizes[families[conversation]] += 1
    draw = random.Random(seed)

    def places() -> Iterator[int]:
        yield from draw.sample(range(count), wanted)  # all, where each conversation is a family
        rest = array("I", range(count))
        draw.shuffle(rest)
        yield from rest

    held_out: set[int] = set()
    found = 0
    for place in places():
        family = families[order[place]]
        after = found + sizes[family]
        if found >= wanted:
            break
        if family not in held_out and after - wanted <= wanted - found and after < count:
            held_out.add(family)
            found = after
    if not held_out:
        raise ValueError(
            f"prepare: eval_fraction must leave whole families of conversations on one side, got "
            f"{eval_fraction}: {max(sizes):,} of {count:,} conversations begin with "
            "the same prompt, so that none can be held out without its prompt in training; hold "
            "out other conversations, or take a larger share"
        )
    return held_out


def _conversation_rows(spool: Spool, merged: Merged, conversation: int) -> bytes:
    """The rows of a conversation, of all its records, as they are written."""
    starts, is_last = spool.starts, merged.following[conversation] == len(merged.following)
    if is_last and merged.kept[conversation] == starts[conversation + 1] - starts[conversation]:
        rows = range(starts[conversation], starts[conversation + 1])
        if not merged.renamed or merged.renamed.isdisjoint(rows):
            return spool.read(conversation)
    records, changed = [], False
    for record in merged.records(conversation):
        numbered = enumerate(spool.read(record).splitlines(keepends=True), starts[record])
        kept = [(row, data) for row, data in numbered if not merged.left_out[row]]
        changed = changed or any(row in merged.renamed for row, _ in kept)
        records += [kept] if kept else []
    if len(records) == 1 and not changed:
        return b"".join([data for _, data in records[0]])
    rows = [(row, json.loads(data)) for rows in records for row, data in rows]
    name = rows[0][1]["conversation_id"]
    for number, row in rows:
        row["conversation_id"] = name
        if number in merged.renamed:
            row["id"] = f"{row['id']}~{number}"
    if len(records) > 1:
        rows.sort(key=lambda item: len(item[1]["prompt"]))
    return b"".join([encode(row) + b"\n" for _, row in rows])


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears at `path` whole and flushed to the disk, or, after an error, not at all.

    A link keeps its place: what it leads to is replaced. Into a pipe or device (``/dev/stdout``) goes what is written.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            yield file
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", buffering=WRITTEN_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_durably(written: Path, path: Path) -> None:
    """Moves a file that is flushed to the disk to `path`, so that the move survives a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(written, path)
    with contextlib.suppress(OSError):  # folders cannot be opened on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
