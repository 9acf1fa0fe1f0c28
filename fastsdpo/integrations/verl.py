"""Losses for verl's registry (https://github.com/verl-project/verl), with a teacher behind verl's servers.

`register_distillation_loss` registers one of two losses:

    sampled token    `sampled_token_for_verl`: verl has the log-probs of student and teacher, this is a formula over
                     them. Nothing of verl is replaced.
    top-k            a divergence over the K tokens that the server scores, and a class for the rest. verl's
                     `compute_topk_loss`, which calls one fixed loss, is replaced.

The path of the second through verl, for a micro-batch of B sequences with N tokens:

    forward pass -> logits [1, N, V] -> logits processor -> values [1, N] -> loss function -> values [B, T] -> weights

The logits processor is `divergences` here, the loss function `divergence_for_verl`. The weights are known last, so
that the gradient is formed in the backward pass (`_PerToken`).

`verl_self_teacher`, where the actor is its own teacher, uses the functions without an underscore.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops.checks import check_alpha
from fastsdpo.ops.divergence import SDPOLossOutput, sdpo_loss

LOSS_NAME = "fastsdpo_sampled_token"
TESTED = "0.9."  # the versions of verl whose functions may be replaced


def import_verl(module: str, needs: str) -> Any:
    """A module of verl; where there is none an ImportError that says what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{needs}, which cannot be imported: {error}") from error


class Divergence(NamedTuple):
    """Arguments of `fastsdpo.sdpo_loss`."""

    mode: str
    alpha: float
    topk: int | None = None
    add_tail: bool = True


_OF_NAME: dict[str, Divergence] = {}  # the divergences that are registered


def register_distillation_loss(
    name: str = LOSS_NAME,
    *,
    mode: Literal["sampled_token", "topk"] = "sampled_token",
    alpha: float = 1.0,
    add_tail: bool = True,
) -> None:
    """Registers a loss in verl's registry: ``distillation.distillation_loss.loss_mode=NAME`` then trains with it.

    Call this in every process that reads the configuration.

    ``"sampled_token"`` has the gradient ``(log p_S - log p_T) * grad log p_S`` per token of the answer. Its
    expectation over the student's answers is the gradient of the reverse KL. With ``use_policy_gradient=False`` verl
    backpropagates it. With True it takes the value ``log p_S - log p_T`` as a penalty in its clipped policy loss, as
    for its own ``k1``. ``loss_max_clamp`` bounds ``|log p_S - log p_T|`` of a token in both cases.

    ``"topk"`` is a divergence over the ``topk`` tokens that the server scores: with ``add_tail`` one more class holds
    the rest of each distribution, else both are renormalized. It needs ``use_policy_gradient=False``, and
    ``loss_max_clamp`` takes the gradient from a token whose divergence is larger, as verl does for its own.

    Args:
        name: of the loss, new in verl's registry.
        alpha: of ``"topk"``: 0 forward KL, 1 reverse KL, between Jensen-Shannon.

    Raises:
        ImportError: verl is not installed or has no such registry; for ``"topk"``, a version that is not `TESTED`.
        ValueError: the name is taken (verl's own error); another mode, as servers score K tokens only.
    """
    losses = import_verl(
        "verl.trainer.distillation.losses",
        "register_distillation_loss needs a verl with verl.trainer.distillation (0.8 or newer)",
    )
    if mode not in ("sampled_token", "topk"):
        raise ValueError(
            "register_distillation_loss: mode must be 'sampled_token' or 'topk' (a server scores K tokens; "
            f"use_self_teacher has the whole vocabulary), got {mode!r}"
        )
    check_alpha("register_distillation_loss", alpha)
    if mode == "sampled_token":
        settings = losses.DistillationLossSettings(names=[name], use_estimator=True)
        losses.register_distillation_loss(settings)(sampled_token_for_verl)
        return
    check_version("register_distillation_loss(mode='topk')")
    settings = losses.DistillationLossSettings(names=[name], use_topk=True)
    losses.register_distillation_loss(settings)(divergence_for_verl)
    _OF_NAME[name] = Divergence("topk", alpha, add_tail=add_tail)
    theirs = losses.compute_topk_loss
    if hasattr(theirs, "of_fastsdpo"):
        return  # another loss was registered before

    def compute_topk_loss(config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str):
        if distillation_config.distillation_loss.loss_mode not in _OF_NAME:
            return theirs(config, distillation_config, data, student_logits, data_format)
        return _of_server(distillation_config.distillation_loss, data, student_logits)

    compute_topk_loss.of_fastsdpo = True  # type: ignore[attr-defined]
    losses.compute_topk_loss = compute_topk_loss


def _of_server(settings: Any, data: Any, student_logits: Tensor) -> dict[str, Tensor]:
    """The logits processor's values of a loss with the server's tokens and log-probs ``[N, K]`` as the teacher."""
    check_supervised(settings)
    rows, counts = answer_rows(data)
    rows = rows[counts]
    teacher = tuple(data[key].values()[rows] for key in ("teacher_ids", "teacher_logprobs"))
    teacher = teacher[0].to(torch.int64), teacher[1].float()
    return divergences(_OF_NAME[settings.loss_mode], student_logits, data, rows, {"teacher_topk": teacher})


# -------------------------------------------------------------------------------------------- inside logits processors


class _PerToken(torch.autograd.Function):
    """Divergences ``[N]`` of logits ``[N, V]``, whose weights in a loss are known in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss_of: Callable[[Tensor, Tensor], SDPOLossOutput]) -> Any:
        out = loss_of(logits, logits.new_ones(len(logits)))
        ctx.save_for_backward(logits)
        ctx.loss_of = loss_of
        ctx.mark_non_differentiable(out.log_ratio)
        return out.per_token_loss, out.log_ratio

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        with torch.enable_grad():
            logits = ctx.saved_tensors[0].detach().requires_grad_()
            return *torch.autograd.grad(ctx.loss_of(logits, upstream[0]).loss, logits), None


def divergences(
    divergence: Divergence, student_logits: Tensor, data: Any, rows: Tensor, teacher: dict[str, Any]
) -> dict[str, Tensor]:
    """Values ``[1, N]`` of a logits processor; ``rows`` of the N count, and the teacher has those only."""
    ids, total = row_targets(student_logits, data, rows)
    given: dict[str, Any] = {"teacher_logits": None, **teacher, **divergence._asdict()}
    if "teacher_topk" in teacher:
        given["topk"] = None

    def loss_of(logits: Tensor, weights: Tensor) -> SDPOLossOutput:
        return sdpo_loss(logits, target_ids=ids, weights=weights, **given)

    values, log_ratio = _PerToken.apply(student_logits[0, rows], loss_of)  # type: ignore[reportGeneralTypeIssues]
    found = {"distillation_losses": values, "distillation_counts": torch.ones_like(values)}
    if "teacher_logits" in teacher:  # outside of a server's top-k the ratio is not known
        found["distillation_log_ratio"] = log_ratio
    return {key: value.new_zeros(total).index_put((rows,), value)[None] for key, value in found.items()}


def row_targets(student_logits: Tensor, data: Any, rows: Tensor) -> tuple[Tensor, int]:
    """The tokens that ``rows`` predict, and N."""
    ids = data["input_ids"].values()
    if student_logits.shape[:2] != (1, len(ids)):
        raise NotImplementedError(
            f"fastsdpo.integrations.verl: the logits must be those of the whole micro-batch, [1, {len(ids)}, V], got "
            f"{list(student_logits.shape)}: sequence parallelism and padding of packed sequences are not supported"
        )
    return ids[rows + 1], len(ids)


def answer_rows(data: Any) -> tuple[Tensor, Tensor]:
    """``[B, T]`` each: the row of the packed logits that predicts a token of an answer, and whether that counts."""
    padding = importlib.import_module("verl.workers.utils.padding")
    ids = data["input_ids"].values()
    rows = padding.no_padding_2_padding(torch.arange(len(ids), device=ids.device), data)
    counts = padded(data["response_mask"]).bool() if "response_mask" in data else torch.ones_like(rows).bool()
    return rows, counts


# ---------------------------------------------------------------------------------------- the loss functions of verl


def divergence_for_verl(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The per-token losses ``[B, T]`` and metrics that verl's registry expects, from the logits processor's values."""
    settings = distillation_config.distillation_loss
    check_supervised(settings)
    bound = _bound(settings)
    padding = importlib.import_module("verl.workers.utils.padding")
    found = {
        key: padding.no_padding_2_padding(value, data)
        for key, value in model_output.items()
        if key.startswith("distillation_")
    }
    values, counts = found["distillation_losses"], found["distillation_counts"]
    rollout = data.get("rollout_is_weights", None)
    if rollout is not None:
        values = values * torch.where(counts == 1, padded(rollout), 0.0)
    metrics = {"distillation/teacher_fraction": _token_mean(counts, data)}
    if "distillation_log_ratio" in found:
        metrics["distillation/log_ratio_mean"] = _token_mean(found["distillation_log_ratio"], data)
    if bound is not None:
        metrics["distillation/clamped_fraction"] = _token_mean((values.detach() > bound).float(), data)
    return values, metrics


def sampled_token_for_verl(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The per-token losses ``[B, T]`` and metrics that verl's registry expects; verl aggregates the losses.

    verl either takes ``-value`` as the advantage of a policy loss (``use_policy_gradient``) or backpropagates.
    Value and gradient therefore differ: the value is g = log p_S - log p_T, the gradient w g grad log p_S, with the
    rollout correction w. verl itself multiplies by w in the policy loss only.
    """
    bound = _bound(distillation_config.distillation_loss)
    padding = import_verl("verl.workers.utils.padding", "the registered loss needs verl")
    mask = padded(data["response_mask"]).bool()
    metrics = {}
    if "distillation_counts" in model_output:  # of `verl_self_teacher`
        student, teacher, counts = (
            padding.no_padding_2_padding(model_output[f"distillation_{key}"], data)
            for key in ("student", "teacher", "counts")
        )
        mask = mask & (counts == 1)
        metrics["distillation/teacher_fraction"] = _token_mean(counts, data)
    else:
        student = padding.no_padding_2_padding(model_output["log_probs"], data)
        teacher = padding.no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    for key, logps in (("log_probs", student), ("teacher_logprobs", teacher)):
        if logps.shape != mask.shape:
            raise ValueError(
                f"{LOSS_NAME}: {key} must have one log-prob per token of response_mask "
                f"{tuple(mask.shape)}, got {tuple(logps.shape)}"
            )
    # verl reports the largest loss and a mean, so padding must be finite.
    student = torch.where(mask, student, 0.0)
    gap = (student - torch.where(mask, teacher, 0.0)).detach()
    # Bounded here, so that verl's own clamp of the value changes neither the value nor its gradient.
    value = gap if bound is None else gap.clamp(-bound, bound)
    rollout = data.get("rollout_is_weights", None)
    weight = value if rollout is None else value * torch.where(mask, padded(rollout), 0.0)
    per_token = value + weight * (student - student.detach())
    return per_token, {**metrics, "distillation/log_ratio_mean": _token_mean(-gap, data)}


def _token_mean(values: Tensor, data: Any) -> Any:
    """A metric per token of the global batch: a sum over micro-batches and a mean over replicas, as verl's losses."""
    metric = importlib.import_module("verl.utils.metric")
    tokens = data["batch_num_tokens"] or max(1, int(padded(data["response_mask"]).sum()))
    return metric.Metric("sum", values.sum() / tokens * data["dp_size"])


def _bound(settings: Any) -> float | None:
    bound = settings.loss_max_clamp
    if bound is not None and not bound > 0:
        raise ValueError(
            f"{settings.loss_mode}: distillation.distillation_loss.loss_max_clamp must be null or above 0, got "
            f"{bound}: it bounds the loss of a token, and nothing would be learned"
        )
    return bound


def check_supervised(settings: Any) -> None:
    if settings.use_policy_gradient:
        raise ValueError(
            f"{settings.loss_mode}: distillation.distillation_loss.use_policy_gradient must be False for a divergence "
            "(verl would take it for the reward of one token), got True"
        )


def check_version(what: str) -> None:
    version = import_verl("verl", f"{what} needs verl").__version__
    if not version.startswith(TESTED):
        raise ImportError(
            f"{what} replaces functions of verl and was tested with verl {TESTED}*, got {version}; "
            "register_distillation_loss() works without replacing any"
        )


def padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor
