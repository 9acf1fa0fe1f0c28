"""The backend of tensors without memory (device ``meta``): it allocates what the kernels do, and computes nothing.

A training step on such tensors shows how much memory the step takes, from shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsdpo.ops.rows import STATISTICS, LossOptions, RowResults, TokenResults, Tokens


def _rows(logits: Tensor, *shape: int) -> Tensor:
    return logits.new_empty((logits.shape[0] * logits.shape[1], *shape), dtype=torch.float32)


def forward(
    student: Tensor, teacher: Tensor | None, tokens: Tokens, options: LossOptions, grad: Tensor | None = None
) -> RowResults:
    per_token, coef, student_logps, teacher_logps = (_rows(student) for _ in range(4))
    classes = _rows(student, options.topk) if options.mode == "topk" else student.new_empty(0)
    return RowResults(per_token, coef, student_logps, teacher_logps, _rows(student, STATISTICS), classes)


def backward(*call: Any) -> None:
    """Kernels write their last argument in place."""


def token_forward(logits: Tensor, target_ids: Tensor, options: LossOptions, entropy: bool = False) -> TokenResults:
    return TokenResults(_rows(logits), _rows(logits) if entropy else logits.new_empty(0), _rows(logits, 2))


token_backward = backward


def log_ratio(student: Tensor, teacher: Tensor, target_ids: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    return _rows(student), _rows(teacher)


def support(logits: Tensor, target_ids: Tensor, k: int, ignore_index: int) -> Tensor:
    return torch.topk(logits, k, dim=-1).indices.reshape(-1, k)
