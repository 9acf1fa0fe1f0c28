"""Oracles, input factories and error budgets for tests and benchmarks.

The oracles are the written formulas of `fastsdpo.ops.divergence` in float64 PyTorch, differentiated by
autograd; they share no code with any backend, the reference included.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def effective_logits(z: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """float64 logits after softcap and temperature; -inf stays -inf under a softcap."""
    u = z.double()
    if softcap is not None:
        finite = u.masked_fill(u == -math.inf, 0.0)
        u = torch.where(u == -math.inf, u, softcap * torch.tanh(finite / softcap))
    return u / temperature


def _product(p: Tensor, values: Tensor) -> Tensor:
    """p * values with 0 * (+-inf) = 0, in value and gradient."""
    dead = p == 0
    return torch.where(dead, 0.0, p * values.masked_fill(dead, 0.0))


def classes_divergence(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    """Divergence over the last axis from log-probabilities ``s`` (student) and ``t`` (teacher)."""
    p, q = s.exp(), t.exp()
    if alpha == 0:
        return _product(q, t - s.masked_fill(q == 0, 0.0)).sum(-1)
    if alpha == 1:
        return _product(p, s - t.masked_fill(p == 0, 0.0)).sum(-1)
    m = (1 - alpha) * p + alpha * q
    log_m = m.masked_fill(m == 0, 1.0).log()
    student = _product(p, s.masked_fill(p == 0, 0.0) - log_m).sum(-1)
    teacher = _product(q, t.masked_fill(q == 0, 0.0) - log_m).sum(-1)
    return (1 - alpha) * student + alpha * teacher


def support_classes(log_probs: Tensor, ids: Tensor, add_tail: bool) -> Tensor:
    """Log-probs of the support's classes, with the tail's or renormalized."""
    chosen = log_probs.gather(-1, ids)
    if not add_tail:
        return chosen - chosen.logsumexp(-1, keepdim=True)
    inside = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, ids, True)
    rest = log_probs.masked_fill(inside, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], -1)


@dataclass(frozen=True)
class OracleLoss:
    """float64 results of `oracle_sdpo_loss`; ``grad`` is with respect to the student's logits."""

    loss: Tensor
    per_token_loss: Tensor
    student_logps: Tensor
    teacher_logps: Tensor
    grad: Tensor


def oracle_sdpo_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    *,
    mode: str = "sampled_token",
    alpha: float = 1.0,
    topk: int | None = None,
    add_tail: bool = True,
    topk_ids: Tensor | None = None,
    weights: Tensor | None = None,
    old_logps: Tensor | None = None,
    is_clip: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> OracleLoss:
    """`fastsdpo.sdpo_loss` by its written formula and autograd, in float64, on rows that count."""
    shape, vocabulary = student_logits.shape[:-1], student_logits.shape[-1]
    z = student_logits.detach().reshape(-1, vocabulary)
    z_teacher = teacher_logits.detach().reshape(-1, vocabulary)
    flat = target_ids.reshape(-1)
    keep = flat != ignore_index
    y = flat[keep]
    count = max(1, int(keep.sum()))
    w = torch.full((len(y),), 1.0 / count, dtype=torch.float64, device=y.device)
    if weights is not None:
        w = weights.reshape(-1)[keep].double()

    leaf = z[keep].double().requires_grad_()
    s = torch.log_softmax(effective_logits(leaf, temperature, softcap), -1)
    t = torch.log_softmax(effective_logits(z_teacher[keep], temperature, softcap), -1)
    student_logps = s.gather(-1, y[:, None]).squeeze(-1)
    teacher_logps = t.gather(-1, y[:, None]).squeeze(-1)
    if mode == "sampled_token":
        per_token = -(teacher_logps - student_logps).detach() * student_logps
    elif mode == "full":
        per_token = classes_divergence(s, t, alpha)
    else:
        ids = topk_ids.reshape(-1, topk_ids.shape[-1])[keep] if topk_ids is not None else None
        if ids is None:
            ids = z[keep].topk(topk or 1, -1).indices
        tail = add_tail and ids.shape[-1] < vocabulary
        per_token = classes_divergence(support_classes(s, ids, tail), support_classes(t, ids, tail), alpha)
    if old_logps is not None and is_clip is not None:
        ratio = (student_logps.detach() - old_logps.reshape(-1)[keep].double()).clamp(-20, 20)
        w = w * ratio.exp().clamp(max=is_clip)
    loss = (w * per_token).sum()
    (grad,) = torch.autograd.grad(loss, leaf) if len(y) else (leaf,)

    def spread(values: Tensor) -> Tensor:
        out = values.new_zeros(len(flat), *values.shape[1:])
        out[keep] = values.detach()
        return out.reshape(*shape, *values.shape[1:])

    return OracleLoss(loss.detach(), spread(per_token), spread(student_logps), spread(teacher_logps), spread(grad))


ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_gradient_close(
    actual: Tensor, expected: Tensor, plain: Tensor | None = None, *, floor: float = 4e-6, absolute: float = 0.0
) -> None:
    """Asserts the error budget for gradients: 2 x plain PyTorch's error in the same dtype + one rounding.

    Args:
        actual: gradient of the kernel, any dtype.
        expected: float64 gradient.
        plain: the gradient that plain PyTorch gives in the same dtype, or None (error 0).
        floor: absolute slack relative to the largest entry, for float32 statistics.
        absolute: slack that does not shrink with the gradient.
    """
    scale = expected.abs().max().clamp(min=1e-30)
    allowed = ROUNDING[actual.dtype] * expected.abs() + floor * scale + absolute
    if actual.dtype == torch.float16:
        allowed = allowed + 2.0**-25  # half a subnormal step
    if plain is not None:
        allowed = allowed + 2 * (plain.double() - expected).abs().max()
    error = (actual.double() - expected).abs()
    worst = (error - allowed).argmax()
    assert bool((error <= allowed).all()), (
        f"gradient off by {error.flatten()[worst]:.3e} where {allowed.flatten()[worst]:.3e} is allowed "
        f"(entry {int(worst)}, expected {expected.flatten()[worst]:.6e})"
    )


@dataclass
class Rows:
    """One drawn case: logits of both policies, targets, weights."""

    student: Tensor
    teacher: Tensor
    target_ids: Tensor
    weights: Tensor
    name: str = field(default="")


def make_rows(
    shape: tuple[int, ...],
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
    distance: float = 0.5,
    ignored: float = 0.2,
    seed: int = 0,
) -> Rows:
    """Random logits of a student and a teacher ``distance`` away from it, on the CPU.

    Targets are drawn from the student, as responses are; about ``ignored`` of them are -100.
    """
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, vocabulary, generator=g) * spread
    teacher = student + distance * torch.randn(*shape, vocabulary, generator=g)
    rows = math.prod(shape)
    noise = torch.rand(rows, vocabulary, generator=g).clamp(min=1e-9).log().neg().log().neg()
    targets = (student.reshape(rows, vocabulary) + noise).argmax(-1) if rows else torch.zeros(0)
    targets = targets.long().reshape(shape)
    targets[torch.rand(shape, generator=g) < ignored] = -100
    weights = torch.rand(shape, generator=g)
    return Rows(student.to(dtype), teacher.to(dtype), targets, weights)


def package_file(package: str, pattern: str) -> Path:
    """The one data file of an installed package, found without importing it.

    Raises:
        FileNotFoundError: the package is not installed, or holds no file like ``pattern``.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package_file: the package {package} is not installed; `make demo` installs it")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob(pattern))
    if not files:
        raise FileNotFoundError(f"package_file: no {pattern} in the package {package}")
    return files[0]


def round_interpreted_bfloat16() -> None:
    """Makes the Triton interpreter round as the hardware does.

    float32 becomes bfloat16 by rounding to nearest even (the interpreter cuts the low bits off), and a fused
    multiply-add rounds once (the interpreter rounds the product too). Call it before the first kernel runs
    under TRITON_INTERPRET=1.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain = builder.cast_impl

    def cast(self: object, source: Any, target: Any) -> Any:
        given, wanted = source.dtype.scalar, target.scalar
        if given == tl.float32 and wanted == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            bits = bits.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, wanted)
        if given == tl.bfloat16 and wanted == tl.float32:
            wide = source.data.astype(np.uint32) << np.uint32(16)
            return interpreter.TensorHandle(wide.view(np.float32), wanted)
        return plain(self, source, target)

    builder.cast_impl = cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))

    def fma(self: object, x: Any, y: Any, z: Any) -> Any:
        with np.errstate(all="ignore"):  # lanes that the kernels discard overflow
            exact = x.data.astype(np.float64) * y.data + z.data  # a product of float32 is exact
            return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    builder.create_fma = fma
