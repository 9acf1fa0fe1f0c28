"""A teacher's weights where FSDP2 holds the model's in shards: each process has the teacher's for its own shards.

A moving average is elementwise, so the shards follow the student's without communication. For the teacher's pass
the contents of the shards are exchanged, in place: FSDP gathers from memory of its own, which the parameters
only point into.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.prefix import HeadParameters, causal_lm, head_parameters
from fastsdpo.trainer.teacher_weights import TeacherWeights


class ShardedTeacherWeights(TeacherWeights):
    """`TeacherWeights` of a model that FSDP2 will shard, or has sharded.

    The copy is made when it is first needed, after the model was sharded and before it has changed.

    Args:
        model, moving: as there.

    Raises:
        NotImplementedError: the head has an adapter of its own, whose shards are not gathered where the
            teacher's head is needed.
    """

    def __init__(self, model: nn.Module, *, moving: bool):
        head = causal_lm(model).get_output_embeddings()
        if hasattr(head, "lora_A") or hasattr(head, "modules_to_save"):
            raise NotImplementedError(
                "SDPOTrainer: under FSDP a teacher with weights of its own is not possible where the head has an "
                "adapter; leave the head out of the adapter's target_modules, or use teacher='live' or DDP"
            )
        self._model, self._dtype = model, torch.float32 if moving else None
        self.parameters: dict[str, nn.Parameter] = {}
        self.values: dict[str, Tensor] = {}
        self._head_names: dict[str, str] = {}

    def _make(self) -> None:
        """The copy, where it is not there yet: between passes, when all parameters are in shards."""
        if self.parameters:
            return
        head = causal_lm(self._model).get_output_embeddings()
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            self.parameters[name] = parameter
            own = _shard(parameter)
            self.values[name] = own.to(dtype=self._dtype or own.dtype, copy=True)
            for kind in ("weight", "bias"):
                if getattr(head, kind, None) is parameter:
                    self._head_names[kind] = name

    @property
    def bytes(self) -> int:
        if self.parameters:
            return super().bytes
        trained = [p for p in self._model.parameters() if p.requires_grad]
        return sum(p.numel() * (p.element_size() if self._dtype is None else 4) for p in trained)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The model has the teacher's values. Only between a backward pass and the next forward."""
        self._make()
        self._reshard()
        students = {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                own = _shard(parameter)
                students[name] = own.clone()
                own.copy_(self.values[name])
        try:
            yield
        finally:
            self._reshard()
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    # Taken anew: the first pass may have given the parameter another place for its shard.
                    _shard(parameter).copy_(students.pop(name))

    def _reshard(self) -> None:
        """No module keeps gathered parameters, which would be those of before."""
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def head(self, model: nn.Module) -> HeadParameters | None:
        self._make()
        student = head_parameters(model)
        if not self._head_names:
            return None
        own = {kind: self._gathered(name).to(student.weight.dtype) for kind, name in self._head_names.items()}
        return student._replace(weight=own.get("weight", student.weight.detach()), bias=own.get("bias", student.bias))

    @torch.no_grad()
    def update(self, rate: float) -> None:
        self._make()
        self._reshard()
        for name, parameter in self.parameters.items():
            value = self.values[name]
            value.lerp_(_shard(parameter).to(value.dtype), rate)

    def _gathered(self, name: str) -> Tensor:
        """A value as a whole; all processes have to ask for it."""
        parameter: Any = self.parameters[name]
        if not hasattr(parameter, "placements"):
            return self.values[name]
        from torch.distributed.tensor import DTensor

        with torch.no_grad():
            sharded = DTensor.from_local(
                self.values[name],
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            return sharded.full_tensor()

    def _whole(self, wanted: bool) -> Mapping[str, Tensor]:
        self._make()
        whole = {}
        for name in self.values:  # one after another, in all processes
            value = self._gathered(name)
            if wanted:
                whole[name] = value.cpu()
        return whole

    def _shapes(self) -> dict[str, torch.Size]:
        self._make()
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def _set(self, name: str, value: Tensor) -> None:
        parameter: Any = self.parameters[name]
        if hasattr(parameter, "placements"):
            from torch.distributed.tensor import distribute_tensor

            own = self.values[name]
            # Each process has read the whole, and takes its part; torch before 2.7 sends it once more.
            known = "src_data_rank" in inspect.signature(distribute_tensor).parameters
            options: dict[str, Any] = {"src_data_rank": None} if known else {}
            whole = value.to(own.device, own.dtype)
            value = distribute_tensor(whole, parameter.device_mesh, parameter.placements, **options).to_local()
        self.values[name].copy_(value)


def _shard(parameter: Any) -> Tensor:
    """What of a parameter lies in this process; the memory that FSDP gathers from."""
    own = parameter.detach()
    return own.to_local() if hasattr(own, "to_local") else own
