"""Ulysses: the tokens of a pass divided among processes, and its attention by heads.

The processes of a group have the same plan. The packed tokens of a pass are cut into stretches of one length, one a
process; all layers but the attention see one token at a time. For the attention an all-to-all gives each process
all tokens of its share of the heads, over which it computes the plan's attention as one process would, and a second
one gives it back all heads of its tokens. Keys and values that the student's pass leaves for the teacher's stay
divided by heads. The rows of student and teacher lie on other tokens, so they are gathered, and each process takes
the loss of its share of them.

The sum of the processes' losses is the loss of the pack, and the sum of their gradients its gradient.

The idea is that of DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsdpo.prefix.attention import attends_alone
from fastsdpo.prefix.model import causal_lm, decoder_of
from fastsdpo.prefix.paths import path_mixers
from fastsdpo.prefix.recurrent import recurrent_mixers
from fastsdpo.prefix.refusals import sharing_limit


class Ulysses:
    """One group of processes, all of which call its methods in the same order.

    Args:
        group: of `torch.distributed`; None: all processes.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def stretch(self, values: Tensor) -> Tensor:
        """This process's stretch ``[C]`` of ``values [T]``; the last ones are filled up with zeros."""
        length = -(-len(values) // self.size)
        return _padded(values, length * self.size)[self.rank * length : (self.rank + 1) * length]

    def to_heads(self, states: Tensor, tokens: int) -> Tensor:
        """All heads of the stretch ``[1, H, C, E]`` -> this process's heads of all tokens ``[1, H / size, T, E]``.

        Where the size does not divide H (keys and values of grouped queries), each head is sent several times.
        """
        times = self.size // math.gcd(states.shape[1], self.size)
        states = states if times == 1 else states.repeat_interleave(times, 1)
        heads = states.shape[1] // self.size
        sent = states[0].unflatten(0, (self.size, heads))  # [size, h, C, E]
        return _AllToAll.apply(sent, self).transpose(0, 1).flatten(1, 2)[None, :, :tokens]

    def to_tokens(self, output: Tensor) -> Tensor:
        """This process's heads of all tokens ``[1, T, h, F]`` -> all heads of its stretch ``[1, C, H, F]``."""
        length = -(-output.shape[1] // self.size)
        sent = _padded(output[0], length * self.size).unflatten(0, (self.size, length))  # [size, C, h, F]
        return _AllToAll.apply(sent, self).transpose(0, 1).flatten(1, 2)[None]

    def own_heads(self, values: Tensor) -> Tensor:
        """This process's part of a value for each head ``[H]``."""
        return values.unflatten(0, (self.size, -1))[self.rank]

    def rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The states ``[n, D]`` of the tokens ``rows [n]``, in all processes; each has a stretch ``[C, D]``."""
        mine, place = self.own_rows(rows.to(hidden.device), len(hidden))
        found = hidden.new_zeros(len(rows), hidden.shape[1]).index_copy(0, mine, hidden[place])
        return _Sum.apply(found, self)

    def own_rows(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Which of the tokens ``rows [n]`` are in this process's stretch of ``length``, and their places in it."""
        place = rows - self.rank * length
        mine = ((place >= 0) & (place < length)).nonzero()[:, 0]
        return mine, place[mine]

    def share(self, values: Tensor) -> Tensor:
        """This process's share ``[S, ...]`` of the rows ``values [N, ...]``; where that is no row, the last one."""
        return values[self._share(len(values)).clamp(max=len(values) - 1).to(values.device)]

    def is_row(self, count: int) -> Tensor:
        """``[S]`` bool: which of the share are rows, of ``count``."""
        return self._share(count) < count

    def _share(self, count: int) -> Tensor:
        length = -(-count // self.size)
        return torch.arange(self.rank * length, (self.rank + 1) * length)

    def whole(self, share: Tensor, count: int) -> Tensor:
        """The rows ``[count]`` of the shares ``[S]`` of all processes; without gradient."""
        parts = [torch.empty_like(share) for _ in range(self.size)]
        self.gather(parts, share.detach().contiguous())
        return torch.cat(parts)[:count]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes; without gradient."""
        total = values.detach().clone()
        self.add(total)
        return total

    def exchange(self, sent: Tensor) -> Tensor:
        """Part i of ``[size, ...]`` goes to process i, and part i of the result comes from it."""
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        return received

    def add(self, values: Tensor) -> None:
        """Sums ``values`` over the processes, in place."""
        dist.all_reduce(values, group=self.group)

    def gather(self, parts: list[Tensor], own: Tensor) -> None:
        """Fills ``parts`` with the tensors ``own`` of all processes."""
        dist.all_gather(parts, own, group=self.group)

    def join(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in their order, in each of them."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, items, group=self.group)
        return [item for part in found for item in part]


def _padded(values: Tensor, length: int) -> Tensor:
    missing = values.new_zeros(length - len(values), *values.shape[1:])
    return torch.cat([values, missing]) if len(missing) else values


class _AllToAll(torch.autograd.Function):
    """`Ulysses.exchange`."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, ulysses: Ulysses) -> Tensor:
        ctx.ulysses = ulysses
        return ulysses.exchange(sent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ulysses.exchange(grads[0]), None


class _Sum(torch.autograd.Function):
    """The sum over the processes, each of which differentiates a loss of its own."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ulysses: Ulysses) -> Tensor:
        ctx.ulysses = ulysses
        total = part.clone()
        ulysses.add(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        ctx.ulysses.add(total)
        return total, None


def not_divisible(model: nn.Module, size: int) -> str | None:
    """Why passes of the model cannot be divided among ``size`` processes, or None."""
    causal = causal_lm(model)
    kind, config = type(causal).__name__, causal.config.get_text_config()
    if recurrent_mixers(decoder_of(causal)):
        return f"{kind} has recurrent layers, which read all tokens in their order"
    if path_mixers(decoder_of(causal)):
        return f"{kind} has layers that read whole sequences"
    if attends_alone(decoder_of(causal)):
        return f"the attention of {kind} is its own, and not divided by heads"
    if getattr(config, "attn_temperature_tuning", None):
        return f"{kind} scales queries by their place in the pass (attn_temperature_tuning)"
    limit = sharing_limit(model)
    if limit is not None:
        return f"{kind} looks at the longest sequence of a pass: {limit}"
    heads = getattr(config, "num_attention_heads", 0)
    if isinstance(heads, int) and heads % size:
        return f"the {heads} attention heads of {kind} cannot be divided by {size}"
    return None
