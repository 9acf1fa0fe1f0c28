"""The loss as TRL and the SDPO authors' verl fork define it.

Tokens that do not count are left out, a top-k support has the tail of `ops.bounded_tail`, and a
policy-gradient loss of the same hidden states may join it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops.backend import resolve_backend
from fastsdpo.ops.checks import accumulation_dtype
from fastsdpo.ops.divergence import SDPOLossOutput, check_loss, rows_loss
from fastsdpo.ops.head import Plan, choose_dtypes, default_chunk_size
from fastsdpo.ops.linear import LinearCall, linear_loss
from fastsdpo.ops.linear import PolicyGradient as PolicyGradient

IGNORE_INDEX = -100


class Head(NamedTuple):
    """``z = logit_scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(z / softcap)``."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    target_ids: Tensor,
    *,
    head: Any = None,
    teacher_head: Any = None,
    mode: str,
    alpha: float,
    topk: int | None = None,
    add_tail: bool = False,
    weights: Tensor,
    teacher_logps: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    old_logps: Tensor | None = None,
    is_clip: float | None = None,
    temperature: float = 1.0,
    policy: PolicyGradient | None = None,
) -> SDPOLossOutput:
    """`sdpo_loss` (no ``head``) or `linear_sdpo_loss` (``head``) with TRL's tail.

    Args:
        student, teacher: logits ``(..., V)``, or with a head hidden states ``(..., D)``.
        target_ids: ``(...)``, -100 where a token does not count: its row is left out altogether.
        head: a `Head` or `fastsdpo.prefix.HeadParameters`.
        teacher_head: the same for the teacher; None is the student's.
        policy: a second loss of the same hidden states, whose gradient joins this one's; ``(...)``.
        others: as `sdpo_loss`.
    """
    shape = target_ids.shape
    if head is not None:
        counts = target_ids != IGNORE_INDEX
        if policy is not None:
            counts = counts | (policy.target_ids != IGNORE_INDEX)
        keep = counts.reshape(-1).nonzero().squeeze(-1)

        def rows(tensor: Tensor | None, width: int = 0) -> Tensor | None:
            if tensor is None:
                return None
            flat = tensor.reshape(-1, *tensor.shape[tensor.ndim - width :])
            return flat[keep] if len(keep) < len(flat) else flat

        student, teacher = rows(student, 1), rows(teacher, 1)  # type: ignore[assignment]
        target_ids, weights, old_logps, teacher_logps = (
            rows(tensor) for tensor in (target_ids, weights, old_logps, teacher_logps)
        )  # type: ignore[assignment]
        if policy is not None:
            policy = PolicyGradient(*(rows(tensor) for tensor in policy))  # type: ignore[arg-type]
        if teacher_topk is not None:
            teacher_topk = tuple(rows(tensor, 1) for tensor in teacher_topk)  # type: ignore

    weight = student if head is None else head.weight
    dtype = accumulation_dtype(student, weight)
    options, tokens = check_loss(
        "distillation_loss",
        target_ids.shape,
        weight.shape[-1 if head is None else 0],
        student.device,
        dtype,
        target_ids,
        teacher="teacher",
        has_teacher=teacher is not None,
        mode=mode,
        alpha=alpha,
        topk=topk,
        add_tail=add_tail,
        weights=weights,
        teacher_logps=teacher_logps,
        teacher_topk=teacher_topk,
        old_logps=old_logps,
        is_clip=is_clip,
        temperature=temperature,
        softcap=None if head is None else head.softcap,
        ignore_index=IGNORE_INDEX,
        bounded_tail=True,
    )
    if head is None:
        both = (student,) if teacher is None else (student, teacher)
        backend = resolve_backend("distillation_loss", "auto", *both)
        return rows_loss(student, teacher, tokens, options, backend)

    scale = head.logit_scale
    options = replace(options, temperature=options.temperature / scale, softcap=options.softcap / scale)
    if policy is not None:
        policy = PolicyGradient(policy.target_ids.contiguous(), policy.grad_logps.to(dtype).contiguous())
    operand, tile = choose_dtypes(student, weight, None)
    chunk = default_chunk_size(len(student), len(weight), student.device)
    own = (None, None) if teacher_head is None else (teacher_head.weight, teacher_head.bias)
    call = LinearCall(
        tokens,
        options,
        Plan(chunk, operand, tile),
        resolve_backend("distillation_loss", "auto", weight.new_empty(0, dtype=tile)),
        None if teacher is None else teacher.detach(),
        *(None if tensor is None else tensor.detach() for tensor in own),
        policy=policy,
    )
    out = linear_loss(student, weight, head.bias, call, target_ids.shape)

    def whole(values: Tensor) -> Tensor:
        if len(keep) == shape.numel():
            return values.view(shape)
        return values.new_zeros(shape.numel()).index_copy_(0, keep, values).view(shape)

    return SDPOLossOutput(out.loss, *(whole(values) for values in out[1:]))


def targets_where(mask: Tensor, target_ids: Tensor) -> Tensor:
    """``target_ids`` with -100 where ``mask`` is 0."""
    return target_ids.masked_fill(mask == 0, IGNORE_INDEX)


def policy_gradient_loss(student: Tensor, head: Any, policy: PolicyGradient, temperature: float) -> Tensor:
    """0, with the gradient ``grad_logps`` in the log-probs of the targets, to hidden states and head.

    The gradient is formed in the forward pass: 3 GEMMs, where log-probs that are differentiated
    afterwards take 4, and need the head again.
    """
    none = torch.full_like(policy.target_ids, IGNORE_INDEX)
    zeros = torch.zeros(none.shape, device=none.device)
    return distillation_loss(
        student,
        None,
        none,
        head=head,
        mode="sampled_token",
        alpha=1.0,
        temperature=temperature,
        teacher_logps=zeros,
        weights=zeros,
        policy=policy,
    ).loss
