"""The only interface to the kernels: losses and log-probs of rows of logits.

Public functions, operators, the chunks of a head, vocabulary shards and integrations call these functions. A
call of the losses is a `RowCall`: logits, `LossOptions` (checked numbers), `Tokens` (checked per-token tensors) and a
backend. A backend is a module with these functions; they take the fields of a call one by one, without the backend:

    forward         results of every row; with ``grad`` also the gradient of ``sum coef * per_token``
    backward        the gradient of the student's logits, from the results of forward
    token_forward   log-probs of the targets (and entropy)
    token_backward  the gradient of the logits, from the log-probs' gradient
    log_ratio       log-probs of the targets under two policies
    support         ids of each row's most likely tokens

Logits are ``[B, L, V]`` with a last stride of 1, per-token tensors ``[N]`` with N = B x L. A gradient
buffer has the shape of the logits, may be the student's logits themselves, and is written as a whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = 5  # columns of `RowResults.stats`
_MODULES = {
    "triton": "fastsdpo.ops._triton",
    "native": "fastsdpo.ops._native",
    "reference": "fastsdpo.ops.reference",
    "meta": "fastsdpo.ops._meta",
}


@dataclass(frozen=True)
class LossOptions:
    """The checked numbers of one call. Log-probs alone use the first three."""

    temperature: float = 1.0
    softcap: float = 0.0  # 0: none
    ignore_index: int = -100
    mode: str = "sampled_token"
    alpha: float = 1.0
    topk: int = 0
    add_tail: bool = True
    is_clip: float = 0.0  # used where there are old log-probs
    bounded_tail: bool = False  # the tail of other libraries: see `ops.bounded_tail`
    ce_temperature: float = 1.0  # used where there are cross-entropy weights: see `ops.cross_entropy`

    def packed(self) -> tuple[str, list[float], list[int]]:
        """As arguments of an operator; numbers may be a compiler's symbols. `unpacked` reads them."""
        words = [self.mode]
        words += ["tail"] if self.add_tail else []
        words += ["bounded"] if self.bounded_tail else []
        floats = [self.temperature, self.softcap, self.alpha, self.is_clip, self.ce_temperature]
        return " ".join(words), floats, [self.ignore_index, self.topk]

    @staticmethod
    def unpacked(words: str, floats: Sequence[float], integers: Sequence[int]) -> LossOptions:
        mode, *tail = words.split()
        temperature, softcap, alpha, is_clip, ce_temperature = floats
        ignore_index, topk = integers
        return LossOptions(
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            mode=mode,
            alpha=alpha,
            topk=topk,
            add_tail="tail" in tail,
            is_clip=is_clip,
            bounded_tail="bounded" in tail,
            ce_temperature=ce_temperature,
        )


class Tokens(NamedTuple):
    """The checked per-token tensors of one loss call: ``[N]``, those of the support ``[N, K]``.

    ``teacher_logps`` and ``topk_logps`` replace the teacher's logits. A backend always gets ``topk_ids`` for
    top-k. ``ce_weights`` weigh a cross entropy of the targets that is added to the loss (`ops.cross_entropy`);
    backends do not read them. None of the tensors needs a gradient.
    """

    target_ids: Tensor
    weights: Tensor
    old_logps: Tensor | None = None
    teacher_logps: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logps: Tensor | None = None
    ce_weights: Tensor | None = None

    def chunk(self, rows: slice) -> Tokens:
        """The same for some of the tokens."""
        optional = [None if tensor is None else tensor[rows] for tensor in self[2:]]
        return Tokens(self.target_ids[rows], self.weights[rows], *optional)


class RowCall(NamedTuple):
    """Rows of logits ``[B, L, V]`` and all that is known of them.

    Attributes:
        teacher: in its own dtype; None where ``tokens`` stand for it. Backward reads it for ``mode="full"`` alone.
    """

    student: Tensor
    teacher: Tensor | None
    tokens: Tokens
    options: LossOptions
    backend: str


class RowResults(NamedTuple):
    """Results of forward for each row, ``[N]`` in the accumulation dtype; 0 where ignored.

    Attributes:
        per_token: the loss, before weights and importance ratio.
        coef: weight times clipped importance ratio.
        student_logps, teacher_logps: of the targets.
        stats: ``[N, 5]`` for backward: max of the student's capped logits c, log2 of its sum of
            2^((c - max) log2(e) / temperature), the teacher's two, and the KL in the gradient. For top-k
            the first two are of the tokens outside the support, the third is the tail's gradient.
        class_grads: ``[N, K]`` gradients of the support's classes, before temperature and softcap; ``[0]``
            but for top-k. The kernels' ``[N, 2]`` of a whole divergence is more exact than the KL in ``stats``.
    """

    per_token: Tensor
    coef: Tensor
    student_logps: Tensor
    teacher_logps: Tensor
    stats: Tensor
    class_grads: Tensor


class TokenResults(NamedTuple):
    """Results of `token_forward` for each row.

    Attributes:
        logps: ``[N]`` of the targets; entropy: ``[N]``, ``[0]`` unless asked for.
        stats: ``[N, 2]``, as the first two columns of `RowResults.stats`.
    """

    logps: Tensor
    entropy: Tensor
    stats: Tensor


@cache
def implementation(backend: str) -> ModuleType:
    """The module of a resolved backend; imported on first use."""
    return importlib.import_module(_MODULES[backend])


def forward(call: RowCall, grad: Tensor | None = None) -> RowResults:
    """The loss of every row; with ``grad [B, L, V]``, which may be the student's logits, its gradient for an
    upstream gradient of 1 is written there too.
    """
    if not call.options.bounded_tail:
        found = implementation(call.backend).forward(*call[:4], grad)
        if grad is not None and call.backend != "triton":  # its kernel leaves them out
            clear_weightless(grad, found.coef, call)
        return found
    from fastsdpo.ops import bounded_tail

    found = bounded_tail.forward(*call)
    if grad is not None:
        backward(found.coef.new_ones(1), found, call, grad)
    return found


def backward(upstream: Tensor, found: RowResults, call: RowCall, grad: Tensor) -> None:
    """Writes the gradient of ``upstream * sum coef * per_token`` into ``grad``.

    Args:
        upstream: ``[1]``.
        found: of `forward`; only ``coef``, the log-probs, ``stats`` and ``class_grads`` are read.
    """
    tokens = call.tokens._replace(target_ids=of_weight(call.tokens.target_ids, found.coef, call.options))
    implementation(call.backend).backward(upstream, found, call.student, call.teacher, tokens, call.options, grad)


def clear_weightless(grad: Tensor, coef: Tensor, call: RowCall) -> None:
    """Writes 0 into ``grad [B, L, V]`` of rows of weight 0. A GPU does not wait for their number and goes over all."""
    weightless = ((coef == 0) & (call.tokens.target_ids != call.options.ignore_index)).view(grad.shape[:2])
    if grad.device.type != "cpu":
        grad.masked_fill_(weightless[..., None], 0)
    elif weightless.any():
        grad[weightless] = 0


def of_weight(target_ids: Tensor, weights: Tensor, options: LossOptions) -> Tensor:
    """The targets, ignored where the weight is 0: 0 times a gradient that is not finite is 0."""
    return torch.where(weights == 0, options.ignore_index, target_ids)


def token_forward(
    logits: Tensor, target_ids: Tensor, options: LossOptions, backend: str, entropy: bool = False
) -> TokenResults:
    return implementation(backend).token_forward(logits, target_ids, options, entropy)


def token_backward(
    upstream: Tensor,
    stats: Tensor,
    logits: Tensor,
    target_ids: Tensor,
    options: LossOptions,
    backend: str,
    grad: Tensor,
) -> None:
    """Writes ``upstream [N]`` times the log-probs' gradient into ``grad``."""
    implementation(backend).token_backward(upstream, stats, logits, target_ids, options, grad)


def log_ratio(
    student: Tensor, teacher: Tensor, target_ids: Tensor, options: LossOptions, backend: str
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets under student and teacher."""
    return implementation(backend).log_ratio(student, teacher, target_ids, options)


def token_advantage(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """A = teacher - student of log-probs of the same tokens; 0 where both give a token probability 0."""
    return torch.where(student_logps == teacher_logps, 0.0, teacher_logps - student_logps)


def support(logits: Tensor, target_ids: Tensor, k: int, ignore_index: int, backend: str) -> Tensor:
    """Ids ``[N, K]``, in any order, of the k most likely tokens of each row of ``logits [B, L, V]``.

    The backend chooses among equal logits. Ignored rows may get any ids.
    """
    return implementation(backend).support(logits, target_ids, k, ignore_index)


BLOCK = 2**22  # elements of a block


def row_blocks(*logits: Tensor | None, size: int = BLOCK) -> Iterator[tuple[slice, list[Tensor | None]]]:
    """Blocks ``[1, n, V]`` of tensors ``[B, L, V]``, with the numbers of their rows; None stays None."""
    if all(one is None or one.is_contiguous() for one in logits):
        logits = tuple(None if one is None else one.view(1, -1, one.shape[-1]) for one in logits)
    (count, length, vocabulary) = next(one for one in logits if one is not None).shape
    step = max(1, size // max(1, vocabulary))
    for b in range(count):
        for start in range(0, length, step):
            stop = min(start + step, length)
            part = [None if one is None else one[b : b + 1, start:stop] for one in logits]
            yield slice(b * length + start, b * length + stop), part
