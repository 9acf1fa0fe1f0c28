"""The order in which interactions are trained on, micro-batches of them, and packs of bounded size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import Sampler

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import pack_conversations

Item = TypeVar("Item", bound=TokenizedInteraction)


class GroupSampler(Sampler):
    """Groups in shuffled order, each group's indices in its own; filled up with None.

    The fill makes the length a multiple of ``multiple`` (the interactions that all processes take
    at once), so that no process repeats interactions to keep up with the others. The order depends on
    ``seed`` and the epoch only.
    """

    def __init__(self, groups: Sequence[Sequence[int]], *, multiple: int = 1, seed: int = 0, shuffle: bool = True):
        self.groups = groups
        self.seed, self.shuffle = seed, shuffle
        self.epoch = 0
        size = sum(len(group) for group in groups)
        self.fill = -size % multiple
        self.size = size + self.fill

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int | None]:
        order = list(range(len(self.groups)))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for group in order:
            yield from self.groups[group]
        yield from [None] * self.fill


def collate(items: list[TokenizedInteraction | None]) -> dict[str, list[TokenizedInteraction]]:
    """A micro-batch: its interactions, without the fill."""
    return {"interactions": [item for item in items if item is not None]}


def pack_sharing(pack: Sequence[TokenizedInteraction], sharing: Any, longest: int | None = None) -> Any:
    """``sharing``; or "off" where a sequence has more than ``longest`` tokens."""
    return "off" if any(_is_longer(item, longest) for item in pack) else sharing


def _is_longer(item: TokenizedInteraction, longest: int | None) -> bool:
    if longest is None:
        return False
    prompts = item.prompt_ids, item.teacher_prompt_ids, item.neutral_prompt_ids or ()
    return max(map(len, prompts)) + len(item.completion_ids) > longest


def split_packs(
    interactions: Sequence[Item],
    max_tokens: int | None,
    sharing: Any,
    longest: int | None = None,
) -> list[list[Item]]:
    """A micro-batch in packs of at most ``max_tokens`` tokens, conversations kept together.

    An interaction with a sequence of more than ``longest`` tokens is a pack by itself.
    """
    alone = [item for item in interactions if _is_longer(item, longest)]
    if alone:
        rest = [item for item in interactions if not _is_longer(item, longest)]
        return split_packs(rest, max_tokens, sharing) + [[item] for item in alone]
    if max_tokens is None or len(interactions) <= 1:
        return [list(interactions)] if interactions else []
    groups: dict[Any, list[int]] = {}
    for index, item in enumerate(interactions):
        key = ("alone", index) if item.conversation_id is None else item.conversation_id
        groups.setdefault(key, []).append(index)
    packs = pack_conversations(interactions, list(groups.values()), max_tokens=max_tokens, sharing=sharing)
    return [[interactions[index] for index in pack] for pack in packs]
