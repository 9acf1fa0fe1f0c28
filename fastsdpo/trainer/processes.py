"""What the processes of a run tell each other. With one process nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

Found = TypeVar("Found")


def agreed(found: Any) -> Any:
    """The first process's finding, in all processes: FSDP may load the weights there alone."""
    broadcast_object_list(shared := [found])
    return shared[0]


def first_alone(call: Callable[[], Found], first: bool) -> Found:
    """What the first process's call returns, in all processes; what it raises is raised in all.

    Raises:
        Exception: the call's, in the first process.
        ValueError: with its text, in the others.
    """
    found = error = None
    if first:
        try:
            found = call()
        except Exception as raised:
            error = raised
    found, said = agreed((found, None if error is None else f"{error}"))
    if error is not None:
        raise error
    if said is not None:
        raise ValueError(said)
    return found


def gather_list(items: list[Any]) -> list[Any]:
    """The items of all processes, in the processes' order."""
    return gather_object(items)


def reduce_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of a tensor over the processes, on the CPU."""
    if accelerator.num_processes == 1:
        return values.cpu()
    return accelerator.reduce(values.to(accelerator.device), "sum").cpu()  # type: ignore[union-attr]


def gather_values(accelerator: Accelerator, values: Tensor) -> Tensor:
    """1-D tensors of any length, NaN excepted, one after the other, on the CPU."""
    if accelerator.num_processes == 1:
        return values.cpu()
    values = values.to(accelerator.device)
    padded = accelerator.pad_across_processes(values, pad_index=float("nan"))  # type: ignore[arg-type]
    gathered: Tensor = accelerator.gather(padded).cpu()  # type: ignore[union-attr]
    return gathered[~torch.isnan(gathered)]
