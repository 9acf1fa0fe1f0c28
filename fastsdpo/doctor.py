"""`fastsdpo doctor`: what runs on this machine, and whether it computes right.

Versions and devices; which backend each operation gets on each device, and why another is missing;
every kernel against float64 on small inputs; achieved bandwidth against a device copy; peak memory.
Exit status 0 when every kernel that is available is right, 1 when one is wrong or fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastsdpo
from fastsdpo.ops._backend import resolve_backend
from fastsdpo.testing import ROUNDING, make_rows, oracle_sdpo_loss

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "flash-attn",
    "liger-kernel",
    "trl",
)
LOSSES: dict[str, dict[str, Any]] = {
    "sampled token": {"mode": "sampled_token"},
    "forward KL": {"mode": "full", "alpha": 0.0},
    "reverse KL": {"mode": "full", "alpha": 1.0},
    "JSD": {"mode": "full", "alpha": 0.5},
    "top-k, tail": {"mode": "topk", "alpha": 1.0, "topk": 20},
    "top-k, renormalized": {"mode": "topk", "alpha": 0.5, "topk": 20, "add_tail": False},
}
# Logits elements read and written, forward + backward, per token and vocabulary position.
MOVED = {"sampled token": 4, "forward KL": 5, "reverse KL": 5, "JSD": 7}
LOSS_TOLERANCE, GRADIENT_FLOOR = 1e-5, 4e-6


def versions() -> dict[str, str]:
    found = {"fastsdpo": fastsdpo.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append({
            "device": f"cuda:{index}", "name": p.name, "memory_gib": round(p.total_memory / 2**30, 1),
            "processors": p.multi_processor_count, "capability": f"{p.major}.{p.minor}",
        })  # fmt: skip
    return found


def choices(device: str) -> dict[str, str]:
    """The backend that "auto" takes on ``device``, by dtype."""
    kinds = ("bfloat16", "float16", "float32", "float64")
    return {
        kind: resolve_backend(
            "doctor", "auto", torch.empty(0, dtype=getattr(torch, kind), device=device)
        )
        for kind in kinds
    }


def backends_on(device: str) -> list[str]:
    names = []
    for name in ("triton", "native", "reference"):
        try:
            resolve_backend("doctor", name, torch.empty(0, device=device))
        except (ValueError, ImportError):
            continue
        names.append(name)
    return names


def check_kernels(device: str) -> Iterator[dict[str, Any]]:
    """Each loss, dtype and backend on an odd vocabulary and an unaligned slice, against float64."""
    for backend in backends_on(device):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows = make_rows((2, 3), 1003, dtype=dtype)
            full = torch.zeros(2, 4, 1003, dtype=dtype)
            full[:, :-1] = rows.student
            for name, options in LOSSES.items():
                cell = {
                    "backend": backend,
                    "dtype": str(dtype).removeprefix("torch."),
                    "loss": name,
                }
                try:
                    expected = oracle_sdpo_loss(
                        rows.student, rows.teacher, rows.target_ids, **options
                    )
                    leaf = full.clone().to(device).requires_grad_()
                    out = fastsdpo.sdpo_loss(
                        leaf[:, :-1], rows.teacher.to(device), rows.target_ids.to(device),
                        backend=backend, **options,
                    )  # fmt: skip
                    out.loss.backward()
                    error = float((out.loss.detach().cpu().double() - expected.loss).abs())
                    grad = leaf.grad[:, :-1].cpu().double()
                    largest = float(expected.grad.abs().max())
                    allowed = (
                        ROUNDING[dtype] * expected.grad.abs() + GRADIENT_FLOOR * largest + 2.0**-25
                    )
                    excess = float(((grad - expected.grad).abs() - allowed).max())
                    right = (
                        error <= LOSS_TOLERANCE * (1 + float(expected.loss.abs())) and excess <= 0
                    )
                    worst = float((grad - expected.grad).abs().max() / largest)
                    cell |= {"right": right, "loss_error": error, "gradient_error": worst}
                except Exception as problem:  # the report goes on; the exit status tells
                    cell |= {"right": False, "problem": f"{type(problem).__name__}: {problem}"}
                yield cell


def _seconds(device: str, call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats + 1):
        if device != "cpu":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def bandwidth(device: str, repeats: int = 5) -> list[dict[str, Any]]:
    """GB/s of forward + backward in bfloat16, gradient in place, next to a copy on the device."""
    tokens, vocabulary = (64, 49152) if device == "cpu" else (4096, 151936)
    student = torch.randn(tokens, vocabulary, device=device).bfloat16()
    teacher = torch.randn(tokens, vocabulary, device=device).bfloat16()
    y = torch.randint(0, vocabulary, (tokens,), device=device)
    target = torch.empty_like(student)
    copied = 2 * student.numel() * 2
    found = [
        {
            "what": "copy",
            "gb_per_s": copied / _seconds(device, lambda: target.copy_(student), repeats) / 1e9,
        }
    ]
    for name, elements in MOVED.items():

        def step(name: str = name) -> None:
            leaf = student.detach().requires_grad_()
            fastsdpo.sdpo_loss(leaf, teacher, y, inplace_grad=True, **LOSSES[name]).loss.backward()

        if device != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        seconds = _seconds(device, step, repeats)
        row = {"what": name, "gb_per_s": 2 * elements * student.numel() / seconds / 1e9}
        if device != "cpu":
            row["peak_extra_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        found.append(row)
    return found


def report(measure: bool = True) -> dict[str, Any]:
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    result: dict[str, Any] = {
        "versions": versions(), "platform": platform.platform(), "devices": devices(),
        "backends": fastsdpo.available_backends(), "auto": {name: choices(name) for name in names},
        "kernels": {name: list(check_kernels(name)) for name in names},
    }  # fmt: skip
    if measure:
        result["bandwidth"] = {name: bandwidth(name) for name in names}
    cells = [cell for found in result["kernels"].values() for cell in found]
    result["checked"] = len(cells)
    result["wrong"] = sum(not cell["right"] for cell in cells)
    return result


def show(result: dict[str, Any]) -> None:
    print("versions   " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()))
    for device in result["devices"]:
        print("device     " + ", ".join(f"{k} {v}" for k, v in device.items()))
    for name, reason in result["backends"].items():
        print(f"backend    {name}: {reason}")
    for device, found in result["auto"].items():
        print(f"auto       {device}: " + ", ".join(f"{k} -> {v}" for k, v in found.items()))
    for device, cells in result["kernels"].items():
        for backend in dict.fromkeys(cell["backend"] for cell in cells):
            mine = [cell for cell in cells if cell["backend"] == backend]
            wrong = [cell for cell in mine if not cell["right"]]
            print(f"kernels    {device} {backend}: {len(mine) - len(wrong)} of {len(mine)} right")
            for cell in wrong:
                print(
                    f"           WRONG {cell['loss']} {cell['dtype']}: {cell.get('problem', cell)}"
                )
    for device, rows in result.get("bandwidth", {}).items():
        copy = rows[0]["gb_per_s"]
        for row in rows:
            share = f" ({row['gb_per_s'] / copy:.2f} of copy)" if row["what"] != "copy" else ""
            extra = f", {row['peak_extra_mib']:.1f} MiB extra" if "peak_extra_mib" in row else ""
            print(f"bandwidth  {device} {row['what']}: {row['gb_per_s']:.1f} GB/s{share}{extra}")
    print(f"{result['checked'] - result['wrong']} of {result['checked']} checks right")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastsdpo doctor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-bandwidth", action="store_true", help="check values only")
    args = parser.parse_args(argv)
    result = report(measure=not args.no_bandwidth)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
