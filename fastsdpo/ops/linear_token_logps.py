"""Log-probs of target tokens from hidden states, a chunk of logits at a time (`ops.head`).

The backward pass computes the logits of each chunk again: 1 GEMM forward, 3 backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from fastsdpo.ops import rows, token_terms
from fastsdpo.ops._operators import forbid_second_derivative
from fastsdpo.ops.backend import resolve_backend
from fastsdpo.ops.checks import (
    accumulation_dtype,
    check_ids,
    check_like,
    check_logits,
    check_softcap,
    check_temperature,
    flat_ids,
)
from fastsdpo.ops.head import (
    ChunkPlan,
    HeadGemms,
    choose_dtypes,
    fake_gradients,
    gradient_scale,
    needed,
    present,
    through_head,
    unscaled,
)
from fastsdpo.ops.linear_checks import (
    check_chunk,
    check_head_tensors,
    check_scale,
    check_tile,
    flat_hidden,
    gathered,
)
from fastsdpo.ops.rows import LossOptions


@custom_op("fastsdpo::linear_token_logps", mutates_args=())
def linear_token_logps_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    entropy: bool,
    chunk_size: int,
    dtypes: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows.TokenResults` of all tokens."""
    options, plan = LossOptions.unpacked(mode, floats, integers), ChunkPlan.unpacked(chunk_size, dtypes)
    check_ids(target_ids, len(weight), "linear_token_logps: target_ids", options.ignore_index)
    dtype, n = accumulation_dtype(hidden, weight), len(hidden)
    out = rows.TokenResults(*(hidden.new_zeros(shape, dtype=dtype) for shape in (n, n if entropy else 0, (n, 2))))

    def tile_loss(logits: Tensor, teacher: Tensor | None, which: slice, grad: Tensor | None):
        found = rows.token_forward(logits.unsqueeze(0), target_ids[which], options, backend, entropy)
        for whole, part in zip(out, found):
            if whole.numel():
                whole[which] = part

    through_head(hidden, HeadGemms(weight, bias, plan.operand), tile_loss, plan)
    return tuple(out)


@linear_token_logps_op.register_fake
def _(hidden, weight, bias, target_ids, mode, floats, integers, entropy, *args):
    n, dtype = hidden.shape[0], accumulation_dtype(hidden, weight)
    return tuple(hidden.new_empty(s, dtype=dtype) for s in (n, n if entropy else 0, (n, 2)))


@custom_op("fastsdpo::linear_token_logps_backward", mutates_args=())
def linear_token_logps_backward_op(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Sequence[Tensor],
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    chunk_size: int,
    dtypes: str,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; computes the logits of each chunk again.

    ``saved`` holds the targets and the statistics of forward.
    """
    target_ids, stats = saved
    options, plan = LossOptions.unpacked(mode, floats, integers), ChunkPlan.unpacked(chunk_size, dtypes)
    scale = gradient_scale(upstream, plan.operand)
    slopes = (upstream if scale is None else upstream * scale).contiguous()

    def tile_loss(logits: Tensor, teacher: Tensor | None, which: slice, grad: Tensor | None):
        assert grad is not None
        given = slopes[which], stats[which], logits.unsqueeze(0), target_ids[which], options, backend
        rows.token_backward(*given, grad.unsqueeze(0))

    head = HeadGemms(weight, bias, plan.operand)
    grads = through_head(hidden, head, tile_loss, plan, needed(needs))
    return unscaled(grads, scale, (hidden, weight, bias), upstream)


@linear_token_logps_backward_op.register_fake
def _(upstream, hidden, weight, bias, *args):
    return fake_gradients(args[-2], (hidden, weight, bias), upstream)


forbid_second_derivative(linear_token_logps_backward_op)


def _linear_token_logps_setup(ctx, inputs, output):
    hidden, weight, bias, target_ids = inputs[:4]
    ctx.options, ctx.plan, ctx.backend = inputs[4:7], inputs[8:10], inputs[10]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target_ids, output[2])


def _linear_token_logps_backward(ctx, upstream, *unused):
    needs = ctx.needs_input_grad[:3]
    if upstream is None or not any(needs):
        return (None,) * 11
    hidden, weight, bias, ids, stats = ctx.saved_tensors
    (mode, floats, integers), (chunk_size, dtypes) = ctx.options, ctx.plan
    found = linear_token_logps_backward_op(
        upstream,
        hidden,
        weight,
        bias,
        [ids, stats],
        mode,
        floats,
        integers,
        chunk_size,
        dtypes,
        list(needs),
        ctx.backend,
    )
    return *present(needs, found), *(None,) * 8


linear_token_logps_op.register_autograd(_linear_token_logps_backward, setup_context=_linear_token_logps_setup)


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
    entropy_grad: bool = False,
    extra_ids: Tensor | None = None,
    chunk_size: int | None = None,
    tile_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each target token from hidden states, without storing the logits.

        z = logit_scale * (hidden @ weight.T + bias);  then as `token_logps`

    Args:
        hidden: ``(..., D)`` floating.
        weight: ``(V, D)`` the head; a DTensor is gathered.
        target_ids: ``(...)`` integer in [0, V), or ``ignore_index`` (0 and no gradient).
        bias: ``(V,)`` or None.
        temperature, softcap, return_entropy, entropy_grad, extra_ids, backend: as `token_logps`.
        logit_scale: multiplies the head's output before the softcap; > 0.
        chunk_size: tokens per tile; None chooses (`ops.head.default_chunk_size`).
        tile_dtype: dtype of the logit tiles on a GPU; None is float32. bfloat16 tiles halve the
            tile's memory and put 7% to 10% error into gradients where two policies are close.

    Returns:
        ``(...)`` float32 (float64 for float64 inputs), differentiable in ``hidden``, ``weight``
        and ``bias``; with ``return_entropy`` and ``extra_ids`` a tuple as of `token_logps`.

    Raises:
        ValueError, TypeError, ImportError: as `token_logps`, by argument.

    Memory: one float32 tile of chunk_size * V (and a gradient tile in the operands' dtype where
        that is not float32) beyond the gradients; backward recomputes the logits: 1 GEMM forward,
        3 backward. On a CPU the tile stays allocated for the next call, up to 512 MiB
        (`fastsdpo.ops.linear.release_tiles` frees it).
    """
    name = "linear_token_logps"
    hidden = check_logits(name, "hidden", hidden, "D")
    weight, bias = gathered(weight), gathered(bias)
    weight, bias = check_head_tensors(name, "weight", hidden, weight, bias)
    shape = hidden.shape[:-1]
    target_ids = check_like(name, "target_ids", target_ids, shape, hidden.device, integer=True)
    scale = check_scale(name, logit_scale)
    temperature = check_temperature(name, temperature) / scale
    cap = check_softcap(name, softcap) / scale
    check_tile(name, tile_dtype, hidden.device)
    flat = flat_hidden(hidden)
    chunk = check_chunk(name, chunk_size, flat.shape[0], weight)
    operand, tile = choose_dtypes(hidden, weight, tile_dtype)
    backend = resolve_backend(name, backend, weight.new_empty(0, dtype=tile))
    options = LossOptions(temperature, cap, ignore_index).packed()
    rest = *options, return_entropy, *ChunkPlan(chunk, operand, tile).packed(), backend
    if entropy_grad or extra_ids is not None:
        extra = token_terms.check_extra_ids(name, extra_ids, target_ids, entropy_grad, return_entropy)
        ids = [flat_ids(target_ids), extra]
        logps, entropy, *_ = token_terms.linear_token_terms_op(flat, weight, bias, ids, *rest)
        entropy = (entropy if entropy_grad else entropy.detach()) if return_entropy else None
        return token_terms.results(logps, entropy, target_ids, extra, ignore_index)
    logps, entropy, _ = linear_token_logps_op(flat, weight, bias, flat_ids(target_ids), *rest)
    logps = logps.view(shape)
    return (logps, entropy.detach().view(shape)) if return_entropy else logps
