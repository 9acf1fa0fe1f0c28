"""Weights that DeepSpeed ZeRO-3 holds in parts: whole sizes, and whole weights for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the model's weights in parts."""
    return any(hasattr(parameter, "ds_status") for parameter in model.parameters())


def whole_size(parameter: Tensor) -> int:
    """How many numbers a parameter has, wherever they are and however they are packed."""
    packed = getattr(parameter, "quant_state", None)  # two numbers of 4 bits in a byte
    if packed is not None:
        return packed.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_shapes(model: nn.Module) -> nn.Module:
    """A copy without values that has the shapes of the whole weights; ``model`` itself where it has them."""
    if not is_partitioned(model):
        return model
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


@contextmanager
def gathered(*parameters: Tensor | None) -> Iterator[None]:
    """Holds parameters whole where DeepSpeed ZeRO-3 has partitioned them; without ZeRO-3 this does nothing.

    Under ZeRO-3 a parameter is empty outside its module's forward pass. A parameter that is whole already (a head
    tied to the embedding, inside the forward pass) is left to its owner. All processes must call this.
    """
    partitioned = {}
    for parameter in parameters:
        status = getattr(parameter, "ds_status", None)
        if status is not None and getattr(status, "name", "") != "AVAILABLE":
            partitioned[id(parameter)] = parameter  # once, however often it is given
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(partitioned.values())):
        yield


@contextmanager
def gathered_layers(model: nn.Module) -> Iterator[None]:
    """Lets a model that DeepSpeed ZeRO-3 has loaded in parts run before there is an engine around it.

    Each module holds its own weights whole while it runs, so that one layer's are whole at a time; in a backward
    pass from the gradient of what it gave to the gradient of what it was given. Other models run as they are. All
    processes must run the model alike.
    """
    if not is_partitioned(model):
        yield
        return
    held: dict[nn.Module, list[ExitStack]] = {}

    def gather(module: nn.Module, *_: Any) -> None:
        stack = ExitStack()
        stack.enter_context(gathered(*module.parameters(recurse=False)))
        held.setdefault(module, []).append(stack)

    def release(module: nn.Module, *_: Any) -> None:
        if held.get(module):
            held[module].pop().close()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        release(module)
        found = output[0] if isinstance(output, tuple) else output
        given = next((value for value in args if isinstance(value, Tensor) and value.requires_grad), None)
        if given is not None and isinstance(found, Tensor) and found.requires_grad:
            hooks.callback(found.register_hook(partial(gather, module)).remove)
            hooks.callback(given.register_hook(partial(release, module)).remove)

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(gather, prepend=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
        for stacks in held.values():
            for stack in reversed(stacks):
                stack.close()
