r"""Self-distillation losses between student and teacher rows, straight from their logits.

With p, q the student's and teacher's probabilities of one row, s and t their logs, A = t[y] - s[y]:

    sampled_token   loss = -stopgrad(A) s[y]                dL/du_v = -A (1[v = y] - p_v)
    alpha = 0       loss = KL(q || p)                       dL/du_v = p_v - q_v
    alpha = 1       loss = KL(p || q)                       dL/du_v = p_v (s_v - t_v - KL)
    0 < alpha < 1   loss = (1-a) KL(p || m) + a KL(q || m)  dL/du_v = (1-a) p_v (s_v - log m_v - KL(p || m))
                    m = (1-a) p + a q
    top-k           the same over K classes of the support and, with a tail, one class for the rest;
                    outside the support the tail's gradient is shared out in proportion to p_v

(equations 1 to 4 of https://arxiv.org/abs/2603.12273; the ends alpha = 0 and 1 are defined as forward
and reverse KL, where the mixture formula tends to 0). The total is ``sum_t w_t r_t l_t`` with r_t the
clipped importance ratio, so a row of the gradient is ``w_t r_t / temperature * dL/du * dc/dz``.

sampled_token and alpha = 1 are two objectives. For a y drawn from p they have the same expected gradient
only if the teacher's context does not depend on y; a follow-up answers y, so for it they differ, and can
have opposite signs (docs/objectives.md).

Saved between forward and backward: both logits and at most five float32 numbers per row. Bytes per
token and vocabulary element in bf16, forward + backward: sampled 8, KL 10, JSD 14, top-k 8 to 10 plus
the selection of the support; plain PyTorch moves 36 to 170.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops import _operators
from fastsdpo.ops.backend import resolve_backend
from fastsdpo.ops.checks import (
    accumulation_dtype,
    as_rows,
    check_alpha,
    check_ignore_index,
    check_is_clip,
    check_like,
    check_logits,
    check_softcap,
    check_temperature,
    check_tensor,
    check_topk,
    cut_vocabulary,
    flat_float,
    flat_ids,
)
from fastsdpo.ops.rows import LossOptions, Tokens, support, token_advantage
from fastsdpo.ops.token_logps import check_pair

LOSS_MODES = ("sampled_token", "full", "topk")


class SDPOLossOutput(NamedTuple):
    """Result of `sdpo_loss` and `linear_sdpo_loss`.

    All but ``loss`` have the shape of ``target_ids``, carry no gradient and are 0 at ignored tokens.

    Attributes:
        loss: a scalar; call ``backward`` on it.
        per_token_loss: l_t of each token in nats, before ``weights`` and the importance ratio.
        log_ratio: ``teacher_logps - student_logps``, the signal: above 0 where the follow-up makes the
            token more likely.
        student_logps, teacher_logps: log-probability of each target token, in nats.
    """

    loss: Tensor
    per_token_loss: Tensor
    log_ratio: Tensor
    student_logps: Tensor
    teacher_logps: Tensor


def check_loss(
    name: str,
    shape: torch.Size,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    target_ids: Tensor,
    *,
    teacher: str,
    has_teacher: bool,
    mode: str,
    alpha: float,
    topk: int | None,
    add_tail: bool,
    weights: Tensor | None,
    teacher_logps: Tensor | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
    old_logps: Tensor | None,
    is_clip: float | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    bounded_tail: bool = False,
    ce_weights: Tensor | None = None,
    ce_temperature: float = 1.0,
) -> tuple[LossOptions, Tokens]:
    """Checks everything but the logits (or hidden states) themselves and flattens the tokens.

    ``teacher`` names the argument that holds the teacher's whole distribution.
    """

    def flat(argument: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else flat_float(check_like(name, argument, value, shape, device), dtype)

    if mode not in LOSS_MODES:
        raise ValueError(f"{name}: mode must be one of {LOSS_MODES}, got {mode!r}")
    alpha = check_alpha(name, alpha)
    if mode == "sampled_token" and alpha != 1.0:
        raise ValueError(f"{name}: alpha must be 1.0 for mode='sampled_token', got {alpha}")
    sources = {
        teacher: has_teacher,
        "teacher_logps": teacher_logps is not None,
        "teacher_topk": teacher_topk is not None,
    }
    given = [source for source, present in sources.items() if present]
    if len(given) != 1:
        raise ValueError(
            f"{name}: exactly one of {teacher}, teacher_logps and teacher_topk must be given, "
            f"got {' and '.join(given) or 'none'}"
        )
    if teacher_logps is not None and mode != "sampled_token":
        raise ValueError(f"{name}: teacher_logps must come with mode='sampled_token', got mode={mode!r}")
    if teacher_topk is not None and mode != "topk":
        raise ValueError(f"{name}: teacher_topk must come with mode='topk', got mode={mode!r}")
    if topk is not None and mode != "topk":
        raise ValueError(f"{name}: topk must be None unless mode='topk', got topk={topk}")
    check_is_clip(name, is_clip)
    ignore_index = check_ignore_index(name, ignore_index)
    target_ids = check_like(name, "target_ids", target_ids, shape, device, integer=True)

    topk_ids = topk_logps = None
    if teacher_topk is not None:
        topk_ids, topk_logps = _check_teacher_topk(name, teacher_topk, topk, vocabulary, shape, device, dtype)
        topk = topk_ids.shape[-1]
        # Padding may hold any ids where the target is ignored.
        ignored = (target_ids == ignore_index).reshape(-1, 1)
        topk_ids = torch.where(ignored, torch.arange(topk, device=device), topk_ids)
    elif mode == "topk":
        topk = check_topk(name, topk, vocabulary)
    bounded_tail = bounded_tail and mode == "topk" and add_tail
    if mode == "topk" and topk == vocabulary and not bounded_tail:
        add_tail = False  # nothing lies outside the support: the tail class would be empty
    if topk_logps is not None and add_tail and not bounded_tail:
        # Rounded probabilities may sum to 1 or more. Scale them below 1: the divergence needs some tail.
        excess = (topk_logps.logsumexp(-1, keepdim=True) + 1e-7).clamp(min=0)
        topk_logps = topk_logps - excess

    options = LossOptions(
        temperature=check_temperature(name, temperature),
        softcap=check_softcap(name, softcap),
        ignore_index=ignore_index,
        mode=mode,
        alpha=alpha,
        topk=topk or 0,
        add_tail=bool(add_tail),
        is_clip=float(is_clip or 0.0),
        bounded_tail=bounded_tail,
        ce_temperature=check_temperature(name, ce_temperature, "ce_temperature"),
    )
    ids = flat_ids(target_ids)
    if weights is None:
        counts = ids != ignore_index
        flat_weights = counts.to(dtype) / counts.sum().clamp(min=1)
    else:
        flat_weights = flat("weights", weights)
    old_logps, teacher_logps = flat("old_logps", old_logps), flat("teacher_logps", teacher_logps)
    ce_weights = flat("ce_weights", ce_weights)
    old_logps = None if is_clip is None else old_logps
    return options, Tokens(ids, flat_weights, old_logps, teacher_logps, topk_ids, topk_logps, ce_weights)


def _check_teacher_topk(
    name: str,
    pair: tuple[Tensor, Tensor],
    topk: int | None,
    vocabulary: int,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The teacher's support as ``[N, K]`` int64 and its log-probs ``[N, K]``."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: teacher_topk must be a pair (ids, logps)")
    ids = check_tensor(name, "teacher_topk ids", pair[0])
    k = ids.shape[-1] if ids.ndim else 0
    if topk is not None and topk != k:
        raise ValueError(f"{name}: topk must equal teacher_topk's K = {k}, got {topk}")
    check_topk(name, k, vocabulary)
    ids = check_like(name, "teacher_topk ids", ids, (*shape, k), device, integer=True)
    logps = check_like(name, "teacher_topk logps", pair[1], (*shape, k), device)
    return ids.reshape(-1, k).to(torch.int64).contiguous(), logps.detach().reshape(-1, k).to(dtype).contiguous()


def sdpo_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target_ids: Tensor,
    *,
    mode: Literal["sampled_token", "full", "topk"] = "sampled_token",
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
    backend: str = "auto",
) -> SDPOLossOutput:
    """Self-distillation loss ``sum_t w_t r_t l_t`` of the student towards the hindsight teacher.

    With ``ce_weights`` h a cross entropy of the targets is added, ``- sum_t h_t log p'_S[y_t]``, and its gradient
    to the divergence's: the hard-label term of knowledge distillation.

    Formulas and gradients are in the module docstring (equations 1 to 4 of
    https://arxiv.org/abs/2603.12273; top-k with a tail bucket from https://arxiv.org/abs/2601.20802).

    Args:
        student_logits: ``(..., V)`` float16, bfloat16, float32 or float64; rows may be strided.
        teacher_logits: the same shape, any of those dtypes, never a gradient; None where
            ``teacher_logps`` or ``teacher_topk`` stands for it.
        target_ids: ``(...)`` integer in [0, V), the response's tokens, or ``ignore_index``.
        mode: ``"sampled_token"`` (``-stopgrad(A_t) log p_S[y_t]``), ``"full"`` (the divergence over
            the vocabulary) or ``"topk"`` (over a support of K tokens). The first is no estimate of the
            second where the teacher's context answers the response (see the module).
        alpha: 0 forward KL(p_T || p_S), 1 reverse KL(p_S || p_T), between generalized
            Jensen-Shannon; 1.0 for ``"sampled_token"``.
        topk: size of the student's support, for ``mode="topk"``; which of several equal logits are the
            last of it is the backend's choice.
        add_tail: one more class for all tokens outside the support; False renormalizes both
            distributions over it.
        weights: ``(...)`` w_t; None is the mean over the tokens that are not ignored. A token of weight 0 costs and
            gives nothing, even where its logits or hidden states are not finite.
        teacher_logps: ``(...)`` the teacher's log-probs of the targets, for ``"sampled_token"``.
        teacher_topk: ``(ids (..., K), logps (..., K))`` the teacher's most likely tokens and their
            log-probs under its whole distribution, for ``"topk"``; ids distinct in each row.
        old_logps, is_clip: with both, ``r_t = min(exp(clamp(log p_S[y_t] - old_logps_t, -20, 20)),
            is_clip)`` without gradient; else ``r_t = 1``.
        ce_weights: ``(...)`` h_t of the cross entropy, beside ``weights``, not in place of them; None adds none.
        ce_temperature: of p'_S = softmax(c / ce_temperature); the divergence has ``temperature``.
        vocab_size: only the first so many logits are tokens, the rest are padding: student and teacher may then
            differ in V. None: all.
        temperature, softcap: of the effective logits ``u``, for both policies.
        ignore_index: targets equal to it cost and give nothing, whatever their logits hold.
        inplace_grad: lets backward overwrite ``student_logits`` with their gradient. A later use
            of the logits by autograd raises. Under `torch.compile` the gradient is allocated.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        `SDPOLossOutput`; float32 (float64 for float64 logits). ``teacher_logps`` is NaN where only
        ``teacher_topk`` is known and the target lies outside it.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range, by name.
        ImportError: a backend asked for by name that is not installed.

    ``per_token_loss`` is the divergence alone; the cross entropy is ``loss - sum_t w_t r_t l_t``.

    Numerics: statistics and loss in float32; a divergence that is truly infinite is ``inf``. Its
        gradient is then not finite.
    Memory: nothing of size V but the gradient of ``student_logits``, and not that in place.
    """
    name = "sdpo_loss"
    student_logits = cut_vocabulary(name, "student_logits", student_logits, vocab_size, -1)
    teacher_logits = cut_vocabulary(name, "teacher_logits", teacher_logits, vocab_size, -1)
    if teacher_logits is None:
        student = check_logits(name, "student_logits", student_logits)
    else:
        student, teacher_logits = check_pair(name, student_logits, teacher_logits)
    shape, vocabulary = student.shape[:-1], student.shape[-1]
    both = (student,) if teacher_logits is None else (student, teacher_logits)
    options, tokens = check_loss(
        name,
        shape,
        vocabulary,
        student.device,
        accumulation_dtype(*both),
        target_ids,
        teacher="teacher_logits",
        has_teacher=teacher_logits is not None,
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
    backend = resolve_backend(name, backend, *both)
    return rows_loss(student, teacher_logits, tokens, options, backend, inplace_grad)


def rows_loss(
    student: Tensor,
    teacher: Tensor | None,
    tokens: Tokens,
    options: LossOptions,
    backend: str,
    inplace_grad: bool = False,
) -> SDPOLossOutput:
    """`sdpo_loss` of a checked call; logits ``(..., V)``."""
    if teacher is not None:
        teacher = as_rows(teacher.detach())
    eager = _operators.is_real(student)
    if options.mode == "topk" and tokens.topk_ids is None:
        choose = support if eager else _operators.support_op
        logits, ids = as_rows(student.detach()), tokens.target_ids
        ids = choose(logits, ids, options.topk, options.ignore_index, backend)
        tokens = tokens._replace(topk_ids=ids)
    if eager:
        # Rows of an expanded tensor share memory: a gradient in place would overwrite itself.
        inplace = inplace_grad and 0 not in student.stride()
        found = _operators.SDPOFunction.apply(student, teacher, tokens, options, inplace, backend)
    else:
        loss, *results = _operators.sdpo_op(as_rows(student), teacher, list(tokens), *options.packed(), backend)
        found = loss, results[0], results[2], results[3]
    return loss_output(found, student.shape[:-1])


def loss_output(found: Sequence[Tensor], shape: torch.Size) -> SDPOLossOutput:
    """From ``(loss, per_token, student_logps, teacher_logps)``, the last three ``[N]``."""
    loss, per_token, student_logps, teacher_logps = found
    if len(shape) != 1:
        per_token, student_logps, teacher_logps = (
            vector.view(shape) for vector in (per_token, student_logps, teacher_logps)
        )
    advantage = token_advantage(student_logps, teacher_logps)
    return SDPOLossOutput(loss, per_token, advantage, student_logps, teacher_logps)
