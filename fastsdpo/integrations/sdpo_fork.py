"""The fork of verl by the authors of "Reinforcement Learning via Self-Distillation".

The fork (https://github.com/lasgroup/SDPO) computes the loss of https://arxiv.org/abs/2601.20802 in
``compute_self_distillation_loss``. This module has

- `compute_self_distillation_loss`: the same arguments and the same loss. Whole distributions may be logits as well
  as log-probs; one gradient of that size is allocated where the fork allocates five copies;
- `self_distillation_loss`: the same loss from hidden states and heads, or from logits and the response's tokens;
  it allocates nothing of vocabulary size but a gradient;
- `patch_sdpo_fork`: replaces the fork's function by the first one.

    loss = sum w_t r_t v_t l_t      r: clipped importance ratio, v: rollout correction, l: divergence

``loss_agg_mode`` chooses the weights w. m is the mask, n_i the number of tokens of sequence i that count, S the
number of sequences with such tokens, T the padded length:

    "token-mean"               w = m / max(1, sum n)
    "seq-mean-token-sum"       w = m / S
    "seq-mean-token-mean"      w = m / (n_i + 1e-8) / S
    "seq-mean-token-sum-norm"  w = m / T

Where no token counts the loss is 0; the fork's means over sequences are NaN there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsdpo.integrations._distillation import Objective, Targets, distillation_loss, targets_where
from fastsdpo.integrations.verl import import_verl
from fastsdpo.ops.bounded_tail import add_tail_class, class_gradients

if TYPE_CHECKING:
    from fastsdpo.prefix import HeadParameters

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def aggregation_weights(mask: Tensor, loss_agg_mode: str) -> Tensor:
    """``[B, T]`` float32 weights w of the module's table, from a ``[B, T]`` mask."""
    mask = mask.to(torch.float32)
    tokens = mask.sum(-1, keepdim=True)
    sequences = (tokens > 0).sum().clamp(min=1)
    if loss_agg_mode == "token-mean":
        return mask / tokens.sum().clamp(min=1.0)
    if loss_agg_mode == "seq-mean-token-sum":
        return mask / sequences
    if loss_agg_mode == "seq-mean-token-mean":
        return mask / (tokens + 1e-8) / sequences
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return mask / mask.shape[-1]
    raise ValueError(f"aggregation_weights: loss_agg_mode must be one of {AGGREGATIONS}, got {loss_agg_mode!r}")


def compute_self_distillation_loss(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    response_mask: Tensor,
    self_distillation_config: Any,
    old_log_probs: Tensor | None = None,
    student_all_log_probs: Tensor | None = None,
    teacher_all_log_probs: Tensor | None = None,
    student_topk_log_probs: Tensor | None = None,
    teacher_topk_log_probs: Tensor | None = None,
    self_distillation_mask: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Computes the loss of the fork's function from the same arguments.

    Args:
        student_log_probs, teacher_log_probs: ``[B, T]`` of the response's tokens.
        response_mask: ``[B, T]``, 1 where a token counts.
        self_distillation_config: attributes or keys ``full_logit_distillation``, ``alpha``, ``distillation_topk``,
            ``distillation_add_tail``, ``is_clip``. Those that decide the divergence have no default: the first,
            alpha if that is set, the tail if top-k is set.
        old_log_probs: ``[B, T]`` under the policy that wrote the response; needed with ``is_clip``.
        student_all_log_probs, teacher_all_log_probs: ``[B, T, V]`` log-probs *or logits* (over the
            temperature), for ``full_logit_distillation`` without top-k.
        student_topk_log_probs, teacher_topk_log_probs: ``[B, T, K]`` log-probs at the same tokens,
            for ``full_logit_distillation`` with ``distillation_topk``.
        self_distillation_mask: ``[B]``, 1 where the sequence has a teacher.
        loss_agg_mode: one of `AGGREGATIONS`.
        rollout_is_weights: ``[B, T]`` rollout correction.

    Returns:
        ``(loss, metrics)``: a scalar with the gradient of the student's tensors, and an empty dict.

    Raises:
        ValueError: a tensor or a setting that decides the loss is missing; an alpha other than 1 for
            the sampled-token loss; an unknown aggregation.
    """
    name = "compute_self_distillation_loss"
    objective = _objective(name, self_distillation_config)
    mask, weights = _weights(response_mask, self_distillation_mask, loss_agg_mode, rollout_is_weights)
    if objective.is_clip is not None:
        if old_log_probs is None:
            raise ValueError(f"{name}: old_log_probs must be given with is_clip, got None")
        ratio = (student_log_probs.detach() - old_log_probs).clamp(-20, 20).exp()
        weights = weights * torch.where(mask == 0, 0.0, ratio.clamp(max=objective.is_clip))
    if objective.mode == "sampled_token":
        return (weights * _sampled_token(student_log_probs, teacher_log_probs, weights)).sum(), {}
    kind, student, teacher = "all", student_all_log_probs, teacher_all_log_probs
    if objective.mode == "topk":
        kind, student, teacher = "topk", student_topk_log_probs, teacher_topk_log_probs
    if student is None or teacher is None:
        raise ValueError(
            f"{name}: student_{kind}_log_probs and teacher_{kind}_log_probs must be given for "
            f"distillation_topk={objective.topk}, got None"
        )
    if kind == "topk":
        per_token = _SupportDivergence.apply(student, teacher.detach(), objective.alpha, objective.add_tail)
        assert isinstance(per_token, Tensor)
        return _masked_sum(weights, per_token), {}
    # The ratio is in the weights already, and a divergence over the vocabulary does not read the ids.
    targets = Targets(targets_where(mask, mask.new_zeros(mask.shape, dtype=torch.int64)), weights)
    return distillation_loss(student, teacher, targets, Objective("full", objective.alpha)).loss, {}


def self_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    responses: Tensor,
    response_mask: Tensor,
    self_distillation_config: Any,
    *,
    head: HeadParameters | None = None,
    teacher_head: HeadParameters | None = None,
    temperature: float = 1.0,
    old_log_probs: Tensor | None = None,
    self_distillation_mask: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Computes the fork's loss from logits or hidden states, without forming log-probs first.

    Args:
        student, teacher: ``[B, T, V]`` logits, or with a head ``[B, T, D]`` hidden states, at the positions that
            predict the response.
        responses: ``[B, T]`` the response's tokens.
        head: `fastsdpo.prefix.HeadParameters` for hidden states, None for logits.
        teacher_head: the teacher's head; None is the student's.
        temperature: divides the logits of both.
        others: as `compute_self_distillation_loss`.

    Returns:
        ``(loss, metrics)``; the metrics are detached tensors: ``self_distillation/log_ratio_mean``
        (teacher's minus student's log-prob of a token that counts, in nats) and
        ``self_distillation/loss_per_token``.
    """
    name = "self_distillation_loss"
    objective = _objective(name, self_distillation_config)
    mask, weights = _weights(response_mask, self_distillation_mask, loss_agg_mode, rollout_is_weights)
    if objective.is_clip is None:
        old_log_probs = None
    elif old_log_probs is None:
        raise ValueError(f"{name}: old_log_probs must be given with is_clip, got None")
    out = distillation_loss(
        student,
        teacher,
        Targets(targets_where(mask, responses), weights, old_log_probs),
        objective._replace(temperature=temperature),
        head=head,
        teacher_head=teacher_head,
    )
    count = (mask != 0).sum().clamp(min=1)
    return out.loss, {
        "self_distillation/log_ratio_mean": out.log_ratio.sum() / count,
        "self_distillation/loss_per_token": out.per_token_loss.sum() / count,
    }


def _objective(name: str, config: Any) -> Objective:
    """Reads the fork's configuration."""

    def read(key: str, needed: bool = False) -> Any:
        given = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
        if needed and given is None:
            raise ValueError(f"{name}: self_distillation_config must have {key}, got none")
        return given

    full, topk = read("full_logit_distillation", needed=True), read("distillation_topk")
    mode = "sampled_token" if not full else "full" if topk is None else "topk"
    alpha = read("alpha", needed=bool(full))
    alpha = 1.0 if alpha is None else float(alpha)
    if mode == "sampled_token" and alpha != 1.0:
        raise ValueError(f"{name}: alpha must be 1.0 without full_logit_distillation, got {alpha}")
    is_topk = mode == "topk"
    add_tail = is_topk and bool(read("distillation_add_tail", needed=True))
    return Objective(mode, alpha, topk if is_topk else None, add_tail, read("is_clip"))


def _weights(
    response_mask: Tensor, self_distillation_mask: Tensor | None, loss_agg_mode: str, rollout_is_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    mask = response_mask
    if self_distillation_mask is not None:
        mask = mask * self_distillation_mask.unsqueeze(1)
    weights = aggregation_weights(mask, loss_agg_mode)
    if rollout_is_weights is not None:
        weights = weights * torch.where(mask == 0, 0.0, rollout_is_weights)
    return mask, weights


def _sampled_token(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """``stopgrad(s - t) s``; 0 without gradient where the mask is 0, whatever the values there."""
    student, teacher = (torch.where(mask == 0, 0.0, logps) for logps in (student, teacher))
    return (student - teacher).detach() * student


def _masked_sum(weights: Tensor, values: Tensor) -> Tensor:
    """The weighted sum; a token of weight 0 adds nothing to it and gets no gradient, whatever its value."""
    return (weights * torch.where(weights == 0, 0.0, values)).sum()


class _SupportDivergence(torch.autograd.Function):
    """Divergence ``[...]`` of log-probs ``[..., K]`` on a support, with a tail class or renormalized."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, alpha: float, add_tail: bool) -> Tensor:
        s, t = (x.flatten(0, -2).float() for x in (student, teacher))
        if add_tail:
            s, bounded = add_tail_class(s)
            t, _ = add_tail_class(t)
            loss, g = class_gradients(s, t, alpha)
            # d log(1 - P) / ds_j = -p_j / (1 - P), none at the bound
            through = torch.where(bounded, 0.0, g[:, -1:] / s[:, -1:].exp())
            grad = g[:, :-1] - s[:, :-1].exp() * through
        else:
            s, t = (x - x.logsumexp(-1, keepdim=True) for x in (s, t))
            loss, g = class_gradients(s, t, alpha)
            grad = g - s.exp() * g.sum(-1, keepdim=True)
        ctx.save_for_backward(grad)
        ctx.shape, ctx.dtype = student.shape, student.dtype
        return loss.view(student.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        (grad_loss,), (grad,) = upstream, ctx.saved_tensors
        grad = torch.where(grad_loss.reshape(-1, 1) == 0, 0.0, grad * grad_loss.reshape(-1, 1))
        return grad.view(ctx.shape).to(ctx.dtype), None, None, None


class SDPOForkPatch:
    """A patch of the fork that is on. `unpatch` takes it off, and so does leaving it as a context manager."""

    def __init__(self) -> None:
        needs = "patch_sdpo_fork needs the verl of https://github.com/lasgroup/SDPO"
        core = import_verl("verl.trainer.ppo.core_algos", needs)
        if not hasattr(core, "compute_self_distillation_loss"):
            raise ImportError(
                f"fastsdpo.integrations.sdpo_fork: {needs}; the verl that is installed has no "
                "compute_self_distillation_loss (see fastsdpo.integrations.verl for it)"
            )
        actor = import_verl("verl.workers.actor.dp_actor", needs)  # imports the function by name
        self._before = [
            (module, module.compute_self_distillation_loss)
            for module in (core, actor)
            if hasattr(module, "compute_self_distillation_loss")
        ]
        ours = tuple(inspect.signature(compute_self_distillation_loss).parameters)
        for module, function in self._before:
            theirs = tuple(inspect.signature(function).parameters)
            if theirs != ours:
                raise ImportError(
                    f"fastsdpo.integrations.sdpo_fork: {needs}; {module.__name__}."
                    f"compute_self_distillation_loss has the arguments ({', '.join(theirs)}), not "
                    f"({', '.join(ours)}): it may compute another loss, and is left as it is"
                )
        for module, _ in self._before:
            module.compute_self_distillation_loss = compute_self_distillation_loss

    def unpatch(self) -> None:
        for module, function in self._before:
            module.compute_self_distillation_loss = function
        self._before = []

    def __enter__(self) -> SDPOForkPatch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unpatch()


def patch_sdpo_fork() -> SDPOForkPatch:
    """Replaces the fork's function by `compute_self_distillation_loss`, for the process or for a ``with`` block.

    Raises:
        ImportError: verl is not installed, is not the fork, or is a version of the fork whose function has other
            arguments (some compute other divergences under the same settings).
    """
    return SDPOForkPatch()
