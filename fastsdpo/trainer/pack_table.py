"""The packs of a data set: how many, how many tokens they compute, and the largest of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import count_tokens, sharing_limit
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.packs import pack_sharing, split_packs

KEPT = 16  # micro-batches with the largest packs
SAMPLED = 100_000  # interactions, about
Pack = list[TokenizedInteraction]


class PackTable:
    """The micro-batches of an epoch in the order of the file, in packs.

    Of large data a sample: micro-batches at equal distances, and those with the most tokens.

    Args:
        sharing: the level: "conversation", "interaction" or "off".

    Attributes:
        tokens, unshared: computed by student and teacher in an epoch, and what they would be without sharing.
        passes: packs in an epoch.
        exact: whether all were counted; else these three are projected from the sample.
    """

    def __init__(self, model: nn.Module, args: SDPOConfig, train: InteractionDataset, sharing: Any):
        limit = None if sharing == "off" else sharing_limit(model)
        self.sharing, self.longest = sharing, None if limit is None else limit.positions
        self.live = args.teacher in ("live", "trust_region")
        self.tokens = self.unshared = self.passes = 0
        self._accumulates = args.gradient_accumulation_steps > 1
        largest: list[tuple[int, int, Pack]] = []
        batches = _MicroBatches(args, train, sharing)
        sample = range(0, len(batches), max(1, len(batches) * batches.size // SAMPLED))
        self.exact = len(sample) == len(batches)
        numbers = {} if self.exact else dict.fromkeys(batches.largest(KEPT), False)
        numbers |= dict.fromkeys(sample, True)  # whether it is counted
        for number, counted in numbers.items():
            items, widest = batches[number], 0
            for pack in self._split(items, args.max_tokens_per_pack):
                counts = self._count(pack)
                widest = max(widest, counts.student)
                if counted:
                    self.tokens += counts.student + counts.teacher
                    self.unshared += counts.unshared_student + counts.unshared_teacher
                    self.passes += 1
            heapq.heappush(largest, (widest, -number, items))
            if len(largest) > KEPT:
                heapq.heappop(largest)
        self._batches = [items for *_, items in sorted(largest, reverse=True)]
        if not self.exact:
            scale = batches.tokens.sum() / max(1, batches.tokens[list(sample)].sum())
            self.tokens, self.unshared = (round(scale * count) for count in (self.tokens, self.unshared))
            self.passes = round(len(batches) / len(sample) * self.passes)

    def _split(self, items: Sequence[TokenizedInteraction], max_tokens: int | None) -> list[Pack]:
        return split_packs(items, max_tokens, self.sharing, self.longest)

    def _count(self, pack: Pack) -> Any:
        return count_tokens(pack, sharing=pack_sharing(pack, self.sharing, self.longest), live=self.live)

    def largest(self, max_tokens: int | None) -> tuple[list[Pack], bool]:
        """The packs that need the most memory, and whether a step has several.

        Args:
            max_tokens: of a pack; another one than the run's is tried on the largest micro-batches only.

        Returns:
            the pack with the most answers' tokens and the one with the most of the student's, which may be the same.
        """
        split = [self._split(items, max_tokens) for items in self._batches]
        packs = [pack for batch in split for pack in batch]
        answers = max(packs, key=lambda pack: sum(len(item.completion_ids) for item in pack))
        widest = max(packs, key=lambda pack: self._count(pack).student)
        return [answers, widest], self._accumulates or any(len(batch) > 1 for batch in split)


class _MicroBatches:
    """Those of an epoch; by number the interactions of one.

    Attributes:
        tokens: what each computes is in proportion to it, about.
    """

    def __init__(self, args: SDPOConfig, train: InteractionDataset, sharing: Any):
        grouped = args.group_by_conversation
        if grouped is None:
            grouped = sharing == "conversation"
        # The processes that share a pack take their micro-batches together.
        self.train, self.size = train, args.per_device_train_batch_size * args.ulysses
        self.order = train.groups(grouped).indices
        starts = np.arange(0, len(self.order), self.size)
        # Without shared prefixes, and as if all were shared: what is computed lies between. And the answers' tokens.
        columns = np.column_stack([train.costs(sharing), train.lengths()[:, 2].numpy()])
        self._sums = np.add.reduceat(columns[self.order], starts, dtype=np.int64)
        self.tokens = self._sums[:, :2].sum(1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> Pack:
        return [self.train[int(index)] for index in self.order[number * self.size : (number + 1) * self.size]]

    def largest(self, count: int) -> list[int]:
        """Those that compute the most, by either bound, and those with the longest answers."""
        orders = np.argsort(-self._sums, axis=0, kind="stable")[:count]
        return list(dict.fromkeys(orders.ravel().tolist()))
