"""Logits that are never formed: what a trainer's own code asks of them, computed from hidden states.

    logits = HeadLogits(hidden, head_parameters(model))      # stands for model(...).logits
    logps = F.log_softmax(logits[:, :-1] / temperature, dim=-1).gather(-1, ids)

Much code takes a whole ``log_softmax`` only to gather a few of its entries. Rows can be sliced, a temperature can
divide, a softmax's log can be taken, entries gathered and the largest found; `gather` is differentiable. Any other
use raises, and names itself.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastsdpo.ops.checks import accumulation_dtype
from fastsdpo.ops.head import ChunkPlan, HeadGemms, choose_dtypes, default_chunk_size, through_head
from fastsdpo.ops.linear import linear_sdpo_loss
from fastsdpo.ops.linear_token_logps import linear_token_logps
from fastsdpo.prefix import HeadParameters


class HeadLogits:
    """Stands for logits ``[*rows, V]``.

    Args:
        hidden: ``[*rows, D]``.
        head: as of `fastsdpo.prefix.head_parameters`.
        temperature: what they have been divided by.
        normalized: whether these are log-probs.
    """

    def __init__(self, hidden: Tensor, head: HeadParameters, temperature: float = 1.0, normalized: bool = False):
        self.hidden, self.head, self.temperature, self.normalized = hidden, head, temperature, normalized

    def _with(self, **changes: Any) -> HeadLogits:
        return HeadLogits(**{**vars(self), **changes})

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], len(self.head.weight)))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.hidden, self.head.weight)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def detach(self) -> HeadLogits:
        return self._with(hidden=self.hidden.detach())

    def __getitem__(self, key: Any) -> HeadLogits:
        keys = key if isinstance(key, tuple) else (key,)
        rows = self.hidden.ndim - 1
        if len(keys) > rows and keys[rows:] != (slice(None),):
            self._refuse(f"logits[{key}]")
        return self._with(hidden=self.hidden[keys[:rows]])

    def __truediv__(self, temperature: float) -> HeadLogits:
        if self.normalized:
            self._refuse("a division of log-probs")
        return self._with(temperature=self.temperature * float(temperature))

    def log_softmax(self, dim: int = -1) -> HeadLogits:
        if dim not in (-1, len(self.shape) - 1):
            self._refuse(f"log_softmax over axis {dim}")
        return self._with(normalized=True)

    def gather(self, dim: int, index: Tensor) -> Tensor:
        """Log-probs ``[*rows, K]`` of the ids ``[*rows, K]``."""
        if not self.normalized or dim not in (-1, len(self.shape) - 1):
            self._refuse(f"gather(dim={dim}) of {'log-probs' if self.normalized else 'logits'}")
        given = {"target_ids": index[..., 0], "temperature": self.temperature, **self.head._asdict()}
        return linear_token_logps(self.hidden, extra_ids=index, **given)[1]

    def topk(self, k: int, dim: int = -1) -> tuple[None, Tensor]:
        """``(None, ids)``: the ids ``[*rows, k]`` alone, the most likely first."""
        if dim not in (-1, len(self.shape) - 1):
            self._refuse(f"topk over axis {dim}")
        return None, self.topk_logits(k)[0]

    def topk_logits(self, k: int) -> tuple[Tensor, Tensor]:
        """The k most likely ids ``[*rows, k]`` and their logits, not yet divided by the temperature; no gradient."""
        weight, bias, softcap, scale = self.head
        hidden = self.hidden.detach().reshape(-1, self.hidden.shape[-1])
        ids = torch.empty(len(hidden), k, dtype=torch.int64, device=self.device)
        values = torch.empty(len(hidden), k, dtype=self.dtype, device=self.device)

        def keep(logits: Tensor, teacher: Tensor | None, which: slice, grad: Tensor | None) -> None:
            values[which], ids[which] = logits.topk(k, -1)

        operand, tile = choose_dtypes(hidden, weight, None)
        plan = ChunkPlan(default_chunk_size(len(hidden), len(weight), self.device), operand, tile)
        with torch.no_grad():
            through_head(hidden, HeadGemms(weight.detach(), bias, operand), keep, plan)
            values = values * scale
            values = values if softcap is None else softcap * torch.tanh(values / softcap)
        shape = (*self.shape[:-1], k)
        return ids.view(shape), values.view(shape)

    def argmax(self, dim: int = -1) -> Tensor:
        return self.topk(1, dim)[1].squeeze(-1)

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"HeadLogits: {what} is not known of logits that are never formed; take source='logits'"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f"logits.{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, (logits, *rest) = getattr(function, "__name__", str(function)), args
        if name not in ("log_softmax", "gather", "argmax", "topk") or not isinstance(logits, cls):
            raise NotImplementedError(
                f"HeadLogits: torch's {name} is not known of logits that are never formed; take source='logits'"
            )
        kwargs = {key: value for key, value in (kwargs or {}).items() if key in ("dim", "index", "k")}
        return getattr(logits, name)(*rest[: 2 if name == "gather" else 1], **kwargs)


def teacher_arguments(
    head: HeadParameters, hidden: Tensor, teacher_head: HeadParameters
) -> tuple[Tensor, dict[str, Any]]:
    """The teacher's hidden states and head as `linear_sdpo_loss` takes them beside the student's ``head``.

    The loss has one logit scale for both heads: their ratio goes into the teacher's hidden states and bias.
    """
    weight, bias, _, scale = teacher_head
    ratio = scale / head.logit_scale
    hidden, bias = hidden.detach(), None if bias is None else bias.detach()
    if ratio != 1.0:
        hidden, bias = hidden * ratio, None if bias is None else bias * ratio
    return hidden, {"teacher_weight": weight.detach(), "teacher_bias": bias}


def divergence(
    student: HeadLogits,
    teacher: HeadLogits | Tensor,
    counts: Tensor,
    alpha: float,
    weight: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """``weight`` times the divergence of the rows that count; other rows never reach a head.

    Args:
        teacher: may be logits ``[*rows, V]`` that exist.
        counts: ``[*rows]`` bool.

    Raises:
        NotImplementedError: softcaps or temperatures of student and teacher that differ.
    """
    head = student.head
    rows = student.hidden[counts]
    given = head._asdict()
    states = None
    if isinstance(teacher, HeadLogits):
        others = teacher.head
        if (others.softcap, teacher.temperature) != (head.softcap, student.temperature):
            raise NotImplementedError(
                "HeadLogits: student and teacher must have one softcap and one temperature, got "
                f"{(head.softcap, student.temperature)} and {(others.softcap, teacher.temperature)}"
            )
        states, arguments = teacher_arguments(head, teacher.hidden[counts], others)
        given |= arguments
    else:
        given["teacher_logits"] = teacher[counts]
    ids = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    weights = weight.expand(len(rows))
    given |= {"mode": "full", "alpha": alpha, "temperature": student.temperature * temperature, "weights": weights}
    return linear_sdpo_loss(rows, states, target_ids=ids, **given).loss
