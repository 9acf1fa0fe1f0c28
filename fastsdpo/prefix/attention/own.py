"""Models with attention of their own: the plan as a mask, and a cache that hands keys from pass to pass.

Some models compute their attention without transformers' `AttentionInterface` (Bloom, GPT-J, Falcon), hand it no
keyword arguments (StableLM), or choose keys by scores of their own (the indexers of DeepSeek V3.2 and GLM-5). They
all add a mask to their scores, and give their keys to a cache. So a pass over a plan brings both. The mask says
which keys a query sees, one row for each query as in these models' own passes. The cache keeps the keys of the
student's pass, and puts them before the teacher's own. ALiBi's biases, slope x position of the key, are read from
the model at the positions of the plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastsdpo.prefix.attention.dense import visible
from fastsdpo.prefix.attention.shared_pass import SharedPass
from fastsdpo.prefix.attention.windows import Window

# Model types that call the interface, but without the pass or with a mask of their own.
OWN_MASKS = ("doge", "nemotron", "stablelm", "hrm_text", "longcat_flash", "git")


class PlanCache:
    """The part of transformers' `Cache` that attention uses, over one pass. Nothing is written in place."""

    is_compileable = False

    def __init__(self, shared: SharedPass):
        self._shared = shared

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keys and values ``[1, G, tokens, E]`` of the passes so far."""
        self._shared.calls[layer_idx] += 1
        return self._join(layer_idx, (key_states, value_states))

    def update_indexer(self, key_states: Tensor, layer_idx: int) -> Tensor:
        """The keys ``[1, tokens, E]`` of an indexer."""
        return self._join(("indexer", layer_idx), (key_states,))[0]

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions are given

    def _join(self, name: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shared = self._shared
        if shared.kept is not None:
            if name in shared.kept:
                raise NotImplementedError(f"shared prefixes: layer {name} attends more than once in a pass")
            shared.kept[name] = tuple(tensor.detach() for tensor in tensors)
        if shared.before is None:
            return tensors
        return tuple(torch.cat(pair, dim=-2) for pair in zip(shared.before[name], tensors))


@cache
def _cache_name(kind: type[nn.Module]) -> str | None:
    """The argument through which attention gets its cache."""
    if issubclass(kind, GradientCheckpointingLayer):
        return None
    names = inspect.signature(kind.forward).parameters
    return next((name for name in ("past_key_values", "layer_past") if name in names), None)


def caching_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules that hand keys to a cache, by the index of their layer."""
    return [m for m in decoder.modules() if hasattr(m, "layer_idx") and _cache_name(type(m)) is not None]


def attends_alone(decoder: Any) -> bool:
    """Whether the attention of this model takes the plan as a mask, and not through the attention interface."""
    config = decoder.config.get_text_config()
    if config.model_type in OWN_MASKS or "indexed_attention" in (getattr(config, "layer_types", None) or ()):
        return True
    return not decoder._can_set_attn_implementation() and bool(caching_modules(decoder))


def functional_dropout(decoder: nn.Module) -> str | None:
    """The name of a dropout in attention that is no module, where it is active."""
    for module in caching_modules(decoder):
        for name, value in vars(module).items():
            if module.training and "drop" in name and isinstance(value, float) and value > 0:
                return f"{type(module).__name__}.{name} is {value}"
    return None


def plan_masks(shared: SharedPass, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The mask ``[1, 1, queries, keys]`` to add to scores; by type of layer, where the layers see different keys."""
    queries = torch.arange(shared.stop - shared.first, device=device)[:, None]
    keys = torch.arange(shared.stop, device=device)[None, :]

    def make(window: Window) -> Tensor:
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
        return torch.where(visible(shared, window, device)(queries, keys), hidden.new_zeros(()), hidden)[None, None]

    types = getattr(config, "layer_types", None) or ()
    by_type = {types[layer] if types else "": window for layer, window in shared.windows.items()}
    if len(set(by_type.values())) == 1:
        return make(next(iter(by_type.values())))
    return {kind: make(window) for kind, window in by_type.items()}


# How the model's own functions make the biases ``[H, 1, keys]`` of ``count`` positions from 0 on.
ALIBI: dict[str, Callable[..., Tensor]] = {
    "build_alibi_tensor": lambda own, count, mask, *rest, **named: own(mask.new_ones(1, count), *rest, **named),
    "build_mpt_alibi_tensor": lambda own, count, heads, _length, *rest, **named: own(heads, count, *rest, **named),
}


@contextmanager
def attending_alone(decoder: nn.Module, current: Callable[[], SharedPass | None]) -> Iterator[None]:
    """Inside, attention gets the cache of the pass ``current()``, and its ALiBi biases.

    A layer that runs again in the backward pass finds neither: the student's pass, which alone has a backward
    pass, reads no keys but its own, and biases are arguments that checkpointing keeps.
    """

    def give_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        shared, name = current(), _cache_name(type(module))
        if shared is None or name is None:
            return None
        call = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        call.arguments[name] = PlanCache(shared)
        return call.args[1:], call.kwargs

    def by_position(own: Callable[..., Tensor], count: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        shared = current()
        if shared is None:
            return own(*args, **kwargs)
        biases = count(own, shared.plan.longest, *args, **kwargs)
        return biases[..., shared.plan.position_ids[: shared.stop].to(biases.device)]

    with ExitStack() as stack:
        for module in caching_modules(decoder):
            stack.callback(module.register_forward_pre_hook(give_cache, with_kwargs=True).remove)
        for name in ALIBI.keys() & set(dir(decoder)):
            own = getattr(decoder, name)
            setattr(decoder, name, partial(by_position, own, ALIBI[name]))
            stack.callback(delattr, decoder, name)
        yield
