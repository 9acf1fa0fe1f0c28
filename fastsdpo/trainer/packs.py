"""The order in which interactions are trained on, micro-batches of them, and packs of bounded size."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.data import Sampler

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import Bundle, ReadyPasses, pack_conversations, ready_passes
from fastsdpo.prefix.attention import Window
from fastsdpo.trainer.loss import token_shares

Item = TypeVar("Item", bound=TokenizedInteraction)


class GroupSampler(Sampler):
    """Groups in shuffled order, each group's indices in its own; filled up with None.

    The fill makes the length a multiple of the interactions that all processes take at once, so that no
    process repeats interactions to keep up with the others. The order depends on ``seed`` and the epoch
    only, but for which process takes which interactions of an optimizer step, and when: they are shared out so that
    all have about as many tokens to compute at once, and in sum, and a group's stay together where they can.

    Args:
        each: interactions that one process takes at once.
        processes: their number.
        accumulated: how often they take so many in one optimizer step.
        costs: ``[indices, 2]``: the tokens to compute where it is a group's first, and where it follows another
            of its group; None: processes take interactions in their order.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        *,
        each: int = 1,
        processes: int = 1,
        accumulated: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        costs: Any = None,
    ):
        self.groups = groups
        self.each, self.processes, self.accumulated, self.costs = each, processes, accumulated, costs
        self.seed, self.shuffle = seed, shuffle
        self.epoch = 0
        size = sum(map(len, groups))
        self.fill = -size % (each * processes)
        self.size = size + self.fill

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int | None]:
        order = array("q", range(len(self.groups)))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        indices: Iterator[tuple[int, int | None]] = itertools.chain(
            ((number, index) for number in order for index in self.groups[number]), [(-1, None)] * self.fill
        )
        if self.costs is None or self.processes == 1:
            yield from (index for _, index in indices)
            return
        while block := list(itertools.islice(indices, self.each * self.processes * self.accumulated)):
            yield from self._shared_out(block)

    def _shared_out(self, block: Sequence[tuple[int, int | None]]) -> Iterator[int | None]:
        """An optimizer step's interactions, in an order in which each process's parts cost about the same.

        Micro-batches are filled alike, then those that cost about the same are taken at once, and of these the
        cheapest by the process that had the most to do before.
        """
        micro_batches = self._micro_batches(block)
        micro_batches.sort(key=lambda one: -one[0])
        loads = [0] * self.processes
        for start in range(0, len(micro_batches), self.processes):
            free = sorted(range(self.processes), key=lambda p: (loads[p], p))
            taken = dict(zip(free, micro_batches[start : start + self.processes]))
            for process in range(self.processes):
                cost, indices = taken[process]
                loads[process] += cost
                yield from indices

    def _micro_batches(self, block: Sequence[tuple[int, int | None]]) -> list[tuple[int, list[int | None]]]:
        """Costs and interactions of micro-batches: the most expensive part of a group first, each to the micro-batch
        that costs the least so far."""
        assert self.costs is not None
        parts = [[index for _, index in part] for _, part in itertools.groupby(block, lambda item: item[0])]
        parts = [part for whole in parts for part in _cut(whole, self.each if whole[0] is not None else 1)]
        costs = [self._cost(part) for part in parts]
        count = len(block) // self.each
        taken: list[list[int]] = [[] for _ in range(count)]  # parts of each micro-batch
        loads, room = [0] * count, [self.each] * count
        waiting = sorted(range(len(parts)), key=lambda number: (-costs[number], number))
        for number in waiting:
            fits = [p for p in range(count) if room[p] >= len(parts[number])]
            if not fits:  # cut in pieces of one, which fit somewhere
                for index in parts[number]:
                    parts.append([index])
                    place = min((p for p in range(count) if room[p]), key=lambda p: (loads[p], p))
                    taken[place].append(len(parts) - 1)
                    loads[place] += self._cost([index])
                    room[place] -= 1
                continue
            place = min(fits, key=lambda p: (loads[p], p))
            taken[place].append(number)
            loads[place] += costs[number]
            room[place] -= len(parts[number])
        return [
            (load, [index for number in sorted(mine) for index in parts[number]]) for load, mine in zip(loads, taken)
        ]

    def _cost(self, part: Sequence[int | None]) -> int:
        assert self.costs is not None
        return sum(int(self.costs[index, int(n > 0)]) for n, index in enumerate(part) if index is not None)


def _cut(items: list[Any], most: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


def collate(items: list[TokenizedInteraction | None]) -> dict[str, list[TokenizedInteraction]]:
    """A micro-batch: its interactions, without the fill."""
    return {"interactions": [item for item in items if item is not None]}


class PackContent(NamedTuple):
    """What a step computes of a pack, besides the model.

    Attributes:
        passes: of student and teacher.
        shares, counts: ``[N]``, see `fastsdpo.trainer.loss.token_shares`.
    """

    passes: ReadyPasses
    shares: Tensor
    counts: Tensor


class ReadyPack(Sequence):
    """The interactions of a pack, and its `PackContent`, which moves to a device in one copy.

    A data loader pins it, and accelerate moves it, as if it were a tensor.
    """

    def __init__(self, interactions: Sequence[TokenizedInteraction], bundle: Bundle):
        self.interactions, self.bundle = interactions, bundle
        self._content: PackContent | None = None

    def __len__(self) -> int:
        return len(self.interactions)

    def __getitem__(self, index: Any) -> Any:
        return self.interactions[index]

    @property
    def content(self) -> PackContent:
        if self._content is None:
            self._content = content = self.bundle.open()
            return content
        return self._content

    def pin_memory(self) -> ReadyPack:
        return ReadyPack(self.interactions, self.bundle.pin_memory())

    def to(self, device: Any, non_blocking: bool = True) -> ReadyPack:
        """Itself where it is there already. The copy is never waited for: what reads it comes after it in line."""
        moved = self.bundle.to(device)
        return self if moved is self.bundle else ReadyPack(self.interactions, moved)


@dataclass
class PackMaker:
    """Makes packs of micro-batches, in the processes of a data loader too.

    Args:
        split: a micro-batch in packs.
        sharing, longest: as `pack_sharing` takes them.
        live: the teacher is the model itself, as it is.
        backend, windows: of the attention, as `fastsdpo.prefix.ready_passes` takes them.
        normalization, ignore_first_k: as in `SDPOConfig`.
    """

    split: Callable[[Sequence[Any]], list[list[Any]]]
    sharing: Any
    longest: int | None
    live: bool
    backend: str
    windows: tuple[Window, ...]
    normalization: str
    ignore_first_k: int

    def collate(self, items: list[TokenizedInteraction | None]) -> dict[str, Any]:
        """A micro-batch: its interactions, without the fill, and packs of them."""
        batch: dict[str, Any] = collate(items)
        return {**batch, "packs": self.packs(batch["interactions"])}

    def packs(self, interactions: Sequence[TokenizedInteraction]) -> list[ReadyPack]:
        return [self.pack(pack) for pack in self.split(interactions)]

    def pack(self, interactions: Sequence[TokenizedInteraction]) -> ReadyPack:
        passes = ready_passes(
            interactions,
            sharing=pack_sharing(interactions, self.sharing, self.longest),
            live=self.live,
            backend=self.backend,
            windows=self.windows,
        )
        lengths = [len(item.completion_ids) for item in interactions]
        content = PackContent(passes, *token_shares(lengths, self.normalization, self.ignore_first_k))
        return ReadyPack(interactions, Bundle(content))


def pack_sharing(pack: Sequence[TokenizedInteraction], sharing: Any, longest: int | None = None) -> Any:
    """``sharing``; or "off" where a sequence has more than ``longest`` tokens."""
    return "off" if any(_is_longer(item, longest) for item in pack) else sharing


def _is_longer(item: TokenizedInteraction, longest: int | None) -> bool:
    return longest is not None and longest_sequence(item) > longest


def longest_sequence(item: TokenizedInteraction) -> int:
    """How many tokens the longest of an interaction's sequences has."""
    prompts = item.prompt_ids, item.teacher_prompt_ids, item.neutral_prompt_ids or ()
    return max(map(len, prompts)) + len(item.completion_ids)


def split_packs(
    interactions: Sequence[Item], max_tokens: int | None, sharing: Any, longest: int | None = None
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
