"""The `torch.library` operators behind the public functions, one set for all backends.

Each loss is a forward operator with its saved statistics and a backward operator that writes the
gradient of the logits; autograd and fake implementations are registered here once, so the public
functions are one graph node each under `torch.compile(fullgraph=True)` whatever computes them. The
``backend`` argument names the module (`_triton.py`, `_native.py`, `reference.py` of the op's folder)
whose plain function does the work.

Backward comes in two forms: one allocates the gradient, one (name ending in ``_``) overwrites the
student's logits with it and declares so, which lets autograd notice a second use of the logits.
A second derivative raises.
"""

# Calls with unpacked lists: pyright cannot count their arguments.
# pyright: reportCallIssue=false
from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastsdpo.ops._backend import implementation
from fastsdpo.ops._checks import accumulation_dtype


def _check_ids(ids: Tensor, vocabulary: int, argument: str, ignore_index: int | None) -> None:
    """Ids must lie in [0, V) (or be ``ignore_index``). Waits for a GPU, so there only on request."""
    if ids.device.type != "cpu" and os.environ.get("FASTSDPO_CHECK", "0") != "1":
        return
    bad = (ids < 0) | (ids >= vocabulary)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bool(bad.any()):
        flat = bad.reshape(-1).nonzero()[0].item()
        value = int(ids.reshape(-1)[flat])
        rule = f"lie in [0, V) = [0, {vocabulary})"
        if ignore_index is not None:
            rule += f" or be ignore_index = {ignore_index}"
        raise ValueError(f"{argument} must {rule}, got {value} at flattened position {flat}")


def _check_distinct(ids: Tensor) -> None:
    if ids.device.type != "cpu" and os.environ.get("FASTSDPO_CHECK", "0") != "1":
        return
    if ids.shape[1] > 1 and bool((ids.sort(-1).values.diff(dim=-1) == 0).any()):
        raise ValueError("teacher_topk ids must be distinct in each row, got a repeated id")


def _rows_like(logits: Tensor, *more: Tensor) -> Tensor:
    """An empty per-token vector for ``logits [B, L, V]`` in the accumulation dtype."""
    rows = logits.shape[0] * logits.shape[1]
    return logits.new_empty(rows, dtype=accumulation_dtype(logits, *more))


def _empty_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _weighted_sum(coef: Tensor, per_token: Tensor) -> Tensor:
    """``sum coef * per_token``, a token of weight 0 counting 0 even where its loss is infinite."""
    return torch.where(coef == 0, 0.0, coef * per_token).sum()


class SecondDerivativeError(NotImplementedError, ValueError):
    """Raised where a gradient of a gradient is asked for (``create_graph=True``)."""


def _raise_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise SecondDerivativeError(
        "fastsdpo: the losses have first derivatives only, got a second derivative "
        "(backward through a gradient made with create_graph=True)"
    )


def _forbid_second_derivative(op: Any) -> None:
    op.register_autograd(_raise_second_derivative, setup_context=lambda ctx, inputs, output: None)


# ---- token_logps -----------------------------------------------------------------------------


@custom_op("fastsdpo::token_logps", mutates_args=())
def token_logps_op(
    logits: Tensor,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_ids(target_ids, logits.shape[-1], "token_logps: target_ids", ignore_index)
    return implementation("token_logps", backend).token_logps_forward(
        logits, target_ids, temperature, softcap, ignore_index, return_entropy
    )


@token_logps_op.register_fake
def _(logits, target_ids, temperature, softcap, ignore_index, return_entropy, backend):
    row = _rows_like(logits)
    entropy = torch.empty_like(row) if return_entropy else row.new_empty(0)
    return row, entropy, torch.empty_like(row), torch.empty_like(row)


@custom_op("fastsdpo::token_logps_backward", mutates_args=())
def token_logps_backward_op(
    grad_logps: Tensor,
    logits: Tensor,
    target_ids: Tensor,
    row_max: Tensor,
    row_log2sum: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    grad = _empty_gradient(logits)
    implementation("token_logps", backend).token_logps_backward(
        grad_logps.contiguous(), logits, target_ids, row_max, row_log2sum,
        temperature, softcap, ignore_index, grad,
    )  # fmt: skip
    return grad


@token_logps_backward_op.register_fake
def _(grad_logps, logits, target_ids, row_max, row_log2sum, temperature, softcap, ignore, backend):
    return _empty_gradient(logits)


_forbid_second_derivative(token_logps_backward_op)


def _token_logps_setup(ctx, inputs, output):
    logits, target_ids, *ctx.options, _, ctx.backend = inputs
    _, entropy, row_max, row_log2sum = output
    ctx.mark_non_differentiable(entropy, row_max, row_log2sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target_ids, row_max, row_log2sum)


def _token_logps_backward(ctx, grad_logps, *unused):
    if grad_logps is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    return token_logps_backward_op(grad_logps, *ctx.saved_tensors, *ctx.options, ctx.backend), *(
        (None,) * 6
    )


token_logps_op.register_autograd(_token_logps_backward, setup_context=_token_logps_setup)


@custom_op("fastsdpo::token_log_ratio", mutates_args=())
def token_log_ratio_op(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_ids(target_ids, student_logits.shape[-1], "token_log_ratio: target_ids", ignore_index)
    return implementation("token_logps", backend).token_log_ratio_forward(
        student_logits, teacher_logits, target_ids, temperature, softcap, ignore_index
    )


@token_log_ratio_op.register_fake
def _(student_logits, teacher_logits, target_ids, temperature, softcap, ignore_index, backend):
    row = _rows_like(student_logits, teacher_logits)
    return row, torch.empty_like(row)


# ---- sdpo losses: one forward and two backward operators per mode ------------------------------


@custom_op("fastsdpo::sampled_token", mutates_args=())
def sampled_token_op(
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
    inplace_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_ids(target_ids, student_logits.shape[-1], "sdpo_loss: target_ids", ignore_index)
    per_token, coef, student, teacher, stats = implementation(
        "divergence", backend
    ).sampled_token_forward(
        student_logits, teacher_logits, teacher_logps, target_ids, weights, old_logps, is_clip,
        temperature, softcap, ignore_index,
    )  # fmt: skip
    return _weighted_sum(coef, per_token), per_token, student, teacher, coef, stats


@sampled_token_op.register_fake
def _(student_logits, teacher_logits, teacher_logps, target_ids, weights, *options):
    teacher = [t for t in (teacher_logits,) if t is not None]
    row = _rows_like(student_logits, *teacher)
    per_token, student, teacher_out, coef = (torch.empty_like(row) for _ in range(4))
    return row.new_empty(()), per_token, student, teacher_out, coef, row.new_empty(row.shape[0], 2)


@custom_op("fastsdpo::sampled_token_backward", mutates_args=())
def sampled_token_backward_op(
    grad_loss: Tensor, coef: Tensor, student_logps: Tensor, teacher_logps: Tensor,
    student_logits: Tensor, target_ids: Tensor, row_stats: Tensor,
    temperature: float, softcap: float, ignore_index: int, backend: str,
) -> Tensor:  # fmt: skip
    grad = _empty_gradient(student_logits)
    implementation("divergence", backend).sampled_token_backward(
        grad_loss.reshape(1).to(coef.dtype), coef, student_logps, teacher_logps, student_logits,
        target_ids, row_stats, temperature, softcap, ignore_index, grad,
    )  # fmt: skip
    return grad


@custom_op("fastsdpo::sampled_token_backward_", mutates_args=("student_logits",))
def sampled_token_backward_inplace_op(
    grad_loss: Tensor, coef: Tensor, student_logps: Tensor, teacher_logps: Tensor,
    student_logits: Tensor, target_ids: Tensor, row_stats: Tensor,
    temperature: float, softcap: float, ignore_index: int, backend: str,
) -> None:  # fmt: skip
    implementation("divergence", backend).sampled_token_backward(
        grad_loss.reshape(1).to(coef.dtype), coef, student_logps, teacher_logps, student_logits,
        target_ids, row_stats, temperature, softcap, ignore_index, student_logits,
    )  # fmt: skip


@custom_op("fastsdpo::divergence", mutates_args=())
def divergence_op(
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
    inplace_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_ids(target_ids, student_logits.shape[-1], "sdpo_loss: target_ids", ignore_index)
    per_token, coef, student, teacher, stats = implementation(
        "divergence", backend
    ).divergence_forward(
        student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
        temperature, softcap, ignore_index,
    )  # fmt: skip
    return _weighted_sum(coef, per_token), per_token, student, teacher, coef, stats


@divergence_op.register_fake
def _(student_logits, teacher_logits, *options):
    row = _rows_like(student_logits, teacher_logits)
    per_token, student, teacher, coef = (torch.empty_like(row) for _ in range(4))
    return row.new_empty(()), per_token, student, teacher, coef, row.new_empty(row.shape[0], 5)


@custom_op("fastsdpo::divergence_backward", mutates_args=())
def divergence_backward_op(
    grad_loss: Tensor, coef: Tensor, student_logits: Tensor, teacher_logits: Tensor,
    target_ids: Tensor, row_stats: Tensor, alpha: float, temperature: float, softcap: float,
    ignore_index: int, backend: str,
) -> Tensor:  # fmt: skip
    grad = _empty_gradient(student_logits)
    implementation("divergence", backend).divergence_backward(
        grad_loss.reshape(1).to(coef.dtype), coef, student_logits, teacher_logits, target_ids,
        row_stats, alpha, temperature, softcap, ignore_index, grad,
    )  # fmt: skip
    return grad


@custom_op("fastsdpo::divergence_backward_", mutates_args=("student_logits",))
def divergence_backward_inplace_op(
    grad_loss: Tensor, coef: Tensor, student_logits: Tensor, teacher_logits: Tensor,
    target_ids: Tensor, row_stats: Tensor, alpha: float, temperature: float, softcap: float,
    ignore_index: int, backend: str,
) -> None:  # fmt: skip
    implementation("divergence", backend).divergence_backward(
        grad_loss.reshape(1).to(coef.dtype), coef, student_logits, teacher_logits, target_ids,
        row_stats, alpha, temperature, softcap, ignore_index, student_logits,
    )  # fmt: skip


@custom_op("fastsdpo::topk_support", mutates_args=())
def support_op(logits: Tensor, target_ids: Tensor, k: int, ignore_index: int) -> Tensor:
    """The native kernel's choice of a support."""
    _check_ids(target_ids, logits.shape[-1], "sdpo_loss: target_ids", ignore_index)
    return implementation("divergence", "native").topk_support(logits, target_ids, k, ignore_index)


@support_op.register_fake
def _(logits, target_ids, k, ignore_index):
    return target_ids.new_empty(len(target_ids), k)


@custom_op("fastsdpo::topk_divergence", mutates_args=())
def topk_op(
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
    inplace_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    vocabulary = student_logits.shape[-1]
    _check_ids(target_ids, vocabulary, "sdpo_loss: target_ids", ignore_index)
    if teacher_topk_logps is not None:
        _check_ids(topk_ids, vocabulary, "sdpo_loss: teacher_topk ids", None)
        _check_distinct(topk_ids)
    per_token, coef, student, teacher, stats, class_grads = implementation(
        "divergence", backend
    ).topk_forward(
        student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights,
        old_logps, is_clip, alpha, add_tail, temperature, softcap, ignore_index,
    )  # fmt: skip
    return _weighted_sum(coef, per_token), per_token, student, teacher, coef, stats, class_grads


@topk_op.register_fake
def _(student_logits, teacher_logits, topk_ids, *options):
    teacher = [t for t in (teacher_logits,) if t is not None]
    row = _rows_like(student_logits, *teacher)
    per_token, student, teacher_out, coef = (torch.empty_like(row) for _ in range(4))
    stats, grads = row.new_empty(row.shape[0], 4), row.new_empty(topk_ids.shape)
    return row.new_empty(()), per_token, student, teacher_out, coef, stats, grads


@custom_op("fastsdpo::topk_divergence_backward", mutates_args=())
def topk_backward_op(
    grad_loss: Tensor, coef: Tensor, student_logits: Tensor, topk_ids: Tensor, target_ids: Tensor,
    row_stats: Tensor, class_grads: Tensor, add_tail: bool, temperature: float, softcap: float,
    ignore_index: int, backend: str,
) -> Tensor:  # fmt: skip
    grad = _empty_gradient(student_logits)
    implementation("divergence", backend).topk_backward(
        grad_loss.reshape(1).to(coef.dtype), coef, student_logits, topk_ids, target_ids, row_stats,
        class_grads, add_tail, temperature, softcap, ignore_index, grad,
    )  # fmt: skip
    return grad


@custom_op("fastsdpo::topk_divergence_backward_", mutates_args=("student_logits",))
def topk_backward_inplace_op(
    grad_loss: Tensor, coef: Tensor, student_logits: Tensor, topk_ids: Tensor, target_ids: Tensor,
    row_stats: Tensor, class_grads: Tensor, add_tail: bool, temperature: float, softcap: float,
    ignore_index: int, backend: str,
) -> None:  # fmt: skip
    implementation("divergence", backend).topk_backward(
        grad_loss.reshape(1).to(coef.dtype), coef, student_logits, topk_ids, target_ids, row_stats,
        class_grads, add_tail, temperature, softcap, ignore_index, student_logits,
    )  # fmt: skip


for _op, _index in (
    (sampled_token_backward_op, 4),
    (divergence_backward_op, 2),
    (topk_backward_op, 2),
):
    # Bound as a default argument: the loop variable is gone when the fake runs.
    _op.register_fake(lambda *args, _index=_index: _empty_gradient(args[_index]))
    _forbid_second_derivative(_op)


def _is_real(tensor: Tensor) -> bool:
    """False while a compiler traces with stand-ins; there the gradient is never formed in place."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _gradient(ctx: Any, allocate: Any, inplace: Any, logits: Tensor, args: tuple) -> Tensor:
    """Runs the in-place form where the user allowed it and nothing else will differentiate it."""
    if ctx.inplace_grad and _is_real(logits) and not torch.is_grad_enabled():
        inplace(*args)
        return logits.detach()
    return allocate(*args)


def _save(ctx: Any, output: tuple, keep: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*keep)


def _sampled_token_setup(ctx, inputs, output):
    student_logits, target_ids = inputs[0], inputs[3]
    ctx.options, ctx.inplace_grad, ctx.backend = inputs[7:10], inputs[10], inputs[11]
    _, _, student_logps, teacher_logps, coef, stats = output
    _save(ctx, output, (coef, student_logps, teacher_logps, student_logits, target_ids, stats))


def _sampled_token_backward(ctx, grad_loss, *unused):
    grads = [None] * 12
    if grad_loss is not None and ctx.needs_input_grad[0]:
        saved = ctx.saved_tensors
        args = (grad_loss, *saved, *ctx.options, ctx.backend)
        grads[0] = _gradient(
            ctx, sampled_token_backward_op, sampled_token_backward_inplace_op, saved[3], args
        )
    return tuple(grads)


def _divergence_setup(ctx, inputs, output):
    student_logits, teacher_logits, target_ids = inputs[:3]
    ctx.options, ctx.inplace_grad, ctx.backend = inputs[6:10], inputs[10], inputs[11]
    *_, coef, stats = output
    _save(ctx, output, (coef, student_logits, teacher_logits, target_ids, stats))


def _divergence_backward(ctx, grad_loss, *unused):
    grads = [None] * 12
    if grad_loss is not None and ctx.needs_input_grad[0]:
        saved = ctx.saved_tensors
        args = (grad_loss, *saved, *ctx.options, ctx.backend)
        grads[0] = _gradient(
            ctx, divergence_backward_op, divergence_backward_inplace_op, saved[1], args
        )
    return tuple(grads)


def _topk_setup(ctx, inputs, output):
    student_logits, topk_ids, target_ids = inputs[0], inputs[2], inputs[4]
    ctx.options, ctx.inplace_grad, ctx.backend = inputs[9:13], inputs[13], inputs[14]
    *_, coef, stats, class_grads = output
    _save(ctx, output, (coef, student_logits, topk_ids, target_ids, stats, class_grads))


def _topk_backward(ctx, grad_loss, *unused):
    grads = [None] * 15
    if grad_loss is not None and ctx.needs_input_grad[0]:
        saved = ctx.saved_tensors
        args = (grad_loss, *saved, *ctx.options, ctx.backend)
        grads[0] = _gradient(ctx, topk_backward_op, topk_backward_inplace_op, saved[1], args)
    return tuple(grads)


sampled_token_op.register_autograd(_sampled_token_backward, setup_context=_sampled_token_setup)
divergence_op.register_autograd(_divergence_backward, setup_context=_divergence_setup)
topk_op.register_autograd(_topk_backward, setup_context=_topk_setup)
