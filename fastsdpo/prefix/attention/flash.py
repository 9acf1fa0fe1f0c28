"""The backend ``flash``: one varlen call of flash-attn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsdpo.prefix.attention.shared_pass import SharedPass
from fastsdpo.prefix.plan import Run


class VarlenIndex(NamedTuple):
    """Keys of each run behind those of its ancestors, as flash-attn's varlen functions take them."""

    key_rows: Tensor  # packed indices, all runs in order
    cu_seqlens_q: Tensor  # int32, runs + 1
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def varlen_index(runs: list[Run], device: torch.device) -> VarlenIndex:
    rows, queries, keys = [], [0], [0]
    for run in runs:
        path = [range(p.start, p.stop) for p in run.ancestors] + [range(run.start, run.stop)]
        rows.extend(row for part in path for row in part)
        queries.append(queries[-1] + run.stop - run.start)
        keys.append(len(rows))
    q, k = torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32)
    longest = int(q.diff().max()), int(k.diff().max())
    return VarlenIndex(torch.tensor(rows, device=device), q.to(device), k.to(device), *longest)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, window: int | None, scale: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    index = shared.cached("varlen", lambda: varlen_index(shared.runs, query.device))
    return varlen_attention(query, key, value, index, window, scale, flash_attn_varlen_func)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: VarlenIndex,
    window: int | None,
    scale: float,
    varlen_func: Callable,
) -> Tensor:
    q = query[0].transpose(0, 1)  # [T, H, E]
    k, v = (x[0].transpose(0, 1).index_select(0, index.key_rows) for x in (key, value))
    output = varlen_func(
        q,
        k,
        v,
        index.cu_seqlens_q,
        index.cu_seqlens_k,
        index.max_seqlen_q,
        index.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return output[None]
