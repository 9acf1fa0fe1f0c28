"""A teacher in another process: its hidden states ``[T, D]`` travel, in place of its logits ``[T, V]``.

    teacher's process                                          trainer's process
    message = pack(hidden, target_ids, head)  --- bytes --->   hidden = unpack(message, head, target_ids)
                                                               linear_sdpo_loss(student, hidden, weight, ids,
                                                                                teacher_weight=head.weight, ...)

The trainer holds a copy of the teacher's head (``lm_head`` of its checkpoint), or the head is the student's own. The
divergence is then over the whole vocabulary, for D numbers per token.

A message is one safetensors file (https://huggingface.co/docs/safetensors), so that no reader executes anything:

    hidden_states  [T, D]        float32, bfloat16 or float16: what the teacher's head takes, final norm included
    target_ids     [T]           int64: the tokens that these positions predict
    check_logps    [min(T, 8)]   float32: the teacher's log-probs of the first of them, at temperature 1
    metadata       format "fastsdpo.hidden_states.1"; vocab_size; head: a name that the sender gives its head

The receiver computes ``check_logps`` again with its own head. A head of another model, an older one, a missing softcap
or scale, a missing final norm, or rows in another order disagree there, and not in the loss curve.

Any transport of bytes will do (HTTP, a socket, a file); `send` and `receive` use a torch.distributed group.
The idea is NeMo-RL's (https://github.com/NVIDIA-NeMo/RL) and verl-omni's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from fastsdpo.ops.linear_token_logps import linear_token_logps

if TYPE_CHECKING:
    from fastsdpo.prefix import HeadParameters

FORMAT = "fastsdpo.hidden_states.1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECKED = 8
TENSORS = {"hidden_states", "target_ids", "check_logps"}


def pack(hidden_states: Tensor, target_ids: Tensor, head: HeadParameters, *, head_name: str = "") -> bytes:
    """The message of one batch.

    Args:
        hidden_states: ``[T, D]``, what the head takes; `fastsdpo.prefix.run_inside` gives it of a model.
        target_ids: ``[T]`` integer in [0, V): the tokens that these positions predict.
        head: the teacher's, `fastsdpo.prefix.head_parameters` of its model.
        head_name: compared by the receiver, for instance the step or a hash of the checkpoint.

    Raises:
        ValueError, TypeError: shapes that do not fit; a dtype other than `DTYPES`.
    """
    name = "pack"
    _check_rows(name, hidden_states, target_ids, head)
    tensors = {
        "hidden_states": hidden_states.detach().contiguous().cpu(),
        "target_ids": target_ids.to("cpu", torch.int64).contiguous(),
        "check_logps": _check_logps(hidden_states, target_ids, head).cpu(),
    }
    metadata = {"format": FORMAT, "vocab_size": str(len(head.weight)), "head": head_name}
    return safetensors.torch.save(tensors, metadata)


def unpack(
    message: bytes, head: HeadParameters, target_ids: Tensor, *, head_name: str = "", tolerance: float | None = None
) -> Tensor:
    """The hidden states ``[T, D]`` of a message, on the head's device.

    Args:
        message: of `pack`, or of any writer of that file.
        head: the trainer's copy of the teacher's head.
        target_ids: ``[T]`` the tokens that the trainer wants scored, in its order.
        head_name: what the sender must have given.
        tolerance: largest difference of a checked log-prob, in nats; None is 1e-3 for float32 and 0.1 for the half
            dtypes, in which two programs round logits differently.

    Raises:
        ValueError: bytes that are no such message; another head, vocabulary, width or other tokens.
        TypeError: a dtype other than `DTYPES`.
    """
    name = "unpack"
    tensors, metadata = _read(name, message)
    hidden, sent_ids, logps = (tensors[key] for key in ("hidden_states", "target_ids", "check_logps"))
    rows = len(head.weight)
    if metadata.get("vocab_size") != str(rows):
        raise ValueError(
            f"{name}: head must have the sender's {metadata.get('vocab_size')} rows, got {rows}; is one vocabulary "
            "padded? Cut both heads to the tokenizer's size"
        )
    if metadata.get("head") != head_name:
        raise ValueError(f"{name}: head_name must be the sender's {metadata.get('head')!r}, got {head_name!r}")
    _check_rows(name, hidden, sent_ids, head)
    wanted = target_ids.detach().to("cpu", torch.int64)
    if wanted.shape != sent_ids.shape or not torch.equal(wanted, sent_ids):
        differ = "numbers of them" if wanted.shape != sent_ids.shape else int((wanted != sent_ids).nonzero()[0, 0])
        raise ValueError(
            f"{name}: target_ids must be the {len(sent_ids)} that the message has, got {tuple(wanted.shape)}; the "
            f"first difference: {differ}"
        )
    hidden = hidden.to(head.weight.device)
    if tolerance is None:
        tolerance = 1e-3 if hidden.dtype == head.weight.dtype == torch.float32 else 0.1
    found = _check_logps(hidden, wanted.to(hidden.device), head).cpu()
    gap = (found - logps).abs().max().item() if len(found) else 0.0
    if len(logps) != len(found) or not gap <= tolerance:
        raise ValueError(
            f"{name}: head must give the sender's log-probs of the first {len(found)} tokens to {tolerance} nats, got "
            f"a difference of {gap:.3g}: it is another head (or another softcap, scale or final norm)"
        )
    return hidden


def send(message: bytes, destination: int, group: dist.ProcessGroup | None = None) -> None:
    """Sends a message to a process of a group that moves CPU tensors (gloo); `receive` is called there."""
    payload = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    dist.send(torch.tensor([len(payload)]), destination, group)
    dist.send(payload, destination, group)


def receive(source: int, group: dist.ProcessGroup | None = None) -> bytes:
    """The message that a process of the group sends."""
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, source, group)
    payload = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(payload, source, group)
    return payload.numpy().tobytes()


def _read(name: str, message: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; the metadata are in the JSON header, behind its length of 8 bytes."""
    try:
        tensors = safetensors.torch.load(message)
        metadata = json.loads(message[8 : 8 + int.from_bytes(message[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{name}: message must be a safetensors file as `pack` makes it, got {len(message)} bytes: {error}"
        ) from None
    if metadata.get("format") != FORMAT or tensors.keys() != TENSORS:
        raise ValueError(
            f"{name}: message must have the format {FORMAT!r} and {sorted(TENSORS)}, got {metadata.get('format')!r} "
            f"and {sorted(tensors)}"
        )
    return tensors, metadata


def _check_rows(name: str, hidden_states: Tensor, target_ids: Tensor, head: HeadParameters) -> None:
    vocabulary, width = head.weight.shape
    if hidden_states.dtype not in DTYPES:
        raise TypeError(f"{name}: hidden_states must be one of {DTYPES}, got {hidden_states.dtype}")
    if hidden_states.ndim != 2 or hidden_states.shape[1] != width:
        raise ValueError(
            f"{name}: hidden_states must have the shape [T, D] with the head's D = {width}, got "
            f"{list(hidden_states.shape)}"
        )
    if target_ids.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"{name}: target_ids must have the shape [T] = [{len(hidden_states)}], got {list(target_ids.shape)}"
        )
    if len(target_ids) and not 0 <= int(target_ids.min()) <= int(target_ids.max()) < vocabulary:
        raise ValueError(
            f"{name}: target_ids must lie in [0, {vocabulary}), got {int(target_ids.min())} to {int(target_ids.max())}"
        )


@torch.no_grad()
def _check_logps(hidden_states: Tensor, target_ids: Tensor, head: HeadParameters) -> Tensor:
    hidden = hidden_states[:CHECKED].to(head.weight.dtype)
    ids = target_ids[:CHECKED].to(head.weight.device)
    logps: Any = linear_token_logps(hidden, target_ids=ids, **head._asdict())
    return logps.float()
