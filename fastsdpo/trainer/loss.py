r"""From hidden states to one loss, as pure functions.

    loss = sum_t w_t (r_t l_t + beta KL(p_S || p_0)_t)

l_t is the divergence of `fastsdpo.ops.divergence`, p_0 the initial model without the follow-up, and w_t
the weight of a response token. With n_i the tokens of answer i that count (its first
``ignore_first_k`` do not), S the answers of the *global* batch with n_i > 0 (all accumulation
steps, all processes) and N = sum_i n_i over the same:

    normalization="sequence":  w_t = 1 / (n_i S)          (the papers')
    normalization="token":     w_t = 1 / N

S or N is counted before the first micro-step, so the micro-batches' losses and gradients add up to
exactly those of one large batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops.divergence import SDPOLossOutput
from fastsdpo.ops.linear import linear_sdpo_loss
from fastsdpo.ops.linear_token_logps import linear_token_logps
from fastsdpo.prefix import HeadParameters, ResponseStates

IGNORE_INDEX = -100


class TokenStatistics(NamedTuple):
    """What one pass says about its response tokens; all ``[N]``, detached, on the device.

    Attributes:
        counts: bool, the token is part of the loss.
        per_token_loss: l_t, in nats (0 where the token does not count).
        log_ratio: teacher's minus student's log-probability of the token, in nats.
        student_logps, teacher_logps: nats.
        reference_kl: KL(p_S || p_0), nats; None without the term.
        sequence_loss: ``[interactions]`` each answer's share of the loss, to find the bad one.
        computed_tokens: how many tokens went through the model for it, shared prefixes once.
        trained_tokens: those of them that the backward pass goes through.
    """

    counts: Tensor
    per_token_loss: Tensor
    log_ratio: Tensor
    student_logps: Tensor
    teacher_logps: Tensor
    reference_kl: Tensor | None
    sequence_loss: Tensor
    computed_tokens: int = 0
    trained_tokens: int = 0


def count_items(lengths: Sequence[int], normalization: str, ignore_first_k: int) -> int:
    """S (answers that count) or N (tokens that count) of answers with these lengths in tokens."""
    counted = [max(0, length - ignore_first_k) for length in lengths]
    return sum(n > 0 for n in counted) if normalization == "sequence" else sum(counted)


def token_shares(lengths: Sequence[int], normalization: str, ignore_first_k: int) -> tuple[Tensor, Tensor]:
    """``(shares [N] float32, counts [N] bool)`` on the CPU, answers one after the other.

    A token's weight w_t is its share over S or N of the global batch; ``counts`` says which are part of the loss.

    Args:
        lengths: response tokens of each answer.
    """
    sizes = torch.tensor(list(lengths), dtype=torch.int64)
    starts = sizes.cumsum(0) - sizes
    position = torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)
    counts = position >= ignore_first_k
    shares = counts.to(torch.float32)
    if normalization == "sequence":
        shares = shares / (sizes - ignore_first_k).clamp(min=1).repeat_interleave(sizes)
    return shares, counts


def weigh(shares: Tensor, num_items: int | float | Tensor) -> Tensor:
    """The weights w_t ``[N]`` of `token_shares`, on ``num_items``'s device where that is a tensor.

    Args:
        num_items: S or N of the global batch.
    """
    if isinstance(num_items, (int, float)):
        return shares / max(1, num_items)
    return shares.to(num_items.device) / num_items.clamp(min=1)


def sdpo_step_loss(
    states: ResponseStates,
    head: HeadParameters,
    *,
    weights: Tensor,
    counts: Tensor,
    sequences: int,
    teacher_head: HeadParameters | None,
    reference: tuple[Tensor, HeadParameters | None] | None,
    reference_kl: float,
    is_clip: float | None = None,
    old_logps: Tensor | None = None,
    advantages: Tensor | None = None,
    ppo_clip: float | None = None,
    center_advantages: bool = False,
    **options: Any,
) -> tuple[Tensor, TokenStatistics]:
    """The loss of one pass.

    Args:
        states: student's hidden states ``[N, D]`` and teacher's ``[N, D_T]``.
        head: the student's head.
        weights: ``[N]`` w_t.
        counts: ``[N]`` bool, tokens that are part of the loss.
        sequences: number of interactions in the pass.
        teacher_head: the teacher's head where it is another than the student's.
        reference: ``[N, D]`` of the initial model without the follow-up, and its head where it is another than the
            student's; needed for ``reference_kl``, and for ``is_clip`` without ``old_logps``.
        reference_kl: beta.
        is_clip: cap of the importance ratio r_t.
        old_logps: ``[N]`` log-probabilities under the policy that wrote the answers; with
            ``is_clip`` and without these, the initial model's.
        advantages: ``[N]`` A_t for `ppo_clip`; None: the log-ratio of this pass.
        ppo_clip: l_t is the clipped policy loss (`ppo_token_loss`), for ``mode="sampled_token"``;
            without `old_logps` the answers are taken as drawn from the student as it is.
        center_advantages: with `ppo_clip`, subtract each answer's mean A_t.
        options: ``mode``, ``alpha``, ``topk``, ``add_tail``, ``temperature``, ``backend``,
            ``chunk_size`` of `linear_sdpo_loss`.

    Returns:
        ``(loss, statistics)``: a scalar with gradients to hidden states and head.
    """
    device = states.student_hidden.device
    weights, counts = weights.to(device), counts.to(device)
    targets = states.target_ids.masked_fill(~counts, IGNORE_INDEX)
    rows = _ResponseRows(states.student_hidden, head, targets, weights, options)
    teacher_head = head if teacher_head is None else teacher_head
    reference_hidden, reference_head = reference or (None, None)
    reference_head = head if reference_head is None else reference_head
    if ppo_clip is not None:
        out = ppo_token_loss(
            rows.logps(states.student_hidden, head),
            rows.logps(states.teacher_hidden, teacher_head).detach(),
            weights,
            states.sequence_ids,
            counts,
            clip=ppo_clip,
            old_logps=old_logps,
            advantages=advantages,
            center=center_advantages,
        )
    else:
        if is_clip is not None and old_logps is None:
            assert reference_hidden is not None
            old_logps = rows.logps(reference_hidden, reference_head).detach()
        ratio = {} if is_clip is None else {"old_logps": old_logps, "is_clip": is_clip}
        out = rows.divergence(states.teacher_hidden, teacher_head, **options, **ratio)
    loss, per_token, kl = out.loss, out.per_token_loss, None
    if reference_kl > 0:
        assert reference_hidden is not None
        away = rows.divergence(reference_hidden, reference_head, mode="full", alpha=1.0)
        kl = away.per_token_loss
        loss, per_token = loss + reference_kl * away.loss, per_token + reference_kl * kl
    sequence_loss = torch.zeros(sequences, device=device, dtype=per_token.dtype)
    sequence_loss.index_add_(0, states.sequence_ids, weights.to(per_token.dtype) * per_token)
    return loss, TokenStatistics(
        counts, out.per_token_loss, out.log_ratio, out.student_logps, out.teacher_logps, kl, sequence_loss
    )


class _ResponseRows:
    """The response tokens of a pass, as the losses from hidden states take them."""

    def __init__(
        self, hidden: Tensor, head: HeadParameters, targets: Tensor, weights: Tensor, options: dict[str, Any]
    ):
        self.hidden, self.head, self.targets, self.weights = hidden, head, targets, weights
        self.options = {
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "temperature": options.get("temperature", 1.0),
            "chunk_size": options.get("chunk_size"),
            "backend": options.get("backend", "auto"),
        }

    def logps(self, hidden: Tensor, head: HeadParameters) -> Tensor:
        """``[N]`` log-probabilities of the tokens; 0 where one does not count."""
        with torch.set_grad_enabled(hidden is self.hidden and torch.is_grad_enabled()):
            return linear_token_logps(hidden, head.weight, self.targets, bias=head.bias, **self.options)

    def divergence(self, hidden: Tensor, head: HeadParameters, **options: Any) -> SDPOLossOutput:
        """Of the student's rows from those of a teacher."""
        other = {} if head is self.head else {"teacher_weight": head.weight, "teacher_bias": head.bias}
        return linear_sdpo_loss(
            self.hidden,
            hidden,
            self.head.weight,
            self.targets,
            bias=self.head.bias,
            weights=self.weights,
            **other,
            **{**options, **self.options},
        )


def ppo_token_loss(
    logps: Tensor,
    teacher_logps: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
    counts: Tensor,
    *,
    clip: float,
    old_logps: Tensor | None = None,
    advantages: Tensor | None = None,
    center: bool = False,
) -> SDPOLossOutput:
    r"""The clipped policy loss of the published online recipe (https://arxiv.org/abs/2603.12273).

        l_t = -min(r_t A_t, clamp(r_t, 1 - c, 1 + c) A_t),    r_t = exp(log p_S - log p_old)

    The gradient is that of l_t with centered A_t. Where r_t = 1 an answer's centered l_t add up to 0, so the
    value that is returned, to be logged, is that of l_t with A_t as it is.

    Args:
        logps: ``[N]`` the student's, with gradient.
        teacher_logps: ``[N]``
        weights: ``[N]`` w_t.
        sequence_ids: ``[N]`` which answer the token belongs to.
        counts: ``[N]`` bool, tokens that are part of the loss.
        clip: c.
        old_logps: ``[N]`` at sampling time; None: the student's own, r_t = 1.
        advantages: ``[N]`` A_t; None: teacher's minus student's log-probability.
        center: subtract from A_t its mean over the answer's tokens that count.
    """
    student = logps.detach()
    log_ratio = teacher_logps.detach() - student
    advantage = log_ratio if advantages is None else advantages.to(student)
    uncentered = advantage = torch.where(counts, advantage, 0.0)
    if center and len(sequence_ids):
        answers = int(sequence_ids.max()) + 1
        sums = advantage.new_zeros(answers).index_add_(0, sequence_ids, advantage)
        sizes = advantage.new_zeros(answers).index_add_(0, sequence_ids, counts.to(advantage))
        advantage = torch.where(counts, advantage - (sums / sizes.clamp(min=1))[sequence_ids], 0.0)
    old = student if old_logps is None else old_logps.to(student)
    ratio = (logps - old).clamp(-20, 20).exp()

    def clipped(advantage: Tensor) -> Tensor:
        per_token = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        return torch.where(counts, per_token, 0.0)

    per_token, logged = clipped(advantage), clipped(uncentered).detach()
    loss = (weights.to(per_token) * per_token).sum()
    loss = loss + ((weights.to(logged) * logged).sum() - loss).detach()
    return SDPOLossOutput(loss, logged, log_ratio, student, teacher_logps.detach())


def guide(followup_hidden: Tensor, unguided: ResponseStates, guidance: float) -> Tensor:
    """Hidden states of a guided teacher, q proportional to p(. | x) (p(. | x, o) / p(. | x, n))^g.

    Everything under the teacher's weights; n is a neutral follow-up, or none: then q is proportional
    to p(. | x)^(1-g) p(. | x, o)^g. What any follow-up does to the answer cancels, and what this one
    says counts g times. As in `mix_teachers`, logits under one head (without a softcap) are linear
    in the hidden states:

        z_x + g (z_o - z_n) = W (h_x + g (h_o - h_n)) + b

    The idea is that of classifier-free guidance with a negative prompt, https://arxiv.org/abs/2306.17806.

    Args:
        followup_hidden: h_o, ``[N, D]``.
        unguided: h_x as ``student_hidden`` and h_n as ``teacher_hidden``, ``[N, D]``.
        guidance: g.
    """
    base, neutral = unguided.student_hidden.float(), unguided.teacher_hidden.float()
    guided = base + guidance * (followup_hidden.float() - neutral)
    return guided.to(followup_hidden.dtype)


def mix_teachers(
    frozen_hidden: Tensor,
    live_hidden: Tensor,
    frozen_head: HeadParameters | None,
    live_head: HeadParameters,
    mix: float,
) -> tuple[Tensor, HeadParameters | None]:
    """The trust-region teacher, q proportional to exp((1-a) log q_frozen + a log q_live), a = ``mix``.

    Log-probabilities are logits up to a constant that the normalization removes, so q has the logits
    (1-a) z_frozen + a z_live. These are linear in the hidden states:

        one head:    W ((1-a) h_frozen + a h_live) + b
        two heads:   [W_frozen, W_live] [(1-a) h_frozen; a h_live] + (1-a) b_frozen + a b_live

    so the mixture is exact and its logits never exist as a whole either. (A softcap between head and
    logits would break this; the trainer refuses it.)

    Returns:
        ``(hidden [N, D] or [N, 2D], head)``; the head is None where the live one serves.
    """
    frozen, live = frozen_hidden.float() * (1 - mix), live_hidden.float() * mix
    if frozen_head is None:
        return frozen + live, None
    bias = None
    if frozen_head.bias is not None and live_head.bias is not None:
        bias = (1 - mix) * frozen_head.bias + mix * live_head.bias.detach()
    weight = torch.cat([frozen_head.weight, live_head.weight.detach()], dim=1)
    return torch.cat([frozen, live], dim=1), frozen_head._replace(weight=weight, bias=bias)
