"""TRL's `AsyncDistillationTrainer`: log-probs and entropy in one pass over the head.

Servers score the rollouts: for every token K candidates with the teacher's log-probs. The trainer computes hidden
states and calls a function of its module, `_chunked_jsd_loss`, for the divergence over the candidates (with
``add_tail_bucket`` one more class holds the rest) and the entropies of both. This function is replaced by
`chunked_jsd_loss`: log-probs of the candidates and the student's entropy come from one pass over the head, without
logits. TRL's own formulas for the K candidates of a token follow.

Not computed here, so that TRL's own function runs: a logit scale that is not positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsdpo.integrations._trl_installed import Replacement, trl_module
from fastsdpo.ops.linear_token_logps import linear_token_logps

MODULE = trl_module("experimental.async_distillation.async_distillation_trainer")
THEIRS = MODULE._chunked_jsd_loss


def chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In the place of TRL's function, with its arguments.

    Args:
        hidden_valid: ``[N, D]`` of the tokens that count; lm_head_weight ``[V, D]``, lm_head_bias ``[V]``.
        target_ids, teacher_target_logps, valid_candidate_mask: ``[N, K]`` the candidates; where the mask is False
            there is none.
        teacher_id_idx: ``[N]`` which of ``num_teachers`` scored a token; None where that is not asked for.

    Returns:
        ``(loss, loss without gradient, the student's entropy, the teacher's)``, sums over the tokens in nats, and
        ``[3 * num_teachers]``: tokens, divergence and entropy of each teacher in turn.
    """
    if logit_scale <= 0:
        return THEIRS(**locals())
    if not torch.is_autocast_enabled(hidden_valid.device.type):
        hidden_valid = hidden_valid.float()
    ids, mask = target_ids.clamp_min(0), valid_candidate_mask
    _, entropy, student = linear_token_logps(
        hidden_valid,
        lm_head_weight,
        ids[:, 0],
        bias=lm_head_bias,
        extra_ids=ids,
        return_entropy=True,
        temperature=temperature,
        softcap=final_logit_softcapping or None,
        logit_scale=logit_scale,
    )
    student = torch.where(mask, student, -torch.inf)
    teacher = torch.where(mask, teacher_target_logps, -torch.inf)
    if add_tail_bucket:
        student, classes = MODULE._add_tail_bucket(student, mask)
        teacher, _ = MODULE._add_tail_bucket(teacher, mask)
    else:
        student, classes = student - torch.logsumexp(student, -1, keepdim=True), mask
        teacher = teacher - torch.logsumexp(teacher, -1, keepdim=True)
    # A candidate of probability 0 has no gradient; with -inf it would be NaN.
    student = student.clamp_min(torch.finfo(student.dtype).min)
    per_token = MODULE._jsd_divergence(student, teacher, beta=beta, support_mask=classes).sum(-1)
    with torch.no_grad():
        of_teacher = torch.where(classes, -teacher.exp() * torch.where(classes, teacher, 0.0), 0.0)
        of_teacher = torch.nan_to_num(of_teacher, nan=0.0).sum(-1)
        stats = per_token.new_zeros(num_teachers, 3)
        if teacher_id_idx is not None:
            stats.index_add_(0, teacher_id_idx, torch.stack([torch.ones_like(per_token), per_token, of_teacher], -1))
    loss = per_token.sum()
    return loss, loss.detach(), entropy.sum(), of_teacher.sum(), stats.reshape(-1)


REPLACEMENTS = [Replacement(MODULE, "_chunked_jsd_loss", chunked_jsd_loss)]
