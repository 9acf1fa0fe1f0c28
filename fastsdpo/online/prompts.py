"""Datasets of users' prompts, and the order in which training takes them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Sampler

from fastsdpo.data.interactions import add_system, is_blank, parse_history
from fastsdpo.data.loading import SUFFIXES, is_data, read_records


class PromptDataset(Dataset):
    """A dataset of prompts as message lists. ``dataset[i]`` is ``(i, messages)``; ``dataset[None]`` is None.

    Args:
        prompts: each is a user's message (text), a list of messages that ends with a user's, a mapping with
            ``prompt`` of either kind, or an `Interaction`. A row with an interaction is such a mapping: its
            answer is ignored. A system prompt beside the prompt (``system``) becomes its first message.
        name: what error messages call this argument.
        system: a system prompt, which becomes the first message of each prompt.

    Raises:
        TypeError, ValueError: a prompt is none of these, or has a system prompt other than `system`; the text
            says which.
    """

    def __init__(self, prompts: Iterable[Any], name: str = "train_dataset", system: str | None = None):
        if system is not None and is_blank(system):
            raise ValueError("OnlineSDPOTrainer: system must be some text, or None")
        self.prompts = [_parse(p, f"{name}[{index}]", system) for index, p in enumerate(prompts)]
        if not self.prompts:
            raise ValueError(f"OnlineSDPOTrainer: {name} must hold a prompt, got none")

    @classmethod
    def from_source(cls, source: Any, name: str, system: str | None = None) -> PromptDataset:
        """Makes a dataset from a collection of prompts, or from a file with rows (``prompt``) or lines of text.

        Rows can be in any file that `load_conversations` reads (JSON Lines, a JSON array, Parquet, ...), or
        be JSON in a text file. A text file is UTF-8; its name ends in ``.txt`` or has no ending.
        A `PromptDataset` is returned as it is.

        Args:
            source: the collection, the file's path, or a `PromptDataset`.
            name, system: as for the class.

        Raises:
            OSError, TypeError, ValueError, ImportError: the source cannot be read; the text names file and line.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, (str, os.PathLike)):
            rows = list(_read(Path(source), system))
            if not rows:
                raise ValueError(f"OnlineSDPOTrainer: {source} must hold a prompt, got none")
            return cls(rows, name, system)
        if not isinstance(source, Iterable) or isinstance(source, Mapping):
            raise TypeError(
                f"OnlineSDPOTrainer: {name} must be a path or a collection of prompts, got {type(source).__name__}"
            )
        return cls(source, name, system)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int | None) -> tuple[int, list[dict]] | None:
        return None if index is None else (index, self.prompts[index])


def _parse(prompt: Any, where: str, system: str | None) -> list[dict]:
    prompt, row = getattr(prompt, "prompt", prompt), {}
    if isinstance(prompt, Mapping):
        if "prompt" not in prompt:
            raise ValueError(
                f"OnlineSDPOTrainer: {where} must have 'prompt', got the keys {', '.join(map(repr, prompt))}; of "
                "conversations `fastsdpo prepare` makes such rows"
            )
        row, prompt = prompt, prompt["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        messages = add_system(row, parse_history(prompt, "prompt"))
    except (TypeError, ValueError) as error:
        raise type(error)(f"OnlineSDPOTrainer: {where}: {error}") from error
    if not messages or messages[-1]["role"] != "user" or is_blank(messages[-1]["content"]):
        raise ValueError(f"OnlineSDPOTrainer: {where} must end with a user's message of some text")
    if system is None:
        return messages
    own = messages[0]["content"].strip() if messages[0]["role"] == "system" else system.strip()
    if own != system.strip():
        raise ValueError(
            f"OnlineSDPOTrainer: {where} must have no other system prompt than the one that is given for all "
            f"(--system), got {own[:60]!r}"
        )
    return [{"role": "system", "content": system}, *messages[messages[0]["role"] == "system" :]]


def _read(path: Path, system: str | None) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not is_data(path):
        lines = [line.strip() for line in _text(path).split("\n") if not is_blank(line)]
        if not _opens_json(lines):
            yield from lines
            return
    for where, row in read_records(path):
        try:
            _parse(row, "prompt", system)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        yield row


def _text(path: Path) -> str:
    """The text of a file, without a byte order mark, its lines ended by ``"\\n"``.

    Raises:
        ValueError: the ending is not that of text, or the content is not.
    """
    if path.suffix.lower() not in ("", ".txt"):
        raise ValueError(
            f"{path}: prompts must be lines of text (a name that ends in .txt, or without an ending) or "
            f"rows with 'prompt' ({', '.join(SUFFIXES)}), got a name that ends in {path.suffix}"
        )
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: prompts must be UTF-8 text, got other bytes at {error.start}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path}: prompts must be UTF-8 text, got a NUL character")
    return text


def _opens_json(lines: list[str]) -> bool:
    """Whether the first line is an object or a list of some, or opens one that goes on below."""
    if not lines or lines[0][0] not in "{[":
        return False
    if not lines[0].strip("[{ \t"):
        return True
    for text in (lines[0], "\n".join(lines)):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        return isinstance(value, dict) or any(isinstance(item, dict) for item in value)
    return False


class PromptSampler(Sampler):
    """Shuffles prompts and yields them in steps of `step` prompts, each step `repeats` times.

    The last step is filled up with None. The order depends on ``seed`` and the epoch only.
    """

    def __init__(self, size: int, *, step: int, repeats: int = 1, seed: int = 0, shuffle: bool = True):
        self.size, self.step, self.repeats, self.seed = size, step, repeats, seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.step) * self.step * self.repeats

    def __iter__(self) -> Iterator[int | None]:
        order: list[int | None] = list(range(self.size))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        order += [None] * (-self.size % self.step)
        for start in range(0, len(order), self.step):
            for _ in range(self.repeats):
                yield from order[start : start + self.step]


def collate_prompts(items: list[tuple[int, list[dict]] | None]) -> dict[str, list]:
    """Makes a micro-batch of prompts, without the Nones that fill up a step."""
    return {"prompts": [item for item in items if item is not None]}
