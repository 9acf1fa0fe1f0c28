"""The teachers that are not the live model: the same module with other values in its weights.

A moving average or the initial model needs one copy of the *trained* weights and nothing else: the
module, its frozen weights and its buffers serve student and teacher. For the teacher's pass the
parameters point at the teacher's values, and back. With LoRA the copy is the adapter alone (a moving
average then starts as a copy of the adapter); where the adapter is new, the initial model is the model
with the adapter disabled, and there is nothing to copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastsdpo.prefix import HeadParameters, head_parameters


class TeacherContext(Protocol):
    """Calling it gives a context in which the model is the teacher."""

    def __call__(self) -> AbstractContextManager: ...

    def head(self, model: nn.Module) -> HeadParameters | None:
        """The teacher's head; None where it is the student's.

        Called inside the forward pass of the student's head, where FSDP holds its parameters gathered.
        """
        ...


class DisabledAdapter:
    """The model without its adapter, as `TeacherContext`.

    Args:
        unwrapped: gives the model without the wrapper that training may put around it.
    """

    def __init__(self, unwrapped: Callable[[], Any]):
        self._unwrapped = unwrapped

    def __call__(self) -> AbstractContextManager:
        return self._unwrapped().disable_adapter()

    def head(self, model: nn.Module) -> HeadParameters | None:
        return other_head(model, self)


class TeacherWeights:
    """Another set of values for the trained parameters of ``model``, float32 where it moves.

    In bfloat16 a moving average would stand still: at rate 0.01 the steps are below its precision.

    Args:
        model: the model, unwrapped.
        moving: the values will follow the student's (`update`).
    """

    def __init__(self, model: nn.Module, *, moving: bool):
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.values = {
            name: parameter.detach().to(dtype=torch.float32 if moving else parameter.dtype, copy=True)
            for name, parameter in self.parameters.items()
        }

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The model has the teacher's values. Only between a backward pass and the next forward."""
        students = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = students[name]

    def head(self, model: nn.Module) -> HeadParameters | None:
        return other_head(model, self)

    @property
    def bytes(self) -> int:
        """Of the values that this process holds."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """``values += rate * (student - values)``"""
        for name, parameter in self.parameters.items():
            value = self.values[name]
            value.lerp_(parameter.detach().to(value.dtype), rate)

    def save(self, path: str | os.PathLike, *, write: bool = True) -> None:
        """Writes the values; the file appears whole or not at all.

        Args:
            write: False in processes that only take part in gathering them.
        """
        from safetensors.torch import save_file

        whole = self._whole(write)
        if write:
            save_file({name: value.contiguous() for name, value in whole.items()}, f"{path}.part")
            os.replace(f"{path}.part", path)

    def _whole(self, wanted: bool) -> Mapping[str, Tensor]:
        """The values, as they are saved."""
        return self.values

    def load(self, path: str | os.PathLike) -> None:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file; not this model's weights.
        """
        from safetensors.torch import load_file

        if not os.path.exists(path):
            raise FileNotFoundError(
                f"SDPOTrainer: the checkpoint must hold the teacher's weights, {path} is missing; "
                "was it written with another teacher?"
            )
        saved = load_file(path)
        shapes = self._shapes()
        if saved.keys() != shapes.keys():
            odd = sorted(saved.keys() ^ shapes.keys())
            raise ValueError(
                f"SDPOTrainer: {path} must hold the values of the trained weights, but "
                f"{len(odd)} names differ: {', '.join(odd[:3])}"
            )
        for name, shape in shapes.items():
            if saved[name].shape != shape:
                raise ValueError(
                    f"SDPOTrainer: {path}: {name} must have shape {list(shape)}, got {list(saved[name].shape)}"
                )
            self._set(name, saved[name])

    def _shapes(self) -> dict[str, torch.Size]:
        """Of the values, as they are saved."""
        return {name: value.shape for name, value in self.values.items()}

    def _set(self, name: str, value: Tensor) -> None:
        self.values[name].copy_(value)


def other_head(model: nn.Module, context: TeacherContext) -> HeadParameters | None:
    """The head that ``model`` has under ``context``, detached; None where it is the student's."""
    student = head_parameters(model)
    with torch.no_grad(), context():
        teacher = head_parameters(model)
        # Taken while the weights are the teacher's: a detached tensor keeps pointing at them.
        weight = teacher.weight.detach()
        bias = None if teacher.bias is None else teacher.bias.detach()
    same = _address(weight) == _address(student.weight) and (
        bias is None or (student.bias is not None and _address(bias) == _address(student.bias))
    )
    return None if same else teacher._replace(weight=weight, bias=bias)


def _address(tensor: Tensor) -> int:
    """Where the values are; of a tensor without memory, its storage."""
    return tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
