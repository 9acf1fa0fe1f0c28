"""The packs of a data set: how many, how many tokens they compute, and the largest of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import count_tokens, rotary_limit
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.packs import pack_sharing, split_packs

KEPT = 16  # micro-batches with the largest packs
Pack = list[TokenizedInteraction]


class PackTable:
    """All micro-batches of an epoch in the order of the file, in packs.

    Args:
        sharing: the level: "conversation", "interaction" or "off".

    Attributes:
        tokens, unshared: computed by student and teacher in an epoch, and what they would be without sharing.
        passes: packs in an epoch.
    """

    def __init__(self, model: nn.Module, args: SDPOConfig, train: InteractionDataset, sharing: Any):
        limit = None if sharing == "off" else rotary_limit(model)
        self.sharing, self.longest = sharing, None if limit is None else limit.positions
        self.live = args.teacher in ("live", "trust_region")
        self.tokens = self.unshared = self.passes = 0
        self._accumulates = args.gradient_accumulation_steps > 1
        largest: list[tuple[int, int, Pack]] = []
        for start, items in _micro_batches(args, train, sharing):
            widest = 0
            for pack in self._split(items, args.max_tokens_per_pack):
                counts = self._count(pack)
                self.tokens += counts.student + counts.teacher
                self.unshared += counts.unshared_student + counts.unshared_teacher
                widest = max(widest, counts.student)
                self.passes += 1
            heapq.heappush(largest, (widest, -start, items))
            if len(largest) > KEPT:
                heapq.heappop(largest)
        self._batches = [items for *_, items in sorted(largest, reverse=True)]

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


def _micro_batches(args: SDPOConfig, train: InteractionDataset, sharing: Any) -> Iterator[tuple[int, Pack]]:
    grouped = args.group_by_conversation
    if grouped is None:
        grouped = sharing == "conversation"
    order = [index for group in train.groups(grouped) for index in group]
    size = args.per_device_train_batch_size
    for start in range(0, len(order), size):
        yield start, [train[index] for index in order[start : start + size]]
