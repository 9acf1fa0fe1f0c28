"""Liger-Kernel's layers in the model that is trained: norms, rotary embeddings and gated MLPs; the loss stays ours."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from fastsdpo.lazy import needed
from fastsdpo.prefix import causal_lm

LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def check_liger_settings(use_liger_kernel: bool, config: dict[str, Any] | None, device: torch.device) -> None:
    """Raises ValueError for settings of ``use_liger_kernel`` that cannot be followed."""
    if not use_liger_kernel:
        if config:
            raise ValueError(f"SDPOConfig: liger_kernel_config must be None without use_liger_kernel, got {config}")
        return
    for name in LOSSES:
        if (config or {}).get(name):
            raise ValueError(
                f"SDPOConfig: liger_kernel_config[{name!r}] must be False: the loss is the one of fastsdpo, got True"
            )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "SDPOConfig: use_liger_kernel must be False on a CPU: Liger-Kernel's layers are Triton kernels, got True"
        )


def use_liger_layers(model: nn.Module, config: dict[str, Any] | None) -> dict[str, Any]:
    """Puts Liger-Kernel's layers into the model, before it is checked, and gives what ``liger_kernel_config`` now is.

    `transformers.Trainer` does the same once more when training begins, which changes nothing.

    Args:
        config: what `transformers.TrainingArguments.liger_kernel_config` takes, such as ``{"swiglu": False}``.

    Raises:
        ImportError: there is no liger-kernel.
        ValueError: it has no layers for models of this type.
    """
    with needed("liger-kernel", "use_liger_kernel", "'fastsdpo[liger]'"):
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    kind = causal_lm(model).config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"SDPOTrainer: use_liger_kernel must be False: Liger-Kernel has no layers for {kind!r}, got True"
        )
    config = {**(config or {}), **dict.fromkeys(LOSSES, False)}
    apply_liger_kernel(model, config)
    return config
