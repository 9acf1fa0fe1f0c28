r"""The self-distillation loss as TRL and the authors' verl fork define it, from logits or hidden states.

Both agree with `fastsdpo.sdpo_loss` but in one thing: the tail of a top-k support. They bound the mass
on the support by ``exp(-1e-7)``, so that no tail is smaller than 1e-7, and a bounded tail has no
gradient; `sdpo_loss` sums what lies outside the support. For a sharply peaked student that is a
visible difference under forward KL. To give the numbers that their users have, this module computes
top-k with a tail itself, on the kernels that `sdpo_loss` uses. With s, t the log-probs of the classes
(support, then tail), p, q their exponentials, and c the class:

    alpha = 0     l = sum q (t - s)                                    dl/ds_c = -q
    alpha = 1     l = sum p (s - t)                                    dl/ds_c = p (s - t + 1)
    between       l = sum (1-a) p (s - log m) + a q (t - log m)        dl/ds_c = (1-a) p (s - log m)
    tail          s_tail = log(1 - P),  P = sum p_j                    ds_tail/ds_j = -p_j / (1 - P), or 0
    support       s_j = u_j - logsumexp(u)                             dl/du_v = g_j [v = j] - p_v sum g
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops._backend import implementation, resolve_backend
from fastsdpo.ops._checks import accumulation_dtype, as_rows
from fastsdpo.ops.divergence import (
    SDPOLossOutput,
    check_loss,
    loss_output,
    sdpo_loss,
    student_support,
)
from fastsdpo.ops.divergence.reference import coefficients, weighted
from fastsdpo.ops.linear import (
    _dtypes,
    _gradient_scale,
    _Head,
    _new_head_gradient,
    _scaled,
    default_chunk_size,
    linear_sdpo_loss,
)

IGNORE_INDEX = -100
LARGEST_LOG_MASS = -1e-7  # of a support; TRL's and the fork's clamp


class Head(NamedTuple):
    """``z = logit_scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(z / softcap)``."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class PolicyGradient(NamedTuple):
    """Another loss of the log-probs of tokens, by its gradient; both ``[...]``.

    Attributes:
        target_ids: -100 where a token has no part in it.
        grad_logps: derivative of the loss in the log-prob of each target.
    """

    target_ids: Tensor
    grad_logps: Tensor


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
        policy: a second loss of the same hidden states, whose gradient joins this one's.
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

    given: dict[str, Any] = {
        "mode": mode, "alpha": alpha, "topk": topk, "weights": weights,
        "teacher_logps": teacher_logps, "teacher_topk": teacher_topk, "old_logps": old_logps,
        "is_clip": is_clip, "temperature": temperature, "add_tail": add_tail,
    }  # fmt: skip
    if (mode == "topk" and add_tail) or policy is not None:
        out = _own_loss(student, teacher, target_ids, head, teacher_head, policy, given)
    elif head is None:
        out = sdpo_loss(student, teacher, target_ids, **given)
    else:
        other = {} if teacher_head is None else {"teacher_weight": teacher_head.weight,
                                                 "teacher_bias": teacher_head.bias}  # fmt: skip
        out = linear_sdpo_loss(
            student, teacher, head.weight, target_ids, bias=head.bias, softcap=head.softcap,
            logit_scale=head.logit_scale, **other, **given,
        )  # fmt: skip
    if head is None:
        return out

    def whole(values: Tensor) -> Tensor:
        if len(keep) == shape.numel():
            return values.view(shape)
        return values.new_zeros(shape.numel()).index_copy_(0, keep, values).view(shape)

    return SDPOLossOutput(out.loss, *(whole(values) for values in out[1:]))


# --------------------------------------------------------------------------- top-k with a tail


def class_gradients(s: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Divergence of classes with log-probs ``s``, ``t`` ``[N, C]`` and its gradient in ``s``.

    0 * log 0 is 0, where a class has probability 0 under both.
    """
    p, q = s.exp(), t.exp()
    if alpha == 0:
        return weighted(q, t - s).sum(-1), -q
    if alpha == 1:
        return weighted(p, s - t).sum(-1), weighted(p, s - t + 1)
    m = (1 - alpha) * p + alpha * q
    log_m = torch.where(m == 0, 1.0, m).log()
    student = weighted(p, s - log_m)
    loss = ((1 - alpha) * student + alpha * weighted(q, t - log_m)).sum(-1)
    return loss, (1 - alpha) * student


def add_tail_class(logps: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, K]`` log-probs with the tail's appended, and ``[N, 1]`` where the tail is at its bound."""
    mass = torch.logsumexp(logps, -1, keepdim=True)
    bounded = mass > LARGEST_LOG_MASS
    tail = torch.log(-torch.expm1(mass.clamp(max=LARGEST_LOG_MASS)))
    return torch.cat([logps, tail], -1), bounded


def _support_logps(
    logits: Tensor, stats: Tensor, support: Tensor, temperature: float, softcap: float
) -> Tensor:
    """Log-probs ``[N, K]`` on the support; ``stats [N, 2]`` as the kernels save them."""
    c = logits.gather(-1, support.view(*logits.shape[:2], -1)).reshape(support.shape)
    c = c.to(stats.dtype)
    if softcap:
        c = softcap * torch.tanh(c / softcap)
    row_max, log_sum = stats[:, :1], stats[:, 1:] * 0.6931471805599453
    return (c - row_max) / temperature - log_sum


class _Tokens(NamedTuple):
    """Per-row tensors of a chunk; ``[N]``, ids and log-probs of the support ``[N, K]``."""

    target_ids: Tensor
    weights: Tensor
    old_logps: Tensor | None
    topk_ids: Tensor | None
    topk_logps: Tensor | None
    teacher_logps: Tensor | None
    policy_ids: Tensor | None
    policy_grads: Tensor | None

    def chunk(self, rows: slice) -> _Tokens:
        return _Tokens(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore


def _tile_loss(
    student: Tensor, teacher: Tensor | None, tokens: _Tokens, options: Any, grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One tile ``[B, L, V]``: ``(per_token, coef, student_logps, teacher_logps)``, each ``[N]``.

    Writes the gradient of ``sum coef * per_token`` into ``grad``, which may be ``student``.
    """
    if options.mode == "topk" and options.add_tail:
        return _tail_tile_loss(student, teacher, tokens, options, grad)
    kernels = implementation("divergence", options.backend)
    given = (tokens.target_ids, tokens.weights, tokens.old_logps, options.is_clip or 0.0)
    tail: tuple = (options.temperature, options.softcap, IGNORE_INDEX)
    tail += () if grad is None else (grad,)
    kind = "forward" if grad is None else "fused"
    if options.mode == "sampled_token":
        run = getattr(kernels, f"sampled_token_{kind}")
        return run(student, teacher, tokens.teacher_logps, *given, *tail)[:4]
    if options.mode == "full":
        run = getattr(kernels, f"divergence_{kind}")
        return run(student, teacher, *given, options.alpha, *tail)[:4]
    run = getattr(kernels, f"topk_{kind}")
    support = student_support(
        student, options.topk, tokens.target_ids, IGNORE_INDEX, options.backend
    )
    return run(student, teacher, support, None, *given, options.alpha, False, *tail)[:4]


def _policy_gradient(logits: Tensor, tokens: _Tokens, options: Any, grad: Tensor) -> None:
    """Writes the gradient of ``sum grad_logps * logps`` of a tile ``[1, N, V]`` into ``grad``."""
    kernels = implementation("token_logps", options.backend)
    scales = (options.temperature, options.softcap)
    _, _, *stats = kernels.token_logps_forward(
        logits, tokens.policy_ids, *scales, IGNORE_INDEX, False
    )
    kernels.token_logps_backward(
        tokens.policy_grads, logits, tokens.policy_ids, *stats, *scales, IGNORE_INDEX, grad
    )


def _tail_tile_loss(
    student: Tensor, teacher: Tensor | None, tokens: _Tokens, options: Any, grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_tile_loss` of top-k with a tail."""
    ids, ignored = tokens.target_ids, tokens.target_ids == IGNORE_INDEX
    scales = (options.temperature, options.softcap)
    kernels = implementation("token_logps", options.backend)

    def statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
        logps, _, *stats = kernels.token_logps_forward(logits, ids, *scales, IGNORE_INDEX, False)
        return logps, torch.stack(stats, -1)

    support = tokens.topk_ids
    if support is None:
        support = student_support(student, options.topk, ids, IGNORE_INDEX, options.backend)
    student_logps, stats = statistics(student)
    s, bounded = add_tail_class(_support_logps(student, stats, support, *scales))
    if teacher is not None:
        teacher_logps, teacher_stats = statistics(teacher)
        on_support = _support_logps(teacher, teacher_stats, support, *scales)
    else:
        assert tokens.topk_logps is not None
        on_support = tokens.topk_logps
        hit = support == ids[:, None]
        teacher_logps = torch.where(
            hit.any(-1), torch.where(hit, on_support, 0.0).sum(-1), torch.nan
        )
        teacher_logps = torch.where(ignored, 0.0, teacher_logps)
    t, _ = add_tail_class(on_support)

    per_token, g = class_gradients(s, t, options.alpha)
    per_token = torch.where(ignored, 0.0, per_token)
    is_clip = options.is_clip or 0.0
    coef = coefficients(tokens.weights, student_logps, tokens.old_logps, is_clip, ids, IGNORE_INDEX)
    if grad is not None:
        p, tail = s[:, :-1].exp(), s[:, -1:].exp()
        through_tail = torch.where(bounded, 0.0, g[:, -1:] / tail)
        g = g[:, :-1] - weighted(p, through_tail.expand_as(p))
        total = g.sum(-1, keepdim=True)
        class_grads = torch.where(ignored[:, None], 0.0, g - weighted(p, total.expand_as(p)))
        row_stats = torch.cat([stats, -total, torch.zeros_like(total)], -1)
        row_stats = torch.where(ignored[:, None], 0.0, row_stats)
        implementation("divergence", options.backend).topk_backward(
            coef.new_ones(1), coef, student, support, ids, row_stats, class_grads.contiguous(),
            True, *scales, IGNORE_INDEX, grad,
        )  # fmt: skip
    return per_token, coef, student_logps, teacher_logps


class _Options(NamedTuple):
    mode: str
    alpha: float
    topk: int
    add_tail: bool
    is_clip: float | None
    temperature: float
    softcap: float
    backend: str


def _own_loss(
    student: Tensor,
    teacher: Tensor | None,
    target_ids: Tensor,
    head: Any,
    teacher_head: Any,
    policy: PolicyGradient | None,
    given: dict[str, Any],
) -> SDPOLossOutput:
    name = "distillation_loss"
    weight = None if head is None else head.weight
    accumulation = accumulation_dtype(student, student if weight is None else weight)
    vocabulary = student.shape[-1] if weight is None else weight.shape[0]
    softcap = None if head is None else head.softcap
    scale = 1.0 if head is None else head.logit_scale
    checked, tokens = check_loss(
        name, target_ids.shape, vocabulary, student.device, accumulation, target_ids,
        teacher="teacher", has_teacher=teacher is not None, softcap=softcap,
        ignore_index=IGNORE_INDEX, **given,
    )  # fmt: skip
    probe = student.new_empty(0, dtype=student.dtype if weight is None else accumulation)
    options = _Options(
        checked.mode, checked.alpha, checked.topk, given["add_tail"], checked.is_clip,
        checked.temperature / scale, checked.softcap / scale, resolve_backend(name, "auto", probe),
    )  # fmt: skip
    topk_logps = given["teacher_topk"] and given["teacher_topk"][1]
    if topk_logps is not None:  # unchanged: the tail's bound is ours to set
        topk_logps = topk_logps.detach().reshape(-1, checked.topk).to(accumulation)
    second: tuple = (None, None)
    if policy is not None:
        second = (policy.target_ids.contiguous(), policy.grad_logps.to(accumulation).contiguous())
    rows = _Tokens(
        tokens.target_ids, tokens.weights, tokens.old_logps, tokens.topk_ids, topk_logps,
        tokens.teacher_logps, *second,
    )  # fmt: skip
    found: Any
    if head is None:
        teacher = None if teacher is None else as_rows(teacher.detach())
        found = _LogitsTopK.apply(as_rows(student), teacher, rows, options)
    else:
        other = head if teacher_head is None else teacher_head
        found = _LinearLoss.apply(
            student, None if teacher is None else teacher.detach(), weight, head.bias,
            other.weight, other.bias, rows, options,
        )  # fmt: skip
    loss, per_token, student_logps, teacher_logps = found
    return loss_output(loss, per_token, student_logps, teacher_logps, target_ids.shape)


def _total(coef: Tensor, per_token: Tensor) -> Tensor:
    """A token of weight 0 costs nothing, though its divergence be infinite."""
    return weighted(coef, per_token).sum()


class _LogitsTopK(torch.autograd.Function):
    """The gradient is formed in the forward pass; backward scales it."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Any, tokens: Any, options: Any) -> Any:
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        per_token, coef, *logps = _tile_loss(student, teacher, tokens, options, grad)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(per_token, *logps)
        ctx.set_materialize_grads(False)
        return _total(coef, per_token), per_token, *logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> Any:
        (grad,) = ctx.saved_tensors
        return None if grad_loss is None else grad * grad_loss, None, None, None


class _LinearLoss(torch.autograd.Function):
    """In chunks of tokens, 4 GEMMs, as `fastsdpo.ops.linear.linear_sdpo_op` does it."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        tokens: _Tokens,
        options: _Options,
    ) -> Any:
        n, vocabulary = student.shape[0], weight.shape[0]
        operand, tile_dtype, accumulation = _dtypes(student, weight, None)
        head = _Head(weight, bias, operand)
        shared = teacher_weight is weight and teacher_bias is bias
        teacher_head = head if shared else _Head(teacher_weight, teacher_bias, operand)
        need_hidden, need_weight, need_bias = (ctx.needs_input_grad[i] for i in (0, 2, 3))
        need = need_hidden or need_weight or need_bias
        slopes = tokens.weights
        if tokens.policy_grads is not None:
            slopes = torch.cat([slopes, tokens.policy_grads])
        scale = _gradient_scale(slopes, operand) if need else None
        if scale is not None:
            tokens = tokens._replace(
                weights=tokens.weights * scale,
                policy_grads=None if tokens.policy_grads is None else tokens.policy_grads * scale,
            )

        per_token, coef, student_logps, teacher_logps = tokens.weights.new_zeros(4, n).unbind()
        grad_hidden = torch.empty_like(student, dtype=accumulation) if need_hidden else None
        grad_weight = _new_head_gradient(weight, accumulation, n) if need_weight else None
        grad_bias = tokens.weights.new_zeros(vocabulary) if need_bias else None
        chunk = max(1, default_chunk_size(n, vocabulary, student.device))
        tiles = student.new_empty(2, min(chunk, n), vocabulary, dtype=tile_dtype)
        grad_tile = tiles[0] if tile_dtype == operand else tiles[0].to(operand)
        second_tile = None
        if need and tokens.policy_grads is not None:
            second_tile = torch.empty_like(grad_tile)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            x, z = student[rows].to(operand), tiles[0, :size]
            head.logits(x, z)
            z_teacher = None
            if teacher is not None:
                z_teacher = tiles[1, :size]
                teacher_head.logits(teacher[rows].to(operand), z_teacher)
                z_teacher = z_teacher[None]
            grad, part = grad_tile[:size], tokens.chunk(rows)
            if second_tile is not None:  # first, as the other may overwrite the logits
                _policy_gradient(z[None], part, options, second_tile[None, :size])
            found = _tile_loss(z[None], z_teacher, part, options, grad[None] if need else None)
            per_token[rows], coef[rows], student_logps[rows], teacher_logps[rows] = found
            if second_tile is not None:
                grad += second_tile[:size]
            if grad_hidden is not None:
                head.hidden_gradient(grad, grad_hidden[rows])
            if grad_weight is not None:
                head.accumulate(grad, x, grad_weight, first=start == 0)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=accumulation)
        if scale is not None:
            coef = coef / scale
            for grad in (grad_hidden, grad_weight, grad_bias):
                if grad is not None:
                    grad.div_(scale)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, student, weight, bias)
        ctx.mark_non_differentiable(per_token, student_logps, teacher_logps)
        ctx.set_materialize_grads(False)
        return _total(coef, per_token), per_token, student_logps, teacher_logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> Any:
        if grad_loss is None:
            return (None,) * 8
        saved = ctx.saved_tensors
        hidden, weight, bias = (
            None if grad is None else _scaled(grad, grad_loss, source)
            for grad, source in zip(saved[:3], saved[3:])
        )
        return hidden, None, weight, bias, None, None, None, None


def targets_where(mask: Tensor, target_ids: Tensor) -> Tensor:
    """``target_ids`` with -100 where ``mask`` is 0."""
    return target_ids.masked_fill(mask == 0, IGNORE_INDEX)


def policy_gradient_loss(
    student: Tensor, head: Any, policy: PolicyGradient, temperature: float
) -> Tensor:
    """0, with the gradient ``grad_logps`` in the log-probs of the targets, to hidden states and head.

    The gradient is formed in the forward pass: 3 GEMMs, where log-probs that are differentiated
    afterwards take 4, and need the head again.
    """
    none = torch.full_like(policy.target_ids, IGNORE_INDEX)
    zeros = torch.zeros(none.shape, device=none.device)
    return distillation_loss(
        student, None, none, head=head, mode="sampled_token", alpha=1.0, temperature=temperature,
        teacher_logps=zeros, weights=zeros, policy=policy,
    ).loss  # fmt: skip
