"""The definition of the token statistics in eager PyTorch: any device, slow and obvious.

The functions take what the kernels take (see the package docstring): ``logits [B, L, V]``,
per-token vectors ``[N]`` with ``N = B * L``. Statistics are float32, or float64 for float64 logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsdpo.ops._checks import accumulation_dtype


def capped_rows(logits: Tensor, softcap: float) -> Tensor:
    """``c = softcap * tanh(z / softcap)`` as ``[N, V]``; -inf (probability 0) stays -inf."""
    z = logits.reshape(-1, logits.shape[-1]).to(accumulation_dtype(logits))
    if not softcap:
        return z
    return torch.where(z == -math.inf, z, softcap * torch.tanh(z / softcap))


def softcap_slope(c: Tensor, softcap: float) -> Tensor | float:
    """dc/dz from the capped value; 0 for a masked token."""
    if not softcap:
        return 1.0
    return torch.where(c == -math.inf, 0.0, 1 - (c / softcap) ** 2)


def row_statistics(c: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``(row_max, row_log2sum)``: max of c, and log2 of the sum of 2^((c - max) * log2(e)/temperature).

    Kept apart: merged into one log-sum-exp they lose the digits that large logits leave.
    """
    if c.shape[0] == 0:
        return c.new_zeros(0), c.new_zeros(0)
    row_max = c.amax(-1)
    scaled = (c - row_max[:, None]) * (math.log2(math.e) / temperature)
    return row_max, torch.exp2(scaled).sum(-1).log2()


def row_log_probs(c: Tensor, row_max: Tensor, row_log2sum: Tensor, temperature: float) -> Tensor:
    """``log p`` of the whole row in nats, ``[N, V]``."""
    scaled = (c - row_max[:, None]) * (math.log2(math.e) / temperature)
    return (scaled - row_log2sum[:, None]) * math.log(2)


def take(log_probs: Tensor, target_ids: Tensor, ignore_index: int) -> Tensor:
    """The target's entry of each row, 0 where ignored."""
    ignored = target_ids == ignore_index
    taken = log_probs.gather(1, torch.where(ignored, 0, target_ids)[:, None]).squeeze(1)
    return torch.where(ignored, 0.0, taken)


def token_logps_forward(
    logits: Tensor,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = capped_rows(logits, softcap)
    ignored = target_ids == ignore_index
    row_max, row_log2sum = row_statistics(c, temperature)
    log_probs = row_log_probs(c, row_max, row_log2sum, temperature)
    logps = take(log_probs, target_ids, ignore_index)
    entropy = c.new_zeros(0)
    if return_entropy:
        p = log_probs.exp()
        terms = torch.where(p == 0, 0.0, p * log_probs)
        entropy = torch.where(ignored, 0.0, -terms.sum(-1))
    zero = torch.zeros_like(row_max)
    return (
        logps,
        entropy,
        torch.where(ignored, zero, row_max),
        torch.where(ignored, zero, row_log2sum),
    )


def token_logps_backward(
    grad_logps: Tensor,
    logits: Tensor,
    target_ids: Tensor,
    row_max: Tensor,
    row_log2sum: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> None:
    c = capped_rows(logits, softcap)
    ignored = target_ids == ignore_index
    p = row_log_probs(c, row_max, row_log2sum, temperature).exp()
    onehot = torch.zeros_like(p).scatter_(1, torch.where(ignored, 0, target_ids)[:, None], 1.0)
    grad = grad_logps[:, None] * (onehot - p) / temperature * softcap_slope(c, softcap)
    grad_logits.copy_(torch.where(ignored[:, None], 0.0, grad).view(logits.shape))


def token_log_ratio_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    student, _, _, _ = token_logps_forward(
        student_logits, target_ids, temperature, softcap, ignore_index, False
    )
    teacher, _, _, _ = token_logps_forward(
        teacher_logits, target_ids, temperature, softcap, ignore_index, False
    )
    return student, teacher
