"""Autograd of the losses from logits, and their `torch.library` operators; the work is done by `ops.rows`.

The operators make each public function one node of a graph under `torch.compile(fullgraph=True)`, whatever
backend computes it. A call's options travel as `LossOptions.packed`, its per-token tensors as one list
(`Tokens`). Outside of compilers `SDPOFunction` does the same in less Python time.

A gradient in place overwrites the student's logits and counts as a change of them, which lets autograd notice
a second use. A second derivative raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastsdpo.ops import cross_entropy, rows
from fastsdpo.ops.checks import accumulation_dtype, as_rows, check_distinct, check_ids
from fastsdpo.ops.rows import STATISTICS, LossOptions, RowCall, RowResults, Tokens


def empty_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def weighted_sum(coef: Tensor, per_token: Tensor) -> Tensor:
    """``sum coef * per_token``, a token of weight 0 counting 0 even where its loss is infinite."""
    return torch.where(coef == 0, 0.0, coef * per_token).sum()


def is_real(tensor: Tensor) -> bool:
    """False while a compiler traces with fake tensors; then no gradient is formed in place."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


class SecondDerivativeError(NotImplementedError, ValueError):
    """Raised where a gradient of a gradient is asked for (``create_graph=True``)."""


def raise_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise SecondDerivativeError(
        "fastsdpo: the losses have first derivatives only, got a second derivative "
        "(backward through a gradient made with create_graph=True)"
    )


def forbid_second_derivative(op: Any) -> None:
    op.register_autograd(raise_second_derivative, setup_context=lambda ctx, inputs, output: None)


def check_values(name: str, vocabulary: int, tokens: Tokens, ignore_index: int) -> None:
    """Checks the ids of a call. It reads them, so on a GPU it does so only with ``FASTSDPO_CHECK=1``."""
    check_ids(tokens.target_ids, vocabulary, f"{name}: target_ids", ignore_index)
    if tokens.topk_ids is not None and tokens.topk_logps is not None:
        check_ids(tokens.topk_ids, vocabulary, f"{name}: teacher_topk ids", None)
        check_distinct(tokens.topk_ids, f"{name}: teacher_topk ids")


# ---- log-probs of the targets --------------------------------------------------------------------


@custom_op("fastsdpo::token_logps", mutates_args=())
def token_logps_op(
    logits: Tensor,
    target_ids: Tensor,
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions.unpacked(mode, floats, integers)
    check_ids(target_ids, logits.shape[-1], "token_logps: target_ids", options.ignore_index)
    return tuple(rows.token_forward(logits, target_ids, options, backend, entropy))


@token_logps_op.register_fake
def _(logits, target_ids, mode, floats, integers, entropy, backend):
    n = target_ids.shape[0]  # not len(), which would fix the size of a graph
    logps = target_ids.new_empty(n, dtype=accumulation_dtype(logits))
    return logps, logps.new_empty(n if entropy else 0), logps.new_empty(n, 2)


@custom_op("fastsdpo::token_logps_backward", mutates_args=())
def token_logps_backward_op(
    upstream: Tensor,
    logits: Tensor,
    target_ids: Tensor,
    stats: Tensor,
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    backend: str,
) -> Tensor:
    grad, options = empty_gradient(logits), LossOptions.unpacked(mode, floats, integers)
    rows.token_backward(upstream.contiguous(), stats, logits, target_ids, options, backend, grad)
    return grad


@token_logps_backward_op.register_fake
def _(upstream, logits, *args):
    return empty_gradient(logits)


forbid_second_derivative(token_logps_backward_op)


def _token_logps_setup(ctx, inputs, output):
    logits, target_ids, *ctx.options, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target_ids, output[2])


def _token_logps_backward(ctx, upstream, *unused):
    grad = None
    if upstream is not None and ctx.needs_input_grad[0]:
        logits, ids, stats = ctx.saved_tensors
        mode, floats, integers = ctx.options
        grad = token_logps_backward_op(upstream, logits, ids, stats, mode, floats, integers, ctx.backend)
    return grad, *(None,) * 6


token_logps_op.register_autograd(_token_logps_backward, setup_context=_token_logps_setup)


@custom_op("fastsdpo::token_log_ratio", mutates_args=())
def token_log_ratio_op(
    student: Tensor,
    teacher: Tensor,
    target_ids: Tensor,
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = LossOptions.unpacked(mode, floats, integers)
    check_ids(target_ids, student.shape[-1], "token_log_ratio: target_ids", options.ignore_index)
    found = rows.log_ratio(student, teacher, target_ids, options, backend)
    return found[0], found[1]


@token_log_ratio_op.register_fake
def _(student, teacher, target_ids, *args):
    row = target_ids.new_empty(target_ids.shape[0], dtype=accumulation_dtype(student, teacher))
    return row, torch.empty_like(row)


# ---- the losses ----------------------------------------------------------------------------------


@custom_op("fastsdpo::support", mutates_args=())
def support_op(logits: Tensor, target_ids: Tensor, k: int, ignore_index: int, backend: str) -> Tensor:
    """`rows.support`."""
    check_ids(target_ids, logits.shape[-1], "sdpo_loss: target_ids", ignore_index)
    return rows.support(logits, target_ids, k, ignore_index, backend)


@support_op.register_fake
def _(logits, target_ids, k, ignore_index, backend):
    return target_ids.new_empty(target_ids.shape[0], k)


class SDPOFunction(torch.autograd.Function):
    """``(loss, per_token, student_logps, teacher_logps)`` of logits ``(..., V)``, outside of compilers."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        tokens: Tokens,
        options: LossOptions,
        inplace_grad: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        check_values("sdpo_loss", student.shape[-1], tokens, options.ignore_index)
        call = RowCall(as_rows(student), teacher, tokens, options, backend)
        found = rows.forward(call)
        ctx.call = options, inplace_grad, backend, student.shape
        out = found.per_token, found.student_logps, found.teacher_logps
        ctx.mark_non_differentiable(*out)
        ctx.set_materialize_grads(False)
        teacher = teacher if options.mode == "full" else None
        # Save the student itself, not a view: autograd then notices a change between forward and backward.
        ctx.save_for_backward(student, teacher, tokens.target_ids, tokens.topk_ids, tokens.ce_weights, *found)
        return weighted_sum(found.coef, found.per_token) + cross_entropy.value(call), *out

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        if upstream[0] is None:
            return (None,) * 6
        options, inplace, backend, shape = ctx.call
        student, teacher, ids, topk_ids, ce_weights, *saved = ctx.saved_tensors
        found, logits = RowResults(*saved), as_rows(student.detach())
        tokens = Tokens(ids, found.coef, topk_ids=topk_ids, ce_weights=ce_weights)
        if torch.is_grad_enabled():  # create_graph: an operator that refuses a second derivative
            mode, floats, integers = options.packed()
            grad = sdpo_backward_op(
                upstream[0], as_rows(student), teacher, list(tokens), list(found), mode, floats, integers, backend
            )
        else:
            grad = logits if inplace else empty_gradient(logits)
            if inplace:
                torch.autograd.graph.increment_version(student)
            factor = upstream[0].reshape(1).to(found.coef.dtype)
            cross_entropy.backward(factor, found, RowCall(logits, teacher, tokens, options, backend), grad)
        return grad.view(shape), None, None, None, None, None


@custom_op("fastsdpo::sdpo", mutates_args=())
def sdpo_op(
    student: Tensor,
    teacher: Tensor | None,
    tokens: Sequence[Tensor | None],
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`SDPOFunction` for compilers, where the gradient is never formed in place."""
    inputs, options = Tokens(*tokens), LossOptions.unpacked(mode, floats, integers)
    check_values("sdpo_loss", student.shape[-1], inputs, options.ignore_index)
    call = RowCall(student, teacher, inputs, options, backend)
    found = rows.forward(call)
    loss = weighted_sum(found.coef, found.per_token) + cross_entropy.value(call)
    # An operator must not return views of one buffer, so clone them.
    return loss, *(result.clone() for result in found)


@sdpo_op.register_fake
def _(student, teacher, tokens, mode, floats, integers, backend):
    inputs = Tokens(*tokens)
    dtype = accumulation_dtype(student, *([] if teacher is None else [teacher]))
    row = student.new_empty(inputs.target_ids.shape[0], dtype=dtype)
    stats = row.new_empty(row.shape[0], STATISTICS)
    grads = row.new_empty(0)
    if inputs.topk_ids is not None and mode.startswith("topk"):
        grads = row.new_empty(inputs.topk_ids.shape)
    elif backend in ("native", "triton") and mode.startswith("full"):
        grads = row.new_empty(row.shape[0], 2)
    return row.new_empty(()), *(torch.empty_like(row) for _ in range(4)), stats, grads


@custom_op("fastsdpo::sdpo_backward", mutates_args=())
def sdpo_backward_op(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    tokens: Sequence[Tensor | None],
    found: Sequence[Tensor],
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    backend: str,
) -> Tensor:
    grad, results = empty_gradient(student), RowResults(*found)
    factor = upstream.reshape(1).to(results.coef.dtype)
    options = LossOptions.unpacked(mode, floats, integers)
    cross_entropy.backward(factor, results, RowCall(student, teacher, Tokens(*tokens), options, backend), grad)
    return grad


@sdpo_backward_op.register_fake
def _(upstream, student, *args):
    return empty_gradient(student)


forbid_second_derivative(sdpo_backward_op)


def _sdpo_setup(ctx, inputs, output):
    student, teacher, tokens, *ctx.options, ctx.backend = inputs
    if not ctx.options[0].startswith("full"):
        teacher = None
    tokens = Tokens(*tokens)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, tokens.target_ids, tokens.topk_ids, tokens.ce_weights, *output[1:])


def _sdpo_backward(ctx, upstream, *unused):
    grad = None
    if upstream is not None and ctx.needs_input_grad[0]:
        student, teacher, ids, topk_ids, ce_weights, *found = ctx.saved_tensors
        tokens = list(Tokens(ids, found[1], topk_ids=topk_ids, ce_weights=ce_weights))
        mode, floats, integers = ctx.options
        grad = sdpo_backward_op(upstream, student, teacher, tokens, found, mode, floats, integers, ctx.backend)
    return grad, *(None,) * 6


sdpo_op.register_autograd(_sdpo_backward, setup_context=_sdpo_setup)
