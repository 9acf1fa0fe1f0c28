"""``generalized_jsd_loss`` with fastsdpo's losses: one adapter for every trainer that has a function of this name.

TRL's GKD, GOLD and IW-OPD trainers and many trainers written after them form their loss in a function

    generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0,
                         reduction="batchmean", ...)

which keeps log-softmaxes of both, their mixture and two divergences, each as large as the logits. `adapt` makes a
function with the same arguments, in the same order, which takes one pass over each of the two tensors:

    Trainer.generalized_jsd_loss = staticmethod(adapt(Trainer.generalized_jsd_loss))

``beta`` is fastsdpo's ``alpha``: 0 is KL(teacher || student), 1 is KL(student || teacher)
(https://arxiv.org/abs/2306.13649, equation 1).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsdpo.integrations._head_logits import HeadLogits, divergence
from fastsdpo.ops.divergence import sdpo_loss

REDUCTIONS = ("batchmean", "sum", "mean")
KNOWN = ("student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction", "num_items_in_batch")
OF_SOME = ("logits_are_probs", "top_k", "topk", "add_tail")


def adapt(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the same arguments and values, computed by `sdpo_loss`.

    Where the loss is not one of the whole vocabulary (probabilities in place of logits, a top-k support) or is not
    summed over it (``reduction="none"``), ``function`` itself runs.

    Raises:
        TypeError: the function has an argument that this does not know, or lacks one of the first five.
    """
    signature = inspect.signature(function)
    names = list(signature.parameters)
    unknown = set(names) - {*KNOWN, *OF_SOME}
    if names[:2] != list(KNOWN[:2]) or not {"labels", "beta", "temperature"} <= set(names) or unknown:
        raise TypeError(
            f"adapt: the function must have the arguments (student_logits, teacher_logits, labels, beta, "
            f"temperature, ...), got ({', '.join(names)})"
        )

    @functools.wraps(function)
    def generalized_jsd_loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {"reduction": "batchmean", "num_items_in_batch": None, **bound.arguments}
        vocabulary = given["student_logits"].shape[-1]
        topk = given.get("top_k", given.get("topk")) or vocabulary
        whole = topk >= vocabulary and not given.get("logits_are_probs")
        reduced = given["reduction"] in REDUCTIONS or given["num_items_in_batch"] is not None
        if not whole or not reduced:
            return function(*args, **kwargs)
        return generalized_jsd(**{name: given[name] for name in KNOWN})

    return generalized_jsd_loss


def generalized_jsd(
    student_logits: Tensor | HeadLogits,
    teacher_logits: Tensor | HeadLogits,
    labels: Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
    num_items_in_batch: Tensor | float | None,
) -> Tensor:
    """The loss over the tokens whose label is not -100.

    Args:
        student_logits, teacher_logits: ``(..., V)``, or `HeadLogits`.
        labels: ``(...)``; None counts every token.
        reduction: "batchmean" divides by the tokens that count (without labels by the first axis' length), "mean" by
            the elements of the tokens that count, "sum" by 1; ``num_items_in_batch`` by itself in place of them.
    """
    shape = tuple(student_logits.shape)
    counts = torch.ones(shape[:-1], dtype=torch.bool, device=student_logits.device)
    if labels is not None:
        counts = labels != -100
    number = counts.sum()
    if num_items_in_batch is not None:
        divisor = torch.as_tensor(num_items_in_batch, device=number.device)
    elif reduction == "batchmean":
        divisor = number.clamp(min=1) if labels is not None else torch.tensor(max(shape[0], 1), device=number.device)
    else:
        divisor = number * shape[-1] if reduction == "mean" else torch.ones_like(number)
    weight = 1.0 / divisor.to(torch.float32)
    if isinstance(student_logits, HeadLogits):
        return divergence(student_logits, teacher_logits, counts, float(beta), weight, temperature)
    if isinstance(teacher_logits, HeadLogits):
        raise TypeError("generalized_jsd: teacher_logits must be a tensor where student_logits is one, got HeadLogits")
    ids = torch.where(counts, 0, -100)
    options = {"mode": "full", "alpha": float(beta), "temperature": float(temperature)}
    weights = weight.expand(counts.shape)
    return sdpo_loss(student_logits, teacher_logits.detach(), ids, weights=weights, **options).loss
