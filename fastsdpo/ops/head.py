"""From hidden states to a loss, a tile of logits at a time: the head's GEMMs and the one chunk loop.

    z = hidden @ weight.T + bias

`through_head` computes the logits of a chunk of tokens and passes them to a function that knows the loss. The
function writes the logits' gradient, and `through_head` carries it to the hidden states and the head. Losses,
log-probs, the losses of other libraries and vocabulary shards differ only in that function.

Logit tiles are float32 whatever the operands: with the teacher close to the student, bfloat16 logits put 7%
to 10% error into the gradients. The gradient tile has the operands' dtype, and the head's gradient
accumulates in float32. Rows of tiles begin at multiples of 64 elements: GEMMs and kernels then read 16 bytes
at a time whatever the vocabulary.

If the gradient has tiles of its own, one GEMM computes the head's gradient of several chunks. Such a GEMM of n
tokens takes 2 n V D operations and moves 8 V D bytes (it reads and writes the float32 sum). On an H100 memory
limits it at n = 1024, but not from about n = 4096 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops._memory import autocast_dtype, borrow_tiles, kind_of, padded, return_tiles
from fastsdpo.ops.backend import constant
from fastsdpo.ops.checks import accumulation_dtype

# f(student's logits [n, V], teacher's or None, slice of the tokens, gradient buffer [n, V] or None)
TileLoss = Callable[[Tensor, "Tensor | None", slice, "Tensor | None"], None]
Needs = tuple[bool, bool, bool]  # gradients of hidden states, weight, bias
GRADIENT_ROWS = 4096  # tokens of one GEMM for the head's gradient


def default_chunk_size(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk: bounded memory, GEMMs large enough to run at full rate.

    The largest multiple of 64 with chunk * V <= 2^26 elements on a GPU (2^24 on a CPU), at least 1024 (256),
    then evened out over the chunks.
    """
    budget, least = (2**24, 256) if kind_of(device) == "cpu" else (2**26, 1024)
    chunk = max(least, budget // vocabulary // 64 * 64)
    if tokens <= chunk:
        return max(1, tokens)
    chunks = math.ceil(tokens / chunk)
    return min(chunk, math.ceil(tokens / chunks / 8) * 8)


def gradient_chunks(tokens: int, chunk: int) -> int:
    """How many chunks share one GEMM for the head's gradient."""
    chunks = math.ceil(tokens / max(1, chunk))
    return max(1, min(chunks, GRADIENT_ROWS // max(1, chunk)))


_mixed: dict[str, bool] = {}  # by device type


@constant
def has_mixed_gemm(device: torch.device) -> bool:
    """Whether GEMMs of half-precision operands can write and accumulate float32 (``out_dtype``); tries one.

    False on a CPU, where a GEMM of half-precision operands takes many times longer than a float32 one.
    """
    if kind_of(device) != "cuda":
        return False
    if device.type not in _mixed:
        half = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        total = torch.zeros(16, 16, dtype=torch.float32, device=device)
        try:
            torch.mm(half, half, out_dtype=total.dtype, out=total)
            torch.addmm(total, half, half, out_dtype=total.dtype, out=total)
            _mixed[device.type] = True
        except (RuntimeError, TypeError):
            _mixed[device.type] = False
    return _mixed[device.type]


@dataclass(frozen=True)
class ChunkPlan:
    """How a call is computed.

    Attributes:
        chunk_size: tokens of a tile.
        operand, tile: dtypes of GEMM operands and of logits.
    """

    chunk_size: int
    operand: torch.dtype
    tile: torch.dtype

    def packed(self) -> tuple[int, str]:
        """As arguments of an operator; `unpacked` reads them."""
        return self.chunk_size, f"{self.operand} {self.tile}"

    @staticmethod
    def unpacked(chunk_size: int, dtypes: str) -> ChunkPlan:
        operand, tile = (getattr(torch, name.removeprefix("torch.")) for name in dtypes.split())
        return ChunkPlan(chunk_size, operand, tile)


def choose_dtypes(hidden: Tensor, weight: Tensor, tile: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """``(operand, tile)`` dtypes of a call."""
    accumulation = accumulation_dtype(hidden, weight)
    if accumulation == torch.float64 or not has_mixed_gemm(hidden.device):
        return accumulation, accumulation
    return autocast_dtype(hidden.device) or weight.dtype, tile or accumulation


class HeadGemms:
    """``x @ weight.T + bias`` into tiles, and the two products of its backward pass.

    Where the device has GEMMs with float32 results, the operands keep their dtype. Elsewhere half-precision
    weights are widened a block of the vocabulary at a time.

    Args:
        weight: ``(V, D)``; ``bias``: ``(V,)`` or None.
        operand: dtype of the GEMMs' operands.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, operand: torch.dtype):
        self.weight = weight
        self.bias = bias
        self.operand = operand
        self.vocabulary = weight.shape[0]
        self.block = max(1, self.vocabulary)
        if weight.dtype != operand:
            if has_mixed_gemm(weight.device):
                self.weight = weight.to(operand)  # autocast: once per call, as autocast does
            else:
                self.block = max(256, 2**22 // max(1, weight.shape[1]))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary with their weights in the operands' dtype."""
        for start in range(0, self.vocabulary, self.block):
            rows = slice(start, min(start + self.block, self.vocabulary))
            yield rows, self.weight[rows].to(self.operand)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Writes the logits of ``x [n, D]`` to ``out [n, V]``; columns of ``out`` beyond V become -inf."""
        for rows, weight in self._blocks():
            if out.dtype == x.dtype:
                torch.mm(x, weight.t(), out=out[:, rows])
            else:
                torch.mm(x, weight.t(), out_dtype=out.dtype, out=out[:, rows])
        if self.bias is not None:
            out[:, : self.vocabulary].add_(self.bias)
        if out.shape[1] > self.vocabulary:
            out[:, self.vocabulary :].fill_(-math.inf)

    def hidden_gradient(self, grad: Tensor, out: Tensor) -> None:
        if self.block == self.vocabulary and grad.dtype == out.dtype == self.weight.dtype:
            torch.mm(grad, self.weight, out=out)
            return
        total = grad.new_zeros(out.shape)
        for rows, weight in self._blocks():
            total.addmm_(grad[:, rows], weight)
        out.copy_(total)

    @staticmethod
    def accumulate(grad: Tensor, x: Tensor, total: Tensor, first: bool) -> None:
        """``total += grad.T @ x`` with ``total`` in the accumulation dtype.

        The first call overwrites ``total`` (beta = 0 does not read it), so that it may be uninitialized.
        """
        beta = 0.0 if first else 1.0
        if grad.dtype == total.dtype:
            total.addmm_(grad.t(), x, beta=beta)
        else:
            torch.addmm(total, grad.t(), x, beta=beta, out_dtype=total.dtype, out=total)


def needed(values: Iterable[bool]) -> Needs:
    """Three flags as a tuple: whether hidden states, weight and bias need a gradient."""
    hidden, weight, bias = values
    return hidden, weight, bias


def present(needs: Sequence[bool], values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``values``, None where not needed."""
    return [value if need else None for need, value in zip(needs, values)]


class Gradients(NamedTuple):
    """Gradients of hidden states, weight and bias; None where not needed.

    Those of weight and bias have the accumulation dtype, that of the hidden states has their own dtype (float32
    for float16).
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def unscaled(
    grads: Gradients, scale: Tensor | None, sources: Sequence[Tensor | None], like: Tensor
) -> tuple[Tensor, ...]:
    """Finished gradients in the dtypes of ``sources``, as results of an operator: ``[0]`` where there is none."""
    return tuple(
        like.new_empty(0)
        if grad is None or source is None
        else (grad if scale is None else grad.div_(scale)).to(source.dtype)
        for grad, source in zip(grads, sources)
    )


def fake_gradients(needs: Sequence[bool], sources: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What `unscaled` gives, for a compiler."""
    return tuple(
        source.new_empty(source.shape) if need and source is not None else like.new_empty(0)
        for need, source in zip(needs, sources)
    )


def gradient_scale(slopes: Tensor, operand: torch.dtype) -> Tensor | None:
    """A power of two that scales the largest weight to nearly 1, because 1/N would underflow in float16."""
    if operand != torch.float16 or slopes.numel() == 0:
        return None
    largest = slopes.abs().max().clamp(min=1e-30)
    return torch.exp2(-largest.log2().ceil())


def through_head(
    hidden: Tensor,
    head: HeadGemms,
    tile_loss: TileLoss,
    plan: ChunkPlan,
    needs: Needs = (False, False, False),
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: HeadGemms | None = None,
    live: Tensor | None = None,
    columns: int = 0,
) -> Gradients:
    """Runs ``tile_loss`` over the logits of all tokens, chunk by chunk.

    Args:
        hidden, teacher_hidden: ``(N, D)``; without a ``teacher_head`` one GEMM of the student's head serves both.
        needs: which gradients are wanted; if none, ``tile_loss`` gets no gradient buffer.
        live: ``[N]``, False where a token has no gradient: its hidden states may be NaN.
        columns: how many columns a tile has beyond the vocabulary; they are -inf in every row.
    """
    tokens, width = len(hidden), head.vocabulary + columns
    operand, chunk = plan.operand, max(1, plan.chunk_size)
    largest = min(chunk, tokens)
    policies = 1 if teacher_hidden is None else 2
    tiles = borrow_tiles(hidden, policies * largest, width, plan.tile)
    out = _new_gradients(hidden, head.weight, needs)
    group, buffer = 1, None
    if any(needs) and plan.tile != operand:
        group = gradient_chunks(tokens, chunk) if needs[1] else 1
        buffer = padded(hidden, min(group * chunk, tokens), width, operand)
    first = 0  # token whose gradient is the buffer's first
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        n = rows.stop - start
        student, teacher = tiles[:n], None
        x = hidden[rows].to(operand)
        if teacher_hidden is not None:
            teacher, y = tiles[n : 2 * n], teacher_hidden[rows].to(operand)
            if teacher_head is None:
                head.logits(torch.cat([x, y]), tiles[: 2 * n])
            else:
                head.logits(x, student)
                teacher_head.logits(y, teacher)
        else:
            head.logits(x, student)
        if not any(needs):
            tile_loss(student, teacher, rows, None)
            continue
        grad = student if buffer is None else buffer[start - first : rows.stop - first]
        tile_loss(student, teacher, rows, grad)
        if rows.stop == tokens or rows.stop - first == group * chunk:
            grad = student if buffer is None else buffer[: rows.stop - first]
            done = slice(first, rows.stop)
            _add_gradients(head, grad[:, : head.vocabulary], hidden, live, done, out)
            first = rows.stop
    return_tiles(tiles)
    return out


def _new_gradients(hidden: Tensor, weight: Tensor, needs: Needs) -> Gradients:
    """Gradients to write or to add to; what the first chunk overwrites is uninitialized."""
    accumulation = accumulation_dtype(hidden, weight)
    make = hidden.new_empty if len(hidden) else hidden.new_zeros
    waits = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return Gradients(
        hidden.new_empty(hidden.shape, dtype=waits) if needs[0] else None,
        make(weight.shape, dtype=accumulation) if needs[1] else None,
        hidden.new_zeros(len(weight), dtype=accumulation) if needs[2] else None,
    )


def _add_gradients(
    head: HeadGemms, grad: Tensor, hidden: Tensor, live: Tensor | None, rows: slice, out: Gradients
) -> None:
    """Carries ``grad [n, V]`` of the tokens ``rows`` to the hidden states and the head."""
    if out.hidden is not None:
        head.hidden_gradient(grad, out.hidden[rows])
    if out.weight is not None:
        x = hidden[rows].to(head.operand)
        if live is not None:
            x = torch.where(live[rows, None], x, 0.0)
        head.accumulate(grad, x, out.weight, first=rows.start == 0)
    if out.bias is not None:
        out.bias.add_(grad.sum(0, dtype=out.bias.dtype))
