"""axolotl's knowledge-distillation plugin, with the loss of the teacher's top-k tokens from hidden states.

    plugins:
      - fastsdpo.integrations.axolotl.FastKDPlugin        # in place of axolotl.integrations.kd.KDPlugin

axolotl keeps the hidden states of every layer, sends every token through the head, a chunk at a time, and forms the
gradient of the head even where it is frozen (LoRA). Here the loss takes the place of the head in the model's own
forward pass, and only tokens that count reach it. Settings, data, collators and callbacks are axolotl's: the plugin
differs from axolotl's in its trainer class alone, and that class in ``compute_loss`` (`FastKDTrainer`), which forms
`kd_loss`.

    loss = sum over tokens (kd_alpha * T^2 * KD + kd_ce_alpha * CE) / num_items_in_batch

KD is over the K tokens of the data. With ``kd_beta`` 0 it is KL(teacher || student), with 1 KL(student || teacher),
between them the generalized Jensen-Shannon divergence; ``kd_normalize_topk`` renormalizes the student over the K. The
gradient lacks T^2, the value has it: so it is in axolotl, and so it stays.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.integrations._hidden_or_logits import why_not_model
from fastsdpo.integrations.transformers import gathered_head
from fastsdpo.ops.linear import linear_sdpo_loss
from fastsdpo.ops.linear_token_logps import linear_token_logps
from fastsdpo.prefix import HeadParameters, head_parameters, run_inside

DATA = ("labels", "target_token_ids", "target_logprobs", "target_mask")


class KDSettings(NamedTuple):
    """axolotl's ``kd_alpha``, ``kd_ce_alpha``, ``kd_temperature``, ``kd_beta`` and ``kd_normalize_topk``."""

    alpha: float
    ce_alpha: float = 0.0
    temperature: float = 1.0
    beta: float = 0.0
    normalize_topk: bool = False


def kd_loss(
    hidden: Tensor,
    head: HeadParameters,
    labels: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    mask: Tensor,
    settings: KDSettings,
) -> Tensor:
    """axolotl's loss, summed over tokens.

    Args:
        hidden: ``[B, L, D]``.
        labels: ``[B, L]``, aligned with the input; -100 where a token has no cross entropy.
        token_ids, logprobs, mask: ``[B, L, K]``, aligned with ``hidden``: what the teacher says of the next token, at
            the temperature; an entry whose mask is 0 does not count.
    """
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    mask = mask.to(torch.bool)
    has_label = (targets != -100) & (settings.ce_alpha > 0)
    taught = mask.any(-1) & (settings.alpha > 0)
    keep = taught | has_label
    hidden, targets, mask = hidden[keep], targets[keep].clamp(min=0), mask[keep]
    token_ids, logprobs = token_ids[keep], logprobs[keep].to(torch.promote_types(logprobs.dtype, torch.float32))
    soft, hard = taught[keep].to(torch.float32), has_label[keep].to(torch.float32)
    given = {"target_ids": targets, **head._asdict()}
    if settings.normalize_topk and bool((mask == mask[:, :1]).all()):
        # A row without a teacher gets a uniform one, over ids that differ.
        first = torch.arange(mask.shape[-1], device=mask.device)
        topk = torch.where(mask, token_ids, first), torch.where(mask, logprobs, -math.log(mask.shape[-1]))
        given |= {"mode": "topk", "teacher_topk": topk, "add_tail": False, "alpha": float(settings.beta)}
        given |= {"weights": settings.alpha * soft, "temperature": settings.temperature}
        if settings.ce_alpha > 0:
            given["ce_weights"] = settings.ce_alpha * hard
        out = linear_sdpo_loss(hidden, None, **given)
        loss, kd = out.loss, settings.alpha * (soft * out.per_token_loss).sum()
    else:
        logps = functools.partial(linear_token_logps, hidden, **given)
        label_logps, student = logps(temperature=settings.temperature, extra_ids=token_ids)
        kd = settings.alpha * _divergence(student, logprobs, mask & (soft > 0)[:, None], settings)
        loss = kd
        if settings.ce_alpha > 0:
            label_logps = label_logps if settings.temperature == 1.0 else logps()
            loss = loss - settings.ce_alpha * (hard * label_logps).sum()
    return loss + (settings.temperature**2 - 1) * kd.detach()


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor, settings: KDSettings) -> Tensor:
    """The sum over the entries that count; log-probs ``[N, K]``, which need not be those of a whole distribution."""
    if settings.normalize_topk:
        student = student.log_softmax(-1)
    student, teacher = student.masked_fill(~mask, 0.0), teacher.masked_fill(~mask, 0.0)
    beta = float(settings.beta)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        return terms.masked_fill(~mask, 0.0).sum()

    if beta in (0.0, 1.0):
        return kl(teacher, student) if beta == 0.0 else kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


@functools.cache
def _trainer() -> Any:
    from axolotl.integrations.kd.trainer import AxolotlKDTrainer

    class FastKDTrainer(AxolotlKDTrainer):
        """`AxolotlKDTrainer`, whose loss never forms logits of tokens that do not count.

        Raises:
            NotImplementedError: from the first step, for a head or an adapter that hidden states will not do for.
        """

        _fastsdpo_checked = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if return_outputs:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
            missing = [name for name in DATA if name not in inputs]
            if missing:
                raise KeyError(f"FastKDTrainer: the batch must have {', '.join(DATA)}, got none of {missing}")
            if not self._fastsdpo_checked:
                reason = why_not_model(self, model, None)
                if reason is not None:
                    raise NotImplementedError(
                        f"FastKDPlugin: {reason}; use axolotl.integrations.kd.KDPlugin if its loss computes this"
                    )
                self._fastsdpo_checked = True
            labels, ids, logprobs, mask = (inputs.pop(name) for name in DATA)
            if num_items_in_batch is None:
                num_items_in_batch = (labels != -100).sum().clamp(min=1)
            args = self.args
            settings = KDSettings(
                args.kd_alpha,
                args.kd_ce_alpha or 0.0,
                args.kd_temperature,
                args.kd_beta or 0.0,
                bool(args.kd_normalize_topk),
            )

            def body(hidden: Tensor) -> Tensor:
                with gathered_head(model):
                    return kd_loss(hidden, head_parameters(model), labels, ids, logprobs, mask, settings)

            return run_inside(model, body, {**inputs, "use_cache": False}) / num_items_in_batch

    return FastKDTrainer


@functools.cache
def _plugin() -> Any:
    from axolotl.integrations.kd import KDPlugin

    class FastKDPlugin(KDPlugin):
        """axolotl's `KDPlugin` with the loss of `kd_loss`; its settings are the same."""

        def get_trainer_cls(self, cfg):
            return _trainer() if cfg.kd_trainer else None

    return FastKDPlugin


def __getattr__(name: str) -> Any:
    """``FastKDPlugin`` and ``FastKDTrainer`` import axolotl; `kd_loss` does without."""
    if name not in ("FastKDPlugin", "FastKDTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _plugin() if name == "FastKDPlugin" else _trainer()
