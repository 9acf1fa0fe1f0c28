r"""The losses from hidden states: the logits never exist as a whole.

    z = logit_scale * (hidden @ weight.T + bias)         u, losses: as in `ops.divergence`

Tokens go through the head in chunks (`ops.head`): one GEMM makes the logits of a chunk for student and
teacher (stacked, where they share the head), the from-logits kernel writes the gradient of the student's
half, and two more GEMMs carry it to the hidden states and the head. That is 4 GEMMs of N x V x D per step
(student, teacher, dHidden, dWeight) in every mode, 3 with a frozen head, 2 without gradients; the
backward pass only scales what the forward pass formed. ``logit_scale`` is folded into temperature
and softcap, so it costs nothing: ``softcap' = softcap / scale``, ``temperature' = temperature / scale``.

Peak extra memory: two float32 tiles of chunk * V, a gradient tile of up to 4096 tokens in the operands' dtype
where that is not float32, and the gradients (the head's in float32 until backward). On a CPU the logit tiles
of the last call, up to 512 MiB, stay allocated for the next one (`release_tiles` frees them); during a
training step the peak is the loss, so that is rarely more memory than before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastsdpo.ops import cross_entropy
from fastsdpo.ops._memory import kind_of
from fastsdpo.ops._memory import meta_stands_for as meta_stands_for
from fastsdpo.ops._memory import release_tiles as release_tiles
from fastsdpo.ops._operators import check_values, is_real, raise_second_derivative, weighted_sum
from fastsdpo.ops.backend import resolve_backend
from fastsdpo.ops.checks import accumulation_dtype, check_logits, cut_vocabulary
from fastsdpo.ops.divergence import SDPOLossOutput, check_loss, loss_output
from fastsdpo.ops.head import (
    ChunkPlan,
    Gradients,
    HeadGemms,
    Needs,
    choose_dtypes,
    gradient_scale,
    needed,
    present,
    through_head,
)
from fastsdpo.ops.linear_checks import (
    check_chunk,
    check_head_tensors,
    check_scale,
    check_teacher,
    check_teacher_logits,
    check_tile,
    flat_hidden,
    gathered,
    refuse_with_shards,
)
from fastsdpo.ops.linear_rows import LinearCall as LinearCall
from fastsdpo.ops.linear_rows import PolicyGradient as PolicyGradient
from fastsdpo.ops.linear_rows import RowLoss
from fastsdpo.ops.linear_rows import RowVectors as RowVectors
from fastsdpo.ops.rows import LossOptions, Tokens


def linear_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, needs: Needs
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Gradients]:
    """``(loss, per_token, student_logps, teacher_logps)`` and the gradients for an upstream one of 1."""
    plan, tokens, policy = call.plan, call.tokens, call.policy
    vocabulary = len(weight)
    if call.vocab_group is not None:
        vocabulary *= torch.distributed.get_world_size(call.vocab_group)
    check_values("linear_sdpo_loss", vocabulary, tokens, call.options.ignore_index)
    scale = None
    if any(needs):
        others = [tokens.ce_weights, None if policy is None else policy.grad_logps]
        slopes = [tokens.weights, *(other for other in others if other is not None)]
        scale = gradient_scale(torch.cat(slopes), plan.operand)
    if scale is not None:
        labels = None if tokens.ce_weights is None else tokens.ce_weights * scale
        tokens = tokens._replace(weights=tokens.weights * scale, ce_weights=labels)
        if policy is not None:
            policy = policy._replace(grad_logps=policy.grad_logps * scale)
        call = replace(call, tokens=tokens, policy=policy)
    teacher_head = None
    if call.teacher_weight is not None:
        teacher_head = HeadGemms(call.teacher_weight, call.teacher_bias, plan.operand)
    shared: dict[str, Any] = {"teacher_hidden": call.teacher_hidden, "teacher_head": teacher_head}
    if needs[1]:
        shared["live"] = call.live()
    head = HeadGemms(weight, bias, plan.operand)
    if call.vocab_group is None:
        tile_loss = RowLoss(call)
        grads = through_head(hidden, head, tile_loss, plan, needs, **shared)
    else:
        from fastsdpo.ops.vocab_parallel import through_shard

        tile_loss, grads = through_shard(hidden, head, call, needs, **shared)
    vectors = tile_loss.vectors
    coef = vectors.coef
    if scale is not None:
        coef = coef / scale
        grads = Gradients(*(None if grad is None else grad.div_(scale) for grad in grads))
    loss = weighted_sum(coef, vectors.per_token)
    if call.tokens.ce_weights is not None:
        labels = cross_entropy.cross_entropy(call.tokens.ce_weights, vectors.label_logps)
        loss = loss + (labels if scale is None else labels / scale)
    return (loss, vectors.per_token, vectors.student_logps, vectors.teacher_logps), grads


class _FirstDerivative(torch.autograd.Function):
    """Identity on a finished gradient that depends on ``source``; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, source: Tensor) -> Tensor:
        return grad.view_as(grad)

    backward = staticmethod(raise_second_derivative)


def _scaled(grad: Tensor | None, upstream: Tensor, source: Tensor) -> Tensor | None:
    """The gradient formed in forward times the upstream one, in the dtype of ``source``.

    If the dtypes differ, one pass scales and rounds. Otherwise the gradient is scaled in place; on a CPU
    that is skipped for a factor of 1. A second backward raises, because the saved tensor has changed.
    """
    if grad is None:
        return None
    if torch.is_grad_enabled():
        scaled = (grad * upstream.to(grad.dtype)).to(source.dtype)
        return _FirstDerivative.apply(scaled, source)
    if not is_real(grad):
        return (grad * upstream.to(grad.dtype)).to(source.dtype)
    grad[:0].mul_(1)  # changes no value but the version counter, so that a second backward raises
    on_cpu = kind_of(upstream.device) == "cpu"
    if on_cpu and not upstream.is_meta and upstream == 1:
        return grad.to(source.dtype)
    if on_cpu or grad.dtype == source.dtype:
        return grad.mul_(upstream).to(source.dtype)
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=source.dtype))


class _LinearLoss(torch.autograd.Function):
    """Forms the gradients in forward, chunk by chunk; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, needs: Needs
    ) -> tuple[Tensor, ...]:
        found, grads = linear_forward(hidden, weight, bias, call, needs)
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads, hidden, weight, bias)
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        if upstream[0] is None:
            return (None,) * 5
        saved = ctx.saved_tensors
        grads = [_scaled(grad, upstream[0], source) for grad, source in zip(saved[:3], saved[3:])]
        return *grads, None, None


@custom_op("fastsdpo::linear_sdpo", mutates_args=())
def linear_sdpo_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Sequence[Tensor | None],
    tokens: Sequence[Tensor | None],
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    chunk_size: int,
    dtypes: str,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `linear_forward` gives, for compilers; an empty tensor where no gradient is needed."""
    options = LossOptions.unpacked(mode, floats, integers)
    plan = ChunkPlan.unpacked(chunk_size, dtypes)
    call = LinearCall(Tokens(*tokens), options, plan, backend, *teacher)
    found, grads = linear_forward(hidden, weight, bias, call, needed(needs))
    none = found[0].new_empty(0)
    return *found, *(none.clone() if grad is None else grad for grad in grads)


@linear_sdpo_op.register_fake
def _(hidden, weight, bias, teacher, tokens, *args):
    weights, needs = tokens[1], args[-2]
    accumulation = accumulation_dtype(hidden, weight)
    waits = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    none = weights.new_empty(0)
    return (
        weights.new_empty(()),
        *(torch.empty_like(weights) for _ in range(3)),
        hidden.new_empty(hidden.shape, dtype=waits) if needs[0] else none,
        weight.new_empty(weight.shape, dtype=accumulation) if needs[1] else none.clone(),
        weight.new_empty(weight.shape[0], dtype=accumulation) if needs[2] else none.clone(),
    )


def _linear_sdpo_setup(ctx, inputs, output):
    ctx.needs = inputs[-2]
    # The gradient of a list of tensors is a list, that of a list with None among them is None.
    whole = all(tensor is not None for tensor in inputs[3])
    ctx.of_teacher = [None] * len(inputs[3]) if whole else None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:], *inputs[:3])


def _linear_sdpo_backward(ctx, upstream, *unused):
    if upstream is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    grads = [_scaled(grad, upstream, source) for grad, source in zip(present(ctx.needs, saved[:3]), saved[3:])]
    return *grads, ctx.of_teacher, *(None,) * 8


linear_sdpo_op.register_autograd(_linear_sdpo_backward, setup_context=_linear_sdpo_setup)


def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, shape: torch.Size
) -> SDPOLossOutput:
    """The loss of a checked call; ``hidden [N, D]``, results of ``shape``."""
    enabled = torch.is_grad_enabled()
    needs = needed(enabled and t is not None and t.requires_grad for t in (hidden, weight, bias))
    if is_real(hidden) and is_real(weight):
        found = _LinearLoss.apply(hidden, weight, bias, call, needs)
    else:
        teacher = [call.teacher_hidden, call.teacher_weight, call.teacher_bias, call.teacher_logits]
        found = linear_sdpo_op(
            hidden,
            weight,
            bias,
            teacher,
            list(call.tokens),
            *call.options.packed(),
            *call.plan.packed(),
            list(needs),
            call.backend,
        )
    return loss_output(found[:4], shape)


def linear_sdpo_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    tile_dtype: torch.dtype | None = None,
    mode: str = "sampled_token",
    alpha: float = 1.0,
    topk: int | None = None,
    add_tail: bool = True,
    weights: Tensor | None = None,
    teacher_logps: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    old_logps: Tensor | None = None,
    is_clip: float | None = None,
    ce_weights: Tensor | None = None,
    ce_temperature: float = 1.0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_grad: bool = False,
    vocab_group: Any = None,
    backend: str = "auto",
) -> SDPOLossOutput:
    """`sdpo_loss` from hidden states; the logits never exist as a whole.

        z = logit_scale * (hidden @ weight.T + bias), for student and teacher

    Args:
        student_hidden: ``(..., D)`` floating, after the model's final norm.
        teacher_hidden: ``(..., D_T)``, never a gradient; None where ``teacher_logps`` or
            ``teacher_topk`` stands for it. D_T = D unless ``teacher_weight`` is given.
        weight, bias: ``(V, D)`` and ``(V,)`` or None, the student's head; a DTensor is gathered.
        target_ids: ``(...)`` integer in [0, V), or ``ignore_index``.
        teacher_weight, teacher_bias: ``(V, D_T)``, ``(V,)``; None is the student's own head
            (self-distillation): its GEMM then serves both.
        teacher_logits: ``(..., V)`` in place of ``teacher_hidden``: the teacher's logits or log-probs over the whole
            vocabulary, as they are (``logit_scale`` is the student's alone); not with a softcap.
        logit_scale: multiplies both heads' outputs before the softcap; > 0.
        vocab_size: as `sdpo_loss`; cuts the rows of both heads.
        chunk_size: tokens per tile; None chooses (`ops.head.default_chunk_size`).
        tile_dtype: dtype of the logit tiles on a GPU; None is float32. bfloat16 tiles halve the
            tiles' memory and put 7% to 10% error into the gradients when teacher and student are
            close, against 0.15% from float32 tiles.
        inplace_grad: accepted for symmetry with `sdpo_loss`; tiles are always overwritten.
        vocab_group: process group of a vocabulary-parallel head. ``weight`` and ``bias`` (and the
            teacher's) are then this process's rows, V / P each, in rank order; ids are global and
            hidden states the same on every process (`fastsdpo.ops.vocab_parallel`).
        others: as `sdpo_loss`.

    Returns:
        `SDPOLossOutput`. ``loss`` carries the gradient with respect to ``student_hidden``,
        ``weight`` and ``bias``, those that require one.

    Raises:
        ValueError, TypeError, ImportError: as `sdpo_loss`, by argument. A second backward through
        the same loss raises: the gradients formed in the forward pass are scaled in place.

    Memory: two float32 tiles of chunk_size * V (one without a teacher's GEMM), a gradient tile in
        the operands' dtype where that is not float32, and the gradients of the inputs (the head's
        in float32 while it accumulates). Without any gradient: the tiles alone. On a CPU the tiles
        stay allocated for the next call, up to 512 MiB (`fastsdpo.ops.linear.release_tiles` frees
        them).
    """
    name = "linear_sdpo_loss"
    student = check_logits(name, "student_hidden", student_hidden, "D")
    heads = {"weight": weight, "bias": bias, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    weight, bias, *teacher_head = (
        cut_vocabulary(name, argument, gathered(value), vocab_size, 0) for argument, value in heads.items()
    )
    weight, bias = check_head_tensors(name, "weight", student, weight, bias)
    teacher = check_teacher(name, student, weight.shape[0], teacher_hidden, *teacher_head)
    if teacher_logits is not None:
        teacher_logits = cut_vocabulary(name, "teacher_logits", teacher_logits, vocab_size, -1)
        given = teacher_hidden is not None
        teacher_logits = check_teacher_logits(name, student, len(weight), teacher_logits, given, softcap)
        if check_scale(name, logit_scale) != 1.0:
            student, bias = student * logit_scale, None if bias is None else bias * logit_scale
        logit_scale = 1.0
    refuse_with_shards(name, vocab_group, ce_weights=ce_weights, teacher_logits=teacher_logits, vocab_size=vocab_size)
    shape = student.shape[:-1]
    operand, tile = choose_dtypes(student, weight, tile_dtype)
    vocabulary = weight.shape[0]
    if vocab_group is not None:
        vocabulary *= torch.distributed.get_world_size(vocab_group)
    options, tokens = check_loss(
        name,
        shape,
        vocabulary,
        student.device,
        accumulation_dtype(student, weight),
        target_ids,
        teacher="teacher_hidden",
        has_teacher=teacher_hidden is not None or teacher_logits is not None,
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
        softcap=softcap,
        ignore_index=ignore_index,
        ce_weights=ce_weights,
        ce_temperature=ce_temperature,
    )
    scale = check_scale(name, logit_scale)
    options = replace(
        options,
        temperature=options.temperature / scale,
        softcap=options.softcap / scale,
        ce_temperature=options.ce_temperature / scale,
    )
    check_tile(name, tile_dtype, student.device)
    flat = flat_hidden(student)
    chunk = check_chunk(name, chunk_size, flat.shape[0], weight)
    backend = resolve_backend(name, backend, weight.new_empty(0, dtype=tile))
    plan = ChunkPlan(chunk, operand, tile)
    call = LinearCall(tokens, options, plan, backend, *teacher, teacher_logits, vocab_group=vocab_group)
    return linear_loss(flat, weight, bias, call, shape)
