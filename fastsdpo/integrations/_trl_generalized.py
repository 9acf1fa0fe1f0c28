"""TRL's GKD, GOLD, IW-OPD and server distillation trainers: their own code over logits that are never formed.

Each of these has a ``compute_loss`` that calls ``model(...).logits`` and takes log-softmaxes. Here it runs as it is,
inside the student's forward pass, on `HeadLogits` in place of logits; and ``generalized_jsd_loss`` is `adapt`'s.
"""

from __future__ import annotations

import importlib
import inspect
import types
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

from torch import nn

from fastsdpo.integrations._head_logits import HeadLogits
from fastsdpo.integrations._hidden_or_logits import uses_hidden_states, why_not_model
from fastsdpo.integrations._trl_originals import NEEDED
from fastsdpo.integrations._trl_sdpo import model_inputs
from fastsdpo.integrations.generalized_jsd import adapt
from fastsdpo.integrations.transformers import gathered_head
from fastsdpo.prefix import head_parameters, no_grad_pass, run_inside

COMPUTE_LOSS = ("self", "model", "inputs", "return_outputs", "num_items_in_batch")
# Trainers, and whether they have a `generalized_jsd_loss`.
TRAINERS = {
    "trl.experimental.gkd.gkd_trainer:GKDTrainer": True,
    "trl.experimental.gold.gold_trainer:GOLDTrainer": True,
    "trl.experimental.iw_opd.iw_opd_trainer:IWOPDTrainer": True,
    "trl.experimental.server_distillation.server_distillation_trainer:ServerDistillationTrainer": False,
}
# Methods that get logits or log-probs: a subclass that has its own may do with them what it likes.
_OF_LOGITS = ("generalized_jsd", "_compute_", "_get_teacher_logits", "_get_reverse_kl")


class Replacement(NamedTuple):
    """What `patch_trl` sets in a class or module."""

    owner: Any
    name: str
    value: Any


def replacements() -> list[Replacement]:
    """Of the trainers that the installed TRL can import.

    Raises:
        ImportError: a function that is replaced takes other arguments than expected.
    """
    found = []
    for place, has_jsd in TRAINERS.items():
        module, name = place.split(":")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
            trainer = getattr(importlib.import_module(module), name)
        if trainer not in _made:
            _made[trainer] = _make(trainer, has_jsd)
        found += _made[trainer]
    return found


_made: dict[Any, list[Replacement]] = {}


def _make(trainer: Any, has_jsd: bool) -> list[Replacement]:
    theirs = vars(trainer)["compute_loss"]
    arguments = tuple(inspect.signature(theirs).parameters)
    problem = None if arguments == COMPUTE_LOSS else f"{trainer.__name__}.compute_loss({', '.join(arguments)})"
    made = [Replacement(trainer, "compute_loss", _compute_loss(trainer, theirs))]
    if has_jsd and problem is None:
        try:
            ours = staticmethod(adapt(trainer.generalized_jsd_loss))
            made.append(Replacement(trainer, "generalized_jsd_loss", ours))
        except (AttributeError, TypeError) as error:
            problem = f"{trainer.__name__}.generalized_jsd_loss ({error})"
    if problem is not None:
        raise ImportError(
            f"fastsdpo.integrations.trl: TRL {version('trl')} differs from {NEEDED}, for which this was written, in "
            f"what is replaced: {problem}. Install TRL {NEEDED} or a newer fastsdpo."
        )
    return made


def _compute_loss(owner: Any, theirs: Callable[..., Any]) -> Callable[..., Any]:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def why_not(trainer: Any, model: nn.Module) -> str | None:
            return _why_not_hidden(owner, trainer, model)

        if return_outputs or not uses_hidden_states(self, model, why_not):
            return theirs(self, model, inputs, return_outputs, num_items_in_batch)
        return _from_hidden_states(theirs, self, model, inputs, num_items_in_batch)

    return compute_loss


def _why_not_hidden(owner: Any, trainer: Any, model: nn.Module) -> str | None:
    known = {name: (value,) for name, value in vars(owner).items() if name.startswith(_OF_LOGITS)}
    for name, values in known.items():
        if inspect.getattr_static(type(trainer), name) not in values:
            return f"{type(trainer).__name__} has its own {name}, which works on logits"
    if getattr(trainer, "use_uld_loss", False):
        return "use_uld_loss=True compares sorted probabilities of the whole vocabulary"
    if getattr(trainer, "_is_vlm", False):
        return "the model takes images"
    teacher = trainer.teacher_model
    reason = why_not_model(trainer, model, teacher)
    if reason is None and teacher is not None:
        with gathered_head(model, teacher):
            student, other = head_parameters(model), head_parameters(teacher)
        if student.softcap != other.softcap or min(student.logit_scale, other.logit_scale) <= 0:
            return "student and teacher have two softcaps, or a logit scale that is not positive"
    return reason


def _from_hidden_states(theirs: Callable[..., Any], trainer: Any, model: nn.Module, inputs: Any, items: Any) -> Any:
    """TRL's loss. The server's trainer has prompts and completions apart, the others sequences."""
    if "input_ids" in inputs:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    else:
        batch = (inputs[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask"))
        given = model_inputs(*batch)

    def body(hidden: Any) -> Any:
        with gathered_head(*(one for one in (model, trainer.teacher_model) if one is not None)):
            outputs = types.SimpleNamespace(logits=HeadLogits(hidden, head_parameters(model)))
            return theirs(_OnHiddenStates(trainer), lambda **_: outputs, inputs, False, items)

    return run_inside(model, body, {**given, "use_cache": False})


class _OnHiddenStates:
    """A trainer as its own methods see it here: its teacher gives `HeadLogits`."""

    def __init__(self, trainer: Any):
        vars(self)["_trainer"] = trainer

    def __getattr__(self, name: str) -> Any:
        trainer = vars(self)["_trainer"]
        found = inspect.getattr_static(type(trainer), name, None)
        if isinstance(found, types.FunctionType):
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
