"""Interactions as a map-style dataset, the order in which they are trained on, and packs of them."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastsdpo.data import Interaction, TokenizedInteraction, load_interactions
from fastsdpo.data.columns import ColumnFiles, Columns, MappedColumns
from fastsdpo.data.loading import expand_source, parse_interaction
from fastsdpo.data.output import encode_rows
from fastsdpo.data.token_cache import LARGE, cache_folder, cached_columns, size_of, token_key
from fastsdpo.data.tokenizing import Tokenization, tokenize_chunks
from fastsdpo.trainer.measures_sample import MeasuredInteraction

logger = logging.getLogger("fastsdpo.trainer")

SAMPLE_SIZE = 64  # interactions of which the text is kept, for the teacher check
MOST_WORKERS = 8
MESSAGES = 3  # of dropped interactions, in warnings
NO_NEUTRAL = "which must have neutral_prompt_ids for neutral_followup"


class InteractionDataset(Dataset):
    """Tokenized interactions, four bytes per token: in memory, or in files that processes share.

    ``dataset[i]`` is a `TokenizedInteraction`; ``dataset[None]`` is None, which fills up batches.

    Args:
        interactions: `TokenizedInteraction` objects, or `Columns` of them.

    Attributes:
        sample: up to 64 interactions as text, drawn evenly, where they came as text.
        dropped: messages about the interactions that could not be used.
        measured: the interactions whose measures are taken, where it is held out.
        keys: of each interaction, a 61-bit key of its prompt, answer and follow-up; 0 where it came
            as tokens.
        history_keys: of each interaction, in ``history_ends[i] : history_ends[i + 1]``, such keys of
            what begins its prompt and ends with a user's message; `message_keys`: of that message.
    """

    def __init__(self, interactions: Iterable[TokenizedInteraction] | Columns | MappedColumns):
        self.sample: list[Interaction] = []
        self.dropped: list[str] = []
        self.measured: list[MeasuredInteraction] = []
        columns = (
            interactions if isinstance(interactions, (Columns, MappedColumns)) else _checked_columns(interactions)
        )
        self.ids: Sequence[str | None] = columns.ids
        self.conversation_ids: Sequence[str | None] = columns.conversation_ids
        self.keys, self.history_ends = columns.keys, columns.history_ends
        self.history_keys, self.message_keys = columns.history_keys, columns.message_keys
        self.tokens = torch.frombuffer(columns.tokens, dtype=torch.int32) if columns.tokens else torch.zeros(0)
        self.ends = torch.frombuffer(columns.ends, dtype=torch.int64)

    @classmethod
    def from_source(
        cls,
        source: Any,
        tokenizer: Any,
        template: str,
        *,
        name: str = "train_dataset",
        progress: bool = False,
        cache: str | None = None,
        workers: int | None = 1,
        **options: Any,
    ) -> InteractionDataset:
        """Tokenizes what comes as text; drops, counts and reports what cannot be tokenized.

        Args:
            source: a path (or a list of them) that `load_interactions` reads, or any iterable of
                `Interaction`, `TokenizedInteraction`, or rows as `fastsdpo prepare` writes them
                (a `datasets.Dataset` is one).
            tokenizer, template, options: of `InteractionTokenizer`.
            name: the argument, in messages.
            progress: show a progress bar.
            cache: where the tokens of files are kept (`SDPOConfig.token_cache`).
            workers: processes that tokenize files (`SDPOConfig.tokenizer_workers`).

        Raises:
            TypeError: not a dataset, or an item of another type.
            ValueError: a malformed row, by index; text without a tokenizer; nothing is left.
            OSError: a file cannot be read, or the cache cannot be written.
        """
        neutral = options.get("neutral_followup") is not None
        if isinstance(source, cls):
            if neutral and not source.has_neutral_prompts():
                raise ValueError(f"SDPOTrainer: {name} came as tokens, {NO_NEUTRAL}")
            return source
        reading = Reading(tokenizer, template, name, options, progress)
        if is_path(source):
            dataset = cls._of_files(source, reading, cache, workers)
        elif not isinstance(source, Iterable) or isinstance(source, Mapping):
            raise TypeError(
                f"SDPOTrainer: {name} must be a path or a collection of interactions, got {type(source).__name__}"
            )
        else:
            columns = Columns()
            reading.read(source, columns, 1 if workers is None else workers)
            dataset = cls._of(columns, reading.sample, reading.dropped)
        if dataset.dropped:
            logger.warning(
                "%s: %d interactions cannot be tokenized and are left out, for example:\n  %s",
                name,
                len(dataset.dropped),
                "\n  ".join(dataset.dropped[:MESSAGES]),
            )
        if len(dataset) == 0:
            raise ValueError(
                f"SDPOTrainer: {name} must hold an interaction, got none"
                + (f"; {len(dataset.dropped)} could not be tokenized: {dataset.dropped[0]}" if dataset.dropped else "")
            )
        return dataset

    @classmethod
    def _of_files(cls, source: Any, reading: Reading, cache: str | None, workers: int | None) -> InteractionDataset:
        items = expand_source(source)
        files = [item for item in items if isinstance(item, Path) and item.is_file()]
        whole = len(files) == len(items)  # not a dataset from elsewhere
        folder = cache_folder(cache, files) if whole and reading.tokenizer is not None else None
        key = None
        if folder is not None:
            key = token_key(files, reading.tokenizer, reading.template, reading.options)
            if key is None:
                logger.info("the tokens of %s are not kept: what decides them cannot be told for certain", source)
        if workers is None:
            workers = 1 if not whole or size_of(files) < LARGE else most_workers()
            if key is None:  # else one process of the machine does it for all
                workers = max(1, workers // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if folder is None or key is None:
            columns = Columns()
            reading.read(load_interactions(source), columns, workers)
            return cls._of(columns, reading.sample, reading.dropped)

        def make(sink: ColumnFiles) -> dict[str, Any]:
            reading.read(load_interactions(source), sink, workers)
            rows = [json.loads(encode_rows([item], 0)) for item in reading.sample]
            return {"sample": rows, "dropped": reading.dropped}

        mapped, about = cached_columns(folder, key, make)
        logger.info("%s: tokens of %d interactions in %s", reading.name, len(mapped), folder / key)
        return cls._of(mapped, [parse_interaction(row) for row in about["sample"]], about["dropped"])

    @classmethod
    def _of(
        cls, columns: Columns | MappedColumns, sample: list[Interaction], dropped: list[str]
    ) -> InteractionDataset:
        dataset = cls(columns)
        dataset.sample, dataset.dropped = sample, dropped
        return dataset

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> TokenizedInteraction: ...
    @overload
    def __getitem__(self, index: None) -> None: ...
    def __getitem__(self, index: int | None) -> TokenizedInteraction | None:
        if index is None:
            return None
        if not 0 <= index < len(self):
            raise IndexError(f"InteractionDataset: index must be in [0, {len(self)}), got {index}")
        ends = self.ends[4 * index : 4 * index + 5].tolist()
        prompt, teacher, completion, neutral = (
            self.tokens[start:stop].tolist() for start, stop in itertools.pairwise(ends)
        )
        return TokenizedInteraction(
            prompt, teacher, completion, self.ids[index], self.conversation_ids[index], neutral or None
        )

    def lengths(self) -> Tensor:
        """``[len, 3]`` tokens of prompt, teacher's prompt and completion."""
        return self.ends.diff().view(-1, 4)[:, :3]

    def costs(self, sharing: str) -> np.ndarray:
        """``[len, 2]`` int32: about how many tokens student and teacher compute of each interaction, alone, and after
        another of its conversation."""
        prompt, teacher, completion = self.lengths().int().T
        alone = after = prompt + teacher + 2 * completion
        if sharing != "off":
            after = (teacher - prompt).clamp_min(0) + 2 * completion  # the hindsight, and the answer twice
            alone = prompt + after
        return torch.stack([alone, after if sharing == "conversation" else alone], dim=1).numpy()

    def longest(self) -> Tensor:
        """``[len]`` tokens of each interaction's longest sequence."""
        prompt, teacher, completion, neutral = self.ends.diff().view(-1, 4).T
        return torch.maximum(torch.maximum(prompt, teacher), neutral) + completion

    def has_neutral_prompts(self) -> bool:
        """Whether every interaction has `neutral_prompt_ids`."""
        return bool((self.ends.diff().view(-1, 4)[:, 3] > 0).all())

    def messages_of(self, index: int) -> Sequence[int]:
        """The keys of the users' messages in an interaction's prompt; none where it came as tokens."""
        start, end = self.history_ends[index : index + 2]
        return self.message_keys[start:end]

    @cached_property
    def token_keys(self) -> array:
        """64-bit keys of the interactions' tokens."""
        return array("Q", map(self._token_key, range(len(self))))

    def _token_key(self, index: int) -> int:
        start, _, _, _, end = self.ends[4 * index : 4 * index + 5].tolist()
        tokens = array("i", self.tokens[start:end].tolist()).tobytes()
        return int.from_bytes(blake2b(tokens, digest_size=8).digest(), "little")

    def groups(self, by_conversation: bool) -> Groups:
        """Indices by conversation, in order of first appearance; or each by itself."""
        if not by_conversation:
            return Groups(np.arange(len(self)), np.arange(len(self) + 1))
        # Eight bytes stand for an id, which would take a hundred.
        names = (f"\0{index}" if name is None else name for index, name in enumerate(self.conversation_ids))
        digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
        _, first, group = np.unique(np.frombuffer(digests, np.uint64), return_index=True, return_inverse=True)
        rank = np.empty_like(first)
        rank[np.argsort(first)] = np.arange(len(first))
        group = rank[group]
        return Groups(np.argsort(group, kind="stable"), np.append(0, np.bincount(group).cumsum()))


class Groups(Sequence):
    """Lists of indices, in two arrays: 16 bytes an index.

    Args:
        indices: of all lists, one after another.
        ends: where they end, after a first 0.
    """

    def __init__(self, indices: np.ndarray, ends: np.ndarray):
        self.indices, self.ends = indices, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: Any) -> Any:
        return self.indices[self.ends[number] : self.ends[number + 1]].tolist()


def is_path(source: Any) -> bool:
    """Whether a source is a path, or a list of them."""
    paths = source if isinstance(source, (list, tuple)) and source else [source]
    return all(isinstance(path, (str, os.PathLike)) for path in paths)


def most_workers() -> int:
    """How many processes tokenize what is large."""
    return min(MOST_WORKERS, os.cpu_count() or 1)


class Reading:
    """One pass over a source: its tokens into columns, and what a dataset tells of it besides.

    Attributes:
        sample, dropped: as `InteractionDataset` has them.
    """

    def __init__(self, tokenizer: Any, template: str, name: str, options: dict[str, Any], progress: bool):
        self.tokenizer, self.template, self.name = tokenizer, template, name
        self.options, self.progress = options, progress
        self.sample: list[Interaction] = []
        self.dropped: list[str] = []
        self._draw, self._drawn_from = random.Random(0), 0

    def read(self, source: Iterable[Any], sink: Columns | ColumnFiles, workers: int) -> None:
        """Adds all that can be tokenized to `sink`, in order."""
        if self.progress:
            from tqdm.auto import tqdm

            source = tqdm(source, desc=f"tokenizing {self.name}", unit=" interactions", leave=False)
        how = Tokenization(self.tokenizer, self.template, self.options)
        for chunk in tokenize_chunks(self.checked(source), how, workers):
            sink.extend(chunk.columns)
            self.dropped += chunk.dropped
            for item in chunk.kept:
                self._add_to_sample(item)

    def checked(self, source: Iterable[Any]) -> Iterator[Interaction | TokenizedInteraction]:
        """The items as objects.

        Raises:
            TypeError, ValueError: one is none, by its index; see `InteractionDataset.from_source`.
        """
        name, neutral = self.name, self.options.get("neutral_followup") is not None
        for index, item in enumerate(source):
            if isinstance(item, Mapping):
                try:
                    item = parse_interaction(item)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"SDPOTrainer: {name}[{index}]: {error}") from error
            if isinstance(item, TokenizedInteraction):
                _check_ids(item, f"SDPOTrainer: {name}[{index}]")
                if neutral and not item.neutral_prompt_ids:
                    raise ValueError(f"SDPOTrainer: {name}[{index}] came as tokens, {NO_NEUTRAL}")
            elif not isinstance(item, Interaction):
                raise TypeError(f"SDPOTrainer: {name}[{index}] must be an interaction, got {type(item).__name__}")
            elif self.tokenizer is None:
                raise ValueError(f"SDPOTrainer: {name} holds text, so processing_class must be a tokenizer, got None")
            yield item

    def _add_to_sample(self, item: Interaction) -> None:
        """Reservoir sampling: every interaction is kept with the same probability."""
        self._drawn_from += 1
        if len(self.sample) < SAMPLE_SIZE:
            self.sample.append(item)
        elif (place := self._draw.randrange(self._drawn_from)) < SAMPLE_SIZE:
            self.sample[place] = item


def _checked_columns(interactions: Iterable[TokenizedInteraction]) -> Columns:
    columns = Columns()
    for index, item in enumerate(interactions):
        if not isinstance(item, TokenizedInteraction):
            raise TypeError(
                f"InteractionDataset: interactions[{index}] must be a TokenizedInteraction, got {type(item).__name__}"
            )
        _check_ids(item, f"InteractionDataset: interactions[{index}]")
        columns.add(item)
    return columns


def _check_ids(item: TokenizedInteraction, where: str) -> None:
    for name in ("prompt_ids", "teacher_prompt_ids", "completion_ids"):
        if not getattr(item, name):
            raise ValueError(f"{where}.{name} must not be empty")
