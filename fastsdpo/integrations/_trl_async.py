"""The loss of TRL's `AsyncDistillationTrainer`, replaced."""

from __future__ import annotations

import importlib
import inspect
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fastsdpo.integrations._trl_originals import NEEDED
from fastsdpo.ops.linear_token_logps import linear_token_logps

MODULE = "trl.experimental.async_distillation.async_distillation_trainer"
ARGUMENTS = (
    *("hidden_valid", "lm_head_weight", "lm_head_bias", "logit_scale", "final_logit_softcapping"),
    *("target_ids", "teacher_target_logps", "valid_candidate_mask", "beta", "temperature", "add_tail_bucket"),
    *("teacher_id_idx", "num_teachers", "chunk_size"),
)


def async_trainer() -> Any:
    """TRL's module; raises an ImportError where its loss takes other arguments than expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        module = importlib.import_module(MODULE)
    found = tuple(inspect.signature(module._chunked_jsd_loss).parameters)
    if found != ARGUMENTS:
        raise ImportError(
            f"fastsdpo.integrations.trl: TRL {version('trl')} differs from {NEEDED}, for which this was written, in "
            f"what is replaced: _chunked_jsd_loss({', '.join(found)}). Install TRL {NEEDED} or a newer fastsdpo."
        )
    return module


def replacement(module: Any) -> Any:
    """A function in the place of ``module._chunked_jsd_loss``, with its arguments and results.

    One pass over the head gives the candidates' log-probs and the entropy. TRL's own formulas for the K candidates
    of a token follow. TRL's function runs where the logit scale is not positive.
    """
    theirs = module._chunked_jsd_loss

    def chunked_jsd_loss(**given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if given["logit_scale"] <= 0:
            return theirs(**given)
        hidden, weight, bias = given["hidden_valid"], given["lm_head_weight"], given["lm_head_bias"]
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.float()
        ids, mask = given["target_ids"].clamp_min(0), given["valid_candidate_mask"]
        _, entropy, student = linear_token_logps(
            hidden,
            weight,
            ids[:, 0],
            bias=bias,
            extra_ids=ids,
            return_entropy=True,
            temperature=given["temperature"],
            softcap=given["final_logit_softcapping"] or None,
            logit_scale=given["logit_scale"],
        )
        student = torch.where(mask, student, -torch.inf)
        teacher = torch.where(mask, given["teacher_target_logps"], -torch.inf)
        if given["add_tail_bucket"]:
            student, classes = module._add_tail_bucket(student, mask)
            teacher, _ = module._add_tail_bucket(teacher, mask)
        else:
            student, classes = student - torch.logsumexp(student, -1, keepdim=True), mask
            teacher = teacher - torch.logsumexp(teacher, -1, keepdim=True)
        per_token = module._jsd_divergence(student, teacher, beta=given["beta"], support_mask=classes).sum(-1)
        loss = per_token.sum()
        with torch.no_grad():
            of_teacher = torch.where(classes, -teacher.exp() * torch.where(classes, teacher, 0.0), 0.0)
            of_teacher = torch.nan_to_num(of_teacher, nan=0.0).sum(-1)
            stats = [loss.detach(), entropy.sum(), of_teacher.sum()]
            per_teacher = _per_teacher(given["teacher_id_idx"], given["num_teachers"], per_token.detach(), of_teacher)
        return loss, *stats, per_teacher

    def by_position(*args: Any, **kwargs: Any) -> Any:
        return chunked_jsd_loss(**dict(zip(ARGUMENTS, args)), **kwargs)

    return by_position


def _per_teacher(which: Tensor | None, teachers: int, per_token: Tensor, of_teacher: Tensor) -> Tensor:
    """``[3 * teachers]``: tokens, divergence and entropy of each teacher, in turn."""
    stats = per_token.new_zeros(teachers, 3)
    if which is not None:
        stats.index_add_(0, which, torch.stack([torch.ones_like(per_token), per_token, of_teacher], -1))
    return stats.reshape(-1)
