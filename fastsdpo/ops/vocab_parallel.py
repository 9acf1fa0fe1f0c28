r"""The loss over a vocabulary-parallel head: each process holds V / P rows of the weight.

Every process of the group has the same hidden states and tokens and makes its shard of the logits. The
kernels see a shard as a vocabulary of its own, with one more token of probability 0 that stands for targets
of other shards. Small collectives, a few numbers per token, merge the shards' results of each row:

    normalizers   one all-gather of each shard's (max, log2 sum), and a sum of the targets' logits
    KL(p || q)    by the chain rule from the shards' own, w_i and v_i a shard's mass under p and q:
                  sum_i w_i KL_i + sum_i w_i log(w_i / v_i)
    JSD           two sums, of the gradient's terms p (s - log m) and q (t - log m) of each shard
    top-k         the shards' candidates, then the classes' logits; the tail's normalizers with the support
                  masked

Each process then has the kernels write the gradient of its own shard of the logits, from the row's
statistics; the hidden states' gradient is summed over the group once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsdpo.ops import rows
from fastsdpo.ops.checks import accumulation_dtype
from fastsdpo.ops.head import Gradients, HeadGemms, Needs, through_head
from fastsdpo.ops.reference import (
    capped_rows,
    coefficients,
    given_logps,
    given_support_log_probs,
    row_divergence,
    sampled_token_loss,
    softcap_slope,
)
from fastsdpo.ops.rows import RowCall, RowResults, Tokens, token_advantage

if TYPE_CHECKING:
    from fastsdpo.ops.linear import LinearCall

LN2, LOG2E = math.log(2), math.log2(math.e)


class _Group:
    """The process group and this process's place in the vocabulary."""

    def __init__(self, group: Any, shard: int):
        self.group = group
        self.size = dist.get_world_size(group)
        self.start = dist.get_rank(group) * shard
        self.shard = shard

    def sum(self, values: Tensor) -> Tensor:
        values = values.contiguous()
        dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """``[P, ...]``: everyone's ``values``."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def local(self, ids: Tensor) -> Tensor:
        """Global ids as columns of this shard; ids of other shards become the column behind the last."""
        local = ids - self.start
        return torch.where((local >= 0) & (local < self.shard), local, self.shard)

    def normalizers(self, stats: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """``[N, 2]`` (max, log2 sum) of whole rows from the shards', and ``[P, N]`` log2 of each one's mass.

        ``scale`` is log2(e) / temperature, the step from logits to exponents.
        """
        maxima, sums = self.gather(stats).unbind(-1)
        row_max = maxima.amax(0)
        apart = torch.where(maxima == -math.inf, -math.inf, (maxima - row_max) * scale)
        # A shard whose tokens all have probability 0 contributes nothing.
        parts = torch.where(apart == -math.inf, -math.inf, apart + sums)
        log2sum = torch.logsumexp(parts * LN2, 0) * LOG2E
        return torch.stack([row_max, log2sum], -1), parts - log2sum


class ShardLoss:
    """The `head.TileLoss` of one process's shard of the logits."""

    def __init__(self, call: LinearCall, shard: int):
        from fastsdpo.ops.linear import RowVectors

        self.call, self.options, self.backend = call, call.options, call.backend
        self.group = _Group(call.vocab_group, shard)
        self.scale = LOG2E / call.options.temperature
        self.vectors = RowVectors(call.tokens.weights)

    def __call__(self, student: Tensor, teacher: Tensor | None, which: slice, grad: Tensor | None) -> None:
        tokens = self.call.tokens.chunk(which)
        ignored = tokens.target_ids == self.options.ignore_index
        ids = torch.where(ignored, tokens.target_ids, self.group.local(tokens.target_ids))
        run = {"sampled_token": self._sampled_token, "full": self._full, "topk": self._topk}
        logits = [tile.unsqueeze(0) for tile in (student, teacher) if tile is not None]
        buffer = None if grad is None else grad.unsqueeze(0)
        found = run[self.options.mode](logits, tokens, ids, buffer)
        if buffer is not None:
            rows.clear_weightless(buffer, found[1], RowCall(logits[0], None, tokens, self.options, self.backend))
        keep = [torch.where(ignored, 0.0, values) for values in found]
        self.vectors.write(which, keep)

    def _statistics(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Normalizers ``[N, 2]`` of whole rows, and the targets' log-probs ``[N]``."""
        stats = rows.token_forward(logits, ids, self.options, self.backend).stats
        merged, _ = self.group.normalizers(stats, self.scale)
        return merged, self._target_logps(logits, ids, merged)

    def _target_logps(self, logits: Tensor, ids: Tensor, merged: Tensor) -> Tensor:
        return self._class_logps(logits, ids[:, None], merged)[:, 0]

    def _class_logps(self, logits: Tensor, ids: Tensor, merged: Tensor) -> Tensor:
        """Log-probs ``[N, K]`` of local ids; each shard contributes those of its own tokens to a sum."""
        mine = (ids >= 0) & (ids < self.group.shard)
        z = logits[0].gather(1, torch.where(mine, ids, 0))
        c = capped_rows(z, self.options.softcap)
        exponent = self.group.sum(torch.where(mine, (c - merged[:, :1]) * self.scale, 0.0))
        return (exponent - merged[:, 1:]) * LN2

    def _sampled_token(
        self, logits: list[Tensor], tokens: Tokens, ids: Tensor, grad: Tensor | None
    ) -> Sequence[Tensor]:
        stats, student_logps = self._statistics(logits[0], ids)
        if len(logits) == 2:
            teacher_logps = self._statistics(logits[1], ids)[1]
        else:
            teacher_logps = given_logps(tokens, self.options)
        coef = coefficients(tokens, student_logps, self.options)
        if grad is not None:
            upstream = -token_advantage(student_logps, teacher_logps) * coef
            self._token_gradient(upstream, stats, logits[0], ids, grad)
        per_token = sampled_token_loss(student_logps, teacher_logps)
        return per_token, coef, student_logps, teacher_logps

    def _token_gradient(self, upstream: Tensor, stats: Tensor, logits: Tensor, ids: Tensor, grad: Tensor) -> None:
        ignored = ids == self.options.ignore_index
        stats = torch.where(ignored[:, None], 0.0, stats)
        rows.token_backward(upstream, stats, logits, ids, self.options, self.backend, grad)

    def _full(self, logits: list[Tensor], tokens: Tokens, ids: Tensor, grad: Tensor | None) -> Sequence[Tensor]:
        student, teacher = logits
        local = tokens._replace(target_ids=ids)
        alpha = self.options.alpha
        # JSD needs only the statistics of the rows, which every mode gives. A KL's take one pass.
        options = replace(self.options, alpha=alpha if alpha in (0.0, 1.0) else 1.0)
        found = rows.forward(RowCall(student, teacher, local, options, self.backend))
        own = found.stats
        p_stats, p_mass = self.group.normalizers(own[:, :2], self.scale)
        q_stats, q_mass = self.group.normalizers(own[:, 2:4], self.scale)
        student_logps = self._target_logps(student, ids, p_stats)
        teacher_logps = self._target_logps(teacher, ids, q_stats)
        coef = coefficients(tokens, student_logps, self.options)
        stats = torch.cat([p_stats, q_stats, p_stats.new_zeros(len(ids), 1)], -1)
        stats = torch.where((ids == self.options.ignore_index)[:, None], 0.0, stats)
        if alpha in (0.0, 1.0):
            per_token = self._chain_rule(found.per_token, p_mass, q_mass)
            stats[:, 4] = per_token
        else:
            of_student = self._terms(student, teacher, local, stats, alpha)
            swapped = torch.cat([stats[:, 2:4], stats[:, :2], stats[:, 4:]], -1)
            of_teacher = self._terms(teacher, student, local, swapped, 1 - alpha)
            of_student, of_teacher = self.group.sum(torch.stack([of_student, of_teacher]))
            per_token = of_student + of_teacher
            stats[:, 4] = of_student / (1 - alpha)
        if grad is not None:
            known = RowResults(per_token, coef, student_logps, teacher_logps, stats, coef.new_empty(0))
            call = RowCall(student, teacher, local, self.options, self.backend)
            rows.backward(coef.new_ones(1), known, call, grad)
        return per_token, coef, student_logps, teacher_logps

    def _chain_rule(self, own: Tensor, p_mass: Tensor, q_mass: Tensor) -> Tensor:
        """The KL ``[N]`` of whole rows from the shards' own and log2 of their masses ``[P, N]``."""
        if self.options.alpha == 0:
            p_mass, q_mass = q_mass, p_mass
        weight = torch.exp2(p_mass)
        terms = self.group.gather(own) + (p_mass - q_mass) * LN2
        return torch.where(weight == 0, 0.0, weight * terms).sum(0)

    def _terms(self, student: Tensor, teacher: Tensor, tokens: Tokens, stats: Tensor, alpha: float) -> Tensor:
        """This shard's sum ``[N]`` of (1 - alpha) p (s - log m), the terms of the gradient without their mean."""
        terms = torch.empty_like(student, dtype=accumulation_dtype(student))
        one = stats.new_ones(len(stats))
        known = RowResults(one, one, one, one, stats, stats.new_empty(0))
        # The sum is over the gradient in u: take the softcap and the temperature out of the chain to z.
        s, t = (capped_rows(z, self.options.softcap).view(z.shape) for z in (student, teacher))
        options = replace(self.options, alpha=alpha, softcap=0.0)
        rows.backward(one[:1], known, RowCall(s, t, tokens, options, self.backend), terms)
        return terms[0].sum(-1) * self.options.temperature

    def _topk(self, logits: list[Tensor], tokens: Tokens, ids: Tensor, grad: Tensor | None) -> Sequence[Tensor]:
        options = self.options
        support = tokens.topk_ids
        if support is None:
            support = self._support(logits[0], options.topk)
        local = self.group.local(support)
        classes, logps, tails = [], [], []
        for z in logits:
            whole, target_logps = self._statistics(z, ids)
            logps.append(target_logps)
            s = self._class_logps(z, local, whole)
            if options.add_tail:
                stats, log_tail = self._outside(z, local, ids, whole)
                tails.append(stats)
                s = torch.cat([s, log_tail], -1)
            else:
                s = s - s.logsumexp(-1, keepdim=True)
            classes.append(s)
        if len(logits) == 1:
            assert tokens.topk_logps is not None
            classes.append(given_support_log_probs(tokens.topk_logps, options.add_tail))
            logps.append(given_logps(tokens._replace(topk_ids=support), options))
        per_token, _, class_grads = row_divergence(classes[0], classes[1], options.alpha)
        coef = coefficients(tokens, logps[0], self.options)
        if grad is not None:
            self._support_gradient(logits[0], local, ids, class_grads, coef, tails, grad)
        return per_token, coef, logps[0], logps[1]

    def _support(self, logits: Tensor, k: int) -> Tensor:
        """Global ids ``[N, K]`` of the student's k most likely tokens over all shards."""
        shard = self.group.shard
        values, ids = logits[0, :, :shard].topk(min(k, shard), -1)
        candidates = torch.cat(self.group.gather(values).unbind(), -1)
        names = torch.cat(self.group.gather(ids + self.group.start).unbind(), -1)
        return names.gather(1, candidates.topk(k, -1).indices)

    def _outside(self, logits: Tensor, local: Tensor, ids: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Normalizers ``[N, 2]`` of the tokens outside the support, and the log of their mass ``[N, 1]``."""
        masked = logits[0].scatter(1, local, -math.inf).unsqueeze(0)
        stats = rows.token_forward(masked, ids, self.options, self.backend).stats
        merged, _ = self.group.normalizers(stats, self.scale)
        log2_mass = (merged[:, 0] - whole[:, 0]) * self.scale + merged[:, 1] - whole[:, 1]
        empty = merged[:, 0] == -math.inf
        return merged, torch.where(empty, -math.inf, log2_mass * LN2)[:, None]

    def _support_gradient(
        self,
        logits: Tensor,
        local: Tensor,
        ids: Tensor,
        class_grads: Tensor,
        coef: Tensor,
        tails: list[Tensor],
        grad: Tensor,
    ) -> None:
        """Writes the gradient: outside the support a token's share of the tail's, on the support its class's."""
        options, k = self.options, local.shape[1]
        on_support = logits[0].gather(1, local)
        slope = softcap_slope(capped_rows(on_support, options.softcap), options.softcap)
        if options.add_tail:
            masked = logits[0].scatter(1, local, -math.inf).unsqueeze(0)
            beyond = torch.where(ids == options.ignore_index, ids, self.group.shard)
            stats = torch.where(tails[0][:, :1] == -math.inf, 0.0, tails[0])
            upstream = -class_grads[:, k] * coef
            self._token_gradient(upstream, stats, masked, beyond, grad)
        else:
            grad.zero_()
        values = class_grads[:, :k] * (coef / options.temperature)[:, None] * slope
        values = torch.where((ids == options.ignore_index)[:, None], 0.0, values)
        grad[0].scatter_(1, local, values.to(grad.dtype))


def through_shard(
    hidden: Tensor, head: HeadGemms, call: LinearCall, needs: Needs, **teacher: Any
) -> tuple[ShardLoss, Gradients]:
    """`through_head` of one process's shard; the hidden states' gradient is the whole one."""
    loss = ShardLoss(call, head.vocabulary)
    grads = through_head(hidden, head, loss, call.plan, needs, columns=1, **teacher)
    if grads.hidden is not None:
        whole = loss.group.sum(grads.hidden.to(accumulation_dtype(grads.hidden)))
        grads = grads._replace(hidden=whole)
    return loss, grads
