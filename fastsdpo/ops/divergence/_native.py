"""The losses by the native CPU kernels (kernels/cpu/token_logps.cpp, divergence.cpp, topk.cpp).

Functions and arguments as in `reference.py`; float32, bfloat16 and float16, student, teacher and
gradient each in its own. A ``*_fused`` function visits a row once for statistics, loss and gradient, and
gives bit for bit what forward and backward give.

Memory: a few numbers per token. The fused functions (and the forward of JSD) also keep the exponentials
of the row that a thread works on, at most 262,144 of student and of teacher: 2 MiB a thread, whatever the
number of tokens; the rest of a longer row is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsdpo._native import FORWARD, GRADIENT, call, rows, vector


class _TokenOutputs:
    """The per-token results ``[N]`` that every loss shares, and the fields that point at them."""

    def __init__(self, logits: Tensor, weights: Tensor, old_logps: Tensor | None, is_clip: float):
        n = logits.shape[0] * logits.shape[1]
        self.per_token, self.coef, self.student_logps, self.teacher_logps = (
            torch.empty(n, dtype=torch.float32) for _ in range(4)
        )
        self.fields = {
            "weights": vector(weights),
            "old_logps": vector(old_logps),
            "is_clip": is_clip,
            "per_token": vector(self.per_token),
            "coef": vector(self.coef),
            "student_logps": vector(self.student_logps),
            "teacher_logps": vector(self.teacher_logps),
        }

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.per_token, self.coef, self.student_logps, self.teacher_logps


def _passes(grad_logits: Tensor | None) -> int:
    return FORWARD if grad_logits is None else FORWARD | GRADIENT


def _optional_rows(**tensors: Tensor | None) -> dict[str, object]:
    return {name: rows(tensor) for name, tensor in tensors.items() if tensor is not None}


def _stats(row_stats: Tensor | None) -> dict[str, object]:
    """Columns of ``row_stats [N, C]``; None where the statistics are not kept."""
    if row_stats is None:
        return {}
    start, columns = vector(row_stats), row_stats.shape[1]
    assert start is not None
    addresses = tuple(start + 4 * column for column in range(columns)) if len(row_stats) else ()
    return {"stats": addresses, "stats_stride": columns}


def _sampled_token(
    student_logits, teacher_logits, teacher_logps, target_ids, weights, old_logps, is_clip,
    temperature, softcap, ignore_index, row_stats, grad_logits,
):  # fmt: skip
    out = _TokenOutputs(student_logits, weights, old_logps, is_clip)
    call(
        "sampled_token", student_logits, target_ids, _passes(grad_logits), temperature, softcap,
        ignore_index, given_teacher_logps=vector(teacher_logps), **out.fields, **_stats(row_stats),
        **_optional_rows(teacher=teacher_logits, grad=grad_logits),
    )  # fmt: skip
    return out.results()


def sampled_token_forward(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    teacher_logps: Tensor | None,
    target_ids: Tensor,
    weights: Tensor,
    old_logps: Tensor | None,
    is_clip: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_stats = torch.empty(len(target_ids), 2)
    out = _sampled_token(
        student_logits, teacher_logits, teacher_logps, target_ids, weights, old_logps, is_clip,
        temperature, softcap, ignore_index, row_stats, None,
    )  # fmt: skip
    return *out, row_stats


def sampled_token_backward(
    grad_loss: Tensor,
    coef: Tensor,
    student_logps: Tensor,
    teacher_logps: Tensor,
    student_logits: Tensor,
    target_ids: Tensor,
    row_stats: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> None:
    call(
        "sampled_token", student_logits, target_ids, GRADIENT, temperature, softcap, ignore_index,
        grad_loss=vector(grad_loss), coef=vector(coef), student_logps=vector(student_logps),
        teacher_logps=vector(teacher_logps), grad=rows(grad_logits), **_stats(row_stats),
    )  # fmt: skip


def sampled_token_fused(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    teacher_logps: Tensor | None,
    target_ids: Tensor,
    weights: Tensor,
    old_logps: Tensor | None,
    is_clip: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _sampled_token(
        student_logits, teacher_logits, teacher_logps, target_ids, weights, old_logps, is_clip,
        temperature, softcap, ignore_index, None, grad_logits,
    )  # fmt: skip


def _divergence(
    student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha, temperature,
    softcap, ignore_index, row_stats, grad_logits,
):  # fmt: skip
    out = _TokenOutputs(student_logits, weights, old_logps, is_clip)
    call(
        "divergence", student_logits, target_ids, _passes(grad_logits), temperature, softcap,
        ignore_index, alpha=alpha, **out.fields, **_stats(row_stats),
        **_optional_rows(teacher=teacher_logits, grad=grad_logits),
    )  # fmt: skip
    return out.results()


def divergence_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    weights: Tensor,
    old_logps: Tensor | None,
    is_clip: float,
    alpha: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_stats = torch.empty(len(target_ids), 5)
    out = _divergence(
        student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
        temperature, softcap, ignore_index, row_stats, None,
    )  # fmt: skip
    return *out, row_stats


def divergence_backward(
    grad_loss: Tensor,
    coef: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    row_stats: Tensor,
    alpha: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> None:
    call(
        "divergence", student_logits, target_ids, GRADIENT, temperature, softcap, ignore_index,
        teacher=rows(teacher_logits), grad_loss=vector(grad_loss), coef=vector(coef), alpha=alpha,
        grad=rows(grad_logits), **_stats(row_stats),
    )  # fmt: skip


def divergence_fused(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    weights: Tensor,
    old_logps: Tensor | None,
    is_clip: float,
    alpha: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _divergence(
        student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
        temperature, softcap, ignore_index, None, grad_logits,
    )  # fmt: skip


def topk_support(logits: Tensor, target_ids: Tensor, k: int, ignore_index: int) -> Tensor:
    """Ids ``[N, K]`` of the k largest logits of each row of ``logits [B, L, V]``, in ascending order; of
    equal logits the first. 0 to k - 1 for rows whose target is ignored."""
    support = torch.empty(len(target_ids), k, dtype=torch.int64)
    call(
        "support", logits, target_ids, FORWARD, 1.0, 0.0, ignore_index, K=k,
        support=vector(support, torch.int64),
    )  # fmt: skip
    return support


def _topk(
    student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights, old_logps,
    is_clip, alpha, add_tail, temperature, softcap, ignore_index, row_stats, grad_logits,
):  # fmt: skip
    out = _TokenOutputs(student_logits, weights, old_logps, is_clip)
    class_grads = torch.empty(topk_ids.shape, dtype=torch.float32)
    call(
        "topk", student_logits, target_ids, _passes(grad_logits), temperature, softcap,
        ignore_index, alpha=alpha, add_tail=int(add_tail), K=topk_ids.shape[1],
        topk_ids=vector(topk_ids, torch.int64), given_topk_logps=vector(teacher_topk_logps),
        class_grads=vector(class_grads), **out.fields, **_stats(row_stats),
        **_optional_rows(teacher=teacher_logits, grad=grad_logits),
    )  # fmt: skip
    return out.results(), class_grads


def topk_forward(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    topk_ids: Tensor,
    teacher_topk_logps: Tensor | None,
    target_ids: Tensor,
    weights: Tensor,
    old_logps: Tensor | None,
    is_clip: float,
    alpha: float,
    add_tail: bool,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_stats = torch.empty(len(target_ids), 4)
    out, class_grads = _topk(
        student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights,
        old_logps, is_clip, alpha, add_tail, temperature, softcap, ignore_index, row_stats, None,
    )  # fmt: skip
    return *out, row_stats, class_grads


def topk_backward(
    grad_loss: Tensor,
    coef: Tensor,
    student_logits: Tensor,
    topk_ids: Tensor,
    target_ids: Tensor,
    row_stats: Tensor,
    class_grads: Tensor,
    add_tail: bool,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> None:
    call(
        "topk", student_logits, target_ids, GRADIENT, temperature, softcap, ignore_index,
        grad_loss=vector(grad_loss), coef=vector(coef), add_tail=int(add_tail), K=topk_ids.shape[1],
        topk_ids=vector(topk_ids, torch.int64), class_grads=vector(class_grads),
        grad=rows(grad_logits), **_stats(row_stats),
    )  # fmt: skip


def topk_fused(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    topk_ids: Tensor,
    teacher_topk_logps: Tensor | None,
    target_ids: Tensor,
    weights: Tensor,
    old_logps: Tensor | None,
    is_clip: float,
    alpha: float,
    add_tail: bool,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, _ = _topk(
        student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights,
        old_logps, is_clip, alpha, add_tail, temperature, softcap, ignore_index, None, grad_logits,
    )  # fmt: skip
    return out
