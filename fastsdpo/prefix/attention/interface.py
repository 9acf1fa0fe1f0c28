"""The attention function that transformers models call in shared passes, and the choice of a backend."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.prefix.attention.dense import dense_attention
from fastsdpo.prefix.attention.flash import flash_attention, flash_takes, varlen_installed
from fastsdpo.prefix.attention.flex import flex_block_attention
from fastsdpo.prefix.attention.segments import segment_attention
from fastsdpo.prefix.attention.shared_pass import Scoring, SharedPass
from fastsdpo.prefix.attention.windows import ChunkWindow

logger = logging.getLogger("fastsdpo")

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
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of T packed tokens, as `AttentionInterface` calls it; the plan replaces the mask.

    Where the pass is divided among processes, the tensors hold this process's tokens.

    Args:
        query, key, value: ``[1, H, T, E]``, ``[1, G, T, E]``, ``[1, G, T, F]``, for H query and G key heads.
        sliding_window: in tokens; must be the configuration's for this layer.
        s_aux: ``[H]``, attention sinks: each query has one more key with this score and the value 0.
        softcap: scores are ``softcap * tanh(score / softcap)``.

    Returns:
        ``[1, T, H, F]``, and None in place of the weights.

    Raises:
        NotImplementedError: the layer asks for something that the plan's attention does not do.
    """
    shared, split, layer = fastsdpo_pass, fastsdpo_pass.ulysses, module.layer_idx
    query = _tempered(module, query, shared)
    dtype = _autocast_dtype(query.device)
    if dtype is not None:
        # Rotary embeddings may give float32; autocast casts the inputs of scaled_dot_product_attention too.
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if split is not None:
        if query.shape[1] % split.size:
            raise NotImplementedError(
                f"shared prefixes: the {query.shape[1]} heads of layer {layer} cannot be divided by {split.size}"
            )
        query, key, value = (split.to_heads(states, shared.stop - shared.first) for states in (query, key, value))
        s_aux = None if s_aux is None else split.own_heads(s_aux)
    _check_layer(module, query, shared, dropout, sliding_window, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scoring(shared.windows.get(layer), scale, s_aux, softcap)
    output = _attend(layer, query, key, value, shared, scores)
    return output if split is None else split.to_tokens(output), None


def _attend(layer: int, query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, scores: Scoring) -> Tensor:
    """``[1, T, H, F]``; the layer's keys and values are kept where the pass keeps them."""
    shared.calls[layer] += 1
    name = layer, shared.calls[layer]  # some layers attend twice
    if shared.kept is not None:
        shared.kept[name] = (key.detach(), value.detach())
    # Chosen here, because only here the dtype under autocast is known.
    backend = choose_backend(shared.backend, query.device, query.dtype)
    if not scores.are_plain:
        backend = _with_sinks(backend, shared.backend)
    before = None if shared.before is None else shared.before[name]
    if backend == "flash" and flash_takes(query, value, shared, scores.window):
        return flash_attention(query, key, value, shared, scores.scale, before)
    if before is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value)))
    attend = {
        "segments": segment_attention,
        "flex": flex_block_attention,
        "flash": flex_block_attention,  # windows that cut a sequence short, and heads of two sizes
        "dense": dense_attention,
    }
    return attend[backend](query, key, value, shared, scores)


def _tempered(module: nn.Module, query: Tensor, shared: SharedPass) -> Tensor:
    """The queries as if Llama 4 had scaled them by their positions, and not by their places in the pass.

    Its layers without rotary embeddings multiply the query at p by ``1 + attn_scale log(1 + (p + 1) // floor_scale)``.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    tokens, floor = shared.stop - shared.first, module.floor_scale
    if max(tokens, shared.plan.longest) < floor:
        return query  # all by 1

    def scales(positions: Tensor) -> Tensor:
        return 1 + module.attn_scale * torch.log1p(((positions + 1) // floor).double())

    def make() -> Tensor:
        ratio = scales(shared.plan.position_ids[shared.first : shared.stop].cpu()) / scales(torch.arange(tokens))
        return ratio[:, None].to(query.device)

    return (query * shared.cached("temperature", make)).to(query.dtype)


def _with_sinks(backend: str, asked: str) -> str:
    """The backend of a layer with attention sinks or softcapped scores."""
    if backend in ("segments", "dense"):
        return backend
    if asked != "auto":
        raise BackendError(
            f"shared_forward: attention={asked!r} has no attention sinks and no softcap; use 'auto' or 'segments'"
        )
    _tell(f"the attention backend is 'segments': {backend!r} has no attention sinks and no softcap")
    return "segments"


@cache
def _tell(message: str) -> None:
    logger.warning("%s", message)  # once


_meta_autocast: list[torch.dtype | None] = [None]


@contextmanager
def meta_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors without memory, which have no autocast, are treated as under one of ``dtype``."""
    _meta_autocast.append(dtype)
    try:
        yield
    finally:
        _meta_autocast.pop()


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "meta":
        return _meta_autocast[-1]
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _check_layer(
    module: nn.Module,
    query: Tensor,
    shared: SharedPass,
    dropout: float,
    sliding_window: int | None,
    mask: Any,
    others: dict[str, Any],
) -> None:
    """Raises NotImplementedError for what the plan's attention does not do."""
    layer = module.layer_idx
    for name in ("sinks", "position_bias", "head_mask", "indices"):
        if others.get(name) is not None:
            raise NotImplementedError(f"shared prefixes: layer {layer} uses attention {name}")
    if mask is not None and mask.numel() > 1:  # another one than the pass gives
        raise NotImplementedError(f"shared prefixes: layer {layer} adds a mask of its own to its scores")
    if dropout:
        raise NotImplementedError(f"shared prefixes: layer {layer} has attention dropout {dropout}")
    if not (getattr(module, "is_causal", True) or getattr(module, "is_decoder", False)):
        raise NotImplementedError(f"shared prefixes: the attention of layer {layer} is not causal")
    window = shared.windows.get(layer)
    if sliding_window != window and not (sliding_window is None and isinstance(window, ChunkWindow)):
        raise NotImplementedError(
            f"shared prefixes: layer {layer} has sliding window {window} by its configuration, but passes "
            f"{sliding_window} to its attention"
        )
    if query.shape[0] != 1 or query.shape[2] != shared.stop - shared.first:
        raise NotImplementedError(f"shared prefixes: layer {layer} changed the packed layout to {tuple(query.shape)}")


class BackendError(ValueError):
    """A backend that was asked for by name does not exist or cannot run here."""


def check_backend(name: str) -> None:
    """Raises BackendError for a name that is neither "auto" nor one of `BACKENDS`."""
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"shared_forward: attention must be 'auto' or one of {BACKENDS}, got {name!r}")


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use: "auto" is ``segments``, on CUDA ``flash`` (half precision) or ``flex``.

    Args:
        name: a backend asked for by name runs or raises; it is never replaced.
        dtype: of the queries.

    Raises:
        BackendError: an unknown name, or a backend that cannot run here.
    """
    if name == "auto":
        first, *others = automatic_backends(device)
        return others[0] if first == "flash" and not flash_runs_on(device, dtype) else first
    check_backend(name)
    if name == "flex" and device.type == "cpu":
        raise BackendError("shared_forward: attention='flex' has no backward pass on a CPU")
    if name == "flash" and not flash_runs_on(device, dtype):
        raise BackendError(
            "shared_forward: attention='flash' needs torch.nn.attention.varlen (torch 2.10), a CUDA device and "
            f"float16 or bfloat16, got {device.type} and {dtype}"
        )
    return name


def automatic_backends(device: torch.device) -> tuple[str, ...]:
    """The backends that "auto" stands for on a device, the best one first."""
    return ("flash", "flex", "segments") if device.type == "cuda" else ("segments",)


def flash_runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has varlen kernels for tensors there; on "meta" as on CUDA."""
    half = dtype in (torch.float16, torch.bfloat16)
    return half and device.type in ("cuda", "meta") and varlen_installed()
