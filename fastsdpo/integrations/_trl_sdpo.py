"""The methods of TRL's `SDPOTrainer` that are replaced: losses from hidden states, or from logits."""

from __future__ import annotations

import inspect
import logging
import types
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from fastsdpo.integrations._distillation import (
    PolicyGradient,
    distillation_loss,
    policy_gradient_loss,
    targets_where,
)
from fastsdpo.integrations._trl_originals import (
    _TRL,
    SDPOTrainer,
    _policy_loss_from_logits,
    _policy_loss_from_logps,
)
from fastsdpo.integrations.transformers import (
    gathered_head,
    is_partitioned,
    label_logps,
)
from fastsdpo.prefix import (
    above_the_decoder,
    check_head,
    head_parameters,
    no_grad_pass,
    run_inside,
)
from fastsdpo.prefix.forward import causal_lm, unwrap

logger = logging.getLogger("fastsdpo.integrations.trl")

MODES = {"sampled_token": "sampled_token", "full_logits": "full", "topk_logits": "topk"}


# ------------------------------------------------------------------------ which way, and why not


def _why_not_hidden(trainer: Any, model: nn.Module) -> str | None:
    """Why this trainer's loss cannot come from hidden states, or None."""
    for name, ours in _OURS.items():
        if inspect.getattr_static(type(trainer), name) not in (ours, _TRL[name]):
            return f"{type(trainer).__name__} has its own {name}, which works on logits"
    for name in ("_compute_teacher_student_logits", "_compute_server_distillation_loss"):
        if inspect.getattr_static(type(trainer), name) is not vars(SDPOTrainer)[name]:
            return f"{type(trainer).__name__} has its own {name}, which works on logits"
    if trainer.use_teacher_server:
        return "the teacher's log-probs come from a server (use_teacher_server=True)"
    if trainer.args.distillation_mode not in MODES:
        return f"distillation_mode={trainer.args.distillation_mode!r} is not known"
    if trainer.args.torch_compile or hasattr(model, "_orig_mod"):
        return "the model is compiled, and hooks on it would break its graph"
    reason = above_the_decoder(model)
    if reason is not None:
        return reason
    teacher = trainer.teacher_model
    separate = unwrap(teacher) is not unwrap(model)
    if separate and trainer.is_fsdp_enabled:
        return "FSDP frees the separate teacher's head after its forward pass"
    for checked, role in ((model, "model"), (teacher, "teacher"))[: 2 if separate else 1]:
        right, reason = _check_head(checked)
        if not right:
            return f"the {role}'s head: {reason}"
    return None


def _check_head(model: nn.Module) -> tuple[bool, str]:
    if is_partitioned(model):
        # DeepSpeed ZeRO-3: what the configuration says of the head; no pass of the whole model while
        # its head is gathered, as the head's own hooks would partition it below our feet.
        try:
            with gathered_head(model):
                head_parameters(model)
        except NotImplementedError as error:
            return False, str(error)
        return True, ""
    # With dropout a forward pass draws random numbers; the run's own draws must not move.
    devices = [p.device for p in unwrap(model).parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices), no_grad_pass():
        return check_head(model)


def _from_hidden(trainer: Any, model: nn.Module) -> bool:
    """Whether to take hidden states; asked of a model once."""
    source = trainer.fastsdpo_source
    if source == "logits":
        return False
    known = trainer.__dict__.setdefault("_fastsdpo_reasons", {})
    key = id(unwrap(model))
    if key not in known:
        known[key] = _why_not_hidden(trainer, model)
        if known[key] is None:
            logger.info("losses from hidden states")
        elif source == "auto":
            logger.warning("losses from logits, not from hidden states: %s", known[key])
    if known[key] is not None and source == "hidden":
        raise NotImplementedError(f"source must not be 'hidden' here: {known[key]}")
    return known[key] is None


# ----------------------------------------------------------------------------- from hidden states


class _Found(NamedTuple):
    """What comes out of the student's forward pass.

    Attributes:
        loss: distillation_weight times the distillation loss; its gradient is that of the whole loss.
        distillation_mean: the metric; None without a distillation loss.
        policy_logps: ``[B, T]`` detached, what the policy loss is computed from; None without one.
    """

    loss: Tensor
    distillation_mean: Tensor | None
    policy_logps: Tensor | None


def _compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    if return_outputs or not _from_hidden(self, model):
        return _TRL["compute_loss"](self, model, inputs, return_outputs, num_items_in_batch)
    found = _hidden_pass(self, model, inputs)
    loss = found.loss
    # After the forward pass: these gather metrics over the processes.
    if found.policy_logps is not None:
        policy = self._compute_policy_loss(inputs, _GivenLogps(found.policy_logps))
        loss = loss + (1 - self.args.distillation_weight) * policy
    if found.distillation_mean is not None:
        mode = "train" if model.training else "eval"
        mean = self.accelerator.gather(found.distillation_mean).mean().item()
        self._log_self_distillation_metric(mode, mean)
    return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)


def _hidden_pass(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> _Found:
    args, ids = trainer.args, inputs["completion_ids"]
    length = ids.size(1)
    mask = _loss_mask(inputs)

    def completion(hidden: Tensor) -> Tensor:
        return hidden[:, -length - 1 : -1]

    def body(hidden: Tensor) -> _Found:
        # In TRL's order, student then teacher, so that dropout draws as it does there.
        student, teacher, teacher_head = completion(hidden), None, None
        if args.distillation_weight > 0:
            teacher, teacher_head = _teacher_states(trainer, model, inputs, completion)
        separate = unwrap(trainer.teacher_model) is not unwrap(model)
        with gathered_head(model, *([trainer.teacher_model] if separate else [])):
            head = head_parameters(model)
            if teacher_head is not None and teacher_head.weight is head.weight:
                teacher_head = None
            device = head.weight.device
            student = student.to(device)
            logps = policy = None
            if args.distillation_weight < 1:
                logps, policy = _policy_terms(trainer, student, inputs, head)
                if teacher is None:
                    loss = policy_gradient_loss(student, head, policy, trainer.temperature)
                    return _Found(loss, None, logps)
            assert teacher is not None
            loss, mean = _distillation_terms(
                trainer,
                student,
                teacher.to(device),
                ids.to(device),
                mask.to(device),
                inputs.get("old_per_token_logps"),
                head,
                teacher_head,
                trainer.temperature,
                policy,
            )
        return _Found(loss, mean, logps)

    given = {
        "input_ids": torch.cat([inputs["prompt_ids"], ids], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "use_cache": False,
    }
    return run_inside(model, body, given)


def _policy_terms(trainer: Any, student: Tensor, inputs: dict[str, Any], head: Any) -> tuple[Tensor, PolicyGradient]:
    """Log-probs of the completion, and the gradient in them of ``(1 - w)`` times TRL's policy loss.

    On the batch's own policy (no old log-probs) the loss depends on differences that are 0, so the
    log-probs need not be known.
    """
    targets = targets_where(inputs["completion_mask"], inputs["completion_ids"])
    old_logps = inputs.get("old_per_token_logps")
    if old_logps is None:
        logps = torch.zeros(targets.shape, device=targets.device)
    else:
        with torch.no_grad():
            (logps,) = label_logps(student, head, targets, trainer.temperature)
        # Padding: a ratio of 1, which the mask then removes; its own ratio could be infinite.
        logps = torch.where(targets < 0, old_logps, logps.to(targets.device))
    with torch.enable_grad():
        leaf = logps.clone().requires_grad_()
        loss = _policy_loss_from_logps(_Quiet(trainer), inputs, leaf)
        (grad,) = torch.autograd.grad((1 - trainer.args.distillation_weight) * loss, leaf)
    return logps, PolicyGradient(targets.to(student.device), grad.to(student.device))


class _Quiet:
    """A trainer whose metrics go nowhere: TRL's policy loss gathers one over the processes."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.accelerator = types.SimpleNamespace(gather=lambda tensor: tensor)
        self._metrics = defaultdict(lambda: defaultdict(list))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _teacher_states(trainer: Any, model: nn.Module, inputs: dict[str, Any], completion: Any) -> tuple[Tensor, Any]:
    """The teacher's hidden states at the completion, and its head."""
    teacher = trainer.teacher_model
    given = {
        "input_ids": inputs["teacher_input_ids"],
        "attention_mask": inputs["teacher_attention_mask"],
        "use_cache": False,
    }
    with no_grad_pass(), trainer._get_teacher_context_for_self_distillation():
        if unwrap(teacher) is unwrap(model):  # inside its own forward pass: the decoder alone
            hidden = causal_lm(model).get_decoder()(**given).last_hidden_state
            return completion(hidden), _head_now(model)
        return run_inside(teacher, lambda hidden: (completion(hidden), head_parameters(teacher)), given)


def _head_now(model: nn.Module) -> Any:
    """The head under the adapters that are on now, None where there are none."""
    if not is_peft_model(unwrap(model)):
        return None
    with gathered_head(model):
        head = head_parameters(model)
        return head._replace(weight=head.weight.detach())


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    chosen = inputs.get("self_distillation_mask")
    return mask if chosen is None else mask * chosen.unsqueeze(1)


def _distillation_terms(
    trainer: Any,
    student: Tensor,
    teacher: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    old_logps: Tensor | None,
    head: Any,
    teacher_head: Any,
    temperature: float,
    policy: PolicyGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, a mean over tokens and then over *all* sequences, and the mean over tokens.

    With ``policy`` the loss is times distillation_weight, and its gradient the sum of both.
    """
    args = trainer.args
    mode = MODES.get(args.distillation_mode)
    if mode is None:
        raise ValueError(f"distillation_mode must be one of {', '.join(MODES)}, got {args.distillation_mode!r}")
    if mode == "topk" and args.distillation_topk is None:
        raise ValueError("distillation_topk must be set for distillation_mode='topk_logits'")
    mask = mask.to(torch.float32)
    tokens = mask.sum(-1, keepdim=True).clamp(min=1.0)
    clip = args.distillation_is_clip
    old_logps = None if clip is None or old_logps is None else old_logps.to(mask.device)
    out = distillation_loss(
        student,
        teacher,
        targets_where(mask, completion_ids),
        head=head,
        teacher_head=teacher_head,
        mode=mode,
        alpha=args.distillation_alpha,
        topk=args.distillation_topk if mode == "topk" else None,
        add_tail=args.distillation_add_tail,
        weights=mask / tokens / mask.shape[0] * (1.0 if policy is None else args.distillation_weight),
        old_logps=old_logps,
        is_clip=clip,
        temperature=temperature,
        policy=policy,
    )
    per_token = out.per_token_loss
    if old_logps is not None:
        ratio = (out.student_logps - old_logps).clamp(-20, 20).exp().clamp(max=clip)
        per_token = per_token * torch.where(mask == 0, 0.0, ratio)
    return out.loss, (per_token * mask).sum() / mask.sum().clamp(min=1.0)


class _GivenLogps:
    """Log-probs of the completion, where TRL's method takes logits."""

    def __init__(self, logps: Tensor):
        self.logps = logps


def _compute_policy_loss(self, inputs, student_logits):
    if isinstance(student_logits, _GivenLogps):
        return _policy_loss_from_logps(self, inputs, student_logits.logps)
    return _policy_loss_from_logits(self, inputs, student_logits)


def _compute_rollout_logps(self, prompt_ids, prompt_mask, completion_ids, completion_mask):
    every = self.args.steps_per_generation * self.num_iterations
    if self.args.gradient_accumulation_steps % every == 0 or not _from_hidden(self, self.model):
        return _TRL["_compute_rollout_logps"](self, prompt_ids, prompt_mask, completion_ids, completion_mask)
    length = completion_ids.size(1)

    def body(hidden: Tensor) -> Tensor:
        with gathered_head(self.model):
            head = head_parameters(self.model)
            return label_logps(hidden[:, -length - 1 : -1], head, completion_ids, self.temperature)[0]

    with torch.no_grad():
        given = {
            "input_ids": torch.cat([prompt_ids, completion_ids], dim=1),
            "attention_mask": torch.cat([prompt_mask, completion_mask], dim=1),
            "use_cache": False,
        }
        return run_inside(self.model, body, given)


# ------------------------------------------------------------------------------------ from logits


def _forward_logits(self, model, input_ids, attention_mask, logits_to_keep):
    """TRL's, without its copy where the temperature is 1."""
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "logits_to_keep" in self.model_kwarg_keys:
        given["logits_to_keep"] = logits_to_keep + 1
    logits = model(**given).logits[:, -logits_to_keep - 1 : -1]
    return logits if self.temperature == 1.0 else logits / self.temperature


def _compute_self_distillation_loss(self, model, inputs, distillation_logits):
    given = distillation_logits
    loss, mean = _distillation_terms(
        self,
        given.student_logits,
        given.teacher_logits,
        given.completion_ids,
        given.loss_mask,
        inputs.get("old_per_token_logps"),
        None,
        None,
        1.0,
    )
    mode = "train" if model.training else "eval"
    self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
    return loss


_OURS = {
    "compute_loss": _compute_loss,
    "_forward_logits": _forward_logits,
    "_compute_policy_loss": _compute_policy_loss,
    "_compute_self_distillation_loss": _compute_self_distillation_loss,
    "_compute_rollout_logps": _compute_rollout_logps,
}
