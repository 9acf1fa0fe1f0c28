"""Interactions as a map-style dataset, the order in which they are trained on, and packs of them."""

from __future__ import annotations

import itertools
import logging
import os
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastsdpo.data import (
    Interaction,
    InteractionTokenizer,
    TokenizedInteraction,
    load_interactions,
)
from fastsdpo.data.keys import TextKeys, extend
from fastsdpo.data.loading import parse_interaction

logger = logging.getLogger("fastsdpo.trainer")

SAMPLE_SIZE = 64  # interactions of which the text is kept, for the teacher check
MESSAGES = 3  # of dropped interactions, in warnings
NO_NEUTRAL = "which must have neutral_prompt_ids for neutral_followup"


class InteractionDataset(Dataset):
    """Tokenized interactions in memory, four bytes per token.

    ``dataset[i]`` is a `TokenizedInteraction`; ``dataset[None]`` is None, which fills up batches.

    Args:
        interactions: `TokenizedInteraction` objects.

    Attributes:
        sample: up to 64 interactions as text, drawn evenly, where they came as text.
        dropped: messages about the interactions that could not be used.
        keys: of each interaction, a 61-bit key of its prompt, answer and follow-up; 0 where it came
            as tokens.
        history_keys: of each interaction, in ``history_ends[i] : history_ends[i + 1]``, such keys of
            what begins its prompt and ends with a user's message; `message_keys`: of that message.
    """

    def __init__(self, interactions: Iterable[TokenizedInteraction]):
        self.sample: list[Interaction] = []
        self.dropped: list[str] = []
        self.ids: list[str | None] = []
        self.conversation_ids: list[str | None] = []
        tokens, ends = array("i"), array("q", [0])
        for index, item in enumerate(interactions):
            if not isinstance(item, TokenizedInteraction):
                raise TypeError(
                    f"InteractionDataset: interactions[{index}] must be a TokenizedInteraction, "
                    f"got {type(item).__name__}"
                )
            for name in ("prompt_ids", "teacher_prompt_ids", "completion_ids"):
                ids = getattr(item, name)
                if not ids:
                    raise ValueError(f"InteractionDataset: interactions[{index}].{name} must not be empty")
                tokens.extend(ids)
                ends.append(len(tokens))
            tokens.extend(item.neutral_prompt_ids or [])
            ends.append(len(tokens))
            self.ids.append(item.id)
            self.conversation_ids.append(item.conversation_id)
        self.keys = array("Q", [0]) * len(self.ids)
        self.history_keys, self.message_keys = array("Q"), array("Q")
        self.history_ends = array("Q", [0]) * (len(self.ids) + 1)
        self.tokens = torch.frombuffer(tokens, dtype=torch.int32) if tokens else torch.zeros(0)
        self.ends = torch.frombuffer(ends, dtype=torch.int64)

    @classmethod
    def from_source(
        cls,
        source: Any,
        tokenizer: Any,
        template: str,
        *,
        name: str = "train_dataset",
        progress: bool = False,
        **options: Any,
    ) -> InteractionDataset:
        """Tokenizes what comes as text; drops, counts and reports what cannot be tokenized.

        Args:
            source: a path (or several) that `load_interactions` reads, or any iterable of
                `Interaction`, `TokenizedInteraction`, or rows as `fastsdpo prepare` writes them
                (a `datasets.Dataset` is one).
            tokenizer, template, options: of `InteractionTokenizer`.
            name: the argument, in messages.
            progress: show a progress bar.

        Raises:
            TypeError: not a dataset, or an item of another type.
            ValueError: a malformed row, by index; text without a tokenizer; nothing is left.
        """
        neutral = options.get("neutral_followup") is not None
        if isinstance(source, cls):
            if neutral and not source.has_neutral_prompts():
                raise ValueError(f"SDPOTrainer: {name} came as tokens, {NO_NEUTRAL}")
            return source
        if isinstance(source, (str, os.PathLike)):
            source = load_interactions(source)
        if not isinstance(source, Iterable) or isinstance(source, Mapping):
            raise TypeError(
                f"SDPOTrainer: {name} must be a path or a collection of interactions, got {type(source).__name__}"
            )
        if progress:
            from tqdm.auto import tqdm

            source = tqdm(source, desc=f"tokenizing {name}", unit=" interactions", leave=False)
        reading = _Tokenization(source, tokenizer, template, name, options)
        dataset = cls(reading.tokenized())
        dataset.sample, dataset.dropped = reading.sample, reading.dropped
        dataset.keys, dataset.history_ends = reading.keys, reading.history_ends
        dataset.history_keys, dataset.message_keys = reading.history_keys, reading.message_keys
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
            prompt,
            teacher,
            completion,
            self.ids[index],
            self.conversation_ids[index],
            neutral or None,
        )

    def lengths(self) -> Tensor:
        """``[len, 3]`` tokens of prompt, teacher's prompt and completion."""
        return self.ends.diff().view(-1, 4)[:, :3]

    def longest(self) -> Tensor:
        """``[len]`` tokens of each interaction's longest sequence."""
        prompt, teacher, completion, neutral = self.ends.diff().view(-1, 4).T
        return torch.maximum(torch.maximum(prompt, teacher), neutral) + completion

    def has_neutral_prompts(self) -> bool:
        """Whether every interaction has `neutral_prompt_ids`."""
        return bool((self.ends.diff().view(-1, 4)[:, 3] > 0).all())

    def messages_of(self, index: int) -> array:
        """The keys of the users' messages in an interaction's prompt; none where it came as tokens."""
        start, end = self.history_ends[index : index + 2]
        return self.message_keys[start:end]

    def token_key(self, index: int) -> int:
        """A 64-bit key of an interaction's tokens."""
        start, _, _, _, end = self.ends[4 * index : 4 * index + 5].tolist()
        tokens = array("i", self.tokens[start:end].tolist()).tobytes()
        return int.from_bytes(blake2b(tokens, digest_size=8).digest(), "little")

    def groups(self, by_conversation: bool) -> list[list[int]]:
        """Indices by conversation, in order of first appearance; or each by itself."""
        if not by_conversation:
            return [[index] for index in range(len(self))]
        groups: dict[Any, list[int]] = {}
        for index, conversation in enumerate(self.conversation_ids):
            key = ("alone", index) if conversation is None else conversation
            groups.setdefault(key, []).append(index)
        return list(groups.values())


class _Tokenization:
    """One pass over a source: what can be tokenized, and what a dataset tells of it (its attributes)."""

    def __init__(self, source: Iterable[Any], tokenizer: Any, template: str, name: str, options: dict[str, Any]):
        self.source, self.name, self.options = source, name, options
        self.tokenizer, self.template = tokenizer, template
        self.neutral = options.get("neutral_followup") is not None
        self.dropped: list[str] = []
        self.sample: list[Interaction] = []
        self.keys, self.history_keys, self.message_keys = array("Q"), array("Q"), array("Q")
        self.history_ends = array("Q", [0])
        self._texts = TextKeys()
        self._draw, self._drawn_from = random.Random(0), 0

    def tokenized(self) -> Iterator[TokenizedInteraction]:
        """All that can be tokenized, in order; the rest is in ``dropped``."""
        tokenize = None
        for text, items in itertools.groupby(self._checked(), lambda i: isinstance(i, Interaction)):
            if not text:
                for item in items:
                    self.keys.append(0)
                    self.history_ends.append(len(self.history_keys))
                    yield cast(TokenizedInteraction, item)
                continue
            tokenize = tokenize or InteractionTokenizer(self.tokenizer, self.template, **self.options)
            items, interactions = itertools.tee(cast(Iterator[Interaction], items))
            for item, result in zip(items, tokenize.stream(interactions)):
                if isinstance(result, ValueError):
                    self.dropped.append(str(result))
                    continue
                self._add_to_sample(item)
                self._add_keys(item)
                yield result

    def _checked(self) -> Iterator[Interaction | TokenizedInteraction]:
        """The items as objects.

        Raises:
            TypeError, ValueError: one is none, by its index; see `InteractionDataset.from_source`.
        """
        name = self.name
        for index, item in enumerate(self.source):
            if isinstance(item, Mapping):
                try:
                    item = parse_interaction(item)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"SDPOTrainer: {name}[{index}]: {error}") from error
            if isinstance(item, TokenizedInteraction):
                if self.neutral and not item.neutral_prompt_ids:
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

    def _add_keys(self, item: Interaction) -> None:
        if len(self._texts) > 1000:  # what it holds speeds up the next interactions of a conversation
            self._texts = TextKeys()
        texts, history = self._texts, 0
        for message in item.prompt:
            history = extend(history, texts[message["role"]], texts[message["content"]])
            if message["role"] == "user":
                self.history_keys.append(history)
                self.message_keys.append(texts[message["content"]])
        history = extend(history, texts["assistant"], texts[item.completion])
        self.keys.append(extend(history, texts["user"], texts[item.followup]))
        self.history_ends.append(len(self.history_keys))
