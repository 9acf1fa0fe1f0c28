"""Attention modules use the plan in the calls that carry a `SharedPass`, and their own function in others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import AttentionInterface

from fastsdpo.prefix.attention.interface import plan_attention

ATTENTION_NAME = "fastsdpo_plan"
AttentionInterface.register(ATTENTION_NAME, plan_attention)


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules that choose an attention function by their configuration."""
    return [
        module
        for module in decoder.modules()
        if hasattr(module, "layer_idx") and "Attention" in type(module).__name__ and hasattr(module, "config")
    ]


def let_attention_switch(decoder: nn.Module, besides: Collection[nn.Module] = ()) -> None:
    """Adds hooks to the attention modules, but not to ``besides``, once per model.

    Calls with a `SharedPass` use the plan's attention.

    The hooks sit on the modules inside the layers, because gradient checkpointing runs these again, hooks
    included, in the backward pass. Evaluation and generation carry no `SharedPass` and run as before.
    """
    for module in attention_modules(decoder):
        if module not in besides and not any(hook is _use_plan for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(_use_plan, with_kwargs=True)
            module.register_forward_hook(_use_own, with_kwargs=True, always_call=True)


def _use_plan(module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    shared = kwargs.get("fastsdpo_pass")
    if shared is not None:
        shared.own_implementation = module.config._attn_implementation
        module.config._attn_implementation = ATTENTION_NAME


def _use_own(module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
    shared = kwargs.get("fastsdpo_pass")
    if shared is not None and module.config._attn_implementation == ATTENTION_NAME:
        module.config._attn_implementation = shared.own_implementation
