"""A loss for verl's registry of distillation losses (https://github.com/verl-project/verl)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

LOSS_NAME = "fastsdpo_sampled_token"


def import_verl(module: str, needs: str) -> Any:
    """A module of verl; where there is none an ImportError that says what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{needs}, which cannot be imported: {error}") from error


def register_distillation_loss(name: str = LOSS_NAME) -> None:
    """Registers the sampled-token loss in verl's registry of distillation losses.

    ``distillation.distillation_loss.loss_mode=fastsdpo_sampled_token`` then trains with the gradient
    ``(log p_S - log p_T) * grad log p_S`` per token of the answer. Its expectation over the student's answers is the
    gradient of the reverse KL. Call this in every process that reads the configuration.

    With ``use_policy_gradient=False`` verl backpropagates the loss. With True it takes the value
    ``log p_S - log p_T`` as a penalty in its clipped policy loss, as for its own ``k1``. ``loss_max_clamp`` bounds
    ``|log p_S - log p_T|`` of a token in both cases.

    verl's top-k losses do not come from this registry: its logits processor calls a fixed function.

    Raises:
        ImportError: verl is not installed or has no such registry.
        ValueError: the name is taken (verl's own error).
    """
    losses = import_verl(
        "verl.trainer.distillation.losses",
        "register_distillation_loss needs a verl with verl.trainer.distillation (0.8 or newer)",
    )
    settings = losses.DistillationLossSettings(names=[name], use_estimator=True)
    losses.register_distillation_loss(settings)(_sampled_token_for_verl)


def _sampled_token_for_verl(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The per-token losses ``[B, T]`` and metrics that verl's registry expects; verl aggregates the losses.

    verl either takes ``-value`` as the advantage of a policy loss (``use_policy_gradient``) or backpropagates.
    Value and gradient therefore differ: the value is g = log p_S - log p_T, the gradient w g grad log p_S, with the
    rollout correction w. verl itself multiplies by w in the policy loss only.
    """
    name = f"{LOSS_NAME}: distillation.distillation_loss"
    bound = distillation_config.distillation_loss.loss_max_clamp
    if bound is not None and not bound > 0:
        raise ValueError(
            f"{name}.loss_max_clamp must be null or above 0, got {bound}: it bounds "
            "|log p_S - log p_T| of a token, and nothing would be learned"
        )
    padding = import_verl("verl.workers.utils.padding", "the registered loss needs verl")
    metric = import_verl("verl.utils.metric", "the registered loss needs verl")
    mask = _padded(data["response_mask"]).bool()
    student = padding.no_padding_2_padding(model_output["log_probs"], data)
    teacher = padding.no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    for key, logps in (("log_probs", student), ("teacher_logprobs", teacher)):
        if logps.shape != mask.shape:
            raise ValueError(
                f"{LOSS_NAME}: {key} must have one log-prob per token of response_mask "
                f"{tuple(mask.shape)}, got {tuple(logps.shape)}"
            )
    # verl reports the largest loss and a mean, so padding must be finite.
    student = torch.where(mask, student, 0.0)
    gap = (student - torch.where(mask, teacher, 0.0)).detach()
    # Bounded here, so that verl's own clamp of the value changes neither the value nor its gradient.
    value = gap if bound is None else gap.clamp(-bound, bound)
    rollout = data.get("rollout_is_weights", None)
    weight = value if rollout is None else value * torch.where(mask, _padded(rollout), 0.0)
    per_token = value + weight * (student - student.detach())
    # A sum over micro-batches and a mean over replicas, as verl reports its own losses.
    tokens = data["batch_num_tokens"] or max(1, int(mask.sum()))
    mean = metric.Metric("sum", -gap.sum() / tokens * data["dp_size"])
    return per_token, {"distillation/log_ratio_mean": mean}


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor
