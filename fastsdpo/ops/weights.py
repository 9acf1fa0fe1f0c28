"""Per-token weights: how the tokens' losses become one number."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastsdpo.ops.checks import check_tensor, shape_text


def _mask(name: str, mask: Any) -> Tensor:
    mask = check_tensor(name, "mask", mask)
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"{name}: mask must be bool or integer (1 = counts), got {mask.dtype}")
    return mask != 0


def _divisor(name: str, argument: str, given: Any, counted: Tensor) -> Tensor:
    """The divisor as a scalar tensor on the mask's device; never zero where something counts."""
    if given is None:
        return counted.clamp(min=1).to(torch.float32)
    if isinstance(given, Tensor):
        if given.numel() != 1:
            raise ValueError(f"{name}: {argument} must be one number, got shape {shape_text(given.shape)}")
        given = given.detach().reshape(()).to(counted.device, torch.float32)
        return torch.where(counted == 0, 1.0, given)  # a batch without tokens may come with 0
    if not isinstance(given, Real) or not 0 < float(given) < math.inf:
        raise ValueError(f"{name}: {argument} must be > 0 and finite, got {given!r}")
    return torch.tensor(float(given), device=counted.device)


def token_mean_weights(mask: Tensor, *, num_items: int | float | Tensor | None = None) -> Tensor:
    """Every token that counts weighs ``1 / num_items``.

    Args:
        mask: ``(...)`` bool or integer, nonzero where a token counts.
        num_items: tokens that count in the whole global batch (all accumulation steps and
            processes); None counts this mask.

    Returns:
        ``(...)`` float32 weights that sum to 1 over the global batch (to 0 where nothing counts).
    """
    counts = _mask("token_mean_weights", mask)
    return counts / _divisor("token_mean_weights", "num_items", num_items, counts.sum())


def sequence_mean_weights(mask: Tensor, *, num_sequences: int | float | Tensor | None = None) -> Tensor:
    """Mean over each sequence's tokens, then over sequences (the papers' normalization).

    Args:
        mask: ``(B, L)`` bool or integer, nonzero where a token counts; one row per sequence.
        num_sequences: sequences with at least one such token in the whole global batch; None
            counts this mask's. A sequence without one weighs nothing and is not counted.

    Returns:
        ``(B, L)`` float32 weights; each counted row sums to ``1 / num_sequences``.
    """
    counts = _mask("sequence_mean_weights", mask)
    if counts.ndim != 2:
        raise ValueError(f"sequence_mean_weights: mask must have shape (B, L), got {shape_text(counts.shape)}")
    lengths = counts.sum(-1, keepdim=True)
    divisor = _divisor("sequence_mean_weights", "num_sequences", num_sequences, (lengths > 0).sum())
    return counts / lengths.clamp(min=1) / divisor
