"""Rows of logits of which each is difficult in its own way, and the losses' results by a backend.

`LOSSES` are the calls of `fastsdpo.ops.rows` that between them launch every kernel in every mode; `LAYOUTS`
are the ways that logits and gradients can lie in memory.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops import rows as door
from fastsdpo.ops.rows import LossOptions, RowCall, Tokens

IGNORE, INF, NAN = -100, float("inf"), float("nan")
TEMPERATURE, TOPK = 0.7, 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 9
LOSS_LIMIT = 1e-5  # of a loss or log-prob, beside max(1, |value|)
GRADIENT_LIMIT = 4e-6  # of an entry, beyond half a rounding, beside max(1/8, the row's largest)
UPSTREAM = 0.75


class Loss(NamedTuple):
    options: LossOptions
    call: str = "loss"  # or "token", "entropy", "log_ratio"
    given: bool = False  # log-probs stand for the teacher's logits
    clipped: bool = False  # old log-probs


def _losses() -> dict[str, Loss]:
    plain = LossOptions(temperature=TEMPERATURE, ignore_index=IGNORE)
    full = {
        name: replace(plain, mode="full", alpha=alpha)
        for name, alpha in (("forward KL", 0.0), ("reverse KL", 1.0), ("JSD", 0.4))
    }
    top = {name: replace(options, mode="topk", topk=TOPK) for name, options in full.items()}
    found = {
        "logps": Loss(plain, "token"),
        "entropy": Loss(plain, "entropy"),
        "log-ratio": Loss(plain, "log_ratio"),
        "sampled": Loss(plain),
        **{name: Loss(options) for name, options in full.items()},
        **{f"top-k {name}": Loss(options) for name, options in top.items()},
        "top-k JSD renormalized": Loss(replace(top["JSD"], add_tail=False)),
    }
    found |= {
        f"{name} softcap": loss._replace(options=replace(loss.options, softcap=30.0))
        for name, loss in found.items()
        if name != "top-k JSD renormalized"
    }
    found |= {
        "sampled given teacher": found["sampled"]._replace(given=True),
        "sampled clipped": Loss(replace(plain, is_clip=2.0), clipped=True),
        "reverse KL clipped": Loss(replace(full["reverse KL"], is_clip=2.0), clipped=True),
        "top-k JSD given teacher": found["top-k JSD"]._replace(given=True),
        "top-k reverse KL renormalized given teacher": Loss(replace(top["reverse KL"], add_tail=False), given=True),
    }
    return found


LOSSES = _losses()
# (student and teacher begin behind a 16-byte boundary, at odd strides; where the gradient goes)
LAYOUTS = {
    "packed": (None, "apart"),
    "in place": (None, "in place"),
    "fused in place": (None, "fused"),
    "odd strides": ((3, 6), "apart"),
    "odd strides, in place": ((3, 6), "in place"),
    "odd strides, fused in place": ((5, 2), "fused"),
}


def rows(vocabulary: int, dtype: torch.dtype, count: int = ROWS, seed: int = 0):
    """(student, teacher ``[count, V]``, targets ``[count]``); the nine difficult rows again and again, from
    another one on for another vocabulary."""
    g = torch.Generator().manual_seed(1000 * seed + vocabulary)
    student = 3 * torch.randn(count, vocabulary, generator=g)
    teacher = student + torch.randn(count, vocabulary, generator=g)
    targets = torch.randint(0, vocabulary, (count,), generator=g)
    for n in range(count):
        kind, s, t, target = (vocabulary + n) % ROWS, student[n], teacher[n], int(targets[n])
        if kind in (1, 6):  # masked tokens, in the teacher alone
            masked = torch.rand(vocabulary, generator=g) < 0.3
            masked[target] = False
            t[masked] = -INF
            if kind == 1:
                s[masked] = -INF
        elif kind == 2:  # nothing of it may be read
            s[:], t[:], targets[n] = NAN, NAN, IGNORE
        elif kind == 3:  # most likely is what comes last
            s[:64] -= 60
            t[:64] -= 50
        elif kind in (4, 8):  # a constant on all logits
            for logits in (s, t):
                logits += 1e4 if kind == 4 else 128
        elif kind == 5:  # a certain token
            s[target] = t[target] = 45
        elif kind == 7:  # one policy's probability is subnormal or nearly, the other's 0
            gaps = torch.linspace(85, 105, vocabulary)
            near = torch.rand(vocabulary, generator=g) < 0.5
            s[:], t[:] = -TEMPERATURE * torch.where(near, gaps, 300), -TEMPERATURE * gaps
            t[near] = -TEMPERATURE * 300
            s[target] = t[target] = 0
    return student.to(dtype), teacher.to(dtype), targets


def placed(values: Tensor, shift: int) -> Tensor:
    """The same values in rows of a stride 3 longer, which start ``shift`` elements behind a boundary."""
    count, vocabulary = values.shape
    stride = vocabulary + 3
    storage = torch.zeros(shift + (count - 1) * stride + vocabulary, dtype=values.dtype)
    out = storage.as_strided((count, vocabulary), (stride, 1), shift)
    return out.copy_(values)


Results = dict[str, Tensor]


def log_softmax(logits: Tensor) -> Tensor:
    return logits.double().div(TEMPERATURE).log_softmax(-1)


def tokens_of(loss: Loss, student: Tensor, teacher: Tensor, targets: Tensor) -> Tokens:
    """A call's per-token tensors, in float32."""
    weights = torch.linspace(0.5, 1.5, len(targets))
    valid = targets.clamp(min=0)[:, None]
    ids = logps = old = of_teacher = None
    if loss.options.mode == "topk":
        # Ids that both backends are given: which of equal logits are of a support is a backend's choice.
        ids = student.float().topk(loss.options.topk).indices
        if loss.given:
            logps = (log_softmax(teacher).gather(1, ids) - 1e-3).float()
    elif loss.given:
        of_teacher = log_softmax(teacher).gather(1, valid)[:, 0].float()
    if loss.clipped:
        moved = 0.5 * torch.linspace(-1, 2, len(targets))
        old = log_softmax(student).gather(1, valid)[:, 0].float() - moved
    return Tokens(targets, weights, old, of_teacher, ids, logps)


def results(loss: Loss, student: Tensor, teacher: Tensor, targets: Tensor, backend: str, layout="packed") -> Results:
    """What a call gives for rows ``[N, V]``. The reference's are in float64."""
    options = loss.options
    if options.mode == "topk":
        topk = min(options.topk, student.shape[-1])
        tail = options.add_tail and topk < student.shape[-1]
        loss = loss._replace(options=replace(options, topk=topk, add_tail=tail))
    tokens, options = tokens_of(loss, student, teacher, targets), loss.options
    shifts, where = LAYOUTS[layout]
    if backend == "reference":
        student, teacher = student.double(), teacher.double()
        tokens = Tokens(*[x.double() if x is not None and x.is_floating_point() else x for x in tokens])
    elif shifts is not None:
        student, teacher = placed(student, shifts[0]), placed(teacher, shifts[1])
    else:
        student = student.clone()
    s, t = student[None], teacher[None]
    grad = torch.empty_like(s, memory_format=torch.contiguous_format) if where == "apart" else s
    if loss.call == "log_ratio":
        found = door.log_ratio(s, t, targets, options, backend)
        return dict(zip(("student", "teacher"), found, strict=True))
    if loss.call != "loss":
        found = door.token_forward(s, targets, options, backend, loss.call == "entropy")
        door.token_backward(tokens.weights, found.stats, s, targets, options, backend, grad)
        entropy = {"entropy": found.entropy} if loss.call == "entropy" else {}
        return {"student": found.logps, **entropy, "gradient": grad[0]}
    teacher_rows = None if loss.given else t
    fused, call = where == "fused", RowCall(s, teacher_rows, tokens, options, backend)
    found = door.forward(call, grad if fused else None)
    if not fused:
        upstream = found.coef.new_full((1,), UPSTREAM)
        door.backward(upstream, found, call, grad)
    names = ("loss", "student", "teacher", "gradient")
    return dict(zip(names, (found.per_token, found.student_logps, found.teacher_logps, grad[0]), strict=True))


class Error(NamedTuple):
    size: float  # as `LOSS_LIMIT` and `GRADIENT_LIMIT` take it; inf where NaN or infinity is wrong
    row: int


def errors(loss: Loss, got: Results, want: Results) -> dict[str, Error]:
    """The largest error of each result, beside float64. The sampled token's loss is a log-prob times a
    difference of log-probs: the roundings of these count, by their size and that of capped logits."""
    found = {}
    sampled = loss.call == "loss" and loss.options.mode == "sampled_token"
    log_prob = torch.where(want["student"].isfinite(), want["student"].abs(), 0) * sampled
    rounded = (log_prob + loss.options.softcap / TEMPERATURE) * sampled
    for name, values in got.items():
        g, w = values.double(), want[name].reshape(values.shape)
        if name == "gradient":
            # An infinite loss has no gradient.
            fine = w.isfinite().all(-1, keepdim=True).expand_as(w)
            scale = torch.where(fine, w.abs(), 0).amax(-1, keepdim=True).clamp(min=1 / 8)
            scale = torch.maximum(scale, rounded[:, None] / 8)
            kind = torch.finfo(values.dtype)
            rounding = 0.51 * kind.eps * w.abs() + kind.smallest_normal * kind.eps
            off = ((g - w).abs() - rounding).clamp(min=0) / scale
            off = torch.where(fine, off, 0).nan_to_num(nan=INF).amax(-1)
        else:
            scale = w.abs().clamp(min=1)
            if name == "loss":
                scale = torch.maximum(scale, log_prob * rounded / 32)
            off = (g - w).abs() / scale
            off = torch.where((g == w) | (g.isnan() & w.isnan()), 0, off).nan_to_num(nan=INF)
        found[name] = Error(float(off.max()), int(off.argmax()))
    return found


def wrong(loss: Loss, got: Results, want: Results) -> list[str]:
    """What differs from float64 by more than it may."""
    return [
        f"{name}: off by {error.size:.2g} in row {error.row}"
        for name, error in errors(loss, got, want).items()
        if not error.size <= (GRADIENT_LIMIT if name == "gradient" else LOSS_LIMIT)
    ]
