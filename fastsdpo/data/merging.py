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

import itertools
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fastsdpo.data.interactions import Conversation, Interaction
from fastsdpo.data.keys import FACTOR, PRIME, ROLE_KEYS, RunKeys, extend, run_hash

PART_KEYS = 3 << 14  # compared at a time, some 100 bytes each
MOST_PARTS = 64  # the files are read once for each part


# The lists with one key for each record or interaction (`times`: or none), and those with any number for each record.
ONE_EACH = ("name", "messages", "interactions", "ids", "times")
MANY_EACH = ("beginnings", "prompts", "histories")


class RecordKeys:
    """The keys of records that hold interactions, one record after another.

    Attributes:
        name: of its conversation's name.
        messages: of all its messages.
        interactions: of each interaction's prompt, answer and follow-up.
        ids: of each interaction's id.
        beginnings: of its first message, its first two, ..., without all.
        prompts: of each interaction's prompt; the first is enough where it begins the others.
        histories: of what begins these prompts and ends with a user's message, themselves included.
        times: the record's time in microseconds since 1970, where rules asked for it.
        counts: how many in each of beginnings, prompts and histories are of each record.
    """

    def __init__(self):
        self.name, self.messages, self.interactions, self.ids, self.times = ([] for _ in ONE_EACH)
        self.beginnings, self.prompts, self.histories = ([] for _ in MANY_EACH)
        self.counts = {name: [] for name in MANY_EACH}

    def add(self, conversation: Conversation, interactions: list[Interaction]) -> None:
        """Adds a record; the conversation and its interactions must have ids."""
        texts = RunKeys()
        self._begin(conversation)
        prompts, histories = [], []
        prompt: list[dict] = []
        history = 0
        for interaction in interactions:
            # Most histories go on from the one before: then only what is new.
            new = interaction.prompt[len(prompt) :]
            if interaction.prompt[: len(prompt)] != prompt:
                new, history = interaction.prompt, 0
            prompt = interaction.prompt
            for message in new:
                history = extend(history, ROLE_KEYS[message["role"]], texts[message["content"]])
                if message["role"] == "user":
                    histories.append(history)
            prompts.append(history)
            answered = extend(history, ROLE_KEYS["assistant"], texts[interaction.completion])
            self.interactions.append(extend(answered, ROLE_KEYS["user"], texts[interaction.followup]))
            before, _, number = str(interaction.id).rpartition(":")
            number = int(number) if number.isdecimal() else texts[number]
            self.ids.append(extend(0, texts[before], number))
        self._add_many("prompts", prompts)
        self._add_many("histories", histories)

    def add_whole(self, conversation: Conversation, first: int, count: int) -> None:
        """`add` of a record with the interactions ``(messages[: t], messages[t], messages[t + 1])`` for
        ``t = first + 1, first + 3, ...``, which are `count`, and have the ids ``name:0``, ``name:1``, ..."""
        name, histories = self._begin(conversation)
        prompts = histories[first::2][:count]
        self._add_many("prompts", prompts[:1])  # begins the others: who has one of them in its histories has it too
        self._add_many("histories", prompts)
        self.interactions += histories[first + 2 :: 2]
        self.ids += [(3 * name + number) % PRIME for number in range(count)]

    def pack(self) -> None:
        """Makes arrays of the lists, as they are sent to another process."""
        for name in (*ONE_EACH, *MANY_EACH):
            setattr(self, name, array("Q", getattr(self, name)))
        self.counts = {name: array("I", counts) for name, counts in self.counts.items()}

    def _begin(self, conversation: Conversation) -> tuple[int, list[int]]:
        """Adds what is of the record: (key of its name, keys of its first message, its first two, ..., all)."""
        histories, history = [], 0
        for message in conversation.messages:  # `extend` and `RunKeys`, without their calls
            key = run_hash(message["content"].strip())
            history = (history * FACTOR + 3 * ROLE_KEYS[message["role"]] + key) % PRIME
            histories.append(history)
        name = run_hash(str(conversation.id).strip()) % PRIME
        self.name.append(name)
        self.messages.append(histories[-1])
        self._add_many("beginnings", histories[:-1])
        if conversation.facts.get("time") is not None:
            self.times.append(max(0, round(conversation.facts["time"] * 1e6)))
        return name, histories

    def _add_many(self, name: str, keys: list[int]) -> None:
        getattr(self, name).extend(keys)
        self.counts[name].append(len(keys))


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


# (name of a list in `RecordKeys`, part, parts) -> its keys of that part (those whose lowest byte has the
# remainder `part`) in order, some at a time, and the number of the record or interaction of each
Keys = Callable[[str, int, int], Iterator["tuple[Iterable[int], Iterable[int]]"]]


def merge(keys: Keys, starts: array, single: bytearray, *, join: bool = True) -> Merged:
    """Merges records.

    Args:
        keys: the keys of all records.
        starts: of each record, the number of its first interaction; at the end the number of all.
        single: of each record, 1 where it is one interaction out of a conversation.
        join: records of one conversation are joined, and what is there twice is left out; else each record
            is a conversation, and those that would be joined are a family.
    """
    records, interactions = len(single), starts[-1]
    conversations = array("I", range(records))
    left_out = bytearray(interactions)

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
            for key, record in _pairs(keys("messages", 0, 1)):
                if key in part_of_longer:
                    start, end = starts[record], starts[record + 1]
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
        if families[record] != record:
            families[record] = _first(families, record)
        first = conversations[record]
        if first != record:
            first = conversations[record] = _first(conversations, record)
        start, end = starts[record], starts[record + 1]
        kept[first] += end - start - left_out.count(1, start, end)
        if first != record:
            following[latest[first]] = record
            latest[first] = record
    return Merged(conversations, families, following, left_out, kept, renamed)


def _pairs(blocks: Iterable[tuple[Iterable[int], Iterable[int]]]) -> Iterator[tuple[int, int]]:
    return itertools.chain.from_iterable(itertools.starmap(zip, blocks))


def _repeated(keys: Keys, name: str, count: int, left_out: bytearray | None = None) -> Iterator[tuple[int, int]]:
    """(first number with the same key, number) of each key that is not the first of its kind."""
    parts = _parts(count)
    for part in range(parts):
        size, different = 0, set()
        for found in ([*found] for found, _ in keys(name, part, parts)):
            size += len(found)
            different.update(found)
        if len(different) == size:
            continue
        different.clear()
        first: dict[int, int] = {}
        for key, number in _pairs(keys(name, part, parts)):
            if left_out is not None and left_out[number]:
                continue
            if first.setdefault(key, number) != number:
                yield first[key], number


def _begun(
    keys: Keys, whole: str, beginnings: str, count: int
) -> Iterator[tuple[dict[int, int], Iterator[tuple[int, int]]]]:
    """For each part of the keys: the first record of each key in `whole`, and those in `beginnings`
    that are among these keys, with their records, where these are others."""
    parts = _parts(count)
    for part in range(parts):
        first: dict[int, int] = {}
        for key, number in _pairs(keys(whole, part, parts)):
            first.setdefault(key, number)
        yield first, _of_others(first, keys(beginnings, part, parts))
        first.clear()  # before there is another one


def _of_others(
    first: dict[int, int], blocks: Iterable[tuple[Iterable[int], Iterable[int]]]
) -> Iterator[tuple[int, int]]:
    """The keys that are in `first` with another record, and their own."""
    for found, numbers in (([*found], [*numbers]) for found, numbers in blocks):
        is_other = map(operator.ne, map(first.get, found, numbers), numbers)
        yield from itertools.compress(zip(found, numbers), is_other)


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
