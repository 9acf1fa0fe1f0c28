"""Chooses the backend that computes: ``"triton"``, ``"native"`` or ``"reference"``; ``"auto"`` picks by device.

A backend asked for by name runs or raises. ``"auto"`` takes Triton for CUDA and ROCm tensors, the
native library for CPU tensors, and the reference where neither can run (float64, another device,
a missing package). It warns once where the device's kernels are not installed.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")
LOSS_BACKENDS = ("auto", "triton", "native", "reference")


def constant(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """`torch.compiler.assume_constant_result`, which imports the whole compiler: as much time as torch itself."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@constant
def _triton_reason() -> str | None:
    """Why Triton cannot run at all here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if not torch.cuda.is_available() and not triton_interpreted():
        return "no CUDA or ROCm device is available (TRITON_INTERPRET=1 runs it on CPU tensors)"
    return None


@constant
def _native_reason() -> str | None:
    """Why the native library cannot run here, or None."""
    try:
        from fastsdpo._native import native_available
    except ModuleNotFoundError:
        return "the module fastsdpo._native is missing"
    available, reason = native_available()
    return None if available else reason


# Tensors without memory (meta) have a backend that only allocates: the memory of a step is read off its shapes.
KERNELS = {"cpu": ("native", _native_reason), "cuda": ("triton", _triton_reason), "meta": ("meta", lambda: None)}
REFERENCE = "losses are computed by the reference (eager PyTorch)"
_told: set[str] = set()  # reasons for a slow backend that the user has been given


def _kernels_for(device: str) -> tuple[str | None, str | None]:
    """``(backend, None)`` that ``"auto"`` takes on a device type, ``(None, reason)`` if its kernels are missing.

    ``(None, None)`` if there are no kernels for the device type.
    """
    if device not in KERNELS:
        return None, None
    name, why = KERNELS[device]
    reason = why()
    return (name, None) if reason is None else (None, f"no {name} kernels: {reason}")


@constant
def _auto(device: str) -> str:
    name, reason = _kernels_for(device)
    if reason is not None and reason not in _told:
        _told.add(reason)  # once per process, whatever the filters: losses are called in loops
        warnings.warn(f"{REFERENCE}, slowly: {_short(reason)}", stacklevel=2)
    return name or "reference"


def _short(reason: str) -> str:
    """The reason without a compiler's output, which may be long."""
    start, failed, _ = reason.partition("failed at install: ")
    return f"{start}failed at install); `fastsdpo doctor` says why" if failed else reason


def describe_backend(device: str, dtype: str | None = None) -> str:
    """A sentence for users: which backend ``"auto"`` takes, and why it takes no faster one.

    It marks the reason as told: no loss of this process warns of it again.

    Args:
        device: a device type, ``"cpu"`` or ``"cuda"``.
        dtype: of the logits, ``"float32"``; None: not known.
    """
    if dtype == "float64":
        return f"{REFERENCE}: the kernels do not compute float64"
    name, reason = _kernels_for(device)
    if reason is not None:
        _told.add(reason)
        return f"{REFERENCE}, slowly: {_short(reason)}"
    if name is None:
        return f"{REFERENCE}: there are no kernels for the device type {device!r}"
    return f"losses are computed by the {name} kernels"


def available_backends() -> dict[str, str]:
    """Tells which backends can compute losses in this environment.

    Returns:
        ``{"triton": ..., "native": ..., "reference": ...}``, each ``"available"`` or the reason why it is missing.
    """
    return {
        "triton": _triton_reason() or "available",
        "native": _native_reason() or "available",
        "reference": "available",
    }


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device, after something was put there; None: CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device, or this PyTorch is built without it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device must be one that this PyTorch can use, got {str(device)!r}: {error}") from None


def resolve_backend(name: str, backend: str, *tensors: Tensor) -> str:
    """The backend that computes ``tensors`` for the public function ``name``.

    Raises:
        ValueError: an unknown backend, or one that cannot run on the tensors' device.
        TypeError: a dtype that the backend asked for does not compute (float64).
        ImportError: the backend asked for is not installed.
    """
    if backend not in LOSS_BACKENDS:
        raise ValueError(f"{name}: backend must be one of {LOSS_BACKENDS}, got {backend!r}")
    if backend == "reference":
        return backend
    device = tensors[0].device.type
    float64 = any(t.dtype == torch.float64 for t in tensors)
    if backend == "auto":
        return "reference" if float64 else _auto(device)
    if float64:
        raise TypeError(
            f"{name}: backend={backend!r} computes float16, bfloat16 and float32, got float64; use backend='reference'"
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
