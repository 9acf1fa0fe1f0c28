"""Whether a trainer's loss comes from hidden states or from logits, and why.

A trainer has ``fastsdpo_source``; the reason is found once for each of its models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from fastsdpo.integrations.transformers import gathered_head, is_partitioned
from fastsdpo.prefix import above_the_decoder, check_head, head_parameters, no_grad_pass, unwrap

logger = logging.getLogger("fastsdpo.integrations")

Source = Literal["auto", "hidden", "logits"]
SOURCES = ("auto", "hidden", "logits")


def check_source(name: str, source: Any) -> Source:
    if source not in SOURCES:
        raise ValueError(f"{name}: source must be one of {SOURCES}, got {source!r}")
    return source


def why_not_model(trainer: Any, model: nn.Module, teacher: nn.Module | None) -> str | None:
    """Why the losses of a trainer's models cannot come from hidden states; None where they can."""
    if trainer.args.torch_compile or hasattr(model, "_orig_mod"):
        return "the model is compiled, and hooks on it would break its graph"
    reason = above_the_decoder(model)
    if reason is not None:
        return reason
    models = {"model": model}
    if teacher is not None and unwrap(teacher) is not unwrap(model):
        if getattr(trainer, "is_fsdp_enabled", False):
            return "FSDP frees the separate teacher's head after its forward pass"
        models["teacher"] = teacher
    for role, checked in models.items():
        right, reason = _check_head(checked)
        if not right:
            return f"the {role}'s head: {reason}"
    return None


def _check_head(model: nn.Module) -> tuple[bool, str]:
    """Whether the head is one that the losses compute, and otherwise what it is."""
    if is_partitioned(model):
        # DeepSpeed ZeRO-3: read the head's configuration only. A pass of the whole model would run the head's own
        # hooks, which partition it again while it is gathered here.
        try:
            with gathered_head(model):
                head_parameters(model)
        except NotImplementedError as error:
            return False, str(error)
        return True, ""
    # A forward pass with dropout draws random numbers; the run's own draws must not change.
    devices = [p.device for p in unwrap(model).parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices), no_grad_pass():
        return check_head(model)


def uses_hidden_states(trainer: Any, model: nn.Module, why_not: Callable[[Any, nn.Module], str | None]) -> bool:
    """Whether the loss comes from hidden states; finds out once for each model of a trainer.

    Raises:
        NotImplementedError: the source is "hidden" and hidden states will not do.
    """
    source = trainer.fastsdpo_source
    if source == "logits":
        return False
    reasons = trainer.__dict__.setdefault("_fastsdpo_reasons", {})
    key = id(unwrap(model))
    if key not in reasons:
        reasons[key] = why_not(trainer, model)
        if reasons[key] is None:
            logger.info("losses from hidden states")
        elif source == "auto":
            logger.warning("losses from logits, not from hidden states: %s", reasons[key])
    if reasons[key] is not None and source == "hidden":
        raise NotImplementedError(f"source must not be 'hidden' here: {reasons[key]}")
    return reasons[key] is None
