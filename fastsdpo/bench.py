"""Losses on one machine beside what one would use instead: cases, rivals and their measurement.

A *case* holds tensors of one shape, a *rival* is a function that takes a case and a mode and returns the call
to be timed, and `measure` compares every rival with float64 before it times them in turns: a wrong rival is not
timed. ``fastsdpo bench`` prints the rivals below; `benchmarks/losses.py` adds others to the same registries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsdpo.ops.divergence import sdpo_loss
from fastsdpo.ops.linear import linear_sdpo_loss
from fastsdpo.shapes import DIVERGENCES as DIVERGENCES
from fastsdpo.shapes import MODELS as MODELS
from fastsdpo.shapes import MODES as MODES
from fastsdpo.timing import installed_version, interleave
from fastsdpo.timing import peak_memory as peak_memory

# Rivals are checked on so many tokens of the case's vocabulary, and at most this width.
CHECKED_TOKENS, CHECKED_HIDDEN = 48, 512


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_loss(
    mode: str, student: Tensor, teacher: Tensor, target_ids: Tensor, softcap: float | None = None
) -> Tensor:
    """The token-mean loss in plain PyTorch with float32 log-softmaxes (float64 stays): the definition.

    Args:
        student, teacher: logits ``[T, V]``.
        target_ids: ``[T]``.
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    s = torch.log_softmax(capped(student.to(wide), softcap), -1)
    t = torch.log_softmax(capped(teacher.to(wide), softcap), -1)
    if mode == "sampled":
        s, t = (x.gather(-1, target_ids[:, None]).squeeze(-1) for x in (s, t))
        return (-(t - s).detach() * s).mean()
    if mode == "topk":
        ids = s.detach().topk(MODES[mode]["topk"], -1).indices
        s, t = (x.gather(-1, ids) for x in (s, t))
        s, t = (torch.cat([x, _rest(x)], -1) for x in (s, t))
    alpha = MODES[mode]["alpha"]
    if alpha == 0:
        return (t.exp() * (t - s)).sum(-1).mean()
    if alpha == 1:
        return (s.exp() * (s - t)).sum(-1).mean()
    p, q = s.exp(), t.exp()
    m = ((1 - alpha) * p + alpha * q).log()
    return ((1 - alpha) * p * (s - m) + alpha * q * (t - m)).sum(-1).mean()


def _rest(log_probs: Tensor) -> Tensor:
    """Log-probability ``[T, 1]`` of all tokens outside the support."""
    return (-log_probs.exp().sum(-1, keepdim=True)).clamp(min=-1 + 1e-7).log1p()


# ------------------------------------------------------------------------------------------- cases

Call = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]  # gives the loss and the gradients of the case's leaves


@dataclasses.dataclass
class Case:
    """Shape of one measurement; the tensors are made from it."""

    tokens: int
    vocabulary: int
    hidden: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    softcap: float | None = None

    question = ""

    def __post_init__(self) -> None:
        self.make_tensors()

    def make_tensors(self) -> None:
        """Makes the tensors, the same ones for the same shape."""
        raise NotImplementedError

    def small(self) -> Case:
        """A few tokens of the same kind, on which rivals are checked."""
        tokens, hidden = min(self.tokens, CHECKED_TOKENS), min(self.hidden, CHECKED_HIDDEN)
        return dataclasses.replace(self, tokens=tokens, hidden=hidden)

    @property
    def label(self) -> str:
        return " x ".join(str(size) for size in (self.tokens, self.vocabulary, self.hidden) if size)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of a ``[T, V]`` tensor."""
        return self.tokens * self.vocabulary * self.dtype.itemsize

    @property
    def gemm(self) -> int:
        """FLOPs of one product of ``[T, D]`` and ``[D, V]``."""
        return 2 * self.tokens * self.vocabulary * self.hidden

    def restore(self) -> None:
        """Undoes what a run has overwritten."""

    def leaves(self) -> tuple[Tensor, ...]:
        """Tensors whose gradients a call gives."""
        raise NotImplementedError

    def loss_of(self, function: Callable[..., Tensor], mode: str) -> Call:
        """The call of ``function(mode, student_logits, teacher_logits, target_ids, softcap)``."""
        raise NotImplementedError

    def exact(self, mode: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and gradients in float64."""
        raise NotImplementedError


class LogitsCase(Case):
    """Student and teacher logits ``[T, V]``; gradients of the student's, which are restored before each run."""

    question = "logits"

    def make_tensors(self) -> None:
        g = torch.Generator(self.device).manual_seed(0)
        self.teacher = torch.empty(self.tokens, self.vocabulary, dtype=self.dtype, device=self.device)
        self.original = torch.empty_like(self.teacher)
        for start in range(0, self.tokens, 64):  # in parts: no float32 copy of the whole
            part = self.teacher[start : start + 64]
            rows, noise = (torch.randn(part.shape, generator=g, device=self.device) for _ in range(2))
            self.original[start : start + 64] = 2.5 * rows
            part.copy_(2.5 * rows + 0.3 * noise)
        self.student = self.original.clone()
        self.target_ids = torch.randint(self.vocabulary, (self.tokens,), generator=g, device=self.device)

    def restore(self) -> None:
        self.student.copy_(self.original)

    def leaves(self) -> tuple[Tensor, ...]:
        return (self.student.detach().requires_grad_(),)

    def loss_of(self, function: Callable[..., Tensor], mode: str) -> Call:
        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            (leaf,) = self.leaves()
            loss = function(mode, leaf, self.teacher, self.target_ids, self.softcap)
            return loss.detach(), torch.autograd.grad(loss, leaf)

        return run

    def exact(self, mode: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = self.original.double().requires_grad_()
        loss = plain_loss(mode, leaf, self.teacher.double(), self.target_ids, self.softcap)
        return loss.detach(), torch.autograd.grad(loss, leaf)


class HiddenCase(Case):
    """Hidden states ``[T, D]`` of both and one head ``[V, D]``; gradients of student and head."""

    question = "hidden"

    def make_tensors(self) -> None:
        g = torch.Generator(self.device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=self.device)

        student = randn(self.tokens, self.hidden)
        self.teacher = (student + 0.1 * randn(self.tokens, self.hidden)).to(self.dtype)
        self.student = student.to(self.dtype)
        weight = randn(self.vocabulary, self.hidden).mul_(2.5 / math.sqrt(self.hidden))
        self.weight = weight.to(self.dtype)
        self.target_ids = torch.randint(self.vocabulary, (self.tokens,), generator=g, device=self.device)

    def leaves(self) -> tuple[Tensor, ...]:
        return self.student.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def grad_of(self, loss_function: Callable[[Tensor, Tensor], Tensor]) -> Call:
        """The call of a loss of the student's hidden states and the head."""

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            student, weight = self.leaves()
            loss = loss_function(student, weight)
            return loss.detach(), torch.autograd.grad(loss, (student, weight))

        return run

    def loss_of(self, function: Callable[..., Tensor], mode: str) -> Call:
        def whole(student: Tensor, weight: Tensor) -> Tensor:
            student_logits = student @ weight.T
            with torch.no_grad():
                teacher_logits = self.teacher @ weight.T
            return function(mode, student_logits, teacher_logits, self.target_ids, self.softcap)

        return self.grad_of(whole)

    def exact(self, mode: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        student, weight = (t.double().requires_grad_() for t in (self.student, self.weight))
        teacher = self.teacher.double() @ weight.detach().T
        loss = plain_loss(mode, student @ weight.T, teacher, self.target_ids, self.softcap)
        return loss.detach(), torch.autograd.grad(loss, (student, weight))


# ------------------------------------------------------------------------------------------ rivals

Maker = Callable[[Any, str], Call | None]


class Rivals(dict[str, Maker]):
    """Rivals by name. ``@rivals("TRL", needs="trl")`` adds a function of (case, mode) that gives the call.

    It gives None for a mode that the rival does not have. ``bound=True``: a part of the work alone, whose time is
    a bound and whose result is not checked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bounds: set[str] = set()

    def __call__(self, name: str, *, needs: str | None = None, bound: bool = False) -> Callable[[Maker], Maker]:
        def add(make: Maker) -> Maker:
            if needs is None or installed_version(needs):
                self[name] = make
            if bound:
                self.bounds.add(name)
            return make

        return add


FROM_LOGITS = Rivals()
FROM_HIDDEN = Rivals()


def rivals_of(case: Case) -> Rivals:
    return FROM_LOGITS if case.question == "logits" else FROM_HIDDEN


@FROM_LOGITS("fastsdpo")
def _fastsdpo_logits(case: LogitsCase, mode: str) -> Call:
    def loss(mode: str, student: Tensor, teacher: Tensor, ids: Tensor, softcap: float | None) -> Tensor:
        return sdpo_loss(student, teacher, ids, inplace_grad=True, softcap=softcap, **MODES[mode]).loss

    return case.loss_of(loss, mode)


@FROM_HIDDEN("fastsdpo")
def _fastsdpo_hidden(case: HiddenCase, mode: str) -> Call:
    options = {"softcap": case.softcap, **MODES[mode]}
    return case.grad_of(lambda s, w: linear_sdpo_loss(s, case.teacher, w, case.target_ids, **options).loss)


@FROM_LOGITS("PyTorch")
@FROM_HIDDEN("PyTorch")
def _pytorch(case: Case, mode: str) -> Call:
    return case.loss_of(plain_loss, mode)


@FROM_LOGITS("torch.compile")
@FROM_HIDDEN("torch.compile")
def _compiled(case: Case, mode: str) -> Call:
    return case.loss_of(torch.compile(plain_loss, dynamic=False), mode)


@FROM_LOGITS("Liger", needs="liger-kernel")
def _liger_logits(case: LogitsCase, mode: str) -> Call | None:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    if mode not in DIVERGENCES:
        return None

    def loss(mode: str, student: Tensor, teacher: Tensor, ids: Tensor, softcap: float | None) -> Tensor:
        s, t = capped(student, softcap), capped(teacher, softcap)
        return LigerFusedLinearJSDFunction.distillation_loss_fn(s, t, beta=MODES[mode]["alpha"]) / len(ids)

    return case.loss_of(loss, mode)


@FROM_HIDDEN("Liger compiled", needs="liger-kernel")
def liger_hidden(case: HiddenCase, mode: str, compiled: bool = True) -> Call | None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if mode not in DIVERGENCES or case.softcap is not None:  # it has no softcap
        return None
    beta = MODES[mode]["alpha"]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    return case.grad_of(lambda s, w: loss(s, w, case.teacher, w.detach(), case.target_ids))


# --------------------------------------------------------------------------------------- measuring


def errors_of(case: Case, mode: str, call: Call) -> list[float]:
    """Relative errors of loss and gradients against float64."""
    case.restore()
    loss, gradients = call()
    exact_loss, exact = case.exact(mode)
    errors = [abs(float(loss) - float(exact_loss)) / abs(float(exact_loss))]
    return errors + [float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients, exact)]


def why_not(case: Case, mode: str, name: str, make: Maker) -> tuple[str, list[float]]:
    """Why a rival cannot be timed ("" where it can), and its errors on the small case."""
    # Rivals that round logits or log-probabilities to 16 bits are off by percents, as designed.
    half = case.dtype.itemsize == 2
    limit = 1e-3 if not half else 1e-2 if name == "fastsdpo" else 0.5
    try:
        small = case.small()
        call = make(small, mode)
        errors = errors_of(small, mode, call) if call and name not in rivals_of(case).bounds else []
    except Exception as error:  # another version, no compiler, out of memory: the row says it
        return _reason(name, error), []
    wrong = bool(errors) and not max(errors) < limit
    if wrong and name == "fastsdpo":
        raise RuntimeError(f"{case.label} {mode}: fastsdpo is off by {max(errors):.1e} from float64")
    return (f"off by {max(errors):.1e} from float64" if wrong else ""), errors


def _reason(name: str, error: Exception) -> str:
    """The error of a rival, in a line; one of fastsdpo is raised."""
    if name == "fastsdpo":
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def measure(
    case: Case,
    mode: str,
    *,
    rounds: int,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    least_seconds: float = 0.0,
    memory: bool = True,
) -> dict[str, Any]:
    """One row of results: time, peak memory and error of every rival on one case."""
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    errors: dict[str, list[float]] = {}
    torch._dynamo.reset()
    for name, make in rivals_of(case).items():
        if name in without or (only and name not in only):
            continue
        reason, errors[name] = why_not(case, mode, name, make)
        try:
            call = None if reason else make(case, mode)
            if call is not None:
                case.restore()
                call()
                calls[name] = call
        except Exception as error:
            reason = _reason(name, error)
        if reason:
            left_out[name] = reason
    timings = interleave(
        calls, rounds, prepare=case.restore, device=case.device, least_seconds=least_seconds, memory=memory
    )
    return {
        "case": {
            "question": case.question,
            "mode": mode,
            "dtype": str(case.dtype).removeprefix("torch."),
            "tokens": case.tokens,
            "vocabulary": case.vocabulary,
            **({"hidden": case.hidden} if case.hidden else {}),
            **({"softcap": case.softcap} if case.softcap else {}),
        },
        "rivals": {name: {**t._asdict(), "errors": errors[name]} for name, t in timings.items()},
        "left_out": left_out,
    }
