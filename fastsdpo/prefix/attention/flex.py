"""The backend ``flex``: one compiled flex_attention call, with a block mask that is counted from the runs.

`create_block_mask` evaluates the mask on all queries x keys, 10 bytes each. Here the visible pairs in each block of
128 x 128 are counted instead: what a run sees is a triangle and a rectangle per segment above it, less the corners
that a sliding window hides, and each of these has a closed form. A block with all its pairs needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsdpo.prefix.attention.dense import visible
from fastsdpo.prefix.attention.kernels import ShapeAttention
from fastsdpo.prefix.attention.shared_pass import Scoring, SharedPass
from fastsdpo.prefix.attention.windows import ChunkWindow, Window, within_chunks
from fastsdpo.prefix.plan import Run

BLOCK = 128


class BlockTable(NamedTuple):
    """Which blocks of keys a block of queries reads, and the other way round; int32 ``[1, 1, blocks(, blocks)]``.

    The names are those of `torch.nn.attention.flex_attention.BlockMask`.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def block_table(runs: Sequence[Run], first: int, queries: int, keys: int, window: Window) -> BlockTable:
    """The blocks of a pass over ``queries`` tokens, the first of them packed token ``first``, on the CPU."""
    counts = visible_pairs(runs, first, queries, keys, window)
    full = counts == BLOCK * BLOCK
    part = (counts > 0) & ~full
    return BlockTable(*_listed(part), *_listed(full), *_listed(part.T), *_listed(full.T))


def visible_pairs(runs: Sequence[Run], first: int, queries: int, keys: int, window: Window) -> np.ndarray:
    """``[blocks of queries, blocks of keys]`` int64: how many pairs of a block are visible."""
    if isinstance(window, ChunkWindow):
        runs, window = within_chunks(runs, window.size), None
    counts = np.zeros((-(-queries // BLOCK), -(-keys // BLOCK)), np.int64)
    edges = np.arange(max(counts.shape) + 1) * BLOCK
    for run in runs:
        length = run.stop - run.start
        rows, x = _edges(edges, run.start - first, run.stop - first)
        columns, y = _edges(edges, run.start, run.stop)
        own = _below(x, y, 0)
        if window is not None and length > window:
            own -= _below(x, y, -window)
        counts[rows, columns] += own
        sizes = (x[1:] - x[:-1])[:, None]
        for segment in run.ancestors:
            columns, y = _edges(edges, segment.start, segment.stop)
            seen = sizes * (y[1:] - y[:-1])
            if window is not None and run.position + length - segment.position > window:
                seen -= _below(x, y, run.position - segment.position - window)
            counts[rows, columns] += seen
    return counts


def _edges(edges: np.ndarray, start: int, stop: int) -> tuple[slice, np.ndarray]:
    """The blocks in which the tokens ``[start, stop)`` lie, and their edges counted from ``start``."""
    low, high = start // BLOCK, -(-stop // BLOCK)
    inside = edges[low : high + 1] - start
    inside[0], inside[-1] = 0, stop - start
    return slice(low, high), inside


def _below(x: np.ndarray, y: np.ndarray, offset: int) -> np.ndarray:
    """How many pairs with j <= i + offset lie between the edges ``x`` of i and ``y`` of j."""
    # Up to the edges: the sum of min(t, y) over t from offset + 1 to x + offset, where t > 0.
    sums = _triangle(x + offset, y)
    if offset > 0:
        sums -= _triangle(np.array([offset]), y)
    sums = sums[1:] - sums[:-1]
    return sums[:, 1:] - sums[:, :-1]


def _triangle(m: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sum of min(t, y) over t = 1..m, for all m and y."""
    m = np.maximum(m, 0)[:, None]
    least = np.minimum(m, y)
    return least * (least + 1) // 2 + (m - least) * y


def _listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Of each row how many blocks are set, and which: these come first."""
    counts = np.count_nonzero(blocks, axis=1).astype(np.int32)
    indices = np.zeros(blocks.shape, np.int32)
    indices[np.arange(blocks.shape[1]) < counts[:, None]] = np.nonzero(blocks)[1]
    return torch.from_numpy(counts)[None, None], torch.from_numpy(indices)[None, None]


def block_mask(table: BlockTable, queries: int, keys: int, see: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """The `BlockMask` of a table; ``see`` says which pairs of a block that is not full are visible."""
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask(
        seq_lengths=(queries, keys),
        **table._asdict(),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=lambda _b, _h, q, k: see(q, k),
    )


@cache
def _compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_block_attention(query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, scores: Scoring) -> Tensor:
    """Of plain scores."""
    if query.is_meta:
        return ShapeAttention.apply(query, key, value).transpose(1, 2)
    from torch.nn.attention.flex_attention import flex_attention

    lengths, window = (query.shape[2], key.shape[2]), scores.window

    def make_table() -> BlockTable:
        table = block_table(shared.runs, shared.first, *lengths, window)
        return BlockTable(*(t.to(query.device) for t in table))

    def make_mask() -> Any:
        table = shared.cached(("blocks of flex", window), make_table)
        return block_mask(table, *lengths, visible(shared, window, query.device))

    mask = shared.cached(("flex", window), make_mask)
    # On a CPU (in tests) it runs uncompiled, as torch's own dense definition of it.
    attend = flex_attention if query.device.type == "cpu" else _compiled_flex_attention()
    grouped = query.shape[1] != key.shape[1]
    output = attend(query, key, value, block_mask=mask, scale=scores.scale, enable_gqa=grouped)
    return output.transpose(1, 2)
