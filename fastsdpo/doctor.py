"""`fastsdpo doctor`: what runs on this machine, and whether it computes right.

Versions and devices; which backend each operation gets on each device, and why another is missing;
every kernel against float64 on small inputs; achieved bandwidth against a device copy; peak memory.
Exit status 0 when every kernel that is available is right, 1 when one is wrong or fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsdpo
from fastsdpo.ops.backend import resolve_backend, triton_interpreted
from fastsdpo.testing import (
    ROUNDING,
    Rows,
    make_rows,
    oracle_sdpo_loss,
    round_interpreted_bfloat16,
)

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
    "softcap, temperature, clipped ratio": {
        "mode": "full",
        "alpha": 1.0,
        "softcap": 30.0,
        "temperature": 0.7,
        "is_clip": 1.5,
    },
}
OPERATIONS = (
    "token_logps",
    "token_log_ratio",
    "sdpo_loss",
    "linear_token_logps",
    "linear_sdpo_loss",
)
# Logits elements read and written, forward + backward, per token and vocabulary position; top-k's
# torch.topk reads the student's once more.
MOVED = {"sampled token": 4, "forward KL": 5, "reverse KL": 5, "JSD": 7, "top-k, tail": 5}
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
        found.append(
            {
                "device": f"cuda:{index}",
                "name": p.name,
                "memory_gib": round(p.total_memory / 2**30, 1),
                "processors": p.multi_processor_count,
                "capability": f"{p.major}.{p.minor}",
            }
        )
    return found


def choices(device: str) -> dict[str, str]:
    """The backend that "auto" takes on ``device``, by dtype."""
    kinds = ("bfloat16", "float16", "float32", "float64")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `why` says what is missing
        return {
            kind: resolve_backend("doctor", "auto", torch.empty(0, dtype=getattr(torch, kind), device=device))
            for kind in kinds
        }


def why(device: str, kind: str, backend: str) -> str:
    """The reason of a choice."""
    if kind == "float64":
        return "only the reference computes float64"
    if backend == "triton":
        return "tensors on a GPU"
    if backend == "native":
        return "tensors on the CPU, the compiled library is there"
    missing = "native" if device == "cpu" else "triton"
    return f"{missing} is missing: {fastsdpo.available_backends()[missing]}"


def backends_on(device: str) -> list[str]:
    names = []
    for name in ("triton", "native", "reference"):
        try:
            resolve_backend("doctor", name, torch.empty(0, device=device))
        except (ValueError, ImportError):
            continue
        names.append(name)
    return names


def sizes_on(device: str) -> list[tuple[tuple[int, ...], int]]:
    """Shapes of the rows and vocabularies to check. Odd vocabularies: rows start at every place of a
    16-byte piece. On a GPU also rows of many tiles: few of them, each split over several programs, and as
    many as there are processors, one program each."""
    sizes: list[tuple[tuple[int, ...], int]] = [((2, 3), 1003)]
    if device != "cpu":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        sizes += [((2, 3), 50257), ((2, -(-processors // 2)), 20001)]
    return sizes


class Errors(NamedTuple):
    right: bool
    loss_error: float
    gradient_error: float


def judge(values: Iterable[tuple[Tensor, Tensor]], grad: Tensor, wanted: Tensor, dtype: torch.dtype) -> Errors:
    """Values and a gradient against float64."""
    pairs = [(got.detach().cpu().double(), want) for got, want in values]
    error = max(float((got - want).abs().max()) for got, want in pairs)
    near = all(bool(((got - want).abs() <= LOSS_TOLERANCE * (1 + want.abs())).all()) for got, want in pairs)
    grad, largest = grad.cpu().double(), float(wanted.abs().max())
    allowed = ROUNDING[dtype] * wanted.abs() + GRADIENT_FLOOR * largest + 2.0**-25
    within = bool(((grad - wanted).abs() <= allowed).all())
    return Errors(near and within, error, float((grad - wanted).abs().max() / largest))


def check_loss(rows: Rows, options: dict[str, Any], backend: str, device: str) -> Errors:
    """One loss on a slice of longer rows, as a trainer shifts its logits."""
    if "is_clip" in options:
        options = {**options, "old_logps": torch.full_like(rows.weights, -6.0)}
    if "topk" in options:  # ties in half precision: the support is the one torch.topk takes here
        ids = rows.student.to(device).topk(options["topk"], -1).indices.cpu()
        expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, topk_ids=ids, **options)
    else:
        expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, **options)
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    leaf = longer(rows.student).to(device).requires_grad_()
    out = fastsdpo.sdpo_loss(
        leaf[:, :-1],
        rows.teacher.to(device),
        rows.target_ids.to(device),
        backend=backend,
        **on_device,
    )
    out.loss.backward()
    assert leaf.grad is not None
    values = (
        (out.loss, expected.loss),
        (out.per_token_loss, expected.per_token_loss),
        (out.student_logps, expected.student_logps),
    )
    return judge(values, leaf.grad[:, :-1], expected.grad, rows.student.dtype)


def check_statistics(rows: Rows, options: dict[str, Any], backend: str, device: str) -> Errors:
    """`token_logps` with entropy and gradient, and `token_log_ratio`."""
    keep = rows.target_ids != -100
    y = rows.target_ids.clamp(min=0)[..., None]
    exact = rows.student.double().requires_grad_()
    log_probs = torch.log_softmax(exact, -1)
    logps = log_probs.gather(-1, y)[..., 0] * keep
    teacher = torch.log_softmax(rows.teacher.double(), -1).gather(-1, y)[..., 0] * keep
    logps.sum().backward()
    assert exact.grad is not None
    leaf = longer(rows.student).to(device).requires_grad_()
    targets = rows.target_ids.to(device)
    got, entropy = fastsdpo.token_logps(leaf[:, :-1], targets, return_entropy=True, backend=backend)
    got.sum().backward()
    ratio = fastsdpo.token_log_ratio(leaf[:, :-1].detach(), rows.teacher.to(device), targets, backend=backend)
    assert leaf.grad is not None
    values = (
        (got, logps.detach()),
        (entropy, -(log_probs.exp() * log_probs).sum(-1).detach() * keep),
        (ratio.teacher_logps, teacher),
    )
    return judge(values, leaf.grad[:, :-1], exact.grad, rows.student.dtype)


def check_hidden_states(rows: Rows, options: dict[str, Any], backend: str, device: str) -> Errors:
    """`linear_sdpo_loss` with an identity for a head: its logits are the rows themselves."""
    expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, **options)
    head = torch.eye(rows.student.shape[-1], dtype=rows.student.dtype, device=device)
    leaf = rows.student.to(device, copy=True).requires_grad_()
    out = fastsdpo.linear_sdpo_loss(
        leaf,
        rows.teacher.to(device),
        head,
        rows.target_ids.to(device),
        chunk_size=4,
        backend=backend,
        **options,
    )
    out.loss.backward()
    assert leaf.grad is not None
    values = ((out.loss, expected.loss), (out.per_token_loss, expected.per_token_loss))
    return judge(values, leaf.grad, expected.grad, rows.student.dtype)


def longer(student: Tensor) -> Tensor:
    """[B, L, V] with one more position, whose logits nobody reads."""
    full = student.new_zeros(student.shape[0], student.shape[1] + 1, student.shape[2])
    full[:, :-1] = student
    return full


def check_kernels(device: str) -> Iterator[dict[str, Any]]:
    """Every operation, dtype and backend against float64."""
    checks: list[tuple[str, Callable[..., Errors], dict[str, Any], bool]] = [
        (name, check_loss, options, True) for name, options in LOSSES.items()
    ]
    checks += [
        ("log-probs, entropy, log-ratio", check_statistics, {}, True),
        ("JSD from hidden states", check_hidden_states, LOSSES["JSD"], False),
    ]
    for backend in backends_on(device):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape, vocabulary in sizes_on(device):
                rows = make_rows(shape, vocabulary, dtype=dtype)
                for name, check, options, any_size in checks:
                    if vocabulary > 2000 and (backend == "reference" or not any_size):
                        continue
                    cell: dict[str, Any] = {
                        "backend": backend,
                        "dtype": str(dtype).removeprefix("torch."),
                        "loss": name,
                        "rows": math.prod(shape),
                        "vocabulary": vocabulary,
                    }
                    try:
                        cell |= check(rows, options, backend, device)._asdict()
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
    """GB/s of forward + backward in bfloat16, gradient in place, next to a copy on the device. Tensors
    of 48 MiB on a CPU, beyond most caches."""
    tokens, vocabulary = (512, 49152) if device == "cpu" else (4096, 151936)
    student = torch.randn(tokens, vocabulary, device=device).bfloat16()
    teacher = torch.randn(tokens, vocabulary, device=device).bfloat16()
    y = torch.randint(0, vocabulary, (tokens,), device=device)
    target = torch.empty_like(student)
    copied = 2 * student.numel() * 2
    found: list[dict[str, Any]] = [
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
    if triton_interpreted():
        round_interpreted_bfloat16()
        # numpy's remarks on lanes that the kernels discard
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton|numpy")
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    result: dict[str, Any] = {
        "versions": versions(),
        "platform": platform.platform(),
        "devices": devices(),
        "backends": fastsdpo.available_backends(),
        "operations": OPERATIONS,
        "auto": {name: choices(name) for name in names},
        "why": {name: {kind: why(name, kind, took) for kind, took in choices(name).items()} for name in names},
        "kernels": {name: list(check_kernels(name)) for name in names},
    }
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
        print(f"auto       {device}, every operation ({', '.join(result['operations'])}):")
        for kind, took in found.items():
            print(f"           {kind} -> {took} ({result['why'][device][kind]})")
    for device, cells in result["kernels"].items():
        for backend in dict.fromkeys(cell["backend"] for cell in cells):
            mine = [cell for cell in cells if cell["backend"] == backend]
            wrong = [cell for cell in mine if not cell["right"]]
            print(f"kernels    {device} {backend}: {len(mine) - len(wrong)} of {len(mine)} right")
            for cell in wrong:
                print(
                    f"           WRONG {cell['loss']} {cell['dtype']} {cell['rows']} x "
                    f"{cell['vocabulary']}: {cell.get('problem', cell)}"
                )
    for device, rows in result.get("bandwidth", {}).items():
        copy = rows[0]["gb_per_s"]
        for row in rows:
            share = f" ({row['gb_per_s'] / copy:.2f} of copy)" if row["what"] != "copy" else ""
            extra = f", {row['peak_extra_mib']:.1f} MiB extra" if "peak_extra_mib" in row else ""
            print(f"bandwidth  {device} {row['what']}: {row['gb_per_s']:.1f} GB/s{share}{extra}")
    print(f"{result['checked'] - result['wrong']} of {result['checked']} checks right")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastsdpo doctor", description=(__doc__ or "").split("\n")[0])
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
