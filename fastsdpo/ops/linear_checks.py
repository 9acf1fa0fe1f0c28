"""Argument checks of the functions that take hidden states and a head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsdpo.ops.checks import (
    FLOAT_DTYPES,
    as_rows,
    check_like,
    check_logits,
    check_tensor,
    refuse_tangent,
    shape_text,
)
from fastsdpo.ops.head import default_chunk_size, has_mixed_gemm


def gathered(tensor: Tensor | None) -> Tensor | None:
    """A sharded (DTensor) head as a whole tensor; its gradient is averaged over the mesh.

    That is what FSDP2 does with the gradients of a module's own parameters.
    """
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    if isinstance(tensor, DTensor):
        return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
    return tensor


def check_head_tensors(
    name: str, argument: str, hidden: Tensor, weight: Any, bias: Any
) -> tuple[Tensor, Tensor | None]:
    weight = refuse_tangent(name, argument, check_tensor(name, argument, weight))
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: {argument} must be floating, got {weight.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        remedy = ""
        if weight.numel() == 0:
            remedy = "; an empty head is partitioned by DeepSpeed ZeRO-3: gather it first"
        raise ValueError(
            f"{name}: {argument} must have shape (V, D) with D = {hidden.shape[-1]}, "
            f"got {shape_text(weight.shape)}{remedy}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{name}: {argument} must be on {hidden.device}, got {weight.device}")
    if bias is not None:
        bias_name = argument.replace("weight", "bias")
        bias = check_like(name, bias_name, bias, (weight.shape[0],), hidden.device)
    return weight, bias


def check_teacher(
    name: str, student: Tensor, vocabulary: int, hidden: Any, weight: Any, bias: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The teacher's hidden states ``[N, D_T]``, weight and bias, detached; None where not given.

    Args:
        student: the student's hidden states ``(..., D)``.
        vocabulary: rows of the student's head.
    """
    weight, bias = gathered(weight), gathered(bias)
    if hidden is None and weight is not None:
        raise ValueError(f"{name}: teacher_weight must come with teacher_hidden, got none")
    if weight is None and bias is not None:
        raise ValueError(f"{name}: teacher_bias must come with teacher_weight, got none")
    if hidden is None:
        return None, None, None
    hidden = check_logits(name, "teacher_hidden", hidden, "D").detach()
    if hidden.shape[:-1] != student.shape[:-1] or hidden.device != student.device:
        raise ValueError(
            f"{name}: teacher_hidden must match student_hidden {shape_text(student.shape)} on {student.device} "
            f"up to D, got {shape_text(hidden.shape)} on {hidden.device}"
        )
    if weight is None:
        if hidden.shape[-1] != student.shape[-1]:
            raise ValueError(
                f"{name}: teacher_hidden must have D = {student.shape[-1]} without a teacher_weight, "
                f"got {hidden.shape[-1]}"
            )
        return flat_hidden(hidden), None, None
    weight, bias = check_head_tensors(name, "teacher_weight", hidden, weight, bias)
    if weight.shape[0] != vocabulary:
        raise ValueError(f"{name}: teacher_weight must have V = {vocabulary} rows, got {weight.shape[0]}")
    return flat_hidden(hidden), weight.detach(), None if bias is None else bias.detach()


def check_teacher_logits(
    name: str, student: Tensor, vocabulary: int, logits: Any, has_hidden: bool, softcap: float | None
) -> Tensor:
    """The teacher's logits ``[B, L, V]``, detached."""
    if has_hidden:
        raise ValueError(f"{name}: exactly one of teacher_hidden and teacher_logits must be given, got both")
    if softcap is not None:
        raise ValueError(
            f"{name}: softcap must be None with teacher_logits, got {softcap}: it would cap them again; "
            "give teacher_hidden, or take sdpo_loss of capped logits"
        )
    logits = check_logits(name, "teacher_logits", logits)
    if logits.shape != (*student.shape[:-1], vocabulary) or logits.device != student.device:
        wanted = shape_text((*student.shape[:-1], vocabulary))
        raise ValueError(
            f"{name}: teacher_logits must have shape {wanted} on {student.device}, "
            f"got {shape_text(logits.shape)} on {logits.device}"
        )
    return as_rows(logits.detach())


def refuse_with_shards(name: str, vocab_group: Any, **arguments: Any) -> None:
    """Raises where an argument that a vocabulary-parallel head does not know is given with one."""
    given = [argument for argument, value in arguments.items() if value is not None]
    if vocab_group is not None and given:
        raise ValueError(
            f"{name}: {given[0]} must be None with vocab_group: not supported for a head that is split by vocabulary"
        )


def check_chunk(name: str, chunk_size: int | None, tokens: int, head: Tensor) -> int:
    if chunk_size is None:
        return default_chunk_size(tokens, head.shape[0], head.device)
    if isinstance(chunk_size, bool) or int(chunk_size) != chunk_size or chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be a positive integer or None, got {chunk_size}")
    return int(chunk_size)


def check_scale(name: str, logit_scale: float) -> float:
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"{name}: logit_scale must be > 0 and finite, got {logit_scale}")
    return float(logit_scale)


def check_tile(name: str, tile_dtype: torch.dtype | None, device: torch.device) -> None:
    if tile_dtype not in (None, torch.float32) and not has_mixed_gemm(device):
        raise ValueError(
            f"{name}: tile_dtype must be None or torch.float32 on {device.type} with torch "
            f"{torch.__version__}, got {tile_dtype}"
        )
    if tile_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: tile_dtype must be None, torch.float32, torch.bfloat16 or torch.float16, got {tile_dtype}"
        )


def flat_hidden(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])
