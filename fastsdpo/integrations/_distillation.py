"""The loss as TRL and the verl fork of the SDPO authors define it.

It differs from `fastsdpo.sdpo_loss` in three points: rows that do not count never reach the head, a top-k support
has the tail of `ops.bounded_tail`, and a policy-gradient loss of the same hidden states can join it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops.backend import resolve_backend
from fastsdpo.ops.checks import accumulation_dtype
from fastsdpo.ops.divergence import SDPOLossOutput, check_loss, rows_loss
from fastsdpo.ops.head import ChunkPlan, choose_dtypes, default_chunk_size
from fastsdpo.ops.linear import LinearCall, linear_loss
from fastsdpo.ops.linear import PolicyGradient as PolicyGradient
from fastsdpo.ops.rows import LossOptions, Tokens

if TYPE_CHECKING:  # needs transformers, which readers of a server's scores do without
    from fastsdpo.prefix import HeadParameters

NAME = "distillation_loss"
IGNORE_INDEX = -100


class Objective(NamedTuple):
    """What is minimized; the fields are arguments of `fastsdpo.sdpo_loss`."""

    mode: str
    alpha: float = 1.0
    topk: int | None = None
    add_tail: bool = False
    is_clip: float | None = None
    temperature: float = 1.0


class Targets(NamedTuple):
    """The response's tokens, each field ``(...)``.

    Attributes:
        ids: -100 where a token does not count.
        weights: of each token in the loss.
        old_logps: log-probs under the policy that wrote the response, for ``is_clip``.
        teacher_logps: the teacher's log-probs, where the teacher has no hidden states or logits.
    """

    ids: Tensor
    weights: Tensor
    old_logps: Tensor | None = None
    teacher_logps: Tensor | None = None


class _CountingRows:
    """Takes the rows of tokens that count out of a batch, and puts results back in their places."""

    def __init__(self, counts: Tensor):
        self.shape = counts.shape
        self.index = counts.reshape(-1).nonzero().squeeze(-1)
        self.is_all = len(self.index) == counts.numel()

    def take(self, tensor: Tensor) -> Tensor:
        """``[N, ...]`` from ``[*shape, ...]``."""
        flat = tensor.reshape(-1, *tensor.shape[len(self.shape) :])
        return flat if self.is_all else flat[self.index]

    def take_targets(self, targets: Targets) -> Targets:
        ids, weights, *optional = targets
        return Targets(self.take(ids), self.take(weights), *(v if v is None else self.take(v) for v in optional))

    def put(self, values: Tensor) -> Tensor:
        """``[*shape]`` from ``[N]``, with 0 in all other places."""
        if self.is_all:
            return values.view(self.shape)
        return values.new_zeros(self.shape.numel()).index_copy_(0, self.index, values).view(self.shape)


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    targets: Targets,
    objective: Objective,
    *,
    head: HeadParameters | None = None,
    teacher_head: HeadParameters | None = None,
    policy: PolicyGradient | None = None,
) -> SDPOLossOutput:
    """`sdpo_loss` (without ``head``) or `linear_sdpo_loss` (with one), with the tail of TRL.

    Args:
        student, teacher: logits ``(..., V)``, or with a head hidden states ``(..., D)``; the teacher may be None
            where the targets have ``teacher_logps``.
        head: the student's head.
        teacher_head: the teacher's; None is the student's.
        policy: a second loss of the same hidden states, ``(...)``; its gradient is added.

    Raises:
        ValueError, TypeError: as `fastsdpo.sdpo_loss`.
    """
    if head is None:
        options, tokens = _check(targets, objective, student, student, student.shape[-1], teacher is not None)
        both = (student,) if teacher is None else (student, teacher)
        return rows_loss(student, teacher, tokens, options, resolve_backend(NAME, "auto", *both))

    counts = targets.ids != IGNORE_INDEX
    if policy is not None:
        counts = counts | (policy.target_ids != IGNORE_INDEX)
    rows = _CountingRows(counts)
    student, weight = rows.take(student), head.weight
    targets = rows.take_targets(targets)
    options, tokens = _check(targets, objective, student, weight, len(weight), teacher is not None, head.softcap)
    scale = head.logit_scale
    options = replace(options, temperature=options.temperature / scale, softcap=options.softcap / scale)
    if policy is not None:
        slopes = rows.take(policy.grad_logps).to(accumulation_dtype(student, weight))
        policy = PolicyGradient(rows.take(policy.target_ids).contiguous(), slopes.contiguous())
    operand, tile = choose_dtypes(student, weight, None)
    call = LinearCall(
        tokens,
        options,
        ChunkPlan(default_chunk_size(len(student), len(weight), student.device), operand, tile),
        resolve_backend(NAME, "auto", weight.new_empty(0, dtype=tile)),
        None if teacher is None else rows.take(teacher).detach(),
        None if teacher_head is None else teacher_head.weight.detach(),
        None if teacher_head is None or teacher_head.bias is None else teacher_head.bias.detach(),
        policy=policy,
    )
    out = linear_loss(student, weight, head.bias, call, targets.ids.shape)
    return SDPOLossOutput(out.loss, *(rows.put(values) for values in out[1:]))


def _check(
    targets: Targets,
    objective: Objective,
    student: Tensor,
    weight: Tensor,
    vocabulary: int,
    has_teacher: bool,
    softcap: float | None = None,
) -> tuple[LossOptions, Tokens]:
    """The checked options and tokens of a call; ``weight`` decides the dtype together with ``student``."""
    return check_loss(
        NAME,
        targets.ids.shape,
        vocabulary,
        student.device,
        accumulation_dtype(student, weight),
        targets.ids,
        teacher="teacher",
        has_teacher=has_teacher,
        weights=targets.weights,
        teacher_logps=targets.teacher_logps,
        teacher_topk=None,
        old_logps=targets.old_logps,
        softcap=softcap,
        ignore_index=IGNORE_INDEX,
        bounded_tail=True,
        **objective._asdict(),
    )


def targets_where(mask: Tensor, target_ids: Tensor) -> Tensor:
    """``target_ids`` with -100 where ``mask`` is 0."""
    return target_ids.masked_fill(mask == 0, IGNORE_INDEX)


def policy_gradient_loss(student: Tensor, head: HeadParameters, policy: PolicyGradient, temperature: float) -> Tensor:
    """A loss of value 0 whose gradient in the targets' log-probs is ``policy.grad_logps``.

    The gradient of hidden states and head is formed in the forward pass with 3 GEMMs. Log-probs that are
    differentiated afterwards take 4, and need the head again in the backward pass.
    """
    none = torch.full_like(policy.target_ids, IGNORE_INDEX)
    zeros = torch.zeros(none.shape, device=none.device)
    targets = Targets(none, zeros, teacher_logps=zeros)
    objective = Objective("sampled_token", temperature=temperature)
    return distillation_loss(student, None, targets, objective, head=head, policy=policy).loss
