"""What `fastsdpo doctor` reports: versions, devices, backends, and whether each backend computes right here.

A backend is tried on a small loss of every kind, values and gradient against float64. How fast it is, `fastsdpo
bench` tells.
"""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch

import fastsdpo
from fastsdpo.ops.backend import resolve_backend, triton_interpreted
from fastsdpo.testing import assert_gradient_close, make_rows, oracle_sdpo_loss, round_interpreted_bfloat16
from fastsdpo.timing import installed_version

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "liger-kernel", "trl")
TRAINING = ("transformers", "accelerate", "peft")  # what the commands need beyond torch
DTYPES = ("bfloat16", "float16", "float32")
LOSSES: dict[str, dict[str, Any]] = {
    "sampled token": {"mode": "sampled_token"},
    "forward KL": {"mode": "full", "alpha": 0.0},
    "reverse KL": {"mode": "full", "alpha": 1.0},
    "JSD": {"mode": "full", "alpha": 0.5},
    "top-k": {"mode": "topk", "alpha": 1.0, "topk": 20},
}
TOLERANCE = 1e-5  # of a loss, relative to 1 + its size


def versions() -> dict[str, str]:
    """The version of fastsdpo, Python and every package that it works with, or "not installed"."""
    shown = {"fastsdpo": fastsdpo.__version__, "python": platform.python_version()}
    return shown | {package: installed_version(package) or "not installed" for package in PACKAGES}


def devices() -> dict[str, str]:
    """A description of the CPU and of every GPU, by device name."""
    threads = torch.get_num_threads()
    shown = {"cpu": f"{platform.processor() or platform.machine()}, {threads} threads"}
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        shown[f"cuda:{index}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}"
    return shown


def chosen(device: str) -> dict[str, str]:
    """The backend that "auto" takes on ``device``, by dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says what is missing
        return {
            dtype: resolve_backend("doctor", "auto", torch.empty(0, dtype=getattr(torch, dtype), device=device))
            for dtype in (*DTYPES, "float64")
        }


def usable(device: str) -> list[str]:
    """The backends that compute tensors on ``device``."""
    names = []
    for name in fastsdpo.available_backends():
        try:
            resolve_backend("doctor", name, torch.empty(0, device=device))
        except (ValueError, ImportError):
            continue
        names.append(name)
    return names


def problems(device: str, backend: str) -> list[str]:
    """What a backend computes wrong, or cannot compute, on ``device``: one line per loss and dtype."""
    found = []
    for dtype in DTYPES:
        for name in LOSSES:
            try:
                check_loss(name, dtype, backend, device)
            except Exception as error:  # whatever it is, the report goes on and names it
                found.append(f"{name}, {dtype}: {type(error).__name__}: {error}")
    return found


def check_loss(name: str, dtype: str, backend: str, device: str) -> None:
    """One loss of 6 tokens over 1,003 (an odd number: no row is aligned), against float64.

    Raises:
        AssertionError: a value or the gradient is off by more than rounding explains.
    """
    options = LOSSES[name]
    rows = make_rows((2, 3), 1003, dtype=getattr(torch, dtype))
    student = rows.student.to(device).requires_grad_()
    support: dict[str, Any] = {}
    if "topk" in options:  # ties in half precision: the support is the one torch.topk takes here
        support = {"topk_ids": student.detach().topk(options["topk"], -1).indices.cpu()}
    exact = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, **options, **support)
    out = fastsdpo.sdpo_loss(student, rows.teacher.to(device), rows.target_ids.to(device), backend=backend, **options)
    out.loss.backward()
    error = (out.per_token_loss.cpu().double() - exact.per_token_loss).abs()
    assert (error <= TOLERANCE * (1 + exact.per_token_loss.abs())).all(), f"off by {float(error.max()):.2g}"
    assert student.grad is not None
    assert_gradient_close(student.grad.cpu(), exact.grad)


def advice(installed: dict[str, str], backends: dict[str, str]) -> list[str]:
    """What to do about what is missing; empty where nothing is."""
    lines = []
    if backends["native"] != "available":
        lines.append("for fast losses on the CPU reinstall with FASTSDPO_REQUIRE_NATIVE=1; backend native says why")
    if torch.cuda.is_available() and backends["triton"] != "available":
        lines.append("for fast losses on the GPU: pip install triton")
    absent = [package for package in TRAINING if installed[package] == "not installed"]
    if absent:
        lines.append(f"for training, which needs {', '.join(absent)}: pip install 'fastsdpo[train]'")
    return lines


def report() -> dict[str, Any]:
    """Everything that the command shows; of ``"checked"`` losses, ``"wrong"`` ones are off or failed."""
    if triton_interpreted():
        round_interpreted_bfloat16()
        # numpy's remarks on lanes that the kernels discard
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton|numpy")
    installed, backends, found = versions(), fastsdpo.available_backends(), devices()
    checks = {device: {name: problems(device, name) for name in usable(device)} for device in found}
    return {
        "versions": installed,
        "platform": platform.platform(),
        "devices": found,
        "backends": backends,
        "auto": {device: chosen(device) for device in found},
        "problems": checks,
        "checked": len(LOSSES) * len(DTYPES) * sum(len(backend) for backend in checks.values()),
        "wrong": sum(len(lines) for backend in checks.values() for lines in backend.values()),
        "advice": advice(installed, backends),
    }
