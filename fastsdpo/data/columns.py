"""Keeps tokenized interactions as flat columns: in memory, or in files that several processes map and share.

tokens         int32   prompt, teacher's prompt, answer and neutral prompt of each interaction
ends           int64   where these four end, after a first 0
keys           uint64  of each interaction's prompt less system messages, answer and follow-up; 0: came as tokens
history_keys   uint64  of what begins the prompt and ends with a user's message; any number for each
message_keys   uint64  of that message
history_ends   int64   where the last two end, after a first 0
ids, conversation_ids  text or None
"""

from __future__ import annotations

import contextlib
import mmap
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, overload

from fastsdpo.data.interactions import Interaction
from fastsdpo.data.keys import TextKeys, extend
from fastsdpo.data.tokenization import TokenizedInteraction

# Of each column of numbers its type; of columns of ends, the column that they are places in.
NUMBERS = {"tokens": "i", "ends": "q", "keys": "Q", "history_keys": "Q", "message_keys": "Q", "history_ends": "q"}
PLACES_IN = {"ends": "tokens", "history_ends": "history_keys"}
NAMES = ("ids", "conversation_ids")
NO_NAME = b"\xff"  # None; not the beginning of any text


class Columns:
    """Columns in memory, to which interactions can be added."""

    def __init__(self) -> None:
        self.tokens = array("i")
        self.ends, self.history_ends = array("q", [0]), array("q", [0])
        self.keys, self.history_keys, self.message_keys = array("Q"), array("Q"), array("Q")
        self.ids: list[str | None] = []
        self.conversation_ids: list[str | None] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, item: TokenizedInteraction, text: Interaction | None = None, texts: TextKeys | None = None) -> None:
        """Adds one interaction.

        Args:
            item: its tokens.
            text: the interaction that was tokenized; None: it came as tokens.
            texts: a cache of the keys of texts that many interactions share.
        """
        for ids in (item.prompt_ids, item.teacher_prompt_ids, item.completion_ids, item.neutral_prompt_ids or []):
            self.tokens.extend(ids)
            self.ends.append(len(self.tokens))
        self.ids.append(item.id)
        self.conversation_ids.append(item.conversation_id)
        if text is None:
            self.keys.append(0)
        else:
            texts, history = TextKeys() if texts is None else texts, 0
            for message in text.prompt:
                if message["role"] == "system":  # it may hold the time, and differ from call to call
                    continue
                history = extend(history, texts[message["role"]], texts[message["content"]])
                if message["role"] == "user":
                    self.history_keys.append(history)
                    self.message_keys.append(texts[message["content"]])
            history = extend(history, texts["assistant"], texts[text.completion])
            self.keys.append(extend(history, texts["user"], texts[text.followup]))
        self.history_ends.append(len(self.history_keys))

    def extend(self, other: Columns) -> None:
        """Appends all interactions of other columns."""
        before = {name: len(getattr(self, name)) for name in PLACES_IN.values()}
        for name in NUMBERS:
            getattr(self, name).extend(_moved(other, name, before))
        self.ids += other.ids
        self.conversation_ids += other.conversation_ids

    def part(self, start: int, stop: int) -> Columns:
        """Returns the interactions from index `start` up to `stop` (excluded), as columns of their own."""
        found = Columns()
        ends, histories = self.ends[4 * start : 4 * stop + 1], self.history_ends[start : stop + 1]
        found.tokens, found.keys = self.tokens[ends[0] : ends[-1]], self.keys[start:stop]
        found.history_keys = self.history_keys[histories[0] : histories[-1]]
        found.message_keys = self.message_keys[histories[0] : histories[-1]]
        found.ends = array("q", [place - ends[0] for place in ends])
        found.history_ends = array("q", [place - histories[0] for place in histories])
        found.ids, found.conversation_ids = self.ids[start:stop], self.conversation_ids[start:stop]
        return found


def _moved(columns: Columns, name: str, before: dict[str, int]) -> array:
    """A column as it goes on after others: places are moved by what was `before`, the first 0 goes."""
    column = getattr(columns, name)
    if name not in PLACES_IN:
        return column
    start = before[PLACES_IN[name]]
    return array(column.typecode, [start + place for place in column[1:]])


class ColumnFiles:
    """Writes columns to a folder, one part after another. It is a context manager.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, folder: Path):
        self._stack = contextlib.ExitStack()
        names = [*NUMBERS, *NAMES, *(f"{name}_ends" for name in NAMES)]
        self._files: dict[str, IO[bytes]] = {
            name: self._stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names
        }
        self._sizes = dict.fromkeys([*PLACES_IN.values(), *NAMES], 0)
        for name in (*PLACES_IN, *(f"{name}_ends" for name in NAMES)):
            self._files[name].write(array("q", [0]).tobytes())
        self.interactions = 0

    def extend(self, other: Columns) -> None:
        """Writes all interactions of the columns after those that are already written."""
        for name in NUMBERS:
            self._files[name].write(_moved(other, name, self._sizes).tobytes())
        for name in PLACES_IN.values():
            self._sizes[name] += len(getattr(other, name))
        for name in NAMES:
            texts = [NO_NAME if text is None else text.encode() for text in getattr(other, name)]
            ends = array("q")
            for text in texts:
                self._sizes[name] += len(text)
                ends.append(self._sizes[name])
            self._files[name].write(b"".join(texts))
            self._files[f"{name}_ends"].write(ends.tobytes())
        self.interactions += len(other)

    def __enter__(self) -> ColumnFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class MappedColumns:
    """Maps the columns that `ColumnFiles` wrote to a folder, without reading them into memory.

    Attributes: those of `Columns`; the numbers are memory views.

    Raises:
        OSError, ValueError: a file is missing, or its size is not that of whole items.
    """

    tokens: memoryview
    ends: memoryview
    keys: memoryview
    history_keys: memoryview
    message_keys: memoryview
    history_ends: memoryview

    def __init__(self, folder: Path):
        for name, kind in NUMBERS.items():
            setattr(self, name, _mapped(folder / f"{name}.bin", kind))
        self.ids, self.conversation_ids = (
            Names(_mapped(folder / f"{name}.bin", "B"), _mapped(folder / f"{name}_ends.bin", "q")) for name in NAMES
        )

    def __len__(self) -> int:
        return len(self.ids)


class Names(Sequence):
    """A sequence of texts (or None) that lie one after another in memory."""

    def __init__(self, texts: memoryview, ends: memoryview):
        self._texts, self._ends = texts, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        index %= len(self)
        data = bytes(self._texts[self._ends[index] : self._ends[index + 1]])
        return None if data == NO_NAME else data.decode()


def _mapped(path: Path, kind: str) -> memoryview:
    with open(path, "rb") as file:
        if path.stat().st_size == 0:  # which cannot be mapped
            return memoryview(array(kind))
        # Copied on writing, so that it may be the memory of a tensor.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)).cast(kind)  # type: ignore[call-overload]
