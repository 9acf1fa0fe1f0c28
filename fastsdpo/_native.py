"""Loads libfastsdpo, the native CPU kernels, and calls its C functions (kernels/cpu/fastsdpo.h).

The library is plain C: no Python and no PyTorch inside, so one build serves every version of both. It
is optional. Where it is missing, `native_available` says why, and the reference computes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ABI = 3
OPERATIONS = ("token_logps", "token_log_ratio", "sampled_token", "divergence", "topk", "support")
FORWARD, GRADIENT = 1, 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What setup.py leaves behind instead of the library when the build fails.
BUILD_FAILURE = "native_build_failed.txt"

_ERRORS = {-1: "target_ids must lie in [0, V) or be ignore_index", -2: "topk_ids must lie in [0, V)"}


class NativeRows(ctypes.Structure):
    """``fastsdpo_rows``: logits ``[B, L, V]`` with any strides on B and L."""

    _fields_ = (("data", c_void_p), ("stride_b", c_int64), ("stride_l", c_int64), ("dtype", c_int64))


class NativeCall(ctypes.Structure):
    """``fastsdpo_call``: the arguments of every operation; what one does not use stays 0."""

    _fields_ = (
        *((name, NativeRows) for name in ("student", "teacher", "grad")),
        *((name, c_int64) for name in ("B", "L", "V", "K")),
        *((name, c_int64) for name in ("ignore_index", "passes", "threads", "add_tail")),
        *((name, c_double) for name in ("temperature", "softcap", "alpha", "is_clip")),
        *((name, c_void_p) for name in ("target_ids", "topk_ids", "weights", "old_logps")),
        *((name, c_void_p) for name in ("given_teacher_logps", "given_topk_logps")),
        *((name, c_void_p) for name in ("upstream", "grad_loss")),
        *((name, c_void_p) for name in ("student_logps", "teacher_logps", "entropy")),
        *((name, c_void_p) for name in ("per_token", "coef", "class_grads", "support")),
        ("stats", c_void_p * 5),
        ("stats_stride", c_int64),
    )


def _file() -> Path:
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    return Path(__file__).with_name(f"{prefix}fastsdpo{suffix}")


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # On Linux the library takes its OpenMP runtime from PyTorch; one that brings none leaves the
        # symbols open, and the system's runtime fills them.
        if not any(symbol in str(error) for symbol in ("GOMP_", "omp_get_")):
            raise
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None with the reason."""
    path = _file()
    if not path.exists():
        failure = path.with_name(BUILD_FAILURE)
        if failure.exists():
            text = failure.read_text(encoding="utf-8").strip()
            why = f"its build failed at install: {text[:1000]}"
        else:
            why = f"{path.name} was not built"
        return None, (
            f"the compiled library is missing ({why}); reinstall with FASTSDPO_REQUIRE_NATIVE=1 "
            "to see the whole error (needs CMake and GCC or Clang)"
        )
    try:
        library = _open(path)
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    abi = library.fastsdpo_abi()
    if abi != ABI:
        return None, f"{path.name} is of another version (interface {abi}, wanted {ABI}); reinstall"
    for name in ("fastsdpo_isa", "fastsdpo_isas"):
        getattr(library, name).restype = ctypes.c_char_p
    library.fastsdpo_set_isa.argtypes = [ctypes.c_char_p]
    for name in OPERATIONS:
        getattr(library, f"fastsdpo_{name}").argtypes = [ctypes.POINTER(NativeCall)]
    library.fastsdpo_math.argtypes = [ctypes.c_int, c_void_p, c_void_p, c_int64]
    library.fastsdpo_convert.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_int64]
    if not library.fastsdpo_isa():
        return None, "this CPU lacks SSE4.2 (x86-64-v2), the least that the kernels need"
    wanted = os.environ.get("FASTSDPO_ISA")
    if wanted and library.fastsdpo_set_isa(wanted.encode()) != 0:
        names = library.fastsdpo_isas().decode()
        raise ValueError(f"FASTSDPO_ISA must be one of {names} on this CPU, got {wanted!r}")
    threads = "" if library.fastsdpo_parallel() else ", one thread: it was built without OpenMP"
    return library, f"instruction set {library.fastsdpo_isa().decode()}{threads}"


def native_available() -> tuple[bool, str]:
    """Whether the compiled kernels can run here, and the instruction set in use or what is missing.

    Raises:
        ValueError: the environment variable ``FASTSDPO_ISA`` names an instruction set that this CPU
            does not have.
    """
    library, reason = _load()
    return library is not None, reason


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        ImportError: it is missing, with the reason.
    """
    loaded, reason = _load()
    if loaded is None:
        raise ImportError(f"backend='native' is not available: {reason}")
    return loaded


def instruction_sets() -> list[str]:
    """The instruction sets that the library was built for and this CPU runs, best first."""
    return library().fastsdpo_isas().decode().split(",")


def set_instruction_set(name: str) -> None:
    """Chooses one of `instruction_sets` for the whole process (for tests and measurements)."""
    if library().fastsdpo_set_isa(name.encode()) != 0:
        raise ValueError(f"instruction set must be one of {instruction_sets()}, got {name!r}")


def rows(logits: Tensor) -> NativeRows:
    """The C description of ``logits [B, L, V]``, whose last stride is 1."""
    stride_b, stride_l, stride_v = logits.stride()
    if stride_v != 1 and logits.shape[2] > 1:
        raise ValueError(f"logits must have last stride 1, got {stride_v}")
    return NativeRows(logits.data_ptr(), stride_b, stride_l, DTYPES[logits.dtype])


def vector(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    """The address of a contiguous per-token tensor; None for None."""
    if tensor is None:
        return None
    assert tensor.dtype == dtype and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
    return tensor.data_ptr()


def call(
    operation: str,
    student: Tensor,
    target_ids: Tensor,
    passes: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
    **fields: object,
) -> None:
    """Runs ``fastsdpo_<operation>`` on ``student [B, L, V]``; ``fields`` are those of `NativeCall`.

    The tensors whose addresses are in ``fields`` must outlive the call: keep them in variables.

    Raises:
        ValueError: an id outside [0, V).
    """
    B, L, V = student.shape
    status = getattr(library(), f"fastsdpo_{operation}")(
        NativeCall(
            student=rows(student),
            target_ids=vector(target_ids, torch.int64),
            B=B,
            L=L,
            V=V,
            passes=passes,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            threads=torch.get_num_threads(),
            **fields,
        )
    )
    if status == -3:
        raise MemoryError(f"{operation}: out of memory")
    if status:
        raise ValueError(f"{operation}: {_ERRORS[status]}")
