"""The definition of the losses and log-probs in eager PyTorch: any device, obvious, on a CPU in blocks of rows.

A backend of `fastsdpo.ops.rows`; formulas and gradients are in `ops.token_logps` and `ops.divergence`.
``p``/``s`` are the student's probabilities and their logs, ``q``/``t`` the teacher's. Statistics are
float32, or float64 for float64 logits. 0 * log 0 is 0, and NaN is kept.

The formulas are of whole tensors. `forward`, `backward`, `token_forward` and `token_backward` apply them to a few rows
at a time on a CPU: a row depends on no other row, temporaries of a block stay in the cache, and none has the size of
the logits. Whole tensors took 4 to 6 times as long as plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsdpo.ops.checks import accumulation_dtype
from fastsdpo.ops.rows import (
    STATISTICS,
    LossOptions,
    RowCall,
    RowResults,
    TokenResults,
    Tokens,
    row_blocks,
    token_advantage,
)

LOG2E = math.log2(math.e)
CACHED = 2**16  # elements of a block for each thread: its temporaries fit a core's second cache


def blocks(*logits: Tensor | None) -> Iterator[tuple[slice, list[Tensor | None]]]:
    """Blocks of rows of tensors ``[B, L, V]``; off the CPU all of it is one, as `rows.row_blocks` gives them."""
    (first, *_) = [one for one in logits if one is not None]
    cached = CACHED * max(2, torch.get_num_threads())
    if first.device.type == "cpu" and first.numel() > cached:
        yield from row_blocks(*logits, size=cached)
    else:
        yield slice(None), list(logits)


# ---- log-probs of a row --------------------------------------------------------------------------


def capped_rows(logits: Tensor, softcap: float) -> Tensor:
    """``c = softcap * tanh(z / softcap)`` as ``[N, V]``; -inf (probability 0) stays -inf."""
    z = logits.reshape(-1, logits.shape[-1]).to(accumulation_dtype(logits))
    if not softcap:
        return z
    return torch.where(z == -math.inf, z, softcap * torch.tanh(z / softcap))


def softcap_slope(c: Tensor, softcap: float) -> Tensor | float:
    """dc/dz from the capped value; 0 for a masked token."""
    if not softcap:
        return 1.0
    return torch.where(c == -math.inf, 0.0, 1 - (c / softcap) ** 2)


def row_statistics(c: Tensor, temperature: float) -> Tensor:
    """``[N, 2]``: max of c, and log2 of the sum of 2^((c - max) * log2(e) / temperature).

    They stay apart: one merged log-sum-exp would lose the low digits where logits are large.
    """
    if c.shape[0] == 0:
        return c.new_zeros(0, 2)
    row_max = c.amax(-1)
    scaled = (c - row_max[:, None]).mul_(LOG2E / temperature)
    return torch.stack([row_max, scaled.exp2_().sum(-1).log2()], -1)


def row_log_probs(c: Tensor, stats: Tensor, temperature: float) -> Tensor:
    """``log p`` of the whole row in nats, ``[N, V]``, from `row_statistics`."""
    scaled = (c - stats[:, :1]).mul_(LOG2E / temperature)
    return scaled.sub_(stats[:, 1:2]).mul_(math.log(2))


def take(log_probs: Tensor, target_ids: Tensor, ignore_index: int) -> Tensor:
    """The target's entry of each row, 0 where ignored."""
    ignored = target_ids == ignore_index
    taken = log_probs.gather(1, torch.where(ignored, 0, target_ids)[:, None]).squeeze(1)
    return torch.where(ignored, 0.0, taken)


def store(grad: Tensor, values: Tensor, target_ids: Tensor, ignore_index: int) -> None:
    """Writes ``values [N, V]`` into a gradient buffer; 0 in ignored rows."""
    ignored = (target_ids == ignore_index)[:, None]
    grad.copy_(torch.where(ignored, 0.0, values).view(grad.shape))


def token_forward(logits: Tensor, target_ids: Tensor, options: LossOptions, entropy: bool = False) -> TokenResults:
    found = []
    for which, (part,) in blocks(logits):
        assert part is not None
        found.append(_token_forward(part, target_ids[which], options, entropy))
    return found[0] if len(found) == 1 else TokenResults(*map(torch.cat, zip(*found)))


def _token_forward(logits: Tensor, target_ids: Tensor, options: LossOptions, entropy: bool) -> TokenResults:
    c = capped_rows(logits, options.softcap)
    ignored = target_ids == options.ignore_index
    stats = row_statistics(c, options.temperature)
    log_probs = row_log_probs(c, stats, options.temperature)
    logps = take(log_probs, target_ids, options.ignore_index)
    found = c.new_zeros(0)
    if entropy:
        terms = weighted(log_probs.exp(), log_probs)
        found = torch.where(ignored, 0.0, -terms.sum(-1))
    return TokenResults(logps, found, torch.where(ignored[:, None], 0.0, stats))


def token_backward(
    upstream: Tensor, stats: Tensor, logits: Tensor, target_ids: Tensor, options: LossOptions, grad: Tensor
) -> None:
    for which, (part, out) in blocks(logits, grad):
        assert part is not None and out is not None
        _token_backward(upstream[which], stats[which], part, target_ids[which], options, out)


def _token_backward(
    upstream: Tensor, stats: Tensor, logits: Tensor, target_ids: Tensor, options: LossOptions, grad: Tensor
) -> None:
    c = capped_rows(logits, options.softcap)
    ids = torch.where(target_ids == options.ignore_index, 0, target_ids)
    p = row_log_probs(c, stats, options.temperature).exp_()
    onehot_less_p = p.neg_().scatter_add_(1, ids[:, None], torch.ones_like(p[:, :1]))
    values = onehot_less_p.mul_(upstream[:, None]).div_(options.temperature)
    values = values * softcap_slope(c, options.softcap)
    store(grad, values, target_ids, options.ignore_index)


def log_ratio(student: Tensor, teacher: Tensor, target_ids: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    return (token_forward(student, target_ids, options).logps, token_forward(teacher, target_ids, options).logps)


def support(logits: Tensor, target_ids: Tensor, k: int, ignore_index: int) -> Tensor:
    return torch.topk(logits, k, dim=-1).indices.reshape(-1, k)


# ---- divergences ---------------------------------------------------------------------------------


def weighted(p: Tensor, values: Tensor) -> Tensor:
    """``p * values`` with 0 * anything = 0; NaN in ``p`` stays NaN."""
    return (p * values).masked_fill_(p == 0, 0.0)


def row_divergence(s: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of each row from log-probs ``s``, ``t`` over the same classes.

    Returns ``(loss [N], K [N], grad [N, C])``: ``grad`` is the gradient with respect to the
    student's class logits, ``K`` the KL that it contains (0 for alpha = 0).
    """
    loss, kl = divergence_values(s, t, alpha)
    return loss, kl, _full_gradient(s, t, kl[:, None], alpha)


def divergence_values(s: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The first two of `row_divergence`."""
    if alpha == 0:
        loss = weighted(t.exp(), t - s).sum(-1)
        return loss, torch.zeros_like(loss)
    p = s.exp()
    if alpha == 1:
        loss = weighted(p, s - t).sum(-1)
        return loss, loss
    q = t.exp()
    m = (1 - alpha) * p + alpha * q
    log_m = torch.where(m == 0, 1.0, m).log()
    kl_student = weighted(p, s - log_m).sum(-1)
    kl_teacher = weighted(q, t - log_m).sum(-1)
    return (1 - alpha) * kl_student + alpha * kl_teacher, kl_student


def coefficients(tokens: Tokens, student_logps: Tensor, options: LossOptions) -> Tensor:
    """``weights * r``, 0 where ignored; r the clipped importance ratio, 1 without old log-probs. 0 * NaN = 0."""
    coef = tokens.weights
    if tokens.old_logps is not None:
        ratio = (student_logps - tokens.old_logps).clamp(-20, 20).exp()
        coef = weighted(coef, ratio.clamp(max=options.is_clip))
    return torch.where(tokens.target_ids == options.ignore_index, 0.0, coef)


def sampled_token_loss(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """-A log p with 0 * inf = 0."""
    ratio = token_advantage(student_logps, teacher_logps)
    nothing = (ratio == 0) | ((student_logps == 0) & ~ratio.isnan())
    return torch.where(nothing, 0.0, -ratio * student_logps)


def given_logps(tokens: Tokens, options: LossOptions) -> Tensor:
    """The teacher's log-probs of the targets from `Tokens`, where no teacher logits are given.

    NaN where a target lies outside the given support, 0 where it is ignored.
    """
    ids, given = tokens.target_ids, tokens.teacher_logps
    if given is None:
        assert tokens.topk_ids is not None and tokens.topk_logps is not None
        hit = tokens.topk_ids == ids[:, None]
        given = torch.where(hit, tokens.topk_logps, 0.0).sum(-1)
        given = torch.where(hit.any(-1), given, math.nan)
    return torch.where(ids == options.ignore_index, 0.0, given)


def forward(
    student: Tensor, teacher: Tensor | None, tokens: Tokens, options: LossOptions, grad: Tensor | None = None
) -> RowResults:
    by_mode = {"sampled_token": _sampled_token, "full": _full, "topk": _topk}
    parts = []
    for which, (mine, others, out) in blocks(student, teacher, grad):
        assert mine is not None
        chunk = tokens.chunk(which)
        parts.append(by_mode[options.mode](mine, others, chunk, options))
        if out is not None:
            call = RowCall(mine, others, chunk, options, "reference")
            _backward(parts[-1].coef.new_ones(1), parts[-1], call, out)
    return parts[0] if len(parts) == 1 else RowResults(*map(torch.cat, zip(*parts)))


def _statistics(columns: list[Tensor], tokens: Tokens, options: LossOptions) -> Tensor:
    """``columns [N, C]`` side by side, filled up to the columns of `RowResults.stats`; 0 where ignored."""
    stats = torch.cat(columns, -1)
    stats = torch.cat([stats, stats.new_zeros(len(stats), STATISTICS - stats.shape[1])], -1)
    return torch.where((tokens.target_ids == options.ignore_index)[:, None], 0.0, stats)


def _sampled_token(student: Tensor, teacher: Tensor | None, tokens: Tokens, options: LossOptions) -> RowResults:
    student_logps, _, stats = token_forward(student, tokens.target_ids, options)
    if teacher is None:
        teacher_logps = given_logps(tokens, options)
    else:
        teacher_logps = token_forward(teacher, tokens.target_ids, options).logps
    teacher_logps = teacher_logps.to(student_logps.dtype)
    return RowResults(
        sampled_token_loss(student_logps, teacher_logps),
        coefficients(tokens, student_logps, options),
        student_logps,
        teacher_logps,
        _statistics([stats], tokens, options),
        stats.new_empty(0),
    )


def _full(student: Tensor, teacher: Tensor | None, tokens: Tokens, options: LossOptions) -> RowResults:
    assert teacher is not None
    log_probs, stats = [], []
    for logits in (student, teacher):
        c = capped_rows(logits, options.softcap)
        stats.append(row_statistics(c, options.temperature))
        log_probs.append(row_log_probs(c, stats[-1], options.temperature))
    loss, kl = divergence_values(log_probs[0], log_probs[1], options.alpha)
    student_logps, teacher_logps = (take(rows, tokens.target_ids, options.ignore_index) for rows in log_probs)
    return RowResults(
        torch.where(tokens.target_ids == options.ignore_index, 0.0, loss),
        coefficients(tokens, student_logps, options),
        student_logps,
        teacher_logps,
        _statistics([*stats, kl[:, None]], tokens, options),
        loss.new_empty(0),
    )


def support_log_probs(log_probs: Tensor, topk_ids: Tensor, add_tail: bool) -> Tensor:
    """Log-probs of the support's classes: ``[N, K + 1]`` with the tail, else renormalized ``[N, K]``."""
    on_support = log_probs.gather(1, topk_ids)
    if not add_tail:
        return on_support - on_support.logsumexp(-1, keepdim=True)
    # Not the log of a sum of probabilities, which is 0 where the support holds nearly all.
    tail = log_probs.scatter(1, topk_ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([on_support, tail], -1)


def given_support_log_probs(topk_logps: Tensor, add_tail: bool) -> Tensor:
    """`support_log_probs` from the teacher's log-probs at the support; the tail is 1 minus their sum."""
    total = topk_logps.logsumexp(-1, keepdim=True)
    if not add_tail:
        return topk_logps - total
    return torch.cat([topk_logps, torch.log(-torch.expm1(total.clamp(max=0)))], -1)


def _topk(student: Tensor, teacher: Tensor | None, tokens: Tokens, options: LossOptions) -> RowResults:
    assert tokens.topk_ids is not None
    ids, ignored = tokens.topk_ids, (tokens.target_ids == options.ignore_index)[:, None]
    c = capped_rows(student, options.softcap)
    stats = row_statistics(c, options.temperature)
    log_probs = row_log_probs(c, stats, options.temperature)
    student_logps = take(log_probs, tokens.target_ids, options.ignore_index)
    s = support_log_probs(log_probs, ids, options.add_tail)
    if teacher is not None:
        c = capped_rows(teacher, options.softcap)
        log_probs = row_log_probs(c, row_statistics(c, options.temperature), options.temperature)
        teacher_logps = take(log_probs, tokens.target_ids, options.ignore_index)
        t = support_log_probs(log_probs, ids, options.add_tail)
    else:
        assert tokens.topk_logps is not None
        teacher_logps = given_logps(tokens, options).to(s.dtype)
        t = given_support_log_probs(tokens.topk_logps.to(s.dtype), options.add_tail)
    loss, _, class_grads = row_divergence(s, t, options.alpha)
    # Outside the support, a token's gradient is the tail's times p / tail. Adding log2(tail) to the saved
    # normalizer makes backward's p the quotient p / tail.
    tail_grad = stats.new_zeros(len(stats), 1)
    if options.add_tail:
        log_tail, tail_grad = s[:, -1], class_grads[:, -1:]
        stats[:, 1] += torch.where(log_tail == -math.inf, 0.0, log_tail * LOG2E)
        class_grads = class_grads[:, :-1]
    return RowResults(
        torch.where(ignored[:, 0], 0.0, loss),
        coefficients(tokens, student_logps, options),
        student_logps,
        teacher_logps,
        _statistics([stats, tail_grad], tokens, options),
        torch.where(ignored, 0.0, class_grads),
    )


def backward(
    upstream: Tensor,
    found: RowResults,
    student: Tensor,
    teacher: Tensor | None,
    tokens: Tokens,
    options: LossOptions,
    grad: Tensor,
) -> None:
    read = student, teacher if options.mode == "full" else None, grad
    for which, (mine, others, out) in blocks(*read):
        assert mine is not None and out is not None
        part = RowResults(*(field[which] if len(field) else field for field in found))
        _backward(upstream, part, RowCall(mine, others, tokens.chunk(which), options, "reference"), out)


def _backward(upstream: Tensor, found: RowResults, call: RowCall, grad: Tensor) -> None:
    student, teacher, tokens, options, _ = call
    coef, stats, temperature = found.coef * upstream, found.stats, options.temperature
    if options.mode == "sampled_token":
        upstream = -token_advantage(found.student_logps, found.teacher_logps) * coef
        _token_backward(upstream, stats, student, tokens.target_ids, options, grad)
        return
    c = capped_rows(student, options.softcap)
    s = row_log_probs(c, stats, temperature)
    if options.mode == "full":
        assert teacher is not None
        t = row_log_probs(capped_rows(teacher, options.softcap), stats[:, 2:], temperature)
        values = _full_gradient(s, t, stats[:, 4:5], options.alpha)
    else:
        assert tokens.topk_ids is not None
        values = torch.zeros_like(s)
        if options.add_tail:
            values = weighted(s.exp(), stats[:, 2:3].expand_as(s))
        values = values.scatter(1, tokens.topk_ids, found.class_grads.to(values.dtype))
    values = values.mul_((coef / temperature)[:, None]) * softcap_slope(c, options.softcap)
    store(grad, values, tokens.target_ids, options.ignore_index)


def _full_gradient(s: Tensor, t: Tensor, kl: Tensor, alpha: float) -> Tensor:
    """Gradient ``[N, V]`` in u of the tokens whose log-probs are given; ``kl`` is that of the whole row."""
    p, q = s.exp(), t.exp()
    if alpha == 0:
        return p - q
    if alpha == 1:
        return weighted(p, s - t - kl)
    m = (1 - alpha) * p + alpha * q
    log_m = torch.where(m == 0, 1.0, m).log()
    return (1 - alpha) * weighted(p, s - log_m - kl)
