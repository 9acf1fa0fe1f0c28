"""Argument checks shared by the ops: shapes, dtypes, ranges; and the flattening of leading axes.

Only shapes, dtypes, devices and Python numbers are read, so a check never waits for a GPU and
`torch.compile` traces through it; but `check_ids` and `check_distinct`, which operators call.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_text(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(int(n)) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def check_tensor(name: str, argument: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{name}: {argument} must be a dense tensor, got {kind}")
    return value


def refuse_tangent(name: str, argument: str, tensor: Tensor) -> Tensor:
    """Operators would drop a tangent of forward-mode derivatives without a word."""
    if not torch.compiler.is_compiling() and unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(f"{name}: {argument} must have no tangent: derivatives are in reverse mode only")
    return tensor


def check_logits(name: str, argument: str, logits: Any, axis: str = "V") -> Tensor:
    """A floating tensor (..., V) with V >= 1; ``axis`` is how errors call V."""
    logits = refuse_tangent(name, argument, check_tensor(name, argument, logits))
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: {argument} must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        wanted = f"(..., {axis}) with {axis} >= 1"
        raise ValueError(f"{name}: {argument} must have shape {wanted}, got {shape_text(logits.shape)}")
    return logits


def check_like(
    name: str,
    argument: str,
    value: Any,
    shape: Sequence[int],
    device: torch.device,
    *,
    integer: bool = False,
) -> Tensor:
    """A tensor of exactly ``shape`` on ``device``; floating, or integer with ``integer=True``."""
    value = check_tensor(name, argument, value)
    is_integer = not (value.is_floating_point() or value.is_complex()) and value.dtype != torch.bool
    if integer and not is_integer:
        raise TypeError(f"{name}: {argument} must have an integer dtype, got {value.dtype}")
    if not integer and not value.is_floating_point():
        raise TypeError(f"{name}: {argument} must have a floating dtype, got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: {argument} must have shape {shape_text(shape)}, got {shape_text(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: {argument} must be on {device}, got {value.device}")
    return value


def check_temperature(name: str, temperature: float, argument: str = "temperature") -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: {argument} must be > 0 and finite, got {temperature}")
    return float(temperature)


def check_softcap(name: str, softcap: float | None) -> float:
    """The softcap as a float, 0.0 standing for none."""
    if softcap is None:
        return 0.0
    if not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap must be > 0 and finite, or None, got {softcap}")
    return float(softcap)


def check_alpha(name: str, alpha: float) -> float:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name}: alpha must lie in [0, 1], got {alpha}")
    return float(alpha)


def check_is_clip(name: str, is_clip: float | None) -> None:
    if is_clip is not None and not is_clip > 0:
        raise ValueError(f"{name}: is_clip must be > 0 or None, got {is_clip}")


def check_ignore_index(name: str, ignore_index: Any) -> int:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name}: ignore_index must be an integer, got {ignore_index!r}")
    return int(ignore_index)


def check_topk(name: str, topk: int | None, vocabulary: int) -> int:
    if topk is None:
        raise ValueError(f"{name}: topk must be given for mode='topk' (or teacher_topk)")
    if isinstance(topk, bool) or int(topk) != topk or not 1 <= topk <= vocabulary:
        raise ValueError(f"{name}: topk must be an integer in [1, V] = [1, {vocabulary}], got {topk}")
    return int(topk)


def _reads_values(tensor: Tensor) -> bool:
    """Whether values are checked: reading them waits for a GPU, so there only with ``FASTSDPO_CHECK=1``."""
    return tensor.device.type == "cpu" or os.environ.get("FASTSDPO_CHECK", "0") == "1"


def check_ids(ids: Tensor, vocabulary: int, argument: str, ignore_index: int | None) -> None:
    """Ids must lie in [0, V) (or be ``ignore_index``)."""
    if not _reads_values(ids):
        return
    bad = (ids < 0) | (ids >= vocabulary)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bool(bad.any()):
        flat = bad.reshape(-1).nonzero()[0].item()
        value = int(ids.reshape(-1)[flat])
        rule = f"lie in [0, V) = [0, {vocabulary})"
        if ignore_index is not None:
            rule += f" or be ignore_index = {ignore_index}"
        raise ValueError(f"{argument} must {rule}, got {value} at flattened position {flat}")


def check_distinct(ids: Tensor, argument: str) -> None:
    """No id stands twice in a row of ``ids [N, K]``."""
    if _reads_values(ids) and bool((ids.sort(-1).values.diff(dim=-1) == 0).any()):
        raise ValueError(f"{argument} must be distinct in each row, got a repeated id")


def as_rows(logits: Tensor) -> Tensor:
    """``(..., V)`` as a view ``[B, L, V]`` whose last stride is 1.

    Two row axes are enough to reach a slice such as ``logits[:, :-1]`` without a copy. Only a
    tensor whose last axis is strided, or with three or more row axes that do not merge, is copied.
    """
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.ndim == 3:
        return logits
    if logits.ndim <= 2:
        return logits.reshape(1, -1, logits.shape[-1]) if logits.ndim == 1 else logits.unsqueeze(0)
    return logits.reshape(-1, logits.shape[-2], logits.shape[-1])


def flat_ids(ids: Tensor) -> Tensor:
    return ids.reshape(-1).to(torch.int64).contiguous()


def flat_float(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().reshape(-1).to(dtype).contiguous()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 whatever comes in; float64 stays float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def cut_vocabulary(name: str, argument: str, value: Any, vocab_size: int | None, axis: int) -> Any:
    """The first ``vocab_size`` entries along the vocabulary's axis, a view; ``value`` itself where either is None."""
    if vocab_size is None or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if isinstance(vocab_size, bool) or int(vocab_size) != vocab_size or not 1 <= vocab_size <= value.shape[axis]:
        raise ValueError(
            f"{name}: vocab_size must be an integer in [1, {value.shape[axis]}], the vocabulary of {argument}, "
            f"got {vocab_size}"
        )
    return value.narrow(axis, 0, int(vocab_size))
