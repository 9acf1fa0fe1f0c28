"""The loss of one tile of logits: what `ops.linear` hands to the chunk loop of `ops.head`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops import rows
from fastsdpo.ops.cross_entropy import label_options
from fastsdpo.ops.head import ChunkPlan
from fastsdpo.ops.rows import LossOptions, RowCall, Tokens


class PolicyGradient(NamedTuple):
    """Another loss of the log-probs of tokens, by its gradient; both ``[N]``.

    Attributes:
        target_ids: ``ignore_index`` where a token has no part in it.
        grad_logps: derivative of the loss in the log-prob of each target.
    """

    target_ids: Tensor
    grad_logps: Tensor


@dataclass(frozen=True)
class LinearCall:
    """A checked call without the tensors that may need a gradient (hidden states ``[N, D]``, weight, bias).

    Attributes:
        teacher_weight, teacher_bias: None: the student's head serves both.
        teacher_logits: ``[B, L, V]`` with N = B x L, in place of the teacher's hidden states.
        policy: a second loss whose gradient joins this one's.
        vocab_group: process group of a vocabulary-parallel head.
    """

    tokens: Tokens
    options: LossOptions
    plan: ChunkPlan
    backend: str
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    teacher_bias: Tensor | None = None
    teacher_logits: Tensor | None = None
    policy: PolicyGradient | None = None
    vocab_group: Any = None

    def live(self) -> Tensor:
        """``[N]``, whether a token has a part in any gradient."""
        counted = self.tokens.target_ids != self.options.ignore_index
        live = counted & (self.tokens.weights != 0)
        if self.tokens.ce_weights is not None:
            live |= counted & (self.tokens.ce_weights != 0)
        if self.policy is not None:
            live |= (self.policy.target_ids != self.options.ignore_index) & (self.policy.grad_logps != 0)
        return live


class RowVectors:
    """Per-token results ``[N]`` of all chunks; 0 where nothing is written."""

    def __init__(self, like: Tensor):
        self.per_token, self.coef, self.student_logps, self.teacher_logps = (torch.zeros_like(like) for _ in range(4))
        self.label_logps = torch.zeros_like(like)  # in the cross entropy

    def write(self, which: slice, found: Sequence[Tensor]) -> None:
        """The first four of `rows.RowResults`."""
        self.per_token[which], self.coef[which] = found[0], found[1]
        self.student_logps[which], self.teacher_logps[which] = found[2], found[3]


class RowLoss:
    """The `head.TileLoss` of `ops.rows`."""

    def __init__(self, call: LinearCall):
        self.call = call
        self.vectors = RowVectors(call.tokens.weights)
        self.second: Tensor | None = None  # gradient tile of the policy's loss

    def __call__(self, student: Tensor, teacher: Tensor | None, which: slice, grad: Tensor | None) -> None:
        options, backend, policy = self.call.options, self.call.backend, self.call.policy
        tokens = self.call.tokens.chunk(which)
        logits = student.unsqueeze(0)
        if self.call.teacher_logits is not None:
            teacher = _rows_of(self.call.teacher_logits, which, student.dtype)
        second = None  # before `rows.forward`, which may overwrite the logits with their gradient
        if tokens.ce_weights is not None:
            labels = PolicyGradient(tokens.target_ids, -tokens.ce_weights)
            second, logps = self._second_gradient(labels, logits, label_options(options), grad)
            self.vectors.label_logps[which] = logps
        elif grad is not None and policy is not None:
            part = PolicyGradient(policy.target_ids[which], policy.grad_logps[which])
            second, _ = self._second_gradient(part, logits, options, grad)
        if options.mode == "topk" and tokens.topk_ids is None:
            ids = rows.support(logits, tokens.target_ids, options.topk, options.ignore_index, backend)
            tokens = tokens._replace(topk_ids=ids)
        teacher = None if teacher is None else teacher.unsqueeze(0)
        found = rows.forward(
            RowCall(logits, teacher, tokens, options, backend), None if grad is None else grad.unsqueeze(0)
        )
        self.vectors.write(which, found)
        if second is not None:
            assert grad is not None
            grad += second

    def _second_gradient(
        self, loss: PolicyGradient, logits: Tensor, options: LossOptions, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Gradient ``[n, V]`` of a loss of the tile's tokens, None where none is wanted; their log-probs."""
        found = rows.token_forward(logits, loss.target_ids, options, self.call.backend)
        if grad is None:
            return None, found.logps
        tile = self.second = torch.empty_like(grad) if self.second is None else self.second
        second, ids = tile[: len(grad)], rows.of_weight(loss.target_ids, loss.grad_logps, options)
        rows.token_backward(loss.grad_logps, found.stats, logits, ids, options, self.call.backend, second.unsqueeze(0))
        return second, found.logps


def _rows_of(logits: Tensor, which: slice, dtype: torch.dtype) -> Tensor:
    """``[n, V]`` of ``[B, L, V]``; a copy only where the rows are not of one ``b``, or float64 of a float32 loss."""
    count, length = logits.shape[:2]
    if count == 1:
        found = logits[0, which]
    else:
        parts = []
        for b in range(which.start // length, -(-which.stop // length)):
            parts.append(logits[b, max(0, which.start - b * length) : min(length, which.stop - b * length)])
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found.to(dtype) if torch.float64 in (found.dtype, dtype) else found
