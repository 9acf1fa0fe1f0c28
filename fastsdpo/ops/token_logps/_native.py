"""The token statistics by the native CPU kernels (kernels/cpu/token_logps.cpp).

Functions and arguments as in `reference.py`; float32, bfloat16 and float16. Nothing of size V is
allocated here or there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsdpo._native import FORWARD, GRADIENT, call, rows, vector


def token_vectors(logits: Tensor, count: int) -> list[Tensor]:
    """``count`` uninitialized float32 vectors ``[N]`` for ``logits [B, L, V]``."""
    n = logits.shape[0] * logits.shape[1]
    return [torch.empty(n, dtype=torch.float32) for _ in range(count)]


def token_logps_forward(
    logits: Tensor,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logps, row_max, row_log2sum = token_vectors(logits, 3)
    entropy = torch.empty_like(logps) if return_entropy else logps.new_empty(0)
    call(
        "token_logps", logits, target_ids, FORWARD, temperature, softcap, ignore_index,
        student_logps=vector(logps), entropy=vector(entropy) if return_entropy else None,
        stats=(vector(row_max), vector(row_log2sum)), stats_stride=1,
    )  # fmt: skip
    return logps, entropy, row_max, row_log2sum


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
    call(
        "token_logps", logits, target_ids, GRADIENT, temperature, softcap, ignore_index,
        upstream=vector(grad_logps), stats=(vector(row_max), vector(row_log2sum)), stats_stride=1,
        grad=rows(grad_logits),
    )  # fmt: skip


def token_log_ratio_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    student_logps, teacher_logps = token_vectors(student_logits, 2)
    call(
        "token_log_ratio", student_logits, target_ids, FORWARD, temperature, softcap, ignore_index,
        teacher=rows(teacher_logits), student_logps=vector(student_logps),
        teacher_logps=vector(teacher_logps),
    )  # fmt: skip
    return student_logps, teacher_logps
