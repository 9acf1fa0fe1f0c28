"""How well a run uses its machine: model FLOP/s utilization, time spent waiting for data, peak memory.

A product of a weight matrix of P numbers with a token is 2 P FLOPs. Every token that goes through the model costs
that for all matrices of the decoder; one of the student's costs it again for the gradient of what went in, and again
for the gradients of the matrices that are trained. The head costs it for the answers' tokens alone, of student and
teacher. Attention's products of queries and keys, a second teacher's head and layers that run again in the backward
pass are not counted, so the utilization is a lower bound (MFU as in https://arxiv.org/abs/2204.02311, appendix B,
without its term for attention).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsdpo.prefix import causal_lm, whole_size
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.loss import TokenStatistics

# TFLOP/s of dense products in bfloat16 with float32 sums, by what a card's name holds; vendors' data sheets. The
# first that fits counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI325X": 1307,
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # their number, in configurations


def peak_tflops(name: str) -> float | None:
    """Of a card by the name that its driver gives it; None: not known."""
    words = f" {name.replace('-', ' ')} "
    return next((float(value) for known, value in PEAK_TFLOPS.items() if f" {known} " in words), None)


class ModelWork(NamedTuple):
    """Numbers in a model's matrices through which a token goes: all, and those that are trained."""

    decoder: float
    trained: float
    head: int
    trained_head: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelWork:
        """Of a model before it is wrapped; of experts, those that a token is sent to."""
        causal: Any = causal_lm(model)
        head = causal.get_output_embeddings().weight
        outside = {id(head), id(causal.get_input_embeddings().weight)}
        config = causal.config.get_text_config()
        experts = next((n for key in EXPERTS if (n := getattr(config, key, None))), 0)
        active = getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
        sizes = [
            (whole_size(p) * (active if ".experts." in name else 1.0), p.requires_grad)
            for name, p in model.named_parameters()
            if id(p) not in outside and len(getattr(p, "ds_shape", p.shape)) > 1
        ]
        decoder, trained = sum(size for size, _ in sizes), sum(size for size, requires_grad in sizes if requires_grad)
        return cls(decoder, trained, whole_size(head), whole_size(head) if head.requires_grad else 0)

    def flops(self, statistics: TokenStatistics, parts: int = 1) -> float:
        """This process's, of the passes over one pack, whose rows ``parts`` processes share."""
        rows, backward = statistics.counts.numel() / parts, statistics.trained_tokens
        work = self.decoder * statistics.computed_tokens + (self.decoder + self.trained) * backward
        return 2 * (work + rows * (2 * self.head + (self.head + self.trained_head if backward else 0)))


class SpeedMeter:
    """Collects what a logging window did, for `flush`.

    Args:
        peak: FLOP/s of one process's card; None: not known.
    """

    def __init__(self, work: ModelWork, peak: float | None, device: torch.device):
        self.work, self.peak, self.device = work, peak, device
        self.reset()

    @classmethod
    def of(cls, model: nn.Module, args: SDPOConfig) -> SpeedMeter:
        """Of a model before it is wrapped."""
        head: Any = causal_lm(model).get_output_embeddings()
        half = args.bf16 or args.fp16 or head.weight.dtype.itemsize == 2
        peak = args.peak_tflops
        if peak is None and half and args.device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(args.device))
        return cls(ModelWork.of(model), None if peak is None else 1e12 * peak, args.device)

    def reset(self) -> None:
        self.done = self.waited = 0.0
        self.started = time.perf_counter()

    def add(self, statistics: TokenStatistics, parts: int = 1) -> None:
        """Takes the work of one pack, which ``parts`` processes share (``ulysses``)."""
        self.done += self.work.flops(statistics, parts)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what takes the next interactions from the data loader."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def flush(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The window's metrics over all processes; see docs/reference/metrics.md.

        Args:
            gather: concatenates 1-D tensors over the processes, in their order.
        """
        seconds = max(time.perf_counter() - self.started, 1e-9)
        own = [self.done / seconds, self.waited / seconds, float(peak_memory(self.device))]
        done, waited, memory = gather(torch.tensor(own, dtype=torch.float64)).view(-1, len(own)).T
        self.reset()
        found = {"sdpo/data_wait": float(waited.max())}
        if memory.max():
            found["sdpo/peak_memory_gb"] = float(memory.max()) / 1e9
        if self.peak is not None:
            found["sdpo/mfu"] = float(done.mean()) / self.peak
        return found


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of tensors on a GPU, else resident; 0: the system does not say."""
    counted = getattr(getattr(torch, device.type, None), "max_memory_allocated", None)
    if counted is not None:
        return counted(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
