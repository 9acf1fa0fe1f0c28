"""TRL's `SDPOTrainer` and `SDFTTrainer`: their losses from hidden states, or in one pass over the logits.

Student and teacher read the same completions, the teacher behind more context. The distillation loss is a divergence
of each token (``distillation_mode``: sampled token, whole vocabulary, or the student's top-k), its mean over a
sequence, and then over the B sequences. SDPO mixes in a policy loss of rewards:

    loss = distillation_weight * distillation + (1 - distillation_weight) * policy

The methods of `FastSDPOTrainer` replace those of TRL's classes that have the same name:

    compute_loss                      one forward pass of the student, in which the loss is formed (`_HiddenPass`);
                                      or TRL's own, over logits, which calls the next three
    _forward_logits                   TRL's, without its copy of the logits where the temperature is 1
    _compute_self_distillation_loss   one pass over the logits of both
    _compute_policy_loss              TRL's, with the fused log-probs; SDFT has none
    _compute_rollout_logps            log-probs of a generated batch, from hidden states

Generation, rewards, teachers and their updates, normalization and metrics remain TRL's. `_why_not_hidden` and
`why_not_model` say when hidden states will not do.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from fastsdpo.integrations._distillation import (
    Objective,
    PolicyGradient,
    Targets,
    distillation_loss,
    policy_gradient_loss,
    targets_where,
)
from fastsdpo.integrations._hidden_or_logits import Source, check_source, uses_hidden_states, why_not_model
from fastsdpo.integrations._trl_installed import Replacement, trl_module
from fastsdpo.integrations.transformers import fused_logps, gathered_head, label_logps
from fastsdpo.ops.token_logps import token_logps
from fastsdpo.prefix import (
    HeadParameters,
    before_head,
    causal_lm,
    decoder_of,
    head_parameters,
    no_grad_pass,
    run_inside,
    unwrap,
)

MODES = {"sampled_token": "sampled_token", "full_logits": "full", "topk_logits": "topk"}
SDPOTrainer: Any = trl_module("experimental.sdpo").SDPOTrainer
SDFTTrainer: Any = trl_module("experimental.sdft").SDFTTrainer


class FastSDPOTrainer(SDPOTrainer):
    """TRL's `SDPOTrainer` with fastsdpo's losses; arguments and numbers are TRL's.

    Args:
        source: "hidden" forms the loss from hidden states, without logits, or raises NotImplementedError;
            "logits" forms it from logits; "auto" takes hidden states where it can and otherwise logits, with a
            warning that says why.
        others: as `trl.experimental.sdpo.SDPOTrainer`.
    """

    # The methods below also replace those of `SDPOTrainer` itself (`patch_trl`): no `super()` in them.

    fastsdpo_source: Source = "auto"

    def __init__(self, *args: Any, source: Source = "auto", **kwargs: Any):
        self.fastsdpo_source = check_source("FastSDPOTrainer", source)
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not uses_hidden_states(self, model, _why_not_hidden):
            return _THEIRS[_owner(self)]["compute_loss"](self, model, inputs, return_outputs, num_items_in_batch)
        student = _HiddenPass(self, model, inputs)
        loss = student.run()
        # After the forward pass: these gather metrics over the processes.
        if student.policy_logps is not None:
            loss = loss + (1 - student.weight) * _policy_loss(self, inputs, student.policy_logps)
        if student.distillation_mean is not None:
            _log_distillation(self, model, student.distillation_mean)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    def _forward_logits(self, model, input_ids, attention_mask, logits_to_keep):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if "logits_to_keep" in self.model_kwarg_keys:
            given["logits_to_keep"] = logits_to_keep + 1
        logits = model(**given).logits[:, -logits_to_keep - 1 : -1]
        return logits if self.temperature == 1.0 else logits / self.temperature

    def _compute_self_distillation_loss(self, model, inputs, distillation_logits):
        loss, mean = _distillation(
            self.args,
            distillation_logits.student_logits,
            distillation_logits.teacher_logits,
            distillation_logits.completion_ids,
            distillation_logits.loss_mask,
            inputs.get("old_per_token_logps"),
            temperature=1.0,  # TRL has divided the logits by it
        )
        _log_distillation(self, model, mean)
        return loss

    def _compute_policy_loss(self, inputs, student_logits):
        return _policy_loss(self, inputs, student_logits, token_logps)

    def _compute_rollout_logps(self, prompt_ids, prompt_mask, completion_ids, completion_mask):
        generate_every = self.args.steps_per_generation * self.num_iterations
        not_needed = self.args.gradient_accumulation_steps % generate_every == 0
        if not_needed or not uses_hidden_states(self, self.model, _why_not_hidden):
            theirs: Any = _THEIRS[_owner(self)]["_compute_rollout_logps"]
            return theirs(self, prompt_ids, prompt_mask, completion_ids, completion_mask)

        ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
        labels = torch.cat([torch.full_like(prompt_ids, -100), completion_ids], 1)
        with torch.no_grad():
            logps: Any = fused_logps(self.model, ids, mask, labels, temperature=self.temperature)
        return logps[:, prompt_ids.size(1) :]


_COMMON = ("compute_loss", "_forward_logits", "_compute_self_distillation_loss", "_compute_rollout_logps")
_REPLACED = {SDPOTrainer: (*_COMMON, "_compute_policy_loss"), SDFTTrainer: _COMMON}
_THEIRS = {owner: {name: vars(owner).get(name) for name in names} for owner, names in _REPLACED.items()}
REPLACEMENTS = [
    Replacement(owner, name, vars(FastSDPOTrainer)[name]) for owner, names in _REPLACED.items() for name in names
]
# Other methods of TRL that hidden states leave out, or of which they take TRL's meaning for granted.
_ASSUMED = (
    "_compute_teacher_student_logits",
    "_compute_server_distillation_loss",
    "_get_teacher_context_for_self_distillation",
)


def _owner(trainer: Any) -> Any:
    return SDFTTrainer if isinstance(trainer, SDFTTrainer) else SDPOTrainer


def _why_not_hidden(trainer: Any, model: nn.Module) -> str | None:
    """Why this trainer's loss cannot come from hidden states; None where it can."""
    owner = _owner(trainer)
    for name in (*_REPLACED[owner], *_ASSUMED):
        if inspect.getattr_static(trainer, name) not in (vars(owner)[name], vars(FastSDPOTrainer).get(name)):
            return f"{type(trainer).__name__} has its own {name}, which works on logits"
    if trainer.use_teacher_server:
        return "the teacher's log-probs come from a server (use_teacher_server=True)"
    return why_not_model(trainer, model, trainer.teacher_model)


def _policy_loss(
    trainer: Any, inputs: Any, logps: Tensor, log_softmax: Callable[..., Tensor] = lambda logps, ids: logps
) -> Tensor:
    """TRL's policy loss, with its clipping and normalization: of log-probs ``[B, T]``, or logits and their softmax."""
    theirs: Any = _THEIRS[SDPOTrainer]["_compute_policy_loss"]
    names = {**theirs.__globals__, "selective_log_softmax": log_softmax}
    return types.FunctionType(theirs.__code__, names)(trainer, inputs, logps)


def _log_distillation(trainer: Any, model: nn.Module, mean: Tensor) -> None:
    """Logs TRL's metric, averaged over the processes."""
    value = trainer.accelerator.gather(mean).mean().item()
    trainer._log_self_distillation_metric("train" if model.training else "eval", value)


def _distillation(
    args: Any,
    student: Tensor,
    teacher: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    old_logps: Tensor | None,
    temperature: float,
    weight: float = 1.0,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """TRL's loss, a mean over the tokens of a sequence and then over all B sequences; and its metric, over all tokens.

    ``student`` and ``teacher`` are logits ``[B, T, V]``, or with a ``head`` hidden states ``[B, T, D]``. The mask
    ``[B, T]`` is 1 where a token counts. ``weight`` multiplies the loss alone; ``more`` goes to `distillation_loss`.
    """
    mode = MODES.get(args.distillation_mode)
    if mode is None:
        raise ValueError(f"distillation_mode must be one of {', '.join(MODES)}, got {args.distillation_mode!r}")
    topk, clip = args.distillation_topk if mode == "topk" else None, args.distillation_is_clip
    if mode == "topk" and topk is None:
        raise ValueError("distillation_topk must be set for distillation_mode='topk_logits'")
    objective = Objective(mode, args.distillation_alpha, topk, args.distillation_add_tail, clip, temperature)
    mask = mask.to(torch.float32)
    weights = weight * mask / mask.sum(-1, keepdim=True).clamp(min=1.0) / len(mask)
    old_logps = None if clip is None or old_logps is None else old_logps.to(mask.device)
    targets = Targets(targets_where(mask, completion_ids), weights, old_logps)
    out = distillation_loss(student, teacher, targets, objective, **more)
    per_token = out.per_token_loss
    if old_logps is not None:
        ratio = (out.student_logps - old_logps).clamp(-20, 20).exp().clamp(max=clip)
        per_token = per_token * torch.where(mask == 0, 0.0, ratio)
    return out.loss, (per_token * mask).sum() / mask.sum().clamp(min=1.0)


class _HiddenPass:
    """The losses of one batch, formed inside the student's forward pass.

    Attributes, after `run`:
        distillation_mean: TRL's metric; None without a distillation loss.
        policy_logps: ``[B, T]`` detached log-probs for TRL's policy loss; None without one.
    """

    distillation_mean: Tensor | None = None
    policy_logps: Tensor | None = None

    def __init__(self, trainer: Any, model: nn.Module, inputs: dict[str, Any]):
        self.trainer, self.model, self.inputs = trainer, model, inputs
        self.weight = getattr(trainer.args, "distillation_weight", 1.0)  # SDFT has no policy loss

    def run(self) -> Tensor:
        """distillation_weight times the distillation loss, with the gradient of the whole loss."""
        pairs = [[self.inputs[f"{part}_{of}"] for part in ("prompt", "completion")] for of in ("ids", "mask")]
        ids, mask = (torch.cat(pair, 1) for pair in pairs)
        return run_inside(self.model, self._loss, {"input_ids": ids, "attention_mask": mask, "use_cache": False})

    def _loss(self, hidden: Tensor) -> Tensor:
        inputs, temperature = self.inputs, self.trainer.temperature
        # Student before teacher, as in TRL: dropout then draws the same numbers.
        teacher, teacher_head = self._teacher() if self.weight > 0 else (None, None)
        with gathered_head(self.model, self.trainer.teacher_model):
            head = head_parameters(self.model)
            device = head.weight.device
            student = self._at(hidden).to(device)
            policy = self._policy_gradient(student, head) if self.weight < 1 else None
            if teacher is None:
                assert policy is not None
                return policy_gradient_loss(student, head, policy, temperature)
            loss, self.distillation_mean = _distillation(
                self.trainer.args,
                student,
                teacher.to(device),
                inputs["completion_ids"].to(device),
                self._mask().to(device),
                inputs.get("old_per_token_logps"),
                temperature,
                self.weight,
                head=head,
                teacher_head=teacher_head,
                policy=policy,
            )
        return loss

    def _at(self, hidden: Tensor) -> Tensor:
        return hidden[:, -self.inputs["completion_ids"].size(1) - 1 : -1]

    def _mask(self) -> Tensor:
        """``[B, T]``, 1 where a token is distilled: SDPO leaves sequences out, SDFT their first tokens."""
        mask, chosen = self.inputs["completion_mask"], self.inputs.get("self_distillation_mask")
        if chosen is not None:
            mask = mask * chosen.unsqueeze(1)
        skipped = getattr(self.trainer, "num_loss_tokens_to_skip", 0)
        return mask * (torch.arange(mask.shape[1], device=mask.device) >= skipped)

    def _teacher(self) -> tuple[Tensor, HeadParameters | None]:
        """The teacher's hidden states at the completion, and its head; None is the student's."""
        model, teacher = self.model, self.trainer.teacher_model
        ids, mask = self.inputs["teacher_input_ids"], self.inputs["teacher_attention_mask"]
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with no_grad_pass(), self.trainer._get_teacher_context_for_self_distillation():
            if unwrap(teacher) is not unwrap(model):
                return run_inside(teacher, lambda states: (self._at(states), head_parameters(teacher)), given)
            # This is inside the model's own forward pass, so only its decoder is called.
            states = before_head(model)(decoder_of(causal_lm(model))(**given).last_hidden_state)
            if not is_peft_model(unwrap(model)):
                return self._at(states), None
            with gathered_head(model):  # the head under the teacher's adapters
                head = head_parameters(model)
                return self._at(states), head._replace(weight=head.weight.detach())

    def _policy_gradient(self, student: Tensor, head: HeadParameters) -> PolicyGradient:
        """The gradient of ``(1 - distillation_weight)`` times TRL's loss, in the log-probs of the completion.

        Without old log-probs the batch is the policy's own. The loss then depends on differences of log-probs that
        are 0, so zeros stand for the log-probs.
        """
        targets = targets_where(self.inputs["completion_mask"], self.inputs["completion_ids"])
        old_logps = self.inputs.get("old_per_token_logps")
        if old_logps is None:
            logps = torch.zeros(targets.shape, device=targets.device)
        else:
            with torch.no_grad():
                (logps,) = label_logps(student, head, targets, self.trainer.temperature)
            # Padding gets the ratio 1, and the mask removes it. Its own ratio could be infinite.
            logps = torch.where(targets < 0, old_logps, logps.to(targets.device))
        self.policy_logps = logps
        quiet = copy.copy(self.trainer)  # TRL's function gathers a metric over the processes
        quiet.accelerator = types.SimpleNamespace(gather=lambda tensor: tensor)
        quiet._metrics = defaultdict(lambda: defaultdict(list))
        with torch.enable_grad():
            leaf = logps.clone().requires_grad_()
            loss = _policy_loss(quiet, self.inputs, leaf)
            (grad,) = torch.autograd.grad((1 - self.weight) * loss, leaf)
        return PolicyGradient(targets.to(student.device), grad.to(student.device))
