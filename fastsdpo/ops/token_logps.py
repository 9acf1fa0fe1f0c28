r"""Log-probabilities of target tokens from logits, and the hindsight-versus-base log-ratio.

    c = softcap * tanh(z / softcap)           (c = z without a softcap; -inf stays -inf)
    u = c / temperature
    logps[n] = u[n, y_n] - logsumexp_v u[n, v]
    entropy[n] = -sum_v p log p

Gradient of a row's logp: ``(1[v = y] - p_v) / temperature * dc/dz``. Saved for it: the logits and two
float32 numbers per row, the max of c and log2 of the sum of 2^((c - max) log2(e) / temperature). They
stay apart: merged into one log-sum-exp, large logits cost the gradient 15 to 800 times its error.

A kernel reads the logits once (2 bytes an element in bf16), a backward reads them once more and
writes the gradient; plain PyTorch stores log-softmaxes in float32 between the two.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastsdpo.ops import _operators
from fastsdpo.ops.backend import resolve_backend
from fastsdpo.ops.checks import (
    as_rows,
    check_ignore_index,
    check_like,
    check_logits,
    check_softcap,
    check_temperature,
    flat_ids,
    shape_text,
)
from fastsdpo.ops.rows import LossOptions, token_advantage


class TokenLogRatio(NamedTuple):
    """Result of `token_log_ratio`.

    Each has the shape of ``target_ids`` and is float32 (float64 for float64 logits), in nats.

    Attributes:
        log_ratio: ``teacher_logps - student_logps``.
        student_logps, teacher_logps: log-probability of each target token.
    """

    log_ratio: Tensor
    student_logps: Tensor
    teacher_logps: Tensor


def check_pair(name: str, student_logits: object, teacher_logits: object) -> tuple[Tensor, Tensor]:
    student = check_logits(name, "student_logits", student_logits)
    teacher = check_logits(name, "teacher_logits", teacher_logits)
    if teacher.shape != student.shape:
        raise ValueError(
            f"{name}: teacher_logits must have student_logits' shape "
            f"{shape_text(student.shape)}, got {shape_text(teacher.shape)}"
        )
    if teacher.device != student.device:
        raise ValueError(f"{name}: teacher_logits must be on {student.device}, got {teacher.device}")
    return student, teacher


def token_logps(
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    extra_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each target token under ``softmax(u)``, in nats.

    Args:
        logits: ``(..., V)`` float16, bfloat16, float32 or float64; rows may be strided.
        target_ids: ``(...)`` integer in [0, V), or ``ignore_index``.
        temperature: divides the (capped) logits; > 0.
        softcap: ``softcap * tanh(logits / softcap)`` first, or None.
        ignore_index: targets equal to it give 0 and no gradient, whatever their logits hold.
        return_entropy: also return each row's entropy in nats.
        entropy_grad: the entropy carries a gradient too; needs ``return_entropy``.
        extra_ids: ``(..., K)`` integer in [0, V), more tokens of each row whose log-probs are wanted, in any order
            and more than once if need be; ``ignore_index`` gives 0.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        ``(...)`` float32 (float64 for float64 logits), differentiable in ``logits``; with ``return_entropy``
        the pair ``(logps, entropy)``, with ``extra_ids`` their log-probs ``(..., K)`` as the last of a tuple.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range, by name.
        ImportError: a backend asked for by name that is not installed.

    Memory: nothing of size V but the gradient of the logits where one is asked for.
    """
    name = "token_logps"
    logits = check_logits(name, "logits", logits)
    shape = logits.shape[:-1]
    target_ids = check_like(name, "target_ids", target_ids, shape, logits.device, integer=True)
    temperature = check_temperature(name, temperature)
    cap = check_softcap(name, softcap)
    backend = resolve_backend(name, backend, logits)
    options = LossOptions(temperature, cap, check_ignore_index(name, ignore_index)).packed()
    if entropy_grad or extra_ids is not None:
        from fastsdpo.ops import token_terms

        extra = token_terms.check_extra_ids(name, extra_ids, target_ids, entropy_grad, return_entropy)
        given = as_rows(logits), flat_ids(target_ids), extra
        logps, entropy, *_ = token_terms.token_terms_op(*given, *options, return_entropy, backend)
        entropy = (entropy if entropy_grad else entropy.detach()) if return_entropy else None
        return token_terms.results(logps, entropy, target_ids, extra, ignore_index)
    logps, entropy, _ = _operators.token_logps_op(
        as_rows(logits), flat_ids(target_ids), *options, return_entropy, backend
    )
    logps = logps.view(shape)
    return (logps, entropy.detach().view(shape)) if return_entropy else logps


def token_log_ratio(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> TokenLogRatio:
    """The signal: ``log_ratio = log p_T[y] - log p_S[y]`` (hindsight minus base), in nats.

    The token advantage of equation (1) of "Aligning Language Models from User Interactions"
    (https://arxiv.org/abs/2603.12273). One pass over each logits tensor; no gradient.

    Args:
        student_logits, teacher_logits: ``(..., V)``, the same shape; dtypes may differ.
        target_ids: ``(...)`` integer in [0, V), or ``ignore_index`` (0 in every result).

    Returns:
        `TokenLogRatio` of three ``(...)`` tensors, detached. Where both policies give the token
        probability 0 the log-ratio is 0.

    Raises:
        ValueError, TypeError, ImportError: as `token_logps`.
    """
    name = "token_log_ratio"
    student, teacher = check_pair(name, student_logits, teacher_logits)
    shape = student.shape[:-1]
    target_ids = check_like(name, "target_ids", target_ids, shape, student.device, integer=True)
    temperature = check_temperature(name, temperature)
    cap = check_softcap(name, softcap)
    backend = resolve_backend(name, backend, student, teacher)
    options = LossOptions(temperature, cap, check_ignore_index(name, ignore_index)).packed()
    student_logps, teacher_logps = _operators.token_log_ratio_op(
        as_rows(student.detach()), as_rows(teacher.detach()), flat_ids(target_ids), *options, backend
    )
    student_logps, teacher_logps = student_logps.view(shape), teacher_logps.view(shape)
    return TokenLogRatio(token_advantage(student_logps, teacher_logps), student_logps, teacher_logps)
