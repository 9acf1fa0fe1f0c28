"""The backend ``segments``: blocks of queries x unbroken keys, merged by their log-sum-exps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsdpo.prefix.attention.kernels import choose_kernel, softcapped_kernel
from fastsdpo.prefix.attention.shared_pass import Scoring, SharedPass
from fastsdpo.prefix.attention.windows import ChunkWindow, Window, within_chunks
from fastsdpo.prefix.plan import Run, Segment

# Queries per block where a sliding window needs a mask: bounds the mask to [512, 512 + window].
BAND_BLOCK = 512


class Block(NamedTuple):
    """Queries ``[q0, q1)`` against keys ``[k0, k1)``.

    ``band`` is None, or (offset, window): query i sees key j where i - j + offset < window.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    band: tuple[int, int] | None


def segment_attention(query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, scores: Scoring) -> Tensor:
    """As `plan_attention`, without gathered keys and without a mask of queries x keys."""
    window, scale, sinks, softcap = scores
    blocks = shared.cached(("blocks", window), lambda: run_blocks(shared.runs, shared.first, window))
    return SegmentAttention.apply(query, key, value, sinks, blocks, scale, softcap)


def run_blocks(runs: list[Run], first: int, window: Window) -> list[list[Block]]:
    """The blocks of each group of queries; indices of queries count from packed token ``first``.

    The first block of a group holds all its queries, each other block some of them.
    """
    if isinstance(window, ChunkWindow):
        runs, window = within_chunks(runs, window.size), None
    groups = []
    for run in runs:
        q0, q1 = run.start - first, run.stop - first
        if window is None or run.position + run.stop - run.start <= window:
            own = Block(q0, q1, run.start, run.stop, True, None)
            above = [Block(q0, q1, p.start, p.stop, False, None) for p in run.ancestors]
            groups.append([own, *above])
            continue
        step = min(BAND_BLOCK, window)
        segments = [*run.ancestors, Segment(run.start, run.stop, run.position)]
        for start in range(run.start, run.stop, step):
            groups.append(_windowed_blocks(run, start, min(start + step, run.stop), segments, first, window))
    return groups


def _windowed_blocks(run: Run, start: int, stop: int, segments: list[Segment], first: int, window: int) -> list[Block]:
    """The blocks of the queries ``[start, stop)`` of ``run``, at most ``window`` of them."""
    low = run.position + start - run.start  # position of the first query
    blocks = [Block(start - first, stop - first, start, stop, True, None)]
    for segment in segments:
        # Keys before the queries, and not before the window of the first of them.
        begin = max(segment.position, low - window + 1)
        end = min(segment.position + segment.stop - segment.start, low)
        if begin >= end:
            continue
        # The last query that sees one of these keys: the softmax of a later one would be over nothing.
        last = min(low + stop - start, end - 1 + window)
        k0 = segment.start + begin - segment.position
        full = last - 1 - begin < window
        band = None if full else (low - begin, window)
        q0 = start - first
        blocks.append(Block(q0, q0 + last - low, k0, k0 + end - begin, False, band))
    return blocks


class SegmentAttention(torch.autograd.Function):
    """All blocks of a layer as one autograd node, with one gradient buffer for the keys and one for the values.

    A sink is one more key of every query, with a score s of its own for each head and the value 0. It joins the
    merged blocks: ``lse' = logaddexp(lse, s)``, ``out' = exp(lse - lse') out``.
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, groups, scale, softcap):
        # Grouped queries: [G, R, T, E], R query heads to a key head; the key head is a stride-0 view.
        q = query[0].unflatten(0, (key.shape[1], -1))
        k, v = _per_query_head(key, q.shape[1]), _per_query_head(value, q.shape[1])
        kernel = choose_kernel(q, v) if softcap is None else softcapped_kernel(softcap)
        tokens, heads = query.shape[2], query.shape[1]
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        out = output[0].unflatten(1, q.shape[:2]).permute(1, 2, 0, 3)  # [G, R, T, F]
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.empty(q.shape[:3], dtype=lse_dtype, device=query.device)
        states = []
        for blocks in groups:
            for number, block in enumerate(blocks):
                rows, columns = slice(block.q0, block.q1), slice(block.k0, block.k1)
                part, part_lse, state = kernel.forward(
                    q[:, :, rows], k[:, :, columns], v[:, :, columns], block.causal, _band_mask(block, q), scale
                )
                states.append(state)
                if number == 0:
                    out[:, :, rows] = part
                    lse[:, :, rows] = part_lse
                else:
                    _merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
        if sinks is not None:
            total = torch.logaddexp(lse, _per_head(sinks, lse))
            out.mul_(torch.exp(lse - total).unsqueeze(-1).to(out.dtype))
            lse = total
        ctx.save_for_backward(query, key, value, output, lse, sinks)
        ctx.groups, ctx.scale, ctx.softcap, ctx.states = groups, scale, softcap, states
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, lse, sinks = ctx.saved_tensors
        q = query[0].unflatten(0, (key.shape[1], -1))
        k, v = _per_query_head(key, q.shape[1]), _per_query_head(value, q.shape[1])
        kernel = choose_kernel(q, v) if ctx.softcap is None else softcapped_kernel(ctx.softcap)
        grad, out = (t[0].unflatten(1, q.shape[:2]).permute(1, 2, 0, 3) for t in (grad_output, output))
        # Many branches add to the gradient of a token of a long history: sum in float32.
        total_dtype = lse.dtype
        grad_q = torch.zeros(q.shape, dtype=total_dtype, device=q.device)
        grad_k, grad_v = (torch.zeros(t[0].shape, dtype=total_dtype, device=q.device) for t in (key, value))
        states = iter(ctx.states)
        for blocks in ctx.groups:
            for block in blocks:
                rows, columns = slice(block.q0, block.q1), slice(block.k0, block.k1)
                dq, dk, dv = kernel.backward(
                    grad[:, :, rows],
                    q[:, :, rows],
                    k[:, :, columns],
                    v[:, :, columns],
                    out[:, :, rows],
                    lse[:, :, rows],
                    block.causal,
                    _band_mask(block, q),
                    ctx.scale,
                    next(states),
                )
                grad_q[:, :, rows] += dq
                grad_k[:, columns] += dk.sum(1)
                grad_v[:, columns] += dv.sum(1)
        grad_sinks = None
        if sinks is not None:  # its share of the softmax times (0 - rowsum(dO * out)): its value is 0
            delta = (grad * out).sum(-1, dtype=lse.dtype)
            grad_sinks = -(torch.exp(_per_head(sinks, lse) - lse) * delta).sum(-1).flatten().to(sinks.dtype)
        grad_query = grad_q.flatten(0, 1)[None].to(query.dtype)
        return (grad_query, grad_k[None].to(key.dtype), grad_v[None].to(value.dtype), grad_sinks, None, None, None)


def _per_query_head(x: Tensor, repeats: int) -> Tensor:
    """``[1, G, T, E]`` as ``[G, repeats, T, E]`` without a copy."""
    return x[0].unsqueeze(1).expand(-1, repeats, -1, -1)


def _per_head(sinks: Tensor, lse: Tensor) -> Tensor:
    """``[H]`` as ``[G, R, 1]``, to go with ``lse [G, R, T]``."""
    return sinks.to(lse.dtype).view(*lse.shape[:2], 1)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges a block's ``part`` into ``out``, in place; both log-sum-exps are finite: each query sees a key."""
    total = torch.logaddexp(lse, part_lse)
    part_share = torch.exp(part_lse - total).unsqueeze(-1).to(out.dtype)
    out.lerp_(part, part_share)  # the shares of old and new sum to one
    lse.copy_(total)


def _band_mask(block: Block, q: Tensor) -> Tensor | None:
    """The additive mask ``[L, S]`` of a block at the edge of a sliding window."""
    if block.band is None:
        return None
    offset, window = block.band
    i = torch.arange(block.q1 - block.q0, device=q.device)[:, None]
    j = torch.arange(block.k1 - block.k0, device=q.device)[None, :]
    beyond = i - j + offset >= window  # the keys of such a block all come before its queries
    return torch.zeros(beyond.shape, dtype=q.dtype, device=q.device).masked_fill_(beyond, float("-inf"))
