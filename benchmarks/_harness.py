"""Timing of rivals that compute the same thing: correctness first, then interleaved in one process.

Interleaving (A B C, A B C, ...) spreads a change of the machine's clock or load over all rivals alike.
A rival whose result is wrong is not timed. Results go to ``benchmarks/results/<name>.json`` and, made
from it, ``.md``; a run replaces the rows it measured and keeps the others, so that a long benchmark
can be taken in parts.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass
class Rival:
    """``run`` is timed; ``prepare`` runs before it, untimed (inputs that a run overwrites)."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass
class Timing:
    """Seconds over the rounds, and the peak of resident memory above the start in bytes.

    ``cpu`` is the median of the processor seconds of all threads: on a machine that does other work
    at the same time it tells more than the wall clock.
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


def peak_memory(run: Callable[[], object]) -> int | None:
    """How far resident memory rises above its start during ``run()``; None where Linux does not say."""
    try:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:
        run()
        return None


def interleave(rivals: list[Rival], rounds: int) -> dict[str, Timing]:
    """Median and spread of ``rounds`` runs of each rival, after one that also measures its memory."""
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    cpu: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    peak = {}
    for rival in rivals:
        if rival.prepare:
            rival.prepare()
        peak[rival.name] = peak_memory(rival.run)
    for _ in range(rounds):
        for rival in rivals:
            if rival.prepare:
                rival.prepare()
            start, start_cpu = time.perf_counter(), time.process_time()
            rival.run()
            seconds[rival.name].append(time.perf_counter() - start)
            cpu[rival.name].append(time.process_time() - start_cpu)
    return {
        name: Timing(
            statistics.median(times),
            min(times),
            max(times),
            statistics.median(cpu[name]),
            peak[name],
        )
        for name, times in seconds.items()
    }


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes read plus written per second by ``Tensor.copy_`` between two warm buffers."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    timing = interleave([Rival("copy", lambda: target.copy_(source))], 7)["copy"]
    return 2 * source.numel() * 4 / timing.median


def gemm_flops(size: int = 2048) -> float:
    """FLOP/s of a square float32 matrix product."""
    a, b, c = (torch.ones(size, size) for _ in range(3))
    timing = interleave([Rival("gemm", lambda: torch.mm(a, b, out=c))], 5)["gemm"]
    return 2 * size**3 / timing.median


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "../kernels", "../fastsdpo/ops", "."],
            capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + (" and uncommitted changes" if dirty.stdout else "")


def environment() -> dict[str, Any]:
    """Device, versions, commit and command of this run."""
    from fastsdpo._native import native_available

    packages = ("torch", "triton", "liger-kernel", "trl", "transformers")
    return {
        "device": f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs",
        "native": native_available()[1],
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "commit": _commit(),
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def record(
    name: str,
    rows: list[dict[str, Any]],
    key: tuple[str, ...],
    markdown: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Merges ``rows`` (equal ``key`` fields replace) into ``results/<name>.json`` and rewrites ``.md``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new_keys = {tuple(row[field] for field in key) for row in rows}
    kept = [row for row in old if tuple(row[field] for field in key) not in new_keys]
    merged = sorted(kept + rows, key=lambda row: tuple(str(row[field]).rjust(12) for field in key))
    path.write_text(json.dumps({"rows": merged}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(merged))


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
