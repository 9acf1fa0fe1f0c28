"""What the parts of `benchmarks.run_gpu` share: the device, its clock and ceilings; rows of results."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import costmodel

Row = dict[str, Any]


class LeftOut(Exception):
    """This machine lacks what a row needs; the text says what."""


class Machine:
    """The device of a run, its clock and its measured ceilings."""

    def __init__(self, rehearsal: bool):
        self.rehearsal = rehearsal
        self.device = "cpu" if rehearsal else "cuda"
        self.gpu = not rehearsal
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.element = self.dtype.itemsize

    @functools.cached_property
    def _flushed(self) -> Tensor:
        """Zeroing it takes about 0.3 ms on an H100 and leaves nothing of the operands in the L2 cache."""
        return torch.empty(2**28, device=self.device)

    def time(
        self,
        call: Callable[[], object],
        *,
        repeats: int = 10,
        queued: bool = True,
        prepare: Callable[[], object] = lambda: None,
    ) -> Row:
        """``{"ms", "ms_fastest", "ms_slowest"}`` of ``call()``, with ``prepare()`` before each, untimed.

        With ``queued`` the GPU is kept busy for about 2 ms before each run, in which the host launches
        all of a short call's kernels: only the GPU's time is measured.
        """
        repeats = min(repeats, 3) if self.rehearsal else repeats
        times = []
        for number in range(repeats + 2):
            prepare()
            if self.gpu:
                for _ in range(6 if queued else 1):
                    self._flushed.zero_()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                stop.record()
                stop.synchronize()
                taken = start.elapsed_time(stop)
            else:
                begun = time.perf_counter()
                call()
                taken = (time.perf_counter() - begun) * 1e3
            if number >= 2:  # the first two warm up
                times.append(taken)
        return {"ms": statistics.median(times), "ms_fastest": min(times), "ms_slowest": max(times)}

    def copy_rate(self) -> float:
        """Bytes read plus written per second by a copy on the device."""
        source = torch.ones(2**29 if self.gpu else 2**22, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.time(lambda: target.copy_(source))["ms"] * 1e3

    def gemm_rate(self) -> float:
        """FLOP/s of a square matrix product."""
        size = 8192 if self.gpu else 512
        a, b, out = (self.randn(size, size) for _ in range(3))
        return 2 * size**3 / self.time(lambda: torch.mm(a, b, out=out))["ms"] * 1e3

    def ceilings(self) -> costmodel.GPU:
        """This device for the cost model: its measured rates in place of a data sheet's."""
        return costmodel.GPU("this", self.gemm_rate(), self.copy_rate(), 0.0, 0.0, gemm=1.0, bandwidth_share=1.0)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def targets(self, tokens: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (tokens,), device=self.device)

    def tokens_that_fit(self, tokens: int, bytes_per_token: float) -> int:
        """``tokens``, or as many as 85% of the free memory holds."""
        if not self.gpu:
            return tokens
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return min(tokens, int(0.85 * free / bytes_per_token))


def cell(row: Row, measure: Callable[..., Row], *arguments: Any) -> Row:
    """``row`` with what ``measure(*arguments)`` gives, or with why it gives nothing."""
    try:
        return {**row, **measure(*arguments)}
    except LeftOut as reason:
        return {**row, "left_out": str(reason)}
    except Exception:
        if torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):  # of a device that a kernel has broken
                torch.cuda.empty_cache()
        lines = [line for line in traceback.format_exc().splitlines() if line.strip(" ^~")]
        return {**row, "problem": "\n".join(lines[-8:])}


def peaks(measured: int | None, predicted: float) -> Row:
    """Peak memory in MB (10^6 bytes), measured where the system says it, and the cost model's."""
    known = {} if measured is None else {"peak_mb": measured / 1e6}
    return {**known, "model_peak_mb": predicted / 1e6}
