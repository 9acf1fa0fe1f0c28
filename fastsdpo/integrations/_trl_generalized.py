"""TRL's `GKDTrainer`, `GOLDTrainer`, `IWOPDTrainer`, `ServerDistillationTrainer`: their code, logits never formed.

The first three compare student and teacher over the whole vocabulary (a generalized Jensen-Shannon divergence), over
a top-k, or weigh log-probs of the tokens that were written (IW-OPD); the last has candidates of a server as its
teacher. All of them do so in ``compute_loss``, which calls ``model(...).logits``. Two functions are replaced:

    compute_loss            runs as it is, inside the student's forward pass, on `HeadLogits` in the place of logits:
                            they are computed for the tokens, and summed over the vocabulary, when it asks for them
    generalized_jsd_loss    `adapt`'s, of the first three: `sdpo_loss` over logits, `divergence` over `HeadLogits`

Generation, requests, buffers and metrics remain TRL's. Where hidden states will not do (`_why_not_hidden`), and for an
evaluation that returns outputs, ``compute_loss`` is TRL's own over logits.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastsdpo.integrations._head_logits import HeadLogits
from fastsdpo.integrations._hidden_or_logits import uses_hidden_states, why_not_model
from fastsdpo.integrations._trl_installed import Replacement, differs, trl_module
from fastsdpo.integrations.generalized_jsd import adapt
from fastsdpo.integrations.transformers import gathered_head
from fastsdpo.prefix import causal_lm, head_parameters, no_grad_pass, run_inside

TRAINERS = (
    trl_module("experimental.gkd.gkd_trainer").GKDTrainer,
    trl_module("experimental.gold.gold_trainer").GOLDTrainer,
    trl_module("experimental.iw_opd.iw_opd_trainer").IWOPDTrainer,
    trl_module("experimental.server_distillation.server_distillation_trainer").ServerDistillationTrainer,
)
# Methods that get logits or log-probs: a subclass that has its own may do with them what it likes.
_OF_LOGITS = ("generalized_jsd", "_compute_", "_get_teacher_logits", "_get_reverse_kl")


def _compute_loss(owner: Any, theirs: Callable[..., Any]) -> Callable[..., Any]:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def why_not(trainer: Any, model: nn.Module) -> str | None:
            return _why_not_hidden(owner, trainer, model)

        if return_outputs or not uses_hidden_states(self, model, why_not):
            return theirs(self, model, inputs, return_outputs, num_items_in_batch)
        return _from_hidden_states(theirs, self, model, inputs, num_items_in_batch)

    return compute_loss


def _why_not_hidden(owner: Any, trainer: Any, model: nn.Module) -> str | None:
    for name, known in vars(owner).items():
        if name.startswith(_OF_LOGITS) and inspect.getattr_static(trainer, name) is not known:
            return f"{type(trainer).__name__} has its own {name}, which works on logits"
    if getattr(trainer, "use_uld_loss", False):
        return "use_uld_loss=True compares sorted probabilities of the whole vocabulary"
    if getattr(trainer, "_is_vlm", False):
        return "the model takes images"
    teacher = trainer.teacher_model
    if teacher is not None and causal_lm(teacher) is causal_lm(model):
        return "the teacher is the model that is trained, which cannot run inside its own forward pass"
    reason = why_not_model(trainer, model, teacher)
    if reason is None and teacher is not None:
        with gathered_head(model, teacher):
            if head_parameters(model).softcap != head_parameters(teacher).softcap:
                return "student and teacher have two softcaps"
    return reason


def _from_hidden_states(theirs: Callable[..., Any], trainer: Any, model: nn.Module, inputs: Any, items: Any) -> Any:
    """TRL's loss. The server's trainer has prompts and completions apart, the others sequences."""
    if "input_ids" in inputs:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if hasattr(trainer, "_get_model_forward_kwargs"):  # GOLD hands on what else a collator gives
            given |= trainer._get_model_forward_kwargs(inputs)
    else:
        parts = {"input_ids": ("prompt_ids", "completion_ids"), "attention_mask": ("prompt_mask", "completion_mask")}
        given = {name: torch.cat([inputs[part] for part in pair], dim=1) for name, pair in parts.items()}

    def body(hidden: Any) -> Any:
        with gathered_head(*(one for one in (model, trainer.teacher_model) if one is not None)):
            outputs = types.SimpleNamespace(logits=HeadLogits(hidden, head_parameters(model)))
            return theirs(_OnHiddenStates(trainer), lambda **_: outputs, inputs, False, items)

    return run_inside(model, body, {**given, "use_cache": False})


class _OnHiddenStates:
    """A trainer as its own methods see it here: its teacher gives `HeadLogits`."""

    def __init__(self, trainer: Any):
        vars(self)["_trainer"] = trainer

    @property
    def __class__(self) -> Any:  # so that a subclass's ``super()`` works
        return type(vars(self)["_trainer"])

    def __getattr__(self, name: str) -> Any:
        trainer = vars(self)["_trainer"]
        found = inspect.getattr_static(type(trainer), name, None)
        if isinstance(found, types.FunctionType) and name not in vars(trainer):
            return types.MethodType(found, self)
        if name == "teacher_model" and trainer.teacher_model is not None:
            return _HiddenTeacher(trainer.teacher_model)
        return getattr(trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_trainer"], name, value)


class _HiddenTeacher:
    """A teacher whose outputs' logits are `HeadLogits`."""

    def __init__(self, model: nn.Module):
        self._model = model

    def eval(self) -> None:
        self._model.eval()

    def __call__(self, **given: Any) -> Any:
        def body(hidden: Any) -> Any:
            return hidden, head_parameters(self._model)

        with no_grad_pass():
            hidden, head = run_inside(self._model, body, {**given, "use_cache": False})
        return types.SimpleNamespace(logits=HeadLogits(hidden.detach(), head._replace(weight=head.weight.detach())))


def _replacements(trainer: Any) -> Iterator[Replacement]:
    yield Replacement(trainer, "compute_loss", _compute_loss(trainer, vars(trainer)["compute_loss"]))
    if trainer.__name__ != "ServerDistillationTrainer":
        try:
            yield Replacement(trainer, "generalized_jsd_loss", staticmethod(adapt(trainer.generalized_jsd_loss)))
        except (AttributeError, TypeError) as error:
            raise differs(f"{trainer.__name__}.generalized_jsd_loss ({error})") from error


REPLACEMENTS = [found for trainer in TRAINERS for found in _replacements(trainer)]
