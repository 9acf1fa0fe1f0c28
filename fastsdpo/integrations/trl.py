"""TRL's `SDPOTrainer` and `DistillationTrainer` with fastsdpo's losses: the same numbers, no logits.

    from fastsdpo.integrations.trl import patch_trl
    patch_trl()                                  # or: with patch_trl(): ...

TRL's SDPO trainer forms the logits of student and teacher, divides both by the temperature and takes
log-softmaxes of both. Here the loss is formed inside the student's forward pass from hidden states, a
chunk of tokens at a time (``source="hidden"``), or from the logits in one pass over each
(``source="logits"``); ``"auto"`` takes hidden states where the model allows it and says where not.
TRL keeps the rest: generation, rewards, teachers and their updates, normalization, metrics.

What a patched trainer computes is TRL's, to float32 rounding, with these exceptions:
where TRL's value is NaN (a token of probability 0 under both policies; masked tokens whose logits are
not finite) it is the limit or 0; where the model runs in bfloat16 or float16, TRL rounds the logits to
it and this does not; and the collective that averages the metric runs also on a process without a
token to train on, which TRL skips, and then waits for ever.
"""

# The version is checked before anything of TRL is imported.
# ruff: noqa: E402
from __future__ import annotations

import inspect
import logging
import types
import warnings
from collections import defaultdict
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

NEEDED = "1.16.0"

try:
    import trl  # noqa: F401
    from packaging.version import Version
except ImportError as error:
    raise ImportError(
        f"fastsdpo.integrations.trl needs TRL >= {NEEDED}: pip install 'trl>={NEEDED}' ({error})"
    ) from error

if Version(version("trl")) < Version(NEEDED):
    raise ImportError(
        f"fastsdpo.integrations.trl needs TRL >= {NEEDED}, got {version('trl')}; pip install -U 'trl>={NEEDED}'"
    )

with warnings.catch_warnings():
    # Whoever imports this module has read that trl.experimental may change: the check below is for it.
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental.sdpo import SDPOTrainer

from accelerate.utils import is_peft_model
from trl.trainer import distillation_trainer as _distillation

from fastsdpo.integrations._distillation import (
    Head,
    PolicyGradient,
    distillation_loss,
    policy_gradient_loss,
    targets_where,
)
from fastsdpo.integrations.transformers import (
    gathered_head,
    is_partitioned,
    label_logps,
)
from fastsdpo.ops.linear import linear_sdpo_loss
from fastsdpo.ops.linear_token_logps import linear_token_logps
from fastsdpo.ops.token_logps import token_logps
from fastsdpo.prefix import (
    above_the_decoder,
    check_head,
    head_parameters,
    no_grad_pass,
    run_inside,
)
from fastsdpo.prefix.forward import causal_lm, unwrap

logger = logging.getLogger("fastsdpo.integrations.trl")

Source = Literal["auto", "hidden", "logits"]
SOURCES = ("auto", "hidden", "logits")
MODES = {"sampled_token": "sampled_token", "full_logits": "full", "topk_logits": "topk"}

# What is replaced, with the arguments that the replacement relies on.
_REPLACED = {
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "_forward_logits": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_compute_policy_loss": ("self", "inputs", "student_logits"),
    "_compute_self_distillation_loss": ("self", "model", "inputs", "distillation_logits"),
    "_compute_rollout_logps": (
        "self",
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
    ),
}
# What is used of TRL's private methods besides.
_USED = ("_get_teacher_context_for_self_distillation", "_log_self_distillation_metric")
_DIVERGENCE = (
    "student_hidden_states",
    "teacher_hidden_states",
    "student_lm_head_weight",
    "teacher_lm_head_weight",
    "completion_mask",
    "beta",
    "num_items_in_batch",
    "student_lm_head_bias",
    "teacher_lm_head_bias",
    "student_logit_scale",
    "teacher_logit_scale",
    "student_final_logit_softcapping",
    "teacher_final_logit_softcapping",
    "temperature",
)


def _check_trl() -> None:
    """TRL is at the version whose private methods are replaced, or they still look the same."""
    problems = [
        f"SDPOTrainer.{name}{inspect.signature(getattr(SDPOTrainer, name))}"
        if hasattr(SDPOTrainer, name)
        else f"SDPOTrainer.{name} is missing"
        for name, arguments in _REPLACED.items()
        if tuple(inspect.signature(getattr(SDPOTrainer, name, print)).parameters) != arguments
    ]
    problems += [f"SDPOTrainer.{name} is missing" for name in _USED if not hasattr(SDPOTrainer, name)]
    divergence = getattr(_distillation, "_chunked_divergence_loss", print)
    if tuple(inspect.signature(divergence).parameters) != _DIVERGENCE:
        problems.append("trl.trainer.distillation_trainer._chunked_divergence_loss")
    if problems:
        raise ImportError(
            f"fastsdpo.integrations.trl: TRL {version('trl')} differs from {NEEDED}, for which this "
            f"was written, in what is replaced: {'; '.join(problems)}. Install TRL {NEEDED} "
            "or a newer fastsdpo."
        )


_check_trl()
_TRL = {name: vars(SDPOTrainer)[name] for name in _REPLACED}
_TRL_DIVERGENCE = _distillation._chunked_divergence_loss


def _rebound(function: Any, **names: Any) -> Any:
    """``function`` with other values of some of its module's names; the module stays as it is."""
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


# TRL's own clipping and normalization, fed with log-probs in place of logits, or with logits and
# the fused kernel.
_policy_loss_from_logps = _rebound(_TRL["_compute_policy_loss"], selective_log_softmax=lambda logps, ids: logps)
_policy_loss_from_logits = _rebound(
    _TRL["_compute_policy_loss"], selective_log_softmax=lambda logits, ids: token_logps(logits, ids)
)


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


class FastSDPOTrainer(SDPOTrainer):
    """TRL's `SDPOTrainer` with fastsdpo's losses; arguments and numbers are TRL's.

    Args:
        source: "hidden" forms the loss from hidden states, without logits, or raises
            NotImplementedError; "logits" from logits; "auto" the first where it can be done, and
            otherwise the second, with a warning that says why.
        others: as `trl.experimental.sdpo.SDPOTrainer`.
    """

    fastsdpo_source: Source = "auto"

    def __init__(self, *args: Any, source: Source = "auto", **kwargs: Any):
        self.fastsdpo_source = _check_source("FastSDPOTrainer", source)
        super().__init__(*args, **kwargs)

    compute_loss = _compute_loss
    _forward_logits = _forward_logits
    _compute_policy_loss = _compute_policy_loss
    _compute_self_distillation_loss = _compute_self_distillation_loss
    _compute_rollout_logps = _compute_rollout_logps


# ---------------------------------------------------------------------------- DistillationTrainer


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """In place of TRL's function of this signature: ``(loss, entropy sum, tokens that count)``.

    5 GEMMs (student, teacher, the student's entropy, two gradients) instead of 6, or 8 for a
    Jensen-Shannon divergence. Softcaps that differ between the two models, and scales that are not
    positive, are left to TRL's function.
    """
    scales = (student_logit_scale, teacher_logit_scale)
    if student_final_logit_softcapping != teacher_final_logit_softcapping or min(scales) <= 0:
        return _TRL_DIVERGENCE(
            student_hidden_states,
            teacher_hidden_states,
            student_lm_head_weight,
            teacher_lm_head_weight,
            completion_mask,
            beta,
            num_items_in_batch,
            student_lm_head_bias,
            teacher_lm_head_bias,
            *scales,
            student_final_logit_softcapping,
            teacher_final_logit_softcapping,
            temperature,
        )
    valid = completion_mask.reshape(-1) != 0
    count = valid.sum()
    student = student_hidden_states.flatten(0, -2)[valid]
    teacher = teacher_hidden_states.flatten(0, -2)[valid]
    if num_items_in_batch is None:
        divisor = count.clamp(min=1)
    else:
        divisor = torch.as_tensor(num_items_in_batch, device=student.device)
    if teacher_logit_scale != student_logit_scale:
        # One scale serves both heads: the other goes into the teacher's hidden states and bias.
        ratio = teacher_logit_scale / student_logit_scale
        teacher = teacher * ratio
        if teacher_lm_head_bias is not None:
            teacher_lm_head_bias = teacher_lm_head_bias * ratio
    head = Head(
        student_lm_head_weight,
        student_lm_head_bias,
        student_final_logit_softcapping or None,
        student_logit_scale,
    )
    ids = count.new_zeros(len(student))
    parameters = (
        student_lm_head_weight,
        student_lm_head_bias,
        teacher_lm_head_weight,
        teacher_lm_head_bias,
    )
    with _gathered(*parameters):
        with torch.no_grad():
            _, entropy = linear_token_logps(
                student,
                head.weight,
                ids,
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                temperature=temperature,
                return_entropy=True,
            )
        out = linear_sdpo_loss(
            student,
            teacher,
            head.weight,
            ids,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            teacher_weight=teacher_lm_head_weight,
            teacher_bias=teacher_lm_head_bias,
            mode="full",
            alpha=beta,
            temperature=temperature,
            weights=(1.0 / divisor).to(torch.float32).expand(len(student)),
        )
    return out.loss, entropy.sum(), count


def _gathered(*parameters: Tensor | None) -> Any:
    """TRL's own gathering of ZeRO-3 parameters, where there are any."""
    if not any(hasattr(parameter, "ds_status") for parameter in parameters):
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


# ------------------------------------------------------------------------------------ the patching


class TRLPatch:
    """A patch that is on; `unpatch` or leaving it as a context manager takes it off."""

    def __init__(self, source: Source):
        self.source: Source = source

    def unpatch(self) -> None:
        """Restores TRL's own functions, unless another patch is still on. Twice is once."""
        if self in _patches:
            _patches.remove(self)
            _apply()

    def __enter__(self) -> TRLPatch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unpatch()


_MISSING = object()
_patches: list[TRLPatch] = []
_before: dict[tuple[Any, str], Any] = {}


def _apply() -> None:
    """Sets what the latest patch wants, or puts back what was there before the first one."""
    if not _patches:
        for (owner, name), value in _before.items():
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        _before.clear()
        return
    wanted = {(SDPOTrainer, name): value for name, value in _OURS.items()}
    wanted[SDPOTrainer, "fastsdpo_source"] = _patches[-1].source
    wanted[_distillation, "_chunked_divergence_loss"] = chunked_divergence_loss
    for (owner, name), value in wanted.items():
        _before.setdefault((owner, name), vars(owner).get(name, _MISSING))
        setattr(owner, name, value)


def _check_source(name: str, source: Any) -> Any:
    if source not in SOURCES:
        raise ValueError(f"{name}: source must be one of {SOURCES}, got {source!r}")
    return source


def patch_trl(source: Source = "auto") -> TRLPatch:
    """Makes every `SDPOTrainer` and `DistillationTrainer` of TRL use fastsdpo's losses.

    Trainers that exist already and subclasses included; a subclass that overrides a method which
    works on logits gets logits. Works as a function, for the rest of the process, and as a context
    manager; patches may overlap, and TRL is as it was when the last one is off.

    Args:
        source: as in `FastSDPOTrainer`, for SDPO. The DistillationTrainer has hidden states anyway.

    Returns:
        `TRLPatch`, with ``unpatch()``.
    """
    patch = TRLPatch(_check_source("patch_trl", source))
    _patches.append(patch)
    _apply()
    return patch


def unpatch_trl() -> None:
    """Takes every patch off; does nothing where none is on."""
    _patches.clear()
    _apply()
