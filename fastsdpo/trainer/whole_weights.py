"""Whole weights of a model that FSDP2 or DeepSpeed ZeRO-3 hold in parts: to sample from, or to hand over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.prefix import gathered


def trained_values(model: nn.Module, *, wanted: bool) -> dict[str, Tensor]:
    """The trained parameters by name, whole and on the CPU; gathered one after another.

    All processes must call it.

    Args:
        wanted: False in processes that only take part, and get an empty dict.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with torch.no_grad(), gathered(parameter):
            value: Any = parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            if wanted:
                whole[name] = value.to("cpu", copy=True)
    return whole


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Each process holds all that FSDP2 divides, and runs the model as often as it likes, without gradients.

    Takes the memory of the whole model. Other models run as they are. All processes must call it.
    """
    if not torch.distributed.is_available():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    kept = []
    for module in shards:
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # an older torch has one
        kept += [(group, group.post_forward_mesh_info) for group in groups if group is not None]
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for group, mesh in kept:
            group.post_forward_mesh_info = mesh
        for module in shards:
            module.reshard()
