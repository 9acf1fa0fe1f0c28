"""Finds which records are one conversation, which interactions are equal, and what must be held out together.

Logs repeat themselves: they have one record per call with the whole history so far, records that were
exported twice, or a row per interaction. The keys of all records (keys.py) tell

- conversations: records that have the name of their conversation in common, or of which one begins
  with all messages of the other;
- what is left out: a record whose messages begin a longer record's, an interaction (same prompt, answer and
  follow-up) that was read before, and one whose answer another record says was cut off;
- families: conversations of which one has a prompt that begins a prompt of the other, whatever their system
  messages (which may hold the time). A family is held out whole, so that no prompt and no answer to it is on both
  sides.

Of two equal interactions the one that was read first is kept; nothing else depends on the order of the records.

Making all keys of a record costs as much as parsing it, and most records are unrelated to all others. Two related
records have the same name, or the same messages up to the first user's. So a record whose interactions are whole
turns (`whole_turns`) first gets only two marks: keys of its name and of that beginning. Such a record is called
*light*. All its keys are made later, from its rows, and only if it shares a mark with another record
(`find_related`).

The keys lie in files, and one part of them is compared at a time. Memory holds 20 bytes for each record, one
byte for each interaction, and one part's keys.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastsdpo.data.interactions import Conversation, Interaction, extract_interactions
from fastsdpo.data.keys import FACTOR, PRIME, ROLE_KEYS, RunKeys, extend, run_hash
from fastsdpo.data.messages import is_blank

PART_KEYS = 3 << 14  # compared at a time, some 100 bytes each
MOST_PARTS = 64  # the files are read once for each part

KEY_LISTS = ("name", "messages", "beginnings", "prompts", "histories", "interactions", "ids", "answers", "id_names")
# In these a light record may have a mark of its own where another record has to do with it.
_RELATED = ("name", "messages", "beginnings", "histories", "id_names", "cut_marks")
OF_ROWS = ("interactions", "ids", "answers")  # numbered by interaction, the others by record
_NO_RECORD = 1 << 62  # the number of what is of no record that is kept
TWICE, CUT_OFF = 1, 2  # why an interaction is left out


class LightRecord(NamedTuple):
    """A light record (see the module) of which all keys are to be made.

    Attributes:
        number, first: the numbers of the record and of its first interaction.
        place, size: where its rows begin in their file, and how many they are, in bytes.
        rest: the key of an answer after the last follow-up, or None.
    """

    number: int
    first: int
    place: int
    size: int
    rest: int | None


class RecordKeys:
    """Keys of records that hold interactions; beside each key stands the number of its record or interaction.

    Attributes:
        keys: several lists of keys, by the list's name:
            name: of its conversation's name;
            messages: of all its messages;
            beginnings: of its first message, its first two, ..., without all;
            prompts: of each interaction's prompt less system messages; the first is enough where it begins the others;
            histories: of what begins these and ends with a user's message, themselves included;
            interactions: of each interaction's prompt, answer and follow-up;
            ids: of each interaction's id;
            answers: of each interaction's prompt, less system messages, and answer;
            id_names: of the names in these, where they are others;
            cut: of the prompt and answer of each call that says it was cut off, as `answers` has them, and of the
                last messages of the prompt alone;
            cut_marks: of the first message in these;
            marks: of light records;
            times: the time of all records in microseconds since 1970, if filter rules ask for it.
        numbers: for each key, the number of its record or interaction, by the same names. Records count from 0.
    """

    def __init__(self):
        self.keys = {name: array("Q") for name in (*KEY_LISTS, "cut", "cut_marks", "marks", "times")}
        self.numbers = {name: array("Q") for name in self.keys}

    def add(
        self, conversation: Conversation, interactions: list[Interaction], number: int = 0, first: int = 0
    ) -> None:
        """Adds a record; the conversation and its interactions must have ids.

        Args:
            number, first: the numbers of the record and of its first interaction.
        """
        texts = RunKeys()
        name = self._begin(str(conversation.id), _histories(conversation.messages), number)
        prompts, histories, whole, ids, answers = [], [], [], [], []
        prompt: list[dict] = []
        history = asked = 0  # of all messages; less system messages
        for interaction in interactions:
            # Most histories go on from the one before: then only what is new.
            new = interaction.prompt[len(prompt) :]
            if interaction.prompt[: len(prompt)] != prompt:
                new, history, asked = interaction.prompt, 0, 0
            prompt = interaction.prompt
            for message in new:
                history = extend(history, ROLE_KEYS[message["role"]], texts[message["content"]])
                if message["role"] != "system":
                    asked = extend(asked, ROLE_KEYS[message["role"]], texts[message["content"]])
                if message["role"] == "user":
                    histories.append(asked)
            prompts.append(asked)
            answered = extend(history, ROLE_KEYS["assistant"], texts[interaction.completion])
            answers.append(extend(asked, ROLE_KEYS["assistant"], texts[interaction.completion]))
            whole.append(extend(answered, ROLE_KEYS["user"], texts[interaction.followup]))
            before, _, turn = str(interaction.id).rpartition(":")
            ids.append(extend(0, texts[before], int(turn) if turn.isdecimal() else texts[turn]))
            if texts[before] != name:
                self._add("id_names", [texts[before]], number)
        self._add("prompts", prompts, number)
        self._add("histories", histories, number)
        self._add_rows((whole, ids, answers), first)

    def add_cut(self, conversation: Conversation) -> None:
        """Adds the last answer of a conversation as one that was cut off: where it stands in another record too,
        with the user's reply and no word of its end, it is in no interaction."""
        messages = [*conversation.messages, {"role": "user", "content": "-"}]
        found = extract_interactions(replace(conversation, messages=messages, answer_fields={}, id="-"))
        if found and conversation.messages[-1]["content"] == found[-1].completion:
            said = [message for message in found[-1].prompt if message["role"] != "system"]
            for start, message in enumerate(said):  # other calls may hold the last few messages only
                if message["role"] == "user":
                    keys = _histories([*said[start:], conversation.messages[-1]])
                    self._add("cut", keys[-1:], _NO_RECORD)
                    self._add("cut_marks", keys[:1], _NO_RECORD)

    def add_light(self, name: str, messages: list[dict], first: int, number: int) -> int | None:
        """Adds the marks of a light record; returns `LightRecord.rest`.

        Args:
            name: the name of its conversation.
            first: the index of the first user's message.
            number: the record's number.
        """
        marks = [_key(name), _histories(messages[: first + 1])[-1]]
        if first:  # and without the system message
            marks += _histories(messages[first : first + 1])
        self._add("marks", marks, number)
        return None if (len(messages) - first) % 2 else _key(messages[-1]["content"])

    def add_all(self, record: LightRecord, row: Mapping[str, Any]) -> None:
        """Adds all keys of a light record, made from the last of its rows."""
        answer = row["completion"]
        answer = answer[0] if isinstance(answer, list) else answer
        histories = _histories([*row["prompt"], answer, row["user_response"]])
        first = 1 if row["prompt"][0]["role"] == "system" else 0
        said = _histories([*row["prompt"][first:], answer]) if first else histories[:-1]
        prompts, answers = said[::2], said[1::2]
        if record.rest is not None:
            histories.append(extend(histories[-1], ROLE_KEYS["assistant"], record.rest))
        name = self._begin(row["conversation_id"], histories, record.number)
        self._add("prompts", prompts[:1], record.number)
        self._add("histories", prompts, record.number)
        ids = [extend(0, name, turn) for turn in range(len(prompts))]
        self._add_rows((histories[first + 2 :: 2], ids, answers), record.first)

    def add_time(self, conversation: Conversation, number: int) -> None:
        """Adds the time of a record, if its facts have it."""
        if conversation.facts.get("time") is not None:
            self._add("times", [max(0, round(conversation.facts["time"] * 1e6))], number)

    def _begin(self, name: str, histories: list[int], number: int) -> int:
        key = _key(name)
        self._add("name", [key], number)
        self._add("messages", histories[-1:], number)
        self._add("beginnings", histories[:-1], number)
        return key

    def _add(self, name: str, keys: Iterable[int], number: int) -> None:
        found, numbers = self.keys[name], self.numbers[name]
        found.extend(keys)
        numbers.extend([number] * (len(found) - len(numbers)))

    def _add_rows(self, lists: tuple[list[int], ...], first: int) -> None:
        for name, keys in zip(OF_ROWS, lists):
            self.keys[name].extend(keys)
            self.numbers[name].extend(range(first, first + len(keys)))


def _key(text: str) -> int:
    return run_hash(text.strip()) % PRIME


def _histories(messages: list[dict]) -> list[int]:
    """The keys of the first message, the first two, ..., all."""
    histories, history = [], 0
    for message in messages:  # `extend` and `RunKeys`, without their calls
        key = run_hash(message["content"].strip())
        history = (history * FACTOR + 3 * ROLE_KEYS[message["role"]] + key) % PRIME
        histories.append(history)
    return histories


def whole_turns(roles: list[str], texts: list[str]) -> int | None:
    """Returns the index of the first user's message if a conversation consists of whole turns, else None.

    In whole turns there is at most one system message, then user and assistant alternate, and no message is blank.
    The interactions are then ``(messages[:t], messages[t], messages[t + 1])`` for each answer t that is not the last
    message.
    """
    first = 1 if roles[0] == "system" else 0
    turns = len(roles) - first
    if turns < 3 or roles[first:] != (_TURNS[:turns] if turns <= len(_TURNS) else (_TURNS[:2] * turns)[:turns]):
        return None
    starts = [text[:1] for text in texts[first:]]
    seen = min(starts) >= "!" and max(starts) <= "~"  # then no text is blank
    return first if seen or not any(map(is_blank, texts[first:])) else None


_TURNS = ["user", "assistant"] * 100


@dataclass
class Merged:
    """The result of merging a run's records. Records and interactions are numbered as they were read.

    Attributes:
        conversations: for each record, the number of the first record of its conversation.
        families: for each record, the number of the first record of its family (see the module).
        following: for each record, the number of the next record of its conversation; for the last, the
            number of all records.
        left_out: for each interaction, `TWICE` or `CUT_OFF` if it is not to be written for that, else 0.
        kept: for the first record of each conversation, how many interactions are written; else 0.
        renamed: the kept interactions whose id an earlier one has already.
    """

    conversations: array
    families: array
    following: array
    left_out: bytearray
    kept: array
    renamed: set[int]

    def records(self, conversation: int) -> Iterator[int]:
        """Yields the numbers of a conversation's records, given the number of its first one."""
        while conversation < len(self.following):
            yield conversation
            conversation = self.following[conversation]


# (name of a list in `RecordKeys`, part, parts) -> its keys of that part (those whose lowest byte has the
# remainder `part`), some at a time, and the number of the record or interaction of each
Keys = Callable[[str, int, int], Iterator["tuple[Iterable[int], Iterable[int]]"]]


def merge(keys: Keys, starts: array, single: bytearray, *, join: bool = True) -> Merged:
    """Merges records.

    Args:
        keys: the keys of all records.
        starts: for each record, the number of its first interaction; at the end the number of all.
        single: for each record, 1 if it is one interaction out of a conversation.
        join: True joins the records of one conversation and leaves out what is there twice. False keeps each
            record as a conversation, and makes those that would be joined a family.
    """
    records, interactions = len(single), starts[-1]
    conversations = array("I", range(records))
    left_out = bytearray(interactions)

    for name in ("name", "messages"):
        for first, record in _repeated(keys, name, records):
            _join(conversations, first, record)
    if join:
        _join_longer(keys, starts, single, conversations, left_out)
        for _, interaction in _repeated(keys, "interactions", interactions, left_out):
            left_out[interaction] = TWICE
        for interaction in _cut_off(keys, interactions):
            left_out[interaction] = left_out[interaction] or CUT_OFF
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
        for sets in (families, conversations):
            if sets[record] != record:
                sets[record] = _first(sets, record)
        first, start, end = conversations[record], starts[record], starts[record + 1]
        kept[first] += left_out.count(0, start, end)
        if first != record:
            following[latest[first]] = record
            latest[first] = record
    return Merged(conversations, families, following, left_out, kept, renamed)


def _join_longer(keys: Keys, starts: array, single: bytearray, conversations: array, left_out: bytearray) -> None:
    """Joins records with the longer ones that begin so, and leaves out the interactions that these have too."""
    for first, found in _begun(keys, "messages", "beginnings", len(single)):
        part_of_longer = set()
        for key, record in found:
            _join(conversations, first[key], record)
            if not single[record]:  # else it holds the last interaction only
                part_of_longer.add(key)
        if part_of_longer:
            for key, record in _pairs(keys("messages", 0, 1)):
                if key in part_of_longer:
                    start, end = starts[record], starts[record + 1]
                    left_out[start:end] = bytes([TWICE]) * (end - start)


def _cut_off(keys: Keys, interactions: int) -> Iterator[int]:
    """The interactions with an answer that a record says was cut off."""
    parts = _parts(interactions)
    for part in range(parts):
        cut = {key for key, _ in _pairs(keys("cut", part, parts))}
        if cut:
            yield from (number for key, number in _pairs(keys("answers", part, parts)) if key in cut)


def find_related(keys: Keys, records: int) -> bytearray:
    """Returns for each record 1 if another record has one of its marks, as a mark or as a key."""
    related = bytearray(records)
    parts = _parts(records)
    for part in range(parts):
        first: dict[int, int] = {}
        for key, number in _pairs(keys("marks", part, parts)):
            if first.setdefault(key, number) != number:
                related[first[key]] = related[number] = 1
        for name in _RELATED if first else ():
            for key, _ in _of_others(first, keys(name, part, parts)):
                related[first[key]] = 1
    return related


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
        for key, number in sorted(_pairs(keys(name, part, parts)), key=operator.itemgetter(1)):
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
