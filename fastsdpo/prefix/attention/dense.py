"""The backend ``dense``: one call, with a mask made from the times of the plan's walk."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsdpo.prefix.attention.shared_pass import Scoring, SharedPass
from fastsdpo.prefix.attention.windows import ChunkWindow, Window


def visible(shared: SharedPass, window: Window, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of broadcast indices: does query q see key k? Queries count from ``shared.first``."""
    plan = shared.plan
    start, stop, position = shared.cached(
        ("times", device),
        lambda: [t[: shared.stop].to(device) for t in (plan.subtree_start, plan.subtree_stop, plan.position_ids)],
    )

    def see(q: Tensor, k: Tensor) -> Tensor:
        q = q + shared.first
        above = (start[k] <= start[q]) & (start[q] < stop[k])
        if isinstance(window, ChunkWindow):
            return above & (position[q] // window.size == position[k] // window.size)
        return above if window is None else above & (position[q] - position[k] < window)

    return see


def dense_attention(query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, scores: Scoring) -> Tensor:
    def make() -> Tensor:
        q = torch.arange(query.shape[2], device=query.device)[:, None]
        k = torch.arange(key.shape[2], device=query.device)[None, :]
        return visible(shared, scores.window, query.device)(q, k)[None, None]

    mask = shared.cached(("mask", scores.window), make)
    if not scores.are_plain:
        return _plain_attention(query, key, value, mask, scores).transpose(1, 2)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scores.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: Scoring) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if how.sinks is not None:  # one more key, with the value 0
        sinks = how.sinks.to(scores.dtype).view(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(-1, -1, scores.shape[2], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value
