"""Which records are one conversation, which interactions are equal, what is held out together.

Logs repeat themselves: one record per call with the whole history so far, a record that was
exported twice, a row per interaction. From the keys of all records (keys.py) follow

- conversations: records that have the name of their conversation in common, or of which one begins
  with all messages of the other;
- what is left out: a record whose messages begin a longer record's, and an interaction (same
  prompt, answer and follow-up) that was read before;
- families: conversations of which one has a prompt that begins a prompt of the other. A family
  is held out whole, so that no prompt and no answer to it is on both sides.

None of it depends on the order of the records, but for which of two equal interactions is kept.

The keys lie in files, and are compared a part of all keys at a time. In memory are 20 bytes for each
record, one for each interaction, and one part's keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fastsdpo.data.interactions import Conversation, Interaction
from fastsdpo.data.keys import TextKeys, extend

PART_KEYS = 1 << 15  # compared at a time, some 100 bytes each
MOST_PARTS = 64  # the files are read once for each part


@dataclass
class RecordKeys:
    """The keys of a record that holds interactions.

    Attributes:
        name: of its conversation's name.
        messages: of all its messages.
        interactions: of each interaction's prompt, answer and follow-up.
        ids: of each interaction's id.
        beginnings: of its first message, its first two, ..., without all.
        prompts: of each interaction's prompt.
        histories: of what begins these prompts and ends with a user's message, themselves included.
        times: the record's time in microseconds since 1970, where rules asked for it.
    """

    name: list[int] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    interactions: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    beginnings: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    histories: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)


# The lists with one key for each record or interaction (`times`: or none), and those with any number for each record.
ONE_EACH = ("name", "messages", "interactions", "ids", "times")
MANY_EACH = ("beginnings", "prompts", "histories")


def record_keys(conversation: Conversation, interactions: list[Interaction]) -> RecordKeys:
    """The keys of a record; the conversation and its interactions must have ids."""
    texts = TextKeys()
    keys = RecordKeys(name=[texts[conversation.id]])
    if conversation.facts.get("time") is not None:
        keys.times.append(max(0, round(conversation.facts["time"] * 1e6)))
    history = 0
    for message in conversation.messages:
        history = extend(history, texts[message["role"]], texts[message["content"]])
        keys.beginnings.append(history)
    keys.messages.append(keys.beginnings.pop())
    prompt: list[dict] = []
    history = 0
    for interaction in interactions:
        # Most histories go on from the one before: then only what is new.
        new = interaction.prompt[len(prompt) :]
        if interaction.prompt[: len(prompt)] != prompt:
            new, history = interaction.prompt, 0
        prompt = interaction.prompt
        for message in new:
            history = extend(history, texts[message["role"]], texts[message["content"]])
            if message["role"] == "user":
                keys.histories.append(history)
        keys.prompts.append(history)
        answered = extend(history, texts["assistant"], texts[interaction.completion])
        keys.interactions.append(extend(answered, texts["user"], texts[interaction.followup]))
        before, _, number = str(interaction.id).rpartition(":")
        number = int(number) if number.isdecimal() else texts[number]
        keys.ids.append(extend(0, texts[before], number))
    return keys


@dataclass
class Merged:
    """The records of a run, merged. Records and interactions are numbered as they were read.

    Attributes:
        conversations: of each record, the first record of its conversation.
        families: of each record, the first record of its family.
        following: of each record, the next of its conversation; of the last, the number of records.
        left_out: of each interaction, 1 where it is not to be written.
        kept: of the first record of each conversation, how many interactions are; else 0.
        renamed: interactions that are kept and have the id of one before them.
    """

    conversations: array
    families: array
    following: array
    left_out: bytearray
    kept: array
    renamed: set[int]

    def records(self, conversation: int) -> Iterator[int]:
        """The records of the conversation with this first record."""
        while conversation < len(self.following):
            yield conversation
            conversation = self.following[conversation]


# (name of a list in `RecordKeys`, part, parts) -> its keys of that part (those with the remainder
# `part` when divided by `parts`), each with the number of its record or interaction, in order
Keys = Callable[[str, int, int], Iterator["tuple[int, int]"]]


def merge(keys: Keys, starts: array, single: bytearray, interactions: int, *, join: bool = True) -> Merged:
    """Merges records.

    Args:
        keys: the keys of all records.
        starts: of each record, the number of its first interaction.
        single: of each record, 1 where it is one interaction out of a conversation.
        interactions: their number.
        join: records of one conversation are joined, and what is there twice is left out; else each record
            is a conversation, and those that would be joined are a family.
    """
    records = len(starts)
    conversations = array("I", range(records))
    left_out = bytearray(interactions)
    ends = array("Q", starts[1:])
    ends.append(interactions)

    for name in ("name", "messages"):
        for first, record in _repeated(keys, name, records):
            _join(conversations, first, record)
    for first, found in _begun(keys, "messages", "beginnings", records) if join else ():
        part_of_longer = set()
        for key, record in found:
            _join(conversations, first[key], record)
            if not single[record]:  # else it holds the last interaction only
                part_of_longer.add(key)
        if part_of_longer:
            for key, record in keys("messages", 0, 1):
                if key in part_of_longer:
                    start, end = starts[record], ends[record]
                    left_out[start:end] = b"\1" * (end - start)
    for _, interaction in _repeated(keys, "interactions", interactions, left_out) if join else ():
        left_out[interaction] = 1
    renamed = {number for _, number in _repeated(keys, "ids", interactions, left_out)}

    families = array("I", conversations)
    for first, found in _begun(keys, "prompts", "histories", interactions):
        for key, record in found:
            _join(families, first[key], record)
    if not join:
        conversations = array("I", range(records))

    following, kept = array("I", [records]) * records, array("I", [0]) * records
    latest = array("I", range(records))
    for record in range(records):
        families[record] = _first(families, record)
        first = conversations[record] = _first(conversations, record)
        kept[first] += ends[record] - starts[record] - sum(left_out[starts[record] : ends[record]])
        if first != record:
            following[latest[first]] = record
            latest[first] = record
    return Merged(conversations, families, following, left_out, kept, renamed)


def _repeated(keys: Keys, name: str, count: int, left_out: bytearray | None = None) -> Iterator[tuple[int, int]]:
    """(first number with the same key, number) of each key that is not the first of its kind."""
    parts = _parts(count)
    for part in range(parts):
        first: dict[int, int] = {}
        for key, number in keys(name, part, parts):
            if left_out is not None and left_out[number]:
                continue
            if first.setdefault(key, number) != number:
                yield first[key], number


def _begun(
    keys: Keys, whole: str, beginnings: str, count: int
) -> Iterator[tuple[dict[int, int], Iterator[tuple[int, int]]]]:
    """For each part of the keys: the first record of each key in `whole`, and those in `beginnings`
    that are among these keys, with their records."""
    parts = _parts(count)
    for part in range(parts):
        first: dict[int, int] = {}
        for key, record in keys(whole, part, parts):
            first.setdefault(key, record)
        found = keys(beginnings, part, parts)
        yield first, ((key, record) for key, record in found if key in first)


def _parts(count: int) -> int:
    return min(MOST_PARTS, count // PART_KEYS + 1)


def _first(sets: array, item: int) -> int:
    """The first item of the set that `item` is in."""
    while sets[item] != item:
        sets[item] = sets[sets[item]]
        item = sets[item]
    return item


def _join(sets: array, one: int, other: int) -> None:
    one, other = _first(sets, one), _first(sets, other)
    sets[max(one, other)] = min(one, other)
