"""Time and peak memory of several functions, run in turns in one process.

`interleave` runs A B C, A B C, ...: a change of the machine's clock or load then meets all of them alike, and
ratios of their medians hold where the times themselves do not.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from fastsdpo._native import native_available
from fastsdpo.ops.linear import release_tiles

PACKAGES = ("fastsdpo", "torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "transformers")


class Timing(NamedTuple):
    """Seconds of the runs and the peak of memory above the start in bytes.

    ``cpu`` is the median of the processor seconds of all threads, which another program's load changes less
    than the wall clock. Memory is the device's allocations on a GPU and resident memory on a CPU; None where
    the system does not say.
    """

    median: float
    fastest: float
    slowest: float
    cpu: float
    peak_bytes: int | None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_memory(run: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes by which memory rises above its start during ``run()``; None where the system does not say."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Memory that the library or the C allocator kept from an earlier call would hide this call's use of it.
    release_tiles()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
    except OSError:
        run()
        return None
    run()
    return max(0, _status("VmHWM") - before)


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    prepare: Callable[[], object] = lambda: None,
    device: str | torch.device = "cpu",
    least_seconds: float = 0.0,
    memory: bool = True,
) -> dict[str, Timing]:
    """Median and spread of the runs of each function, in turns.

    Args:
        rounds: at least so many rounds; more until ``least_seconds`` have passed, because the median of a few
            runs of milliseconds depends on luck.
        prepare: is called before each run and not timed (it restores inputs that a run overwrites).
        memory: whether two more runs, before and after the timed ones, measure peaks. The lower one counts: a
            cycle or the allocator sometimes still holds a tensor of the run before.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[int]] = {name: [] for name in runs}

    def measure_peaks() -> None:
        for name, run in runs.items():
            prepare()
            peak = peak_memory(run, device)
            if peak is not None:
                peaks[name].append(peak)

    if memory:
        measure_peaks()
    done, begun = 0, time.perf_counter()
    while done < rounds or time.perf_counter() - begun < least_seconds:
        done += 1
        for name, run in runs.items():
            prepare()
            wait()
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    if memory:
        measure_peaks()
    return {
        name: Timing(
            statistics.median(times),
            min(times),
            max(times),
            statistics.median(cpu[name]),
            min(peaks[name], default=None),
        )
        for name, times in seconds.items()
    }


def copy_bandwidth(device: str | torch.device = "cpu", megabytes: int | None = None) -> float:
    """Bytes read plus written per second by ``Tensor.copy_`` between two warm buffers.

    The buffers have 256 MiB each, 2 GiB on a GPU: far more than its caches hold, and long beside a launch.
    """
    megabytes = megabytes or (256 if torch.device(device).type == "cpu" else 2048)
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, 7, device=device)["copy"]
    return 2 * source.numel() * 4 / timing.median


def gemm_flops(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None
) -> float:
    """FLOP/s of a square product of random matrices, of size 2048 on a CPU and 8192 on a GPU."""
    size = size or (2048 if torch.device(device).type == "cpu" else 8192)
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    timing = interleave({"gemm": lambda: torch.mm(a, b, out=c)}, 5, device=device)["gemm"]
    return 2 * size**3 / timing.median


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: str | torch.device = "cpu") -> dict[str, str | dict[str, str]]:
    """Device, versions, command and date of this run."""
    name = f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; {name}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = os.path.relpath(sys.argv[0])
    if spec is not None:  # python -m ...
        program = "-m " + spec.name.removesuffix(".__main__")
    return {
        "device": name,
        "native": native_available()[1],
        "python": platform.python_version(),
        "versions": {package: version for package in PACKAGES if (version := installed_version(package))},
        "command": "python " + " ".join([program, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
