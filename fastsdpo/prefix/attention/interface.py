"""The attention function that transformers models call in shared passes, and the choice of a backend."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.prefix.attention.dense import dense_attention, flex_attention_of_plan
from fastsdpo.prefix.attention.flash import flash_attention
from fastsdpo.prefix.attention.segments import segment_attention
from fastsdpo.prefix.attention.shared_pass import SharedPass

BACKENDS = ("segments", "flex", "flash", "dense")


def plan_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    fastsdpo_pass: SharedPass,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [1, H, T, E]``, ``key [1, G, T, E]``, ``value [1, G, T, F]`` -> ``[1, T, H, F]``.

    The mask is ignored: the plan says what is visible.

    Raises:
        NotImplementedError: something that the plan's attention does not do, by name.
    """
    shared = fastsdpo_pass
    layer = module.layer_idx
    for name in ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"shared prefixes: layer {layer} uses attention {name}")
    if dropout:
        raise NotImplementedError(f"shared prefixes: layer {layer} has attention dropout {dropout}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError(f"shared prefixes: the attention of layer {layer} is not causal")
    if sliding_window != shared.windows.get(layer):
        raise NotImplementedError(
            f"shared prefixes: layer {layer} has sliding window {shared.windows.get(layer)} by its "
            f"configuration, but passes {sliding_window} to its attention"
        )
    if query.shape[0] != 1 or query.shape[2] != shared.stop - shared.first:
        raise NotImplementedError(f"shared prefixes: layer {layer} changed the packed layout to {tuple(query.shape)}")
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for scaled_dot_product_attention; rotary embeddings may leave float32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    shared.layers.add(layer)
    if shared.kept is not None:
        shared.kept[layer] = (key.detach(), value.detach())
    if shared.before is not None:
        before_key, before_value = shared.before[layer]
        key = torch.cat([before_key, key], dim=2)
        value = torch.cat([before_value, value], dim=2)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Not before: only here is it known what autocast makes of the dtype.
    backend = choose_backend(shared.backend, query.device, query.dtype)
    attend = {
        "segments": segment_attention,
        "flex": flex_attention_of_plan,
        "flash": flash_attention,
        "dense": dense_attention,
    }
    output = attend[backend](query, key, value, shared, sliding_window, scale)
    return output, None


class BackendError(ValueError):
    """A backend that was asked for by name does not exist or cannot run here."""


def check_backend(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"shared_forward: attention must be 'auto' or one of {BACKENDS}, got {name!r}")


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for ``name`` and the dtype of the queries; "auto" is ``segments`` but on CUDA.

    Raises:
        BackendError: an unknown name, or one that cannot run here; a name is never replaced.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        if device.type != "cuda":
            return "segments"
        return "flash" if half and flash_attn_installed() else "flex"
    check_backend(name)
    if name == "flex" and device.type == "cpu":
        raise BackendError("shared_forward: attention='flex' has no backward pass on a CPU")
    if name == "flash" and not (device.type == "cuda" and half and flash_attn_installed()):
        raise BackendError(
            "shared_forward: attention='flash' needs the package flash-attn, a CUDA device and "
            f"float16 or bfloat16, got {device.type} and {dtype}"
        )
    return name


@cache
def flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
