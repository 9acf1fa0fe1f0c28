r"""The losses from hidden states: the logits never exist as a whole.

    z = logit_scale * (hidden @ weight.T + bias)         u, losses: as in `ops.divergence`

Tokens go through in chunks: one GEMM makes the logits of a chunk for student and teacher (stacked,
where they share the head), the from-logits kernel turns the student's half into the gradient, and
two more GEMMs carry it to the hidden states and the head. That is 4 GEMMs of N x V x D per step
(student, teacher, dHidden, dWeight) in every mode, 3 with a frozen head, 2 without gradients; the
backward pass only scales what the forward pass formed. ``logit_scale`` is folded into temperature
and softcap, so it costs nothing: ``softcap' = softcap / scale``, ``temperature' = temperature / scale``.

Logit tiles are float32 whatever the operands: with the teacher close to the student, bfloat16
logits put 7% to 10% error into the gradients. The gradient tile has the operands' dtype, and the
head's gradient accumulates in float32 over the chunks.

Chunk size (``chunk_size=None``): the largest multiple of 64 with chunk * V <= 2^26 elements on a GPU
(2^24 on a CPU), at least 1024 (256), then evened out over the chunks. The least is what dWeight needs:
it moves 8 V D bytes (its float32 sum, read and written) for 2 chunk V D operations, so below about
1000 tokens memory limits it on an H100, whatever V and D are; a CPU's GEMMs only slow down below 256.
Peak extra memory: two float32 tiles of chunk * V, one gradient tile, and the gradients. On a CPU the
logit tiles of the last call, up to 512 MiB, stay allocated for the next one (`release_tiles` frees
them); during a training step the peak is the loss, so that is rarely more memory than before.
"""

# Calls with unpacked lists: pyright cannot count their arguments.
# pyright: reportCallIssue=false
from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastsdpo.ops._backend import implementation, resolve_backend
from fastsdpo.ops._checks import (
    FLOAT_DTYPES,
    accumulation_dtype,
    check_like,
    check_softcap,
    check_temperature,
    check_tensor,
    flat_ids,
    shape_text,
)
from fastsdpo.ops._library import (
    _check_distinct,
    _check_ids,
    _forbid_second_derivative,
    _is_real,
    _raise_second_derivative,
    _weighted_sum,
)
from fastsdpo.ops._memory import borrow_tiles, return_tiles
from fastsdpo.ops._memory import release_tiles as release_tiles
from fastsdpo.ops.divergence import (
    LossOptions,
    SDPOLossOutput,
    TokenInputs,
    check_loss,
    loss_output,
    student_support,
)


def default_chunk_size(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk: bounded memory, GEMMs large enough to run at full rate (see the module)."""
    budget, least = (2**24, 256) if device.type == "cpu" else (2**26, 1024)
    chunk = max(least, budget // vocabulary // 64 * 64)
    if tokens <= chunk:
        return max(1, tokens)
    chunks = math.ceil(tokens / chunk)
    return min(chunk, math.ceil(tokens / chunks / 8) * 8)


def _has_mixed_gemm(device: torch.device) -> bool:
    """Whether GEMMs of half-precision operands can give float32 (``out_dtype``, CUDA, torch 2.8)."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return device.type in ("cuda", "meta") and version >= (2, 8)


class _Head:
    """``x @ weight.T + bias`` into float32 tiles, and the two products of its backward pass.

    Where the device has GEMMs with float32 results, the operands keep their dtype. Elsewhere
    half-precision weights are widened a block of the vocabulary at a time (on a CPU without matrix
    units a bfloat16 GEMM takes many times longer than a float32 one).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, operand: torch.dtype):
        self.weight = weight
        self.bias = bias
        self.operand = operand
        self.block = max(1, weight.shape[0])
        if weight.dtype != operand:
            if _has_mixed_gemm(weight.device):
                self.weight = weight.to(operand)  # autocast: once per call, as autocast does
            else:
                self.block = max(256, 2**22 // max(1, weight.shape[1]))

    def _blocks(self):
        """Slices of the vocabulary with their weights in the operands' dtype."""
        for start in range(0, self.weight.shape[0], self.block):
            rows = slice(start, min(start + self.block, self.weight.shape[0]))
            yield rows, self.weight[rows].to(self.operand)

    def logits(self, x: Tensor, out: Tensor) -> None:
        for rows, weight in self._blocks():
            if out.dtype == x.dtype:
                torch.mm(x, weight.t(), out=out[:, rows])
            else:
                torch.mm(x, weight.t(), out_dtype=out.dtype, out=out[:, rows])
        if self.bias is not None:
            out.add_(self.bias)

    def hidden_gradient(self, grad: Tensor, out: Tensor) -> None:
        if self.block == self.weight.shape[0] and grad.dtype == out.dtype == self.weight.dtype:
            torch.mm(grad, self.weight, out=out)
            return
        total = grad.new_zeros(out.shape)
        for rows, weight in self._blocks():
            total.addmm_(grad[:, rows], weight)
        out.copy_(total)

    @staticmethod
    def accumulate(grad: Tensor, x: Tensor, total: Tensor, first: bool) -> None:
        """``total += grad.T @ x``, ``total`` in the accumulation dtype; ``=`` for the first chunk.

        So ``total`` need not hold zeros: beta = 0 reads nothing of it.
        """
        beta = 0.0 if first else 1.0
        if grad.dtype == total.dtype:
            total.addmm_(grad.t(), x, beta=beta)
        else:
            torch.addmm(total, grad.t(), x, beta=beta, out_dtype=total.dtype, out=total)


def _dtypes(hidden: Tensor, weight: Tensor, tile: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """``(operand, tile, accumulation)`` dtypes of one call."""
    accumulation = accumulation_dtype(hidden, weight)
    if accumulation == torch.float64 or not _has_mixed_gemm(hidden.device):
        return accumulation, accumulation, accumulation
    if torch.is_autocast_enabled(hidden.device.type):
        operand = torch.get_autocast_dtype(hidden.device.type)
    else:
        operand = weight.dtype
    return operand, tile or accumulation, accumulation


def _gradient_scale(weights: Tensor, operand: torch.dtype) -> Tensor | None:
    """A power of two that brings the largest weight near 1: 1/N would underflow in float16."""
    if operand != torch.float16 or weights.numel() == 0:
        return None
    largest = weights.abs().max().clamp(min=1e-30)
    return torch.exp2(-largest.log2().ceil())


def _new_head_gradient(weight: Tensor, accumulation: torch.dtype, tokens: int) -> Tensor:
    """Uninitialized where a first chunk will write it."""
    make = torch.empty if tokens else torch.zeros
    return make(weight.shape, dtype=accumulation, device=weight.device)


def _stored_dtype(source: Tensor) -> torch.dtype:
    """dtype in which a finished gradient waits for backward.

    A float16 one would underflow before the caller's loss scale reaches it, so it waits in float32.
    """
    return torch.float32 if source.dtype == torch.float16 else source.dtype


@custom_op("fastsdpo::linear_sdpo", mutates_args=())
def linear_sdpo_op(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor,
    weights: Tensor,
    old_logps: Tensor | None,
    teacher_logps: Tensor | None,
    topk_ids: Tensor | None,
    topk_logps: Tensor | None,
    mode: str,
    alpha: float,
    topk: int,
    add_tail: bool,
    is_clip: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
    chunk_size: int,
    operand: torch.dtype,
    tile: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, vocabulary = student_hidden.shape[0], weight.shape[0]
    _check_ids(target_ids, vocabulary, "linear_sdpo_loss: target_ids", ignore_index)
    if topk_ids is not None:
        _check_ids(topk_ids, vocabulary, "linear_sdpo_loss: teacher_topk ids", None)
        _check_distinct(topk_ids)
    kernels = implementation("divergence", backend)
    accumulation = weights.dtype
    head = _Head(weight, bias, operand)
    shared = teacher_weight is None
    teacher_head = head if teacher_weight is None else _Head(teacher_weight, teacher_bias, operand)
    need_grad = need_hidden or need_weight or need_bias
    scale = _gradient_scale(weights, operand) if need_grad else None
    if scale is not None:
        weights = weights * scale

    per_token, coef, student_logps, teacher_out = (weights.new_zeros(tokens) for _ in range(4))
    grad_hidden = weights.new_empty(0)
    if need_hidden:
        shape, stored = student_hidden.shape, _stored_dtype(student_hidden)
        grad_hidden = student_hidden.new_empty(shape, dtype=stored)
    grad_weight = weights.new_empty(0)
    if need_weight:
        grad_weight = _new_head_gradient(weight, accumulation, tokens)
    grad_bias = weights.new_zeros(vocabulary if need_bias else 0)

    has_teacher = teacher_hidden is not None
    largest = min(chunk_size, tokens)
    tiles = borrow_tiles(student_hidden, (2 if has_teacher else 1) * largest, vocabulary, tile)
    grad_tile = None
    if need_grad and tile != operand:
        grad_tile = student_hidden.new_empty(largest, vocabulary, dtype=operand)

    for start in range(0, tokens, max(1, chunk_size)):
        rows = slice(start, min(start + chunk_size, tokens))
        n = rows.stop - start
        x = student_hidden[rows].to(operand)
        student, teacher = tiles[:n], None
        if has_teacher:
            teacher = tiles[n : 2 * n]
            x_teacher = teacher_hidden[rows].to(operand)
            if shared:
                head.logits(torch.cat([x, x_teacher]), tiles[: 2 * n])
            else:
                head.logits(x, student)
                teacher_head.logits(x_teacher, teacher)
            teacher = teacher.unsqueeze(0)
        else:
            head.logits(x, student)
        grad = student if grad_tile is None else grad_tile[:n]
        student = student.unsqueeze(0)

        ids, w = target_ids[rows], weights[rows]
        old = None if old_logps is None else old_logps[rows]
        tail: tuple = (temperature, softcap, ignore_index)
        if need_grad:
            tail += (grad.unsqueeze(0),)
        if mode == "sampled_token":
            given = None if teacher_logps is None else teacher_logps[rows]
            run = kernels.sampled_token_fused if need_grad else kernels.sampled_token_forward
            out = run(student, teacher, given, ids, w, old, is_clip, *tail)
        elif mode == "full":
            run = kernels.divergence_fused if need_grad else kernels.divergence_forward
            out = run(student, teacher, ids, w, old, is_clip, alpha, *tail)
        else:
            given = None if topk_logps is None else topk_logps[rows]
            if topk_ids is None:
                support = student_support(student, topk, ids, ignore_index, backend)
            else:
                support = topk_ids[rows]
            run = kernels.topk_fused if need_grad else kernels.topk_forward
            out = run(
                student, teacher, support, given, ids, w, old, is_clip, alpha, add_tail, *tail
            )
        per_token[rows], coef[rows], student_logps[rows], teacher_out[rows] = out[:4]

        if need_hidden:
            head.hidden_gradient(grad, grad_hidden[rows])
        if need_weight:
            head.accumulate(grad, x, grad_weight, first=start == 0)
        if need_bias:
            grad_bias += grad.sum(0, dtype=accumulation)
    return_tiles(tiles)

    if scale is not None:
        coef = coef / scale
        grad_hidden, grad_weight, grad_bias = (
            g.div_(scale) for g in (grad_hidden, grad_weight, grad_bias)
        )
    if need_weight:
        grad_weight = grad_weight.to(_stored_dtype(weight))
    if need_bias and bias is not None:
        grad_bias = grad_bias.to(_stored_dtype(bias))
    loss = _weighted_sum(coef, per_token)
    return loss, per_token, student_logps, teacher_out, grad_hidden, grad_weight, grad_bias


@linear_sdpo_op.register_fake
def _(student_hidden, teacher_hidden, weight, bias, *rest):
    weights, (need_hidden, need_weight, need_bias) = rest[3], rest[-4:-1]
    per_token, student, teacher = (torch.empty_like(weights) for _ in range(3))
    none = weights.new_empty(0)
    return (
        weights.new_empty(()), per_token, student, teacher,
        student_hidden.new_empty(student_hidden.shape, dtype=_stored_dtype(student_hidden))
        if need_hidden else none,
        weight.new_empty(weight.shape, dtype=_stored_dtype(weight))
        if need_weight else none.clone(),
        bias.new_empty(bias.shape, dtype=_stored_dtype(bias)) if need_bias else none.clone(),
    )  # fmt: skip


def _linear_sdpo_setup(ctx, inputs, output):
    ctx.needs = inputs[23:26]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:], inputs[0], inputs[2], inputs[3])


class _FirstDerivative(torch.autograd.Function):
    """Identity on a finished gradient that depends on ``source``; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, source: Tensor) -> Tensor:
        return grad.view_as(grad)

    backward = staticmethod(_raise_second_derivative)


def _scaled(grad: Tensor, grad_loss: Tensor, source: Tensor) -> Tensor:
    """The gradient formed in forward times the upstream one, in its own storage where that is safe.

    In place it moves V x D elements once and allocates nothing; a second backward then finds the
    saved tensor changed and raises.
    """
    if torch.is_grad_enabled():
        scaled = (grad * grad_loss.to(grad.dtype)).to(source.dtype)
        return _FirstDerivative.apply(scaled, source)
    if not _is_real(grad):
        return (grad * grad_loss.to(grad.dtype)).to(source.dtype)
    if grad_loss.device.type == "cpu" and grad_loss == 1:
        grad[:0].mul_(1)  # marks the saved tensor as changed, which is what the refusal rests on
        return grad.to(source.dtype)
    return grad.mul_(grad_loss).to(source.dtype)


def _linear_sdpo_backward(ctx, grad_loss, *unused):
    grads: list[Tensor | None] = [None] * 27
    if grad_loss is None:
        return tuple(grads)
    saved = ctx.saved_tensors
    for slot, needed, grad, source in zip((0, 2, 3), ctx.needs, saved[:3], saved[3:]):
        if needed and ctx.needs_input_grad[slot]:
            grads[slot] = _scaled(grad, grad_loss, source)
    return tuple(grads)


linear_sdpo_op.register_autograd(_linear_sdpo_backward, setup_context=_linear_sdpo_setup)


@custom_op("fastsdpo::linear_token_logps", mutates_args=())
def linear_token_logps_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
    chunk_size: int,
    operand: torch.dtype,
    tile: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    _check_ids(target_ids, vocabulary, "linear_token_logps: target_ids", ignore_index)
    kernels = implementation("token_logps", backend)
    head = _Head(weight, bias, operand)
    result = hidden.new_zeros(4, tokens, dtype=accumulation_dtype(hidden, weight))
    tiles = borrow_tiles(hidden, min(chunk_size, tokens), vocabulary, tile)
    for start in range(0, tokens, max(1, chunk_size)):
        rows = slice(start, min(start + chunk_size, tokens))
        logits = tiles[: rows.stop - start]
        head.logits(hidden[rows].to(operand), logits)
        out = kernels.token_logps_forward(
            logits.unsqueeze(0), target_ids[rows], temperature, softcap, ignore_index,
            return_entropy,
        )  # fmt: skip
        for row, values in zip(result, out):
            if values.numel():
                row[rows] = values
    return_tiles(tiles)
    logps, entropy, row_max, row_log2sum = (row.clone() for row in result)
    return logps, entropy if return_entropy else entropy.new_empty(0), row_max, row_log2sum


@linear_token_logps_op.register_fake
def _(hidden, weight, bias, target_ids, temperature, softcap, ignore, return_entropy, *rest):
    row = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden, weight))
    entropy = torch.empty_like(row) if return_entropy else row.new_empty(0)
    return row, entropy, torch.empty_like(row), torch.empty_like(row)


@custom_op("fastsdpo::linear_token_logps_backward", mutates_args=())
def linear_token_logps_backward_op(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    row_max: Tensor,
    row_log2sum: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    chunk_size: int,
    operand: torch.dtype,
    tile: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    kernels = implementation("token_logps", backend)
    head = _Head(weight, bias, operand)
    accumulation = grad_logps.dtype
    scale = _gradient_scale(grad_logps, operand)
    if scale is not None:
        grad_logps = grad_logps * scale
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    grad_weight = grad_logps.new_empty(0)
    if need_weight:
        grad_weight = _new_head_gradient(weight, accumulation, tokens)
    grad_bias = grad_logps.new_zeros(vocabulary if need_bias else 0)
    largest = min(chunk_size, tokens)
    tiles = borrow_tiles(hidden, largest, vocabulary, tile)
    grad_tile = None
    if tile != operand:
        grad_tile = hidden.new_empty(largest, vocabulary, dtype=operand)
    for start in range(0, tokens, max(1, chunk_size)):
        rows = slice(start, min(start + chunk_size, tokens))
        n = rows.stop - start
        x, logits = hidden[rows].to(operand), tiles[:n]
        head.logits(x, logits)
        grad = logits if grad_tile is None else grad_tile[:n]
        kernels.token_logps_backward(
            grad_logps[rows].contiguous(), logits.unsqueeze(0), target_ids[rows], row_max[rows],
            row_log2sum[rows], temperature, softcap, ignore_index, grad.unsqueeze(0),
        )  # fmt: skip
        if need_hidden:
            head.hidden_gradient(grad, grad_hidden[rows])
        if need_weight:
            head.accumulate(grad, x, grad_weight, first=start == 0)
        if need_bias:
            grad_bias += grad.sum(0, dtype=accumulation)
    return_tiles(tiles)
    if scale is not None:
        for grad in (grad_hidden, grad_weight, grad_bias):
            grad.div_(scale)
    if need_weight:
        grad_weight = grad_weight.to(weight.dtype)
    if need_bias and bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias


@linear_token_logps_backward_op.register_fake
def _(grad_logps, hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-4:-1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if need_weight
        else grad_logps.new_empty(0),
        torch.empty_like(bias) if need_bias else grad_logps.new_empty(0),
    )


_forbid_second_derivative(linear_token_logps_backward_op)


def _linear_token_logps_setup(ctx, inputs, output):
    hidden, weight, bias, target_ids, *options, ctx.backend = inputs
    temperature, softcap, ignore_index, _, chunk_size, operand, tile = options
    ctx.options = (temperature, softcap, ignore_index, chunk_size, operand, tile)
    _, entropy, row_max, row_log2sum = output
    ctx.mark_non_differentiable(entropy, row_max, row_log2sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target_ids, row_max, row_log2sum)


def _linear_token_logps_backward(ctx, grad_logps, *unused):
    needs = ctx.needs_input_grad[:3]
    if grad_logps is None or not any(needs):
        return (None,) * 12
    found = linear_token_logps_backward_op(
        grad_logps, *ctx.saved_tensors, *ctx.options, *needs, ctx.backend
    )
    return *(grad if need else None for grad, need in zip(found, needs)), *((None,) * 9)


linear_token_logps_op.register_autograd(
    _linear_token_logps_backward, setup_context=_linear_token_logps_setup
)


def _gathered(tensor: Tensor | None) -> Tensor | None:
    """A sharded (DTensor) head as a whole tensor; its gradient is averaged over the mesh.

    That is what FSDP2 does with the gradients of a module's own parameters.
    """
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    if isinstance(tensor, DTensor):
        return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
    return tensor


def _check_head(
    name: str, argument: str, hidden: Tensor, weight: Any, bias: Any
) -> tuple[Tensor, Tensor | None]:
    weight = check_tensor(name, argument, weight)
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: {argument} must be floating, got {weight.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        remedy = ""
        if weight.numel() == 0:
            remedy = "; an empty head is partitioned by DeepSpeed ZeRO-3: gather it first"
        raise ValueError(
            f"{name}: {argument} must have shape (V, D) with D = {hidden.shape[-1]}, "
            f"got {shape_text(weight.shape)}{remedy}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{name}: {argument} must be on {hidden.device}, got {weight.device}")
    if bias is not None:
        bias_name = argument.replace("weight", "bias")
        bias = check_like(name, bias_name, bias, (weight.shape[0],), hidden.device)
    return weight, bias


def _check_hidden(name: str, argument: str, hidden: Any) -> Tensor:
    hidden = check_tensor(name, argument, hidden)
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: {argument} must be floating, got {hidden.dtype}")
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(
            f"{name}: {argument} must have shape (..., D), got {shape_text(hidden.shape)}"
        )
    return hidden


def _check_chunk(name: str, chunk_size: int | None, tokens: int, head: Tensor) -> int:
    if chunk_size is None:
        return default_chunk_size(tokens, head.shape[0], head.device)
    if isinstance(chunk_size, bool) or int(chunk_size) != chunk_size or chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be a positive integer or None, got {chunk_size}")
    return int(chunk_size)


def _check_scale(name: str, logit_scale: float) -> float:
    if not math.isfinite(logit_scale) or logit_scale <= 0:
        raise ValueError(f"{name}: logit_scale must be > 0 and finite, got {logit_scale}")
    return float(logit_scale)


def _check_tile(name: str, tile_dtype: torch.dtype | None, device: torch.device) -> None:
    if tile_dtype not in (None, torch.float32) and not _has_mixed_gemm(device):
        raise ValueError(
            f"{name}: tile_dtype must be None or torch.float32 on {device.type} with torch "
            f"{torch.__version__}, got {tile_dtype}"
        )
    if tile_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: tile_dtype must be None, torch.float32, torch.bfloat16 or torch.float16, "
            f"got {tile_dtype}"
        )


def _flat_hidden(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    tile_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token from hidden states, without storing the logits.

        z = logit_scale * (hidden @ weight.T + bias);  then as `token_logps`

    Args:
        hidden: ``(..., D)`` floating.
        weight: ``(V, D)`` the head; a DTensor is gathered.
        target_ids: ``(...)`` integer in [0, V), or ``ignore_index`` (0 and no gradient).
        bias: ``(V,)`` or None.
        temperature, softcap, return_entropy, backend: as `token_logps`.
        logit_scale: multiplies the head's output before the softcap; > 0.
        chunk_size: tokens per tile; None chooses (formula in the module docstring).
        tile_dtype: dtype of the logit tiles on a GPU; None is float32. bfloat16 tiles halve the
            tile's memory and put 7% to 10% error into gradients where two policies are close.

    Returns:
        ``(...)`` float32 (float64 for float64 inputs), differentiable in ``hidden``, ``weight``
        and ``bias``; with ``return_entropy`` the pair ``(logps, entropy)``, in nats.

    Raises:
        ValueError, TypeError, ImportError: as `token_logps`, by argument.

    Memory: one float32 tile of chunk_size * V (and a gradient tile in the operands' dtype where
        that is not float32) beyond the gradients; backward recomputes the logits: 1 GEMM forward,
        3 backward. On a CPU the tile stays allocated for the next call, up to 512 MiB
        (`fastsdpo.ops.linear.release_tiles` frees it).
    """
    name = "linear_token_logps"
    hidden = _check_hidden(name, "hidden", hidden)
    weight, bias = _gathered(weight), _gathered(bias)
    weight, bias = _check_head(name, "weight", hidden, weight, bias)
    shape = hidden.shape[:-1]
    target_ids = check_like(name, "target_ids", target_ids, shape, hidden.device, integer=True)
    scale = _check_scale(name, logit_scale)
    temperature = check_temperature(name, temperature) / scale
    cap = check_softcap(name, softcap) / scale
    _check_tile(name, tile_dtype, hidden.device)
    rows = _flat_hidden(hidden)
    chunk = _check_chunk(name, chunk_size, rows.shape[0], weight)
    operand, tile, _ = _dtypes(hidden, weight, tile_dtype)
    probe = weight.new_empty(0, dtype=tile)
    backend = resolve_backend(name, backend, probe)
    logps, entropy, _, _ = linear_token_logps_op(
        rows, weight, bias, flat_ids(target_ids), temperature, cap, ignore_index, return_entropy,
        chunk, operand, tile, backend,
    )  # fmt: skip
    logps = logps.view(shape)
    return (logps, entropy.detach().view(shape)) if return_entropy else logps


def linear_sdpo_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
        logit_scale: multiplies both heads' outputs before the softcap; > 0.
        chunk_size: tokens per tile; None chooses (formula in the module docstring).
        tile_dtype: dtype of the logit tiles on a GPU; None is float32. bfloat16 tiles halve the
            tiles' memory and put 7% to 10% error into the gradients when teacher and student are
            close, against 0.15% from float32 tiles.
        inplace_grad: accepted for symmetry with `sdpo_loss`; tiles are always overwritten.
        vocab_group: process group of a vocabulary-parallel head. ``weight`` and ``bias`` (and the
            teacher's) are then this process's rows, V / P each, in rank order; ids are global and
            hidden states the same on every process. Runs in eager PyTorch
            (`fastsdpo.ops.vocab_parallel`), so ``backend`` must be "auto" or "reference".
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
    student = _check_hidden(name, "student_hidden", student_hidden)
    weight, bias = _gathered(weight), _gathered(bias)
    weight, bias = _check_head(name, "weight", student, weight, bias)
    teacher_weight, teacher_bias = _gathered(teacher_weight), _gathered(teacher_bias)
    teacher_rows = None
    if teacher_hidden is not None:
        teacher = _check_hidden(name, "teacher_hidden", teacher_hidden).detach()
        if teacher.shape[:-1] != student.shape[:-1] or teacher.device != student.device:
            raise ValueError(
                f"{name}: teacher_hidden must match student_hidden "
                f"{shape_text(student.shape)} on {student.device} up to D, "
                f"got {shape_text(teacher.shape)} on {teacher.device}"
            )
        if teacher_weight is not None:
            teacher_weight, teacher_bias = _check_head(
                name, "teacher_weight", teacher, teacher_weight, teacher_bias
            )
            assert teacher_weight is not None
            if teacher_weight.shape[0] != weight.shape[0]:
                raise ValueError(
                    f"{name}: teacher_weight must have V = {weight.shape[0]} rows, "
                    f"got {teacher_weight.shape[0]}"
                )
        elif teacher.shape[-1] != student.shape[-1]:
            raise ValueError(
                f"{name}: teacher_hidden must have D = {student.shape[-1]} "
                f"without a teacher_weight, got {teacher.shape[-1]}"
            )
        teacher_rows = _flat_hidden(teacher)
    elif teacher_weight is not None:
        raise ValueError(f"{name}: teacher_weight must come with teacher_hidden, got none")
    if teacher_bias is not None and teacher_weight is None:
        raise ValueError(f"{name}: teacher_bias must come with teacher_weight, got none")

    shape = student.shape[:-1]
    operand, tile, accumulation = _dtypes(student, weight, tile_dtype)
    vocabulary = weight.shape[0]
    if vocab_group is not None:
        vocabulary *= torch.distributed.get_world_size(vocab_group)
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"{name}: backend must be 'auto' or 'reference' with vocab_group, got {backend!r}"
            )
    options, tokens = check_loss(
        name, shape, vocabulary, student.device, accumulation, target_ids,
        teacher="teacher_hidden", has_teacher=teacher_rows is not None, mode=mode, alpha=alpha,
        topk=topk, add_tail=add_tail, weights=weights, teacher_logps=teacher_logps,
        teacher_topk=teacher_topk, old_logps=old_logps, is_clip=is_clip, temperature=temperature,
        softcap=softcap, ignore_index=ignore_index,
    )  # fmt: skip
    scale = _check_scale(name, logit_scale)
    _check_tile(name, tile_dtype, student.device)
    rows = _flat_hidden(student)
    chunk = _check_chunk(name, chunk_size, rows.shape[0], weight)
    if vocab_group is not None:
        from fastsdpo.ops.vocab_parallel import vocab_parallel_loss

        options = replace(
            options, temperature=options.temperature / scale, softcap=options.softcap / scale
        )
        return vocab_parallel_loss(
            rows, teacher_rows, weight, bias, teacher_weight, teacher_bias, options, tokens, chunk,
            vocab_group, shape,
        )  # fmt: skip
    backend = resolve_backend(name, backend, weight.new_empty(0, dtype=tile))
    return _run_linear(
        rows, teacher_rows, weight, bias, teacher_weight, teacher_bias, options, tokens, scale,
        chunk, operand, tile, backend, shape,
    )  # fmt: skip


def _run_linear(
    rows: Tensor,
    teacher_rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    options: LossOptions,
    tokens: TokenInputs,
    scale: float,
    chunk: int,
    operand: torch.dtype,
    tile: torch.dtype,
    backend: str,
    shape: torch.Size,
) -> SDPOLossOutput:
    grad_enabled = torch.is_grad_enabled()
    needs = [
        grad_enabled and tensor is not None and tensor.requires_grad
        for tensor in (rows, weight, bias)
    ]
    detach = [None if t is None else t.detach() for t in (teacher_weight, teacher_bias)]
    loss, per_token, student_logps, teacher_logps, *_ = linear_sdpo_op(
        rows, teacher_rows, weight, bias, *detach, tokens.target_ids, tokens.weights,
        tokens.old_logps, tokens.teacher_logps, tokens.topk_ids, tokens.topk_logps, options.mode,
        options.alpha, options.topk, options.add_tail, options.is_clip or 0.0,
        options.temperature / scale, options.softcap / scale, options.ignore_index, chunk, operand,
        tile, *needs, backend,
    )  # fmt: skip
    return loss_output(loss, per_token, student_logps, teacher_logps, shape)
