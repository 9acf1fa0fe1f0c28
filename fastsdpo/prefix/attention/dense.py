"""The backends ``dense`` and ``flex``: one call, with a mask made from the times of the plan's walk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsdpo.prefix.attention.kernels import ShapeAttention
from fastsdpo.prefix.attention.shared_pass import SharedPass


def visible(shared: SharedPass, window: int | None, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of broadcast indices: does query q see key k? Queries count from ``shared.first``."""
    plan = shared.plan
    start, stop, position = shared.cached(
        ("times", device),
        lambda: [t[: shared.stop].to(device) for t in (plan.subtree_start, plan.subtree_stop, plan.position_ids)],
    )

    def see(q: Tensor, k: Tensor) -> Tensor:
        q = q + shared.first
        above = (start[k] <= start[q]) & (start[q] < stop[k])
        return above if window is None else above & (position[q] - position[k] < window)

    return see


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared: SharedPass,
    window: int | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    def make() -> Tensor:
        q = torch.arange(query.shape[2], device=query.device)[:, None]
        k = torch.arange(key.shape[2], device=query.device)[None, :]
        return visible(shared, window, query.device)(q, k)[None, None]

    mask = shared.cached(("mask", window), make)
    if sinks is not None or softcap is not None:
        return _plain_attention(query, key, value, mask, scale, sinks, softcap).transpose(1, 2)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2)


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, sinks: Tensor | None, softcap: float | None
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:  # one more key, with the value 0
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value


@cache
def _compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_block_attention(
    query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, window: int | None, scale: float
) -> Tensor:
    if query.is_meta:
        return ShapeAttention.apply(query, key, value).transpose(1, 2)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def make() -> Any:
        see = visible(shared, window, query.device)
        lengths = query.shape[2], key.shape[2]
        return create_block_mask(lambda _b, _h, q, k: see(q, k), None, None, *lengths, query.device)

    mask = shared.cached(("flex", window), make)
    # On a CPU (in tests) it runs uncompiled, as torch's own dense definition of it.
    attend = flex_attention if query.device.type == "cpu" else _compiled_flex_attention()
    grouped = query.shape[1] != key.shape[1]
    output = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)
