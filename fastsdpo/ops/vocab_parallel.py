r"""The loss over a vocabulary-parallel head: each process holds V / P rows of the weight.

Every process of the group has the same hidden states and tokens and makes its shard of the logits.
A row's statistics merge with two small all-reduces of a few float32 numbers per token:

    1. max      the row maxima M of both policies
    2. sum      the sums of 2^((c - M) k), the target's logit (from the process that owns it, 0 from the
                others) and, for forward and reverse KL, the unnormalized sum of p (s - t)

Jensen-Shannon needs the normalized probabilities first and adds one sum; top-k adds one all-gather of
each shard's candidates and one sum. Each process then has the gradient of its own shard of the logits
and of its rows of the weight; the hidden states' gradient is summed over the group once.

The algebra runs in eager PyTorch on tiles of chunk_size x V / P.
"""

# Calls with unpacked lists: pyright cannot count their arguments.
# pyright: reportCallIssue=false
from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsdpo.ops._checks import accumulation_dtype
from fastsdpo.ops._library import _check_ids, _weighted_sum
from fastsdpo.ops.divergence import LossOptions, SDPOLossOutput, TokenInputs, loss_output
from fastsdpo.ops.divergence.reference import (
    coefficients,
    given_support_log_probs,
    log_ratio,
    row_divergence,
    weighted,
)
from fastsdpo.ops.token_logps.reference import capped_rows, softcap_slope

LN2 = math.log(2)


class _Group:
    """The process group and this process's place in the vocabulary."""

    def __init__(self, group: Any, shard: int):
        self.group = group
        self.start = dist.get_rank(group) * shard
        self.shard = shard
        self.vocabulary = dist.get_world_size(group) * shard

    def reduce(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        values = values.contiguous()
        dist.all_reduce(values, op=op, group=self.group)
        return values

    def owned(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``(whether this shard holds the id, its local position or 0)``."""
        local = ids - self.start
        mine = (local >= 0) & (local < self.shard)
        return mine, torch.where(mine, local, 0)

    def take(self, rows: Tensor, ids: Tensor) -> Tensor:
        """This shard's entries of ``rows [N, V / P]`` at global ``ids [N, K]``, 0 where not owned."""
        mine, local = self.owned(ids)
        return torch.where(mine, rows.gather(1, local), 0.0)


class _Policy:
    """One policy's shard of a chunk: capped logits and, after merging, the statistics of the rows."""

    def __init__(self, logits: Tensor, temperature: float, softcap: float):
        self.c = capped_rows(logits, softcap)
        self.k = math.log2(math.e) / temperature
        self.row_max = self.c.amax(-1)
        self.log2sum = self.row_max

    def log_probs(self) -> Tensor:
        return ((self.c - self.row_max[:, None]) * self.k - self.log2sum[:, None]) * LN2


def _merge(
    group: _Group, policies: list[_Policy], target_ids: Tensor, alpha: float | None
) -> tuple[list[Tensor], Tensor | None]:
    """Merged statistics of the policies; the targets' log-probs of each, and for alpha 0 or 1 the KL."""
    maxima = group.reduce(torch.stack([p.row_max for p in policies]), dist.ReduceOp.MAX)
    mine, local = group.owned(target_ids)
    sums = []
    for policy, row_max in zip(policies, maxima):
        policy.row_max = row_max
        scaled = (policy.c - row_max[:, None]) * policy.k
        target = scaled.gather(1, local[:, None]).squeeze(1)
        # -inf from the owner must survive the sum with the others' zeros: it does.
        sums += [torch.exp2(scaled).sum(-1), torch.where(mine, target, 0.0)]
    if alpha is not None:
        student, teacher = policies
        s = (student.c - student.row_max[:, None]) * student.k
        t = (teacher.c - teacher.row_max[:, None]) * teacher.k
        terms = weighted(torch.exp2(s), s - t) if alpha == 1 else weighted(torch.exp2(t), t - s)
        sums.append(terms.sum(-1))
    merged = group.reduce(torch.stack(sums))
    logps = []
    for i, policy in enumerate(policies):
        policy.log2sum = merged[2 * i].log2()
        logps.append((merged[2 * i + 1] - policy.log2sum) * LN2)
    kl = None
    if alpha is not None:
        student, teacher = policies
        if alpha == 1:
            kl = (merged[4] / merged[0] - student.log2sum + teacher.log2sum) * LN2
        else:
            kl = (merged[4] / merged[2] - teacher.log2sum + student.log2sum) * LN2
    return logps, kl


def _support(group: _Group, logits: Tensor, k: int) -> Tensor:
    """Global ids ``[N, K]`` of the student's k most likely tokens over all shards."""
    size = dist.get_world_size(group.group)
    values, ids = logits.topk(min(k, group.shard), -1)
    candidates = [torch.empty_like(values) for _ in range(size)]
    names = [torch.empty_like(ids) for _ in range(size)]
    dist.all_gather(candidates, values.contiguous(), group=group.group)
    dist.all_gather(names, (ids + group.start).contiguous(), group=group.group)
    best = torch.cat(candidates, -1).topk(k, -1).indices
    return torch.cat(names, -1).gather(1, best)


def _chunk(
    group: _Group,
    student: Tensor,
    teacher: Tensor | None,
    tokens: TokenInputs,
    rows: slice,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(per_token, coef, student_logps, teacher_logps, d loss / d u of this shard x coef)``."""
    mode, alpha, ignore = options.mode, options.alpha, options.ignore_index
    ids, weights = tokens.target_ids[rows], tokens.weights[rows]
    ignored = ids == ignore
    safe = torch.where(ignored, 0, ids)
    policies = [_Policy(student, options.temperature, options.softcap)]
    if teacher is not None:
        policies.append(_Policy(teacher, options.temperature, options.softcap))
    ends = alpha if mode == "full" and alpha in (0.0, 1.0) else None
    logps, kl = _merge(group, policies, safe, ends)
    s = policies[0].log_probs()
    t = policies[1].log_probs() if teacher is not None else None
    p = s.exp()
    student_logps = torch.where(ignored, 0.0, logps[0])
    teacher_logps = torch.where(ignored, 0.0, logps[1]) if teacher is not None else None

    if mode == "sampled_token":
        if teacher_logps is None:
            assert tokens.teacher_logps is not None
            teacher_logps = torch.where(ignored, 0.0, tokens.teacher_logps[rows])
        ratio = log_ratio(student_logps, teacher_logps)
        nothing = (ratio == 0) | ((student_logps == 0) & ~ratio.isnan())  # 0 * inf = 0
        per_token = torch.where(nothing, 0.0, -ratio * student_logps)
        mine, local = group.owned(safe)
        onehot = torch.zeros_like(p).scatter_(1, local[:, None], mine[:, None].to(p.dtype))
        grad = -ratio[:, None] * (onehot - p)
    elif mode == "full" and ends is not None:
        assert t is not None and kl is not None
        per_token = kl
        if alpha == 0:
            grad = p - t.exp()
        else:
            grad = weighted(p, s - t - kl[:, None])
    elif mode == "full":
        assert t is not None
        q = t.exp()
        m = (1 - alpha) * p + alpha * q
        log_m = torch.where(m == 0, 1.0, m).log()
        parts = torch.stack([weighted(p, s - log_m).sum(-1), weighted(q, t - log_m).sum(-1)])
        of_student, of_teacher = group.reduce(parts)
        per_token = (1 - alpha) * of_student + alpha * of_teacher
        grad = (1 - alpha) * weighted(p, s - log_m - of_student[:, None])
    else:
        support = tokens.topk_ids
        support = _support(group, policies[0].c, options.topk) if support is None else support[rows]
        mine, local = group.owned(support)
        sums = [group.take(s, support)]
        inside = torch.zeros_like(s, dtype=torch.bool)
        inside.scatter_(1, local, mine)
        # Position 0 stands for every id of another shard: mark it only where it is owned.
        first = (mine & (local == 0)).any(-1)
        inside[:, 0] = first
        if options.add_tail:
            sums.append(p.masked_fill(inside, 0.0).sum(-1, keepdim=True))
        if t is not None:
            sums.append(group.take(t, support))
            if options.add_tail:
                sums.append(t.exp().masked_fill(inside, 0.0).sum(-1, keepdim=True))
        merged = group.reduce(torch.cat(sums, -1))
        width = options.topk + int(options.add_tail)
        classes = [_classes(merged[:, :width], options.add_tail)]
        if t is not None:
            classes.append(_classes(merged[:, width:], options.add_tail))
        else:
            assert tokens.topk_logps is not None
            given = tokens.topk_logps[rows]
            classes.append(given_support_log_probs(given, options.add_tail))
            hit = support == ids[:, None]
            teacher_logps = torch.where(hit, given, 0.0).sum(-1)
            teacher_logps = torch.where(hit.any(-1), teacher_logps, math.nan)
            teacher_logps = torch.where(ignored, 0.0, teacher_logps)
        per_token, _, class_grads = row_divergence(*classes, alpha)
        grad = torch.zeros_like(p)
        if options.add_tail:
            tail = classes[0][:, -1:].exp()
            grad = weighted(p, torch.where(tail == 0, 0.0, class_grads[:, -1:] / tail).expand_as(p))
            class_grads = class_grads[:, :-1]
        grad = grad.masked_fill(inside, 0.0)
        grad.scatter_add_(1, local, torch.where(mine, class_grads, 0.0))

    assert teacher_logps is not None
    old = None if tokens.old_logps is None else tokens.old_logps[rows]
    clip = options.is_clip or 0.0
    coef = coefficients(weights, student_logps, old, clip, ids, ignore)
    grad = grad * (coef / options.temperature)[:, None]
    grad = grad * softcap_slope(policies[0].c, options.softcap)
    grad = torch.where(ignored[:, None], 0.0, grad)
    return torch.where(ignored, 0.0, per_token), coef, student_logps, teacher_logps, grad


def _classes(merged: Tensor, add_tail: bool) -> Tensor:
    """Class log-probs from merged log-probs of the support and, last, the tail's probability."""
    if add_tail:
        return torch.cat([merged[:, :-1], merged[:, -1:].log()], -1)
    return merged - merged.logsumexp(-1, keepdim=True)


class _VocabParallelLoss(torch.autograd.Function):
    """Forms the gradients in forward, chunk by chunk; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        tokens: TokenInputs,
        options: LossOptions,
        chunk_size: int,
        process_group: Any,
    ) -> tuple[Tensor, ...]:
        group = _Group(process_group, weight.shape[0])
        dtype = accumulation_dtype(student_hidden, weight)
        needs = ctx.needs_input_grad[:3]
        n = student_hidden.shape[0]
        vectors = [student_hidden.new_zeros(n, dtype=dtype) for _ in range(4)]
        grad_hidden = student_hidden.new_zeros(student_hidden.shape, dtype=dtype)
        grad_weight = weight.new_zeros(weight.shape if needs[1] else (0,), dtype=dtype)
        grad_bias = weight.new_zeros(weight.shape[0], dtype=dtype)

        def head(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            z = x.to(dtype) @ w.to(dtype).T
            return z if b is None else z + b.to(dtype)

        for start in range(0, n, chunk_size):
            rows = slice(start, min(start + chunk_size, n))
            x = student_hidden[rows]
            student = head(x, weight, bias)
            teacher = None
            if teacher_hidden is not None:
                teacher = head(teacher_hidden[rows], teacher_weight, teacher_bias)
            *found, grad = _chunk(group, student, teacher, tokens, rows, options)
            for vector, values in zip(vectors, found):
                vector[rows] = values
            if needs[0]:
                grad_hidden[rows] = grad @ weight.to(dtype)
            if needs[1]:
                grad_weight.addmm_(grad.T, x.to(dtype))
            grad_bias += grad.sum(0)
        if needs[0]:
            group.reduce(grad_hidden)
        per_token, coef, student_logps, teacher_logps = vectors
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [t.dtype if t is not None else dtype for t in (student_hidden, weight, bias)]
        ctx.mark_non_differentiable(per_token, student_logps, teacher_logps)
        return _weighted_sum(coef, per_token), per_token, student_logps, teacher_logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        grads = [
            (grad * grad_loss).to(dtype) if needed else None
            for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
        ]
        return (*grads, *(None,) * 7)


def vocab_parallel_loss(
    rows: Tensor,
    teacher_rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    options: LossOptions,
    tokens: TokenInputs,
    chunk: int,
    process_group: Any,
    shape: torch.Size,
) -> SDPOLossOutput:
    """`linear_sdpo_loss` for a checked call whose ``weight`` is this process's shard."""
    vocabulary = dist.get_world_size(process_group) * weight.shape[0]
    _check_ids(tokens.target_ids, vocabulary, "linear_sdpo_loss: target_ids", options.ignore_index)
    shared = teacher_weight is None
    found = _VocabParallelLoss.apply(
        rows, weight, bias, teacher_rows,
        weight.detach() if shared else teacher_weight.detach(),
        (bias if shared else teacher_bias), tokens, options, chunk, process_group,
    )  # fmt: skip
    return loss_output(*found, shape)
