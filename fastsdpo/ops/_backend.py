"""Who computes: ``"triton"``, ``"native"`` or ``"reference"``; ``"auto"`` picks by device.

A backend asked for by name runs or raises. ``"auto"`` takes Triton for CUDA and ROCm tensors, the
native library for CPU tensors, and the reference where neither can run (float64, another device,
a missing package).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "native", "reference")


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@torch.compiler.assume_constant_result
def _triton_reason() -> str | None:
    """Why Triton cannot run at all here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if not torch.cuda.is_available() and not triton_interpreted():
        return "no CUDA or ROCm device is available (TRITON_INTERPRET=1 runs it on CPU tensors)"
    return None


@torch.compiler.assume_constant_result
def _native_reason() -> str | None:
    """Why the native library cannot run here, or None."""
    try:
        from fastsdpo._native import native_available
    except ModuleNotFoundError:
        return "the module fastsdpo._native is missing"
    available, reason = native_available()
    return None if available else reason


def available_backends() -> dict[str, str]:
    """Each backend with ``"available"`` or the reason why it is missing."""
    return {
        "triton": _triton_reason() or "available",
        "native": _native_reason() or "available",
        "reference": "available",
    }


def resolve_backend(name: str, backend: str, *tensors: Tensor) -> str:
    """The backend that computes ``tensors`` for the public function ``name``.

    Raises:
        ValueError: an unknown backend, or one that cannot run on the tensors' device.
        TypeError: a dtype that the backend asked for does not compute (float64).
        ImportError: the backend asked for is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return backend
    device = tensors[0].device.type
    float64 = any(t.dtype == torch.float64 for t in tensors)
    if backend == "auto":
        if float64:
            return "reference"
        if device == "cuda" and _triton_reason() is None:
            return "triton"
        if device == "cpu" and _native_reason() is None:
            return "native"
        return "reference"
    if float64:
        raise TypeError(
            f"{name}: backend={backend!r} computes float16, bfloat16 and float32, got float64; "
            "use backend='reference'"
        )
    if backend == "triton":
        if device != "cuda" and not (device == "cpu" and triton_interpreted()):
            raise ValueError(
                f"{name}: backend='triton' must have CUDA or ROCm tensors "
                f"(CPU tensors under TRITON_INTERPRET=1), got {device}"
            )
        reason = _triton_reason()
    else:
        if device != "cpu":
            raise ValueError(f"{name}: backend='native' must have CPU tensors, got {device}")
        reason = _native_reason()
    if reason is not None:
        raise ImportError(f"{name}: backend={backend!r} is not available: {reason}")
    return backend


def implementation(op: str, backend: str) -> ModuleType:
    """The module that holds ``op``'s functions for a resolved backend; imported on first use."""
    file = {"triton": "_triton", "native": "_native", "reference": "reference"}[backend]
    return importlib.import_module(f"fastsdpo.ops.{op}.{file}")
