r"""Log-probs of several tokens of a row, and an entropy with a gradient: `token_logps` with more results.

    logps[n, j] = u[n, ids[n, j]] - logsumexp_v u[n, v]          entropy[n] = -sum_v p log p
    gradient in u_v of sum_j g_j logps_j:    sum over j with ids_j = v of g_j  -  p_v sum_j g_j
    gradient in u_v of the entropy:          -p_v (log p_v + entropy)

No kernel is new. The first gradient is that of a top-k loss whose tail is the whole row (as in `ops.bounded_tail`).
The second is that of the reverse KL to a uniform teacher, KL(p || 1/V) = log V - entropy; the teacher is one row of
V zeros. Where both are asked for they are added a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from fastsdpo.ops import rows
from fastsdpo.ops._operators import empty_gradient, forbid_second_derivative
from fastsdpo.ops.bounded_tail import support_logps
from fastsdpo.ops.checks import accumulation_dtype, check_ids, check_like, check_tensor
from fastsdpo.ops.head import (
    ChunkPlan,
    HeadGemms,
    fake_gradients,
    gradient_scale,
    needed,
    present,
    through_head,
    unscaled,
)
from fastsdpo.ops.reference import weighted
from fastsdpo.ops.rows import STATISTICS, LossOptions, RowCall, RowResults, Tokens


class Terms(NamedTuple):
    """Results of rows, saved for backward.

    Attributes:
        logps: ``[N, 1 + K]`` of ``ids``.
        entropy: ``[N]``, or ``[0]`` where none was asked for.
        stats: ``[N, 2]``, as of `rows.TokenResults`.
        ids: ``[N, 1 + K]``, the target first (0 where it is ignored); it also stands for ids that do not count.
    """

    logps: Tensor
    entropy: Tensor
    stats: Tensor
    ids: Tensor


def check_extra_ids(name: str, extra_ids: Any, target_ids: Tensor, entropy_grad: bool, return_entropy: bool) -> Tensor:
    """``[N, K]`` int64; K = 0 for None."""
    if entropy_grad and not return_entropy:
        raise ValueError(f"{name}: entropy_grad must come with return_entropy=True, got return_entropy=False")
    if extra_ids is None:
        return target_ids.new_zeros(target_ids.numel(), 0, dtype=torch.int64)
    extra_ids = check_tensor(name, "extra_ids", extra_ids)
    k = extra_ids.shape[-1] if extra_ids.ndim else 0
    extra_ids = check_like(name, "extra_ids", extra_ids, (*target_ids.shape, k), target_ids.device, integer=True)
    return extra_ids.reshape(-1, k).to(torch.int64).contiguous()


def results(
    logps: Tensor, entropy: Tensor | None, target_ids: Tensor, extra_ids: Tensor, ignore_index: int
) -> Tensor | tuple[Tensor, ...]:
    """Log-probs of the targets ``(...)``; with an entropy also that, and with K > 0 log-probs ``(..., K)``."""
    shape = target_ids.shape
    out = [logps[:, 0].reshape(shape)]
    if entropy is not None:
        out.append(entropy.reshape(shape))
    if extra_ids.shape[1]:
        counts = (extra_ids != ignore_index) & (target_ids.reshape(-1, 1) != ignore_index)
        out.append(torch.where(counts, logps[:, 1:], 0.0).reshape(*shape, extra_ids.shape[1]))
    return out[0] if len(out) == 1 else tuple(out)


def forward(
    logits: Tensor, target_ids: Tensor, extra_ids: Tensor, options: LossOptions, backend: str, entropy: bool
) -> Terms:
    """Of rows ``[B, L, V]``."""
    found = rows.token_forward(logits, target_ids, options, backend, entropy)
    targets, logps = torch.where(target_ids == options.ignore_index, 0, target_ids)[:, None], found.logps[:, None]
    extra = torch.where(extra_ids == options.ignore_index, targets, extra_ids)
    if extra.shape[1]:
        logps = torch.cat([logps, support_logps(logits, found.stats, extra, options)], -1)
    return Terms(logps.contiguous(), found.entropy, found.stats, torch.cat([targets, extra], -1))


def _per_class(slopes: Tensor, ids: Tensor) -> Tensor:
    """``slopes [N, K]`` summed over the equal ids of a row, in the place of each of them."""
    ordered, order = ids.sort(-1)
    starts = torch.cat([torch.zeros_like(ordered[:, :1]), (ordered.diff(dim=-1) != 0).long()], -1)
    group = starts.cumsum(-1)
    sums = torch.zeros_like(slopes).scatter_add(1, group, slopes.gather(1, order))
    return torch.empty_like(slopes).scatter_(1, order, sums.gather(1, group))


def _results(coef: Tensor, stats: Sequence[Tensor], class_grads: Tensor) -> RowResults:
    columns = torch.cat(list(stats), -1)
    columns = torch.cat([columns, columns.new_zeros(len(coef), STATISTICS - columns.shape[1])], -1)
    none = torch.zeros_like(coef)
    return RowResults(none, coef.contiguous(), none, none, columns, class_grads.contiguous())


def _logps_gradient(
    slopes: Tensor, terms: Terms, logits: Tensor, target_ids: Tensor, options: LossOptions, backend: str, grad: Tensor
) -> None:
    if terms.ids.shape[1] == 1:
        rows.token_backward(slopes[:, 0].contiguous(), terms.stats, logits, target_ids, options, backend, grad)
        return
    p, total = terms.logps.exp(), slopes.sum(-1, keepdim=True)
    p = torch.where(terms.ids == terms.ids[:, :1], p[:, :1], p)  # the same bits for the same token
    class_grads = _per_class(slopes, terms.ids) - weighted(p, total.expand_as(p))
    ones = torch.ones_like(terms.stats[:, 0])
    found = _results(ones, [terms.stats, -total], class_grads)
    tokens = Tokens(target_ids, ones, topk_ids=terms.ids.contiguous())
    options = replace(options, mode="topk", topk=terms.ids.shape[1], add_tail=True)
    rows.backward(ones.new_ones(1), found, RowCall(logits, None, tokens, options, backend), grad)


def _entropy_gradient(
    slopes: Tensor, terms: Terms, logits: Tensor, target_ids: Tensor, options: LossOptions, backend: str, grad: Tensor
) -> None:
    vocabulary = logits.shape[-1]
    uniform = logits.new_zeros(vocabulary).expand(logits.shape)
    ones = torch.ones_like(terms.entropy)[:, None]
    stats = [terms.stats, 0 * ones, math.log2(vocabulary) * ones, (math.log(vocabulary) - terms.entropy)[:, None]]
    found = _results(-slopes, stats, slopes.new_empty(0))
    options = replace(options, mode="full", alpha=1.0)
    tokens = Tokens(target_ids, found.coef)
    rows.backward(slopes.new_ones(1), found, RowCall(logits, uniform, tokens, options, backend), grad)


def tile_gradient(
    slopes: Tensor,
    entropy_slopes: Tensor | None,
    terms: Terms,
    logits: Tensor,
    target_ids: Tensor,
    options: LossOptions,
    backend: str,
    grad: Tensor,
) -> None:
    """Writes the gradient of a block of rows; ``grad`` may be the logits."""
    rest = logits, target_ids, options, backend
    if entropy_slopes is None:
        _logps_gradient(slopes, terms, *rest, grad)
        return
    second = torch.empty_like(grad)
    _entropy_gradient(entropy_slopes, terms, *rest, second)
    _logps_gradient(slopes, terms, *rest, grad)
    grad += second


def _part(terms: Terms, which: slice) -> Terms:
    return Terms(*(value[which] if value.numel() else value for value in terms))


# ---- from logits ---------------------------------------------------------------------------------


@custom_op("fastsdpo::token_terms", mutates_args=())
def token_terms_op(
    logits: Tensor,
    target_ids: Tensor,
    extra_ids: Tensor,
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Terms` of rows ``[B, L, V]``."""
    options = LossOptions.unpacked(mode, floats, integers)
    for argument, ids in (("target_ids", target_ids), ("extra_ids", extra_ids)):
        check_ids(ids, logits.shape[-1], f"token_logps: {argument}", options.ignore_index)
    return tuple(forward(logits, target_ids, extra_ids, options, backend, entropy))


@token_terms_op.register_fake
def _(logits, target_ids, extra_ids, mode, floats, integers, entropy, backend):
    return _fake_terms(logits, target_ids, extra_ids, accumulation_dtype(logits), entropy)


def _fake_terms(
    like: Tensor, target_ids: Tensor, extra_ids: Tensor, dtype: torch.dtype, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = target_ids.shape[0], extra_ids.shape[1] + 1
    logps = like.new_empty(n, k, dtype=dtype)
    return logps, logps.new_empty(n if entropy else 0), logps.new_empty(n, 2), target_ids.new_empty(n, k)


@custom_op("fastsdpo::token_terms_backward", mutates_args=())
def token_terms_backward_op(
    slopes: Tensor,
    entropy_slopes: Tensor | None,
    logits: Tensor,
    target_ids: Tensor,
    saved: Sequence[Tensor],
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    backend: str,
) -> Tensor:
    grad, options, terms = empty_gradient(logits), LossOptions.unpacked(mode, floats, integers), Terms(*saved)
    if entropy_slopes is None:
        tile_gradient(slopes, None, terms, logits, target_ids, options, backend, grad)
        return grad
    for which, (part, out) in rows.row_blocks(logits, grad):
        assert part is not None and out is not None
        tile = torch.empty_like(part, dtype=slopes.dtype)
        given = slopes[which], entropy_slopes[which], _part(terms, which)
        tile_gradient(*given, part, target_ids[which], options, backend, tile)
        out.copy_(tile)
    return grad


@token_terms_backward_op.register_fake
def _(slopes, entropy_slopes, logits, *args):
    return empty_gradient(logits)


forbid_second_derivative(token_terms_backward_op)


def _slopes(upstream: Sequence[Tensor | None], terms: Sequence[Tensor]) -> tuple[Tensor, Tensor | None] | None:
    """Upstream gradients of log-probs and entropy; None where there are none."""
    logps, entropy, *_ = upstream
    if logps is None and entropy is None:
        return None
    if logps is None:
        logps = torch.zeros_like(terms[0])
    return logps.contiguous(), None if entropy is None else entropy.contiguous()


def _token_terms_setup(ctx, inputs, output):
    logits, target_ids, _, *ctx.options, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target_ids, *output)


def _token_terms_backward(ctx, *upstream):
    grad, (logits, target_ids, *terms) = None, ctx.saved_tensors
    slopes = _slopes(upstream, terms)
    if slopes is not None and ctx.needs_input_grad[0]:
        mode, floats, integers = ctx.options
        rest = logits, target_ids, terms, mode, floats, integers, ctx.backend
        grad = token_terms_backward_op(slopes[0], slopes[1], *rest)
    return grad, *(None,) * 7


token_terms_op.register_autograd(_token_terms_backward, setup_context=_token_terms_setup)


# ---- from hidden states --------------------------------------------------------------------------


@custom_op("fastsdpo::linear_token_terms", mutates_args=())
def linear_token_terms_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Sequence[Tensor],
    mode: str,
    floats: Sequence[float],
    integers: Sequence[int],
    entropy: bool,
    chunk_size: int,
    dtypes: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Terms` of all tokens; ``ids`` are the targets and the extra ids."""
    options, plan = LossOptions.unpacked(mode, floats, integers), ChunkPlan.unpacked(chunk_size, dtypes)
    target_ids, extra_ids = ids
    for argument, given in (("target_ids", target_ids), ("extra_ids", extra_ids)):
        check_ids(given, len(weight), f"linear_token_logps: {argument}", options.ignore_index)
    found = _fake_terms(hidden, target_ids, extra_ids, accumulation_dtype(hidden, weight), entropy)

    def tile_loss(logits: Tensor, teacher: Tensor | None, which: slice, grad: Tensor | None):
        part = forward(logits.unsqueeze(0), target_ids[which], extra_ids[which], options, backend, entropy)
        for whole, values in zip(found, part):
            if whole.numel():
                whole[which] = values

    through_head(hidden, HeadGemms(weight, bias, plan.operand), tile_loss, plan)
    return found


@linear_token_terms_op.register_fake
def _(hidden, weight, bias, ids, mode, floats, integers, entropy, *args):
    return _fake_terms(hidden, ids[0], ids[1], accumulation_dtype(hidden, weight), entropy)


@custom_op("fastsdpo::linear_token_terms_backward", mutates_args=())
def linear_token_terms_backward_op(
    upstream: Sequence[Tensor | None],
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

    ``upstream`` are the gradients of log-probs ``[N, 1 + K]`` and entropy ``[N]`` or None.
    """
    slopes, entropy_slopes = upstream
    assert slopes is not None
    options, plan = LossOptions.unpacked(mode, floats, integers), ChunkPlan.unpacked(chunk_size, dtypes)
    target_ids, terms = saved[0], Terms(*saved[1:])
    both = slopes if entropy_slopes is None else torch.cat([slopes, entropy_slopes[:, None]], -1)
    scale = gradient_scale(both, plan.operand)
    both = both if scale is None else both * scale
    k = slopes.shape[1]

    def tile_loss(logits: Tensor, teacher: Tensor | None, which: slice, grad: Tensor | None):
        assert grad is not None
        entropy = None if entropy_slopes is None else both[which, k]
        rest = _part(terms, which), logits.unsqueeze(0), target_ids[which], options, backend, grad.unsqueeze(0)
        tile_gradient(both[which, :k], entropy, *rest)

    live = target_ids != options.ignore_index
    grads = through_head(hidden, HeadGemms(weight, bias, plan.operand), tile_loss, plan, needed(needs), live=live)
    return unscaled(grads, scale, (hidden, weight, bias), slopes)


@linear_token_terms_backward_op.register_fake
def _(upstream, hidden, weight, bias, *args):
    return fake_gradients(args[-2], (hidden, weight, bias), upstream[0])


forbid_second_derivative(linear_token_terms_backward_op)


def _linear_setup(ctx, inputs, output):
    hidden, weight, bias, ids = inputs[:4]
    ctx.rest, ctx.backend = (*inputs[4:7], *inputs[8:10]), inputs[10]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, ids[0], *output)


def _linear_backward(ctx, *upstream):
    hidden, weight, bias, target_ids, *terms = ctx.saved_tensors
    slopes, needs = _slopes(upstream, terms), list(ctx.needs_input_grad[:3])
    of_ids = [None, None]
    if slopes is None or not any(needs):
        return None, None, None, of_ids, *(None,) * 7
    mode, floats, integers, chunk_size, dtypes = ctx.rest
    rest = [target_ids, *terms], mode, floats, integers, chunk_size, dtypes, needs, ctx.backend
    found = linear_token_terms_backward_op(list(slopes), hidden, weight, bias, *rest)
    return *present(needs, found), of_ids, *(None,) * 7


linear_token_terms_op.register_autograd(_linear_backward, setup_context=_linear_setup)
