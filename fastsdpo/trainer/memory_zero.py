"""What DeepSpeed's engine holds under ZeRO-2 and ZeRO-3, for a walk on tensors without memory.

Both keep a float32 copy of this process's part of the trained weights, which the optimizer steps, and reduce
gradients in a bucket of a fixed number of them. ZeRO-2 has all weights whole and float32 gradients of its part.
ZeRO-3 has weights in parts as FSDP2 has (`Shards`), gradients of its part in the weights' dtype, and weights whole
that are small or come again: with DeepSpeed's prefetching all of them, measured. The numbers are DeepSpeed's own
defaults, or what its configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fastsdpo.trainer.memory_meter import Meter
from fastsdpo.trainer.memory_shards import GATHERED, Shards, Unit


class ZeroSettings(NamedTuple):
    """Numbers of weights, of DeepSpeed's configuration (``zero_optimization``).

    Attributes:
        bucket: of gradients that are reduced together.
        overlap: whether there are two buckets (ZeRO-2); None: DeepSpeed's default.
        prefetch: that are gathered ahead. 0: none is, and a weight stays whole if it comes again within ``reuse``.
        small: a weight of fewer is whole all the time.
    """

    bucket: int = 500_000_000
    overlap: bool | None = None
    prefetch: int = 50_000_000
    reuse: int = 1_000_000_000
    small: int = 100_000

    @classmethod
    def read(cls, zero: Mapping[str, Any]) -> ZeroSettings:
        """Those of a configuration, which has "auto" where it leaves them to others."""
        keys = {
            "bucket": "reduce_bucket_size",
            "overlap": "overlap_comm",
            "reuse": "stage3_max_reuse_distance",
            "prefetch": "stage3_prefetch_bucket_size",
            "small": "stage3_param_persistence_threshold",
        }
        given = {name: zero.get(key) for name, key in keys.items()}
        known: dict[str, Any] = {name: value for name, value in given.items() if isinstance(value, int)}
        return cls(**known)


class ZeroMemory:
    """The bucket, the gradients of this process's part, and the float32 weights that the optimizer steps.

    Attributes:
        master: this process's part of the trained weights, flat; what the optimizer is given.
    """

    def __init__(self, meter: Meter, trained: list[nn.Parameter], processes: int, stage: int, settings: ZeroSettings):
        self.meter, self.stage = meter, stage
        self.part = -(-sum(p.numel() for p in trained) // processes)
        self.size = trained[0].element_size()
        self.master = nn.Parameter(torch.empty(self.part, dtype=torch.float32, device="meta"))
        meter.see(self.master, "weights")
        buckets = 2 if stage == 2 and settings.overlap else 1
        self.bucket = buckets * settings.bucket * self.size
        # A norm of each gradient's part is taken in float64.
        self._norm = 8 * min(self.part, max(p.numel() for p in trained))
        self._gradients = 0
        if stage == 3:
            meter.add("buckets", self.bucket)
            meter.add("gradients", self.size * self.part)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """A whole gradient is there until it is in the bucket."""
        assert parameter.grad is not None
        self.meter.see(parameter.grad, "gradients")
        parameter.grad = None

    def backward_begins(self) -> None:
        if self.stage == 2:
            self.meter.add("buckets", self.bucket)
            if not self._gradients:
                self._gradients = 4 * self.part
                self.meter.add("gradients", self._gradients)

    def backward_ends(self) -> None:
        if self.stage == 2:
            self.meter.remove("buckets", self.bucket)

    def step_begins(self) -> None:
        """ZeRO-3 widens the gradients of its part."""
        self.meter.add("step", self._norm)
        self.meter.remove("step", self._norm)
        self.master.grad = torch.empty_like(self.master)
        self.meter.see(self.master.grad, "gradients", share=0 if self.stage == 2 else 1)

    def step_ends(self) -> None:
        self.master.grad = None

    def drop_gradients(self) -> None:
        self.meter.remove("gradients", self._gradients)
        self._gradients = 0


class ZeroShards(Shards):
    """Weights of ZeRO-3. Gradients go to the bucket of a `ZeroMemory`, one by one."""

    def __init__(self, meter: Meter, model: nn.Module, processes: int, settings: ZeroSettings):
        super().__init__(meter, model, processes, wide=False)
        small = [p for p in model.parameters() if p.numel() < settings.small]
        meter.add(GATHERED, sum(p.nbytes for p in small))
        after = 0
        for unit in reversed(self.units):
            unit.size -= sum(p.nbytes for p in unit.parameters if p.numel() < settings.small)
            count = sum(p.numel() for p in unit.parameters)
            # From a layer's forward pass to its backward pass lie the layers after it, twice. What prefetching comes
            # across in the teacher's pass and the backward pass is not given up in between, whatever the limit.
            unit.stays = settings.prefetch > 0 or 2 * after <= settings.reuse
            after += count

    def _accumulated(self, unit: Unit, parameter: nn.Parameter) -> None:
        unit.waiting -= 1
        if not unit.waiting:
            unit.waiting = len(unit.trained)
            self._give_up(unit)
