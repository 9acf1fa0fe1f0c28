"""TRL's `DistillationTrainer`: the divergence of two heads, without logits.

The trainer computes the hidden states of student and teacher at the completion's tokens, and hands them with both
heads to a function of its module, `_chunked_divergence_loss`. This is replaced by `chunked_divergence_loss`. Both give
the generalized Jensen-Shannon divergence of the tokens that count and the student's entropy; TRL's takes 6 to 8
products of a head for it, ours 5.

Not computed here, so that TRL's own function runs: softcaps that differ between the two models, and a logit scale that
is not positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsdpo.integrations._head_logits import HeadLogits, divergence
from fastsdpo.integrations._trl_installed import Replacement, trl_module
from fastsdpo.integrations.transformers import gathered, label_logps
from fastsdpo.prefix import HeadParameters

MODULE = trl_module("trainer.distillation_trainer")
THEIRS = MODULE._chunked_divergence_loss


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """In the place of TRL's function, with its arguments.

    Args:
        student_hidden_states, teacher_hidden_states: ``[B, T, D]``, each model with its own D.
        student_lm_head_weight, teacher_lm_head_weight: ``[V, D]``; the biases ``[V]``.
        completion_mask: ``[B, T]``, not 0 where a token counts.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher).
        num_items_in_batch: divides the sum over the tokens; None is the number of tokens that count.

    Returns:
        ``(loss, sum of the student's entropies in nats, number of tokens that count)``.
    """
    given = dict(locals())
    softcap = student_final_logit_softcapping or None
    if softcap != (teacher_final_logit_softcapping or None) or min(student_logit_scale, teacher_logit_scale) <= 0:
        return THEIRS(**given)
    head = HeadParameters(student_lm_head_weight, student_lm_head_bias, softcap, student_logit_scale)
    other = HeadParameters(teacher_lm_head_weight, teacher_lm_head_bias, softcap, teacher_logit_scale)
    counts = completion_mask != 0
    count = counts.sum()
    divisor = count.clamp(min=1) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    weight = (1.0 / divisor.to(count.device)).to(torch.float32)
    with gathered(head.weight, head.bias, other.weight, other.bias):
        student, teacher = HeadLogits(student_hidden_states, head), HeadLogits(teacher_hidden_states, other)
        with torch.no_grad():
            any_token = torch.where(counts, 0, -100)  # the entropy does not depend on the token
            _, entropy = label_logps(student_hidden_states, head, any_token, temperature, return_entropy=True)
        loss = divergence(student, teacher, counts, beta, weight, temperature)
    return loss, entropy.sum(), count


REPLACEMENTS = [Replacement(MODULE, "_chunked_divergence_loss", chunked_divergence_loss)]
