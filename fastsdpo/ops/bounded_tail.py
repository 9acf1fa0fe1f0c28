r"""Top-k with the tail that TRL and the SDPO authors' verl fork have, from the kernels' token statistics.

They limit the mass on the support to ``exp(-1e-7)``: no tail is smaller than 1e-7, and a tail at this limit has no
gradient. `sdpo_loss` sums the tokens outside the support instead. For a sharply peaked student the two differ
visibly under forward KL. `LossOptions.bounded_tail` asks for their numbers. With s, t the
log-probs of the classes (support, then tail), p, q their exponentials, and c the class:

    alpha = 0     l = sum q (t - s)                                    dl/ds_c = -q
    alpha = 1     l = sum p (s - t)                                    dl/ds_c = p (s - t + 1)
    between       l = sum (1-a) p (s - log m) + a q (t - log m)        dl/ds_c = (1-a) p (s - log m)
    tail          s_tail = log(1 - P),  P = sum p_j                    ds_tail/ds_j = -p_j / (1 - P), or 0
    support       s_j = u_j - logsumexp(u)                             dl/du_v = g_j [v = j] - p_v sum g

The gradient of the logits is then `rows.backward` of a top-k loss whose tail's gradient is ``-sum g`` and
whose tail is the whole row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsdpo.ops import rows
from fastsdpo.ops.reference import coefficients, given_logps, weighted
from fastsdpo.ops.rows import STATISTICS, LossOptions, RowResults, Tokens

LARGEST_LOG_MASS = -1e-7  # of a support


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
    """Log-probs ``[N, K]`` with the tail's appended, and whether the tail is at its limit, ``[N, 1]``."""
    mass = torch.logsumexp(logps, -1, keepdim=True)
    bounded = mass > LARGEST_LOG_MASS
    tail = torch.log(-torch.expm1(mass.clamp(max=LARGEST_LOG_MASS)))
    return torch.cat([logps, tail], -1), bounded


def support_logps(logits: Tensor, stats: Tensor, ids: Tensor, options: LossOptions) -> Tensor:
    """Log-probs ``[N, K]`` on the support."""
    c = logits.gather(-1, ids.view(*logits.shape[:2], ids.shape[1])).reshape(ids.shape).to(stats.dtype)
    if options.softcap:
        c = torch.where(c == -math.inf, c, options.softcap * torch.tanh(c / options.softcap))
    row_max, log_sum = stats[:, :1], stats[:, 1:] * 0.6931471805599453
    return (c - row_max) / options.temperature - log_sum


def forward(student: Tensor, teacher: Tensor | None, tokens: Tokens, options: LossOptions, backend: str) -> RowResults:
    """What `rows.forward` gives of such a loss."""
    assert tokens.topk_ids is not None
    ids, ignored = tokens.target_ids, (tokens.target_ids == options.ignore_index)[:, None]
    student_logps, _, stats = rows.token_forward(student, ids, options, backend)
    s, bounded = add_tail_class(support_logps(student, stats, tokens.topk_ids, options))
    if teacher is None:
        assert tokens.topk_logps is not None
        teacher_logps, on_support = given_logps(tokens, options), tokens.topk_logps
    else:
        teacher_logps, _, own = rows.token_forward(teacher, ids, options, backend)
        on_support = support_logps(teacher, own, tokens.topk_ids, options)
    t, _ = add_tail_class(on_support)
    per_token, g = class_gradients(s, t, options.alpha)
    p, tail = s[:, :-1].exp(), s[:, -1:].exp()
    through_tail = torch.where(bounded, 0.0, g[:, -1:] / tail)
    g = g[:, :-1] - weighted(p, through_tail.expand_as(p))
    total = g.sum(-1, keepdim=True)
    g = g - weighted(p, total.expand_as(p))
    rest = stats.new_zeros(len(stats), STATISTICS - 3)
    return RowResults(
        torch.where(ignored[:, 0], 0.0, per_token),
        coefficients(tokens, student_logps, options),
        student_logps,
        teacher_logps,
        torch.where(ignored, 0.0, torch.cat([stats, -total, rest], -1)),
        torch.where(ignored, 0.0, g).contiguous(),
    )
