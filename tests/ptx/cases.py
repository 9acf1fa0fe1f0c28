"""Rows of logits of which each is difficult in its own way, and the losses' results by a backend."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import fastsdpo
from fastsdpo.ops import divergence
from fastsdpo.ops.divergence import _triton as kernels

IGNORE, INF, NAN = -100, float("inf"), float("nan")
TEMPERATURE = 0.7


def rows(vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher [7, V], targets [7])."""
    g = torch.Generator().manual_seed(1000 * seed + vocabulary)
    student = 3 * torch.randn(7, vocabulary, generator=g)
    teacher = student + torch.randn(7, vocabulary, generator=g)
    targets = torch.randint(0, vocabulary, (7,), generator=g)
    for row, share, policies in (
        (1, 0.3, (student, teacher)),
        (6, 0.2, (teacher,)),
    ):  # masked tokens
        masked = torch.rand(vocabulary, generator=g) < share
        masked[targets[row]] = False
        for logits in policies:
            logits[row, masked] = -INF
    student[2], teacher[2], targets[2] = NAN, NAN, IGNORE  # nothing of it may be read
    student[3, :64] -= 60  # far below the best token: a segment is summed again
    teacher[3, :64] -= 50
    student[4] += 1e4 if dtype == torch.float32 else 128  # a constant on all logits
    student[5, targets[5]] = teacher[5, targets[5]] = 45  # a certain token
    return student.to(dtype), teacher.to(dtype), targets


def placed(values: Tensor, shift: int) -> Tensor:
    """The same values in rows of a stride 3 longer, which start ``shift`` elements behind a boundary."""
    count, vocabulary = values.shape
    stride = vocabulary + 3
    storage = torch.zeros(shift + (count - 1) * stride + vocabulary, dtype=values.dtype)
    out = storage.as_strided((count, vocabulary), (stride, 1), shift)
    return out.copy_(values)


Results = dict[str, Tensor]


def logps(student: Tensor, teacher: Tensor, targets: Tensor, backend: str, **options) -> Results:
    student = student.detach().requires_grad_()
    found, entropy = fastsdpo.token_logps(
        student, targets, temperature=TEMPERATURE, return_entropy=True, backend=backend, **options
    )
    found.sum().backward()
    return {"student": found.detach(), "entropy": entropy, "gradient": student.grad}


def log_ratio(
    student: Tensor, teacher: Tensor, targets: Tensor, backend: str, **options
) -> Results:
    found = fastsdpo.token_log_ratio(
        student, teacher, targets, temperature=TEMPERATURE, backend=backend, **options
    )
    return {"student": found.student_logps, "teacher": found.teacher_logps}


def loss(student: Tensor, teacher: Tensor, targets: Tensor, backend: str, **options) -> Results:
    student = student.detach().requires_grad_()
    weights = torch.linspace(0.5, 1.5, len(targets))
    if "topk" in options:
        options["topk"] = min(options["topk"], student.shape[-1])
    out = fastsdpo.sdpo_loss(
        student, teacher, targets, weights=weights.to(torch.promote_types(student.dtype, torch.float32)),
        temperature=TEMPERATURE, backend=backend, **options,
    )  # fmt: skip
    out.loss.backward()
    return {"loss": out.per_token_loss, "student": out.student_logps, "teacher": out.teacher_logps,
            "gradient": student.grad}  # fmt: skip


def fused(student: Tensor, teacher: Tensor, targets: Tensor, backend: str, *, mode: str, alpha: float = 1.0,
          topk: int = 20, softcap: float = 0.0) -> Results:  # fmt: skip
    """As `linear_sdpo_loss` calls it where its tiles have the gradient's dtype: the student's logits are
    overwritten."""
    if backend == "reference":
        options = {"topk": topk} if mode == "topk" else {}
        options |= {"softcap": softcap} if softcap else {}
        return loss(student, teacher, targets, backend, mode=mode, alpha=alpha, **options)
    grad = student.detach()
    weights = (torch.linspace(0.5, 1.5, len(targets)), None, 0.0)
    settings = (TEMPERATURE, softcap, IGNORE, grad[None])
    s, t = grad[None], teacher[None]
    if mode == "sampled_token":
        out = kernels.sampled_token_fused(s, t, None, targets, *weights, *settings)
    elif mode == "full":
        out = kernels.divergence_fused(s, t, targets, *weights, alpha, *settings)
    else:
        k = min(topk, student.shape[-1])
        ids = divergence.student_support(grad, k, targets, IGNORE, "triton")
        tail = k < student.shape[-1]
        out = kernels.topk_fused(s, t, ids, None, targets, *weights, alpha, tail, *settings)
    return {"loss": out[0], "student": out[2], "teacher": out[3], "gradient": grad}


def with_options(run: Callable[..., Results], **options) -> Callable[..., Results]:
    return functools.partial(run, **options)


FULL = {"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.4}
LOSSES = {
    "logps": logps,
    "log-ratio": log_ratio,
    "sampled": with_options(loss, mode="sampled_token"),
    "sampled fused": with_options(fused, mode="sampled_token"),
    "top-k JSD": with_options(loss, mode="topk", alpha=0.4, topk=20),
    "top-k reverse KL": with_options(loss, mode="topk", alpha=1.0, topk=20),
    "top-k forward KL": with_options(loss, mode="topk", alpha=0.0, topk=20),
    "top-k fused": with_options(fused, mode="topk", alpha=1.0, topk=20),
}
for _name, _alpha in FULL.items():
    LOSSES[_name] = with_options(loss, mode="full", alpha=_alpha)
    LOSSES[f"{_name} fused"] = with_options(fused, mode="full", alpha=_alpha)


def wrong(got: Results, want: Results, floor: float = 4e-6) -> list[str]:
    """What differs from float64: values beyond 1e-5; gradients beyond one rounding, ``floor`` of the row's
    largest entry and a float32's rounding of a probability."""
    found = []
    for name, values in got.items():
        g, w = values.double(), want[name].double().reshape(values.shape)
        if name == "gradient":
            fine = (
                w.isfinite().all(-1, keepdim=True).expand_as(w)
            )  # an infinite loss has no gradient
            scale = torch.where(fine, w.abs(), 0).amax(-1, keepdim=True)
            kind = torch.finfo(values.dtype)
            allowed = (
                0.51 * kind.eps * w.abs() + floor * scale + kind.smallest_normal * kind.eps + 5e-7
            )
        else:
            fine, allowed = w.isfinite(), 1e-5 * w.abs().clamp(min=1)
            same = torch.where(w.isinf(), g == w, torch.isnan(g) == torch.isnan(w))
            if not same.all():
                found.append(f"{name}: {g[~same].tolist()}, wanted {w[~same].tolist()}")
        off = torch.where(fine, (g - w).abs(), 0)
        bad = ~(off <= allowed) & fine
        if bad.any():
            found.append(
                f"{name}: off by {off[bad].max():.2g} in rows {bad.nonzero()[:, 0].unique().tolist()}"
            )
    return found
