"""The losses and log-probs by the native CPU kernels (kernels/cpu/), a backend of `fastsdpo.ops.rows`.

float32, bfloat16 and float16; student, teacher and gradient may have different dtypes. With a gradient buffer,
`forward` computes statistics, loss and gradient in one visit of a row and stores no statistics. Its results
have the same bits as those of forward and backward.

Memory: a few numbers per token. With a gradient buffer (and for JSD) each thread also keeps the exponentials of
its current row: at most 262,144 each of student and teacher, 2 MiB a thread for any number of tokens. The rest
of a longer row is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsdpo._native import FORWARD, GRADIENT, call, rows, vector
from fastsdpo.ops.rows import STATISTICS, LossOptions, RowResults, TokenResults, Tokens

_OPERATIONS = {"sampled_token": "sampled_token", "full": "divergence", "topk": "topk"}
_COLUMNS = {"sampled_token": 2, "full": 5, "topk": 4}  # of the statistics that a kernel writes


def _stats(stats: Tensor, columns: int) -> dict[str, object]:
    """The kernel's fields for ``stats [N, C]``; none if no statistics are kept."""
    start = vector(stats)
    if not start:
        return {}
    return {"stats": tuple(start + 4 * column for column in range(columns)), "stats_stride": stats.shape[1]}


def _call(
    logits: Tensor,
    teacher: Tensor | None,
    tokens: Tokens,
    options: LossOptions,
    passes: int,
    grad: Tensor | None,
    **fields: object,
) -> None:
    if options.mode == "topk":
        assert tokens.topk_ids is not None
        fields["K"] = tokens.topk_ids.shape[1]
        fields["topk_ids"] = vector(tokens.topk_ids, torch.int64)
        fields["add_tail"] = int(options.add_tail)
    for name, tensor in (("teacher", teacher), ("grad", grad)):
        if tensor is not None:
            fields[name] = rows(tensor)
    call(
        _OPERATIONS[options.mode],
        logits,
        tokens.target_ids,
        passes,
        options.temperature,
        options.softcap,
        options.ignore_index,
        **fields,
    )


def forward(
    student: Tensor, teacher: Tensor | None, tokens: Tokens, options: LossOptions, grad: Tensor | None = None
) -> RowResults:
    n, classes = len(tokens.target_ids), torch.Size([0])
    if options.mode == "topk" and tokens.topk_ids is not None:
        classes = tokens.topk_ids.shape
    elif options.mode == "full" and grad is None:
        classes = torch.Size([n, 2])
    stats = torch.zeros((n, STATISTICS) if grad is None else (0,))
    class_grads = torch.empty(classes)
    per_token, coef, student_logps, teacher_logps = (torch.empty(n) for _ in range(4))
    found = RowResults(per_token, coef, student_logps, teacher_logps, stats, class_grads)
    fields = {} if options.mode == "sampled_token" else {"alpha": options.alpha}
    _call(
        student,
        teacher,
        tokens,
        options,
        FORWARD if grad is None else FORWARD | GRADIENT,
        grad,
        weights=vector(tokens.weights),
        old_logps=vector(tokens.old_logps),
        is_clip=options.is_clip,
        given_teacher_logps=vector(tokens.teacher_logps),
        given_topk_logps=vector(tokens.topk_logps),
        per_token=vector(found.per_token),
        coef=vector(found.coef),
        student_logps=vector(found.student_logps),
        teacher_logps=vector(found.teacher_logps),
        class_grads=vector(class_grads),
        **_stats(stats, _COLUMNS[options.mode]),
        **fields,
    )
    return found


def backward(
    upstream: Tensor,
    found: RowResults,
    student: Tensor,
    teacher: Tensor | None,
    tokens: Tokens,
    options: LossOptions,
    grad: Tensor,
) -> None:
    full = options.mode == "full"
    _call(
        student,
        teacher if full else None,
        tokens,
        options,
        GRADIENT,
        grad,
        grad_loss=vector(upstream),
        coef=vector(found.coef),
        student_logps=vector(found.student_logps),
        teacher_logps=vector(found.teacher_logps),
        class_grads=vector(found.class_grads),
        **_stats(found.stats, _COLUMNS[options.mode]),
        **({"alpha": options.alpha} if full else {}),
    )


def support(logits: Tensor, target_ids: Tensor, k: int, ignore_index: int) -> Tensor:
    """In ascending order; of equal logits the first. 0 to k - 1 for rows whose target is ignored."""
    ids = torch.empty(len(target_ids), k, dtype=torch.int64)
    call("support", logits, target_ids, FORWARD, 1.0, 0.0, ignore_index, K=k, support=vector(ids, torch.int64))
    return ids


def _token_call(
    operation: str, logits: Tensor, target_ids: Tensor, options: LossOptions, passes: int, **fields: object
) -> None:
    scales = (options.temperature, options.softcap, options.ignore_index)
    call(operation, logits, target_ids, passes, *scales, **fields)


def token_forward(logits: Tensor, target_ids: Tensor, options: LossOptions, entropy: bool = False) -> TokenResults:
    n = len(target_ids)
    found = TokenResults(torch.empty(n), torch.empty(n if entropy else 0), torch.empty(n, 2))
    _token_call(
        "token_logps",
        logits,
        target_ids,
        options,
        FORWARD,
        student_logps=vector(found.logps),
        entropy=vector(found.entropy) if entropy else None,
        **_stats(found.stats, 2),
    )
    return found


def token_backward(
    upstream: Tensor, stats: Tensor, logits: Tensor, target_ids: Tensor, options: LossOptions, grad: Tensor
) -> None:
    _token_call(
        "token_logps",
        logits,
        target_ids,
        options,
        GRADIENT,
        upstream=vector(upstream),
        grad=rows(grad),
        **_stats(stats, 2),
    )


def log_ratio(student: Tensor, teacher: Tensor, target_ids: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    student_logps, teacher_logps = (torch.empty(len(target_ids)) for _ in range(2))
    _token_call(
        "token_log_ratio",
        student,
        target_ids,
        options,
        FORWARD,
        teacher=rows(teacher),
        student_logps=vector(student_logps),
        teacher_logps=vector(teacher_logps),
    )
    return student_logps, teacher_logps
