"""The definition of the losses in eager PyTorch: any device, slow and obvious.

Formulas and gradients as in the package docstring. ``p``/``s`` are the student's probabilities and
their logs, ``q``/``t`` the teacher's. ``where(p == 0, 0, ...)`` makes 0 * log 0 = 0 and keeps NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsdpo.ops.token_logps.reference import (
    capped_rows,
    row_log_probs,
    row_statistics,
    softcap_slope,
    take,
    token_logps_backward,
    token_logps_forward,
)


def weighted(p: Tensor, values: Tensor) -> Tensor:
    """``p * values`` with 0 * anything = 0; NaN in ``p`` stays NaN."""
    return torch.where(p == 0, 0.0, p * values)


def row_divergence(s: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of each row from log-probs ``s``, ``t`` over the same classes.

    Returns ``(loss [N], K [N], grad [N, C])``: ``grad`` is the gradient with respect to the
    student's class logits (MATH.md section 2), ``K`` the KL that it contains (0 for alpha = 0).
    """
    p, q = s.exp(), t.exp()
    if alpha == 0:
        loss = weighted(q, t - s).sum(-1)
        return loss, torch.zeros_like(loss), p - q
    if alpha == 1:
        loss = weighted(p, s - t).sum(-1)
        return loss, loss, weighted(p, s - t - loss[:, None])
    m = (1 - alpha) * p + alpha * q
    log_m = torch.where(m == 0, 1.0, m).log()
    kl_student = weighted(p, s - log_m).sum(-1)
    kl_teacher = weighted(q, t - log_m).sum(-1)
    loss = (1 - alpha) * kl_student + alpha * kl_teacher
    return loss, kl_student, (1 - alpha) * weighted(p, s - log_m - kl_student[:, None])


def coefficients(
    weights: Tensor,
    student_logps: Tensor,
    old_logps: Tensor | None,
    is_clip: float,
    target_ids: Tensor,
    ignore_index: int,
) -> Tensor:
    """``weights * r``, 0 where ignored; r the clipped importance ratio, 1 without ``old_logps``."""
    coef = weights
    if old_logps is not None:
        ratio = (student_logps - old_logps).clamp(-20, 20).exp().clamp(max=is_clip)
        coef = weights * ratio
    return torch.where(target_ids == ignore_index, 0.0, coef)


def log_ratio(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """A = teacher - student; 0 where both give the token probability 0."""
    both = (student_logps == -math.inf) & (teacher_logps == -math.inf)
    return torch.where(both, 0.0, teacher_logps - student_logps)


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
    student_logps, _, row_max, row_log2sum = token_logps_forward(
        student_logits, target_ids, temperature, softcap, ignore_index, False
    )
    if teacher_logits is not None:
        teacher_logps, _, _, _ = token_logps_forward(
            teacher_logits, target_ids, temperature, softcap, ignore_index, False
        )
    assert teacher_logps is not None
    teacher_logps = torch.where(
        target_ids == ignore_index, 0.0, teacher_logps.to(student_logps.dtype)
    )
    ratio = log_ratio(student_logps, teacher_logps)
    nothing = (ratio == 0) | ((student_logps == 0) & ~ratio.isnan())  # 0 * inf = 0
    per_token = torch.where(nothing, 0.0, -ratio * student_logps)
    coef = coefficients(weights, student_logps, old_logps, is_clip, target_ids, ignore_index)
    row_stats = torch.stack([row_max, row_log2sum], -1)
    return per_token, coef, student_logps, teacher_logps, row_stats


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
    grad_logps = -log_ratio(student_logps, teacher_logps) * coef * grad_loss
    token_logps_backward(
        grad_logps,
        student_logits,
        target_ids,
        row_stats[:, 0],
        row_stats[:, 1],
        temperature,
        softcap,
        ignore_index,
        grad_logits,
    )


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
    ignored = target_ids == ignore_index
    log_probs, stats = [], []
    for logits in (student_logits, teacher_logits):
        c = capped_rows(logits, softcap)
        row_max, row_log2sum = row_statistics(c, temperature)
        log_probs.append(row_log_probs(c, row_max, row_log2sum, temperature))
        stats += [row_max, row_log2sum]
    s, t = log_probs
    loss, k, _ = row_divergence(s, t, alpha)
    student_logps = take(s, target_ids, ignore_index)
    teacher_logps = take(t, target_ids, ignore_index)
    coef = coefficients(weights, student_logps, old_logps, is_clip, target_ids, ignore_index)
    row_stats = torch.stack([*stats, k], -1)
    row_stats = torch.where(ignored[:, None], 0.0, row_stats)
    return torch.where(ignored, 0.0, loss), coef, student_logps, teacher_logps, row_stats


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
    c = capped_rows(student_logits, softcap)
    s = row_log_probs(c, row_stats[:, 0], row_stats[:, 1], temperature)
    t = row_log_probs(
        capped_rows(teacher_logits, softcap), row_stats[:, 2], row_stats[:, 3], temperature
    )
    _, _, grad = row_divergence(s, t, alpha)
    grad = grad * ((coef * grad_loss) / temperature)[:, None] * softcap_slope(c, softcap)
    ignored = (target_ids == ignore_index)[:, None]
    grad_logits.copy_(torch.where(ignored, 0.0, grad).view(student_logits.shape))


def support_log_probs(log_probs: Tensor, topk_ids: Tensor, add_tail: bool) -> Tensor:
    """Log-probs of the support's classes: ``[N, K + 1]`` with the tail, else renormalized ``[N, K]``."""
    on_support = log_probs.gather(1, topk_ids)
    if not add_tail:
        return on_support - on_support.logsumexp(-1, keepdim=True)
    # Not the log of a sum of probabilities, which is 0 where the support holds nearly all.
    tail = log_probs.scatter(1, topk_ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([on_support, tail], -1)


def given_support_log_probs(topk_logps: Tensor, add_tail: bool) -> Tensor:
    """The same from the teacher's log-probs at the support alone: the tail is 1 - their sum."""
    total = topk_logps.logsumexp(-1, keepdim=True)
    if not add_tail:
        return topk_logps - total
    return torch.cat([topk_logps, torch.log(-torch.expm1(total.clamp(max=0)))], -1)


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
    ignored = target_ids == ignore_index
    c = capped_rows(student_logits, softcap)
    row_max, row_log2sum = row_statistics(c, temperature)
    log_probs = row_log_probs(c, row_max, row_log2sum, temperature)
    student_logps = take(log_probs, target_ids, ignore_index)
    s = support_log_probs(log_probs, topk_ids, add_tail)
    if teacher_logits is not None:
        c_teacher = capped_rows(teacher_logits, softcap)
        teacher = row_log_probs(c_teacher, *row_statistics(c_teacher, temperature), temperature)
        teacher_logps = take(teacher, target_ids, ignore_index)
        t = support_log_probs(teacher, topk_ids, add_tail)
    else:
        assert teacher_topk_logps is not None
        given = teacher_topk_logps.to(s.dtype)
        hit = topk_ids == target_ids[:, None]
        teacher_logps = torch.where(hit, given, 0.0).sum(-1)
        teacher_logps = torch.where(hit.any(-1), teacher_logps, math.nan)
        teacher_logps = torch.where(ignored, 0.0, teacher_logps)
        t = given_support_log_probs(given, add_tail)
    loss, _, class_grads = row_divergence(s, t, alpha)
    # Outside the support the gradient is a factor times exp of a log-prob: the tail's gradient times the
    # token's part of the tail, which a normalizer moved by the log of the tail gives without a quotient.
    log2_mass, tail_grad = row_log2sum, torch.zeros_like(loss)
    if add_tail:
        log_tail, tail_grad = s[:, -1], class_grads[:, -1]
        log2_mass = row_log2sum + torch.where(
            log_tail == -math.inf, 0.0, log_tail * math.log2(math.e)
        )
        class_grads = class_grads[:, :-1]
    coef = coefficients(weights, student_logps, old_logps, is_clip, target_ids, ignore_index)
    row_stats = torch.stack([row_max, log2_mass, tail_grad, torch.zeros_like(loss)], -1)
    row_stats = torch.where(ignored[:, None], 0.0, row_stats)
    class_grads = torch.where(ignored[:, None], 0.0, class_grads)
    loss = torch.where(ignored, 0.0, loss)
    return loss, coef, student_logps, teacher_logps, row_stats, class_grads.contiguous()


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
    c = capped_rows(student_logits, softcap)
    if add_tail:
        p = row_log_probs(c, row_stats[:, 0], row_stats[:, 1], temperature).exp()
        grad = weighted(p, row_stats[:, 2:3].expand_as(p))
    else:
        grad = torch.zeros_like(c)
    grad = grad.scatter(1, topk_ids, class_grads)
    grad = grad * ((coef * grad_loss) / temperature)[:, None] * softcap_slope(c, softcap)
    ignored = (target_ids == ignore_index)[:, None]
    grad_logits.copy_(torch.where(ignored, 0.0, grad).view(student_logits.shape))


def _one(per_token: Tensor) -> Tensor:
    return per_token.new_ones(1)


def sampled_token_fused(
    student_logits, teacher_logits, teacher_logps, target_ids, weights, old_logps, is_clip,
    temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    per_token, coef, student_logps, teacher_logps, row_stats = sampled_token_forward(
        student_logits, teacher_logits, teacher_logps, target_ids, weights, old_logps, is_clip,
        temperature, softcap, ignore_index,
    )  # fmt: skip
    sampled_token_backward(
        _one(per_token), coef, student_logps, teacher_logps, student_logits, target_ids, row_stats,
        temperature, softcap, ignore_index, grad_logits,
    )  # fmt: skip
    return per_token, coef, student_logps, teacher_logps


def divergence_fused(
    student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
    temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    per_token, coef, student_logps, teacher_logps, row_stats = divergence_forward(
        student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
        temperature, softcap, ignore_index,
    )  # fmt: skip
    divergence_backward(
        _one(per_token), coef, student_logits, teacher_logits, target_ids, row_stats, alpha,
        temperature, softcap, ignore_index, grad_logits,
    )  # fmt: skip
    return per_token, coef, student_logps, teacher_logps


def topk_fused(
    student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights, old_logps,
    is_clip, alpha, add_tail, temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    per_token, coef, student_logps, teacher_logps, row_stats, class_grads = topk_forward(
        student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights,
        old_logps, is_clip, alpha, add_tail, temperature, softcap, ignore_index,
    )  # fmt: skip
    topk_backward(
        _one(per_token), coef, student_logits, topk_ids, target_ids, row_stats, class_grads,
        add_tail, temperature, softcap, ignore_index, grad_logits,
    )  # fmt: skip
    return per_token, coef, student_logps, teacher_logps
