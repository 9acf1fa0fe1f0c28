"""ms-swift's GKD trainer with fastsdpo's losses.

    from fastsdpo.integrations.swift import patch_swift
    patch_swift()                     # in a file that `swift rlhf --external_plugins FILE` loads

ms-swift forms the logits of student and teacher over the completion, takes log-softmaxes of both, of their mixture,
and two divergences. Two of its functions are replaced (`SwiftPatch`):

    GKDTrainer.compute_loss    the loss is formed inside the student's forward pass, from hidden states of the tokens
                               that count (`_from_hidden_states`); with ``sft_alpha`` the cross entropy comes from the
                               same products of the head. Where hidden states will not do, a warning says why
                               (`_why_not_hidden`), and ms-swift's own runs, which calls
    gkd_loss                   one pass over the logits

Both end in `divergence`. Covered: a teacher of its own, the student itself (OPSD, ``disable_adapter``), a teacher
behind a server, ``beta`` (0 is KL(teacher || student), 1 KL(student || teacher)), ``temperature``,
``gkd_logits_topk``, ``sft_alpha``. Data, generation, teachers and normalization are ms-swift's.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsdpo.integrations._head_logits import HeadLogits as HeadLogits
from fastsdpo.integrations._head_logits import teacher_arguments
from fastsdpo.integrations._hidden_or_logits import Source, check_source, uses_hidden_states, why_not_model
from fastsdpo.integrations.transformers import gathered_head
from fastsdpo.ops.divergence import sdpo_loss
from fastsdpo.ops.linear import linear_sdpo_loss
from fastsdpo.prefix import head_parameters, no_grad_pass, run_inside

PLACE = "swift.rlhf_trainers.gkd_trainer"
# What is replaced, with its arguments.
REPLACED = {
    "GKDTrainer.compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "gkd_loss": ["student_logits", "teacher_output", "labels", "beta", "temperature"],
}


class GKDSettings(NamedTuple):
    """Settings of ms-swift: ``beta``, ``temperature``, and the weight of the cross entropy beside the divergence."""

    beta: float
    temperature: float
    sft_alpha: float = 0.0


def divergence(
    student: Tensor | HeadLogits,
    teacher: Tensor | HeadLogits | None,
    topk: tuple[Tensor, Tensor] | None,
    objective: GKDSettings,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(loss, number)``: the mean over the tokens that count, and their number.

    Args:
        student: logits ``[N, V]``, or what stands for them.
        teacher: the same of the teacher, where there is no ``topk``.
        topk: ids and logits or log-probs ``[N, K]``, over which both are normalized. A token without any is left out.
        labels: ``[N]``, of the cross entropy; its mean is over those that are not -100.
    """
    given: dict[str, Any] = {"mode": "full", "alpha": float(objective.beta), "temperature": objective.temperature}
    counts = torch.ones(student.shape[:1], dtype=torch.bool, device=student.device)
    if topk is not None:
        ids, values = topk
        counts = (values > -torch.inf).any(-1)
        values = (
            torch.where(counts[:, None], values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)
            / objective.temperature
        )
        ids = torch.where(counts[:, None], ids, torch.arange(ids.shape[-1], device=ids.device))
        given |= {"mode": "topk", "add_tail": False, "teacher_topk": (ids, values.log_softmax(-1))}
        teacher = None
    number = counts.sum()
    given["weights"] = counts / number.clamp(min=1).to(torch.float32)
    targets = torch.zeros_like(counts, dtype=torch.int64)
    if not isinstance(student, HeadLogits):
        return sdpo_loss(student, teacher, targets, **given).loss, number
    if labels is not None and objective.sft_alpha:
        has_label = labels != -100
        targets = labels.clamp(min=0)
        given["ce_weights"] = objective.sft_alpha * has_label / has_label.sum().clamp(min=1).to(torch.float32)
    head, hidden = student.head, None
    if isinstance(teacher, HeadLogits):
        hidden, arguments = teacher_arguments(head, teacher.hidden, teacher.head)
        given |= arguments
    return linear_sdpo_loss(student.hidden, hidden, target_ids=targets, **head._asdict(), **given).loss, number


def _from_hidden_states(trainer: Any, model: nn.Module, inputs: Any) -> Tensor:
    """ms-swift's loss of a batch: the teacher's pass, then the student's with the loss in it."""
    given, taught, batch = inputs["model_inputs"], inputs["teacher_model_inputs"], inputs["gkd_batch"]
    labels, taught_labels = (torch.roll(one["labels"], -1, dims=1) for one in (given, taught))
    counts, taught_counts = labels != -100, taught_labels != -100
    if counts.sum() != taught_counts.sum():
        raise ValueError(
            "GKDTrainer: student and teacher must share the tokens of the response, got "
            f"{int(counts.sum())} and {int(taught_counts.sum())}"
        )
    teacher, support = None, None
    holder = model if trainer.teacher_model is None else trainer.teacher_model
    if trainer.use_teacher_api:
        support = batch.teacher_topk_indices[taught_counts], batch.teacher_topk_logprobs[taught_counts]
    else:
        with no_grad_pass(), _adapter_off(trainer, model):
            teacher = run_inside(holder, lambda hidden: _kept(holder, hidden[taught_counts]), _forward_inputs(taught))
    sampled = getattr(batch.data_source, "value", None) == "student"
    objective = GKDSettings(trainer.beta, trainer.temperature, 0.0 if sampled else trainer.args.sft_alpha)
    labels[:, -1] = -100  # the first label of the sequence, which the model's own cross entropy does not have

    def body(hidden: Tensor) -> Tensor:
        with gathered_head(model, holder):
            topk = support
            if teacher is not None and trainer.gkd_logits_topk is not None:
                topk = teacher.topk_logits(trainer.gkd_logits_topk)
            student = HeadLogits(hidden[counts], head_parameters(model))
            return divergence(student, teacher, topk, objective, labels[counts])[0]

    return run_inside(model, body, _forward_inputs(given))


def _adapter_off(trainer: Any, model: nn.Module) -> AbstractContextManager[Any]:
    if trainer._is_self_distillation and trainer._teacher_use_disable_adapter:
        return trainer.accelerator.unwrap_model(model).disable_adapter()
    return nullcontext()


def _kept(holder: nn.Module, hidden: Tensor) -> HeadLogits:
    """The teacher's hidden states with the head that it has now: an adapter may be off."""
    with gathered_head(holder):
        head = head_parameters(holder)
        return HeadLogits(hidden, head._replace(weight=head.weight.detach()))


def _forward_inputs(inputs: Any) -> dict[str, Any]:
    return {**{name: value for name, value in inputs.items() if name != "labels"}, "use_cache": False}


def _why_not_hidden(trainer: Any, model: nn.Module) -> str | None:
    if trainer.use_liger_gkd_loss:
        return "use_liger_kernel=True has a loss of its own"
    if trainer.template.sequence_parallel_size > 1:
        return "sequence_parallel_size is above 1"
    teacher = trainer.teacher_model
    if teacher is not None and trainer.args.offload_teacher_model:
        return "offload_teacher_model=True moves the teacher's head away after its forward pass"
    reason = why_not_model(trainer, model, teacher)
    if reason is None and teacher is not None:
        with gathered_head(model, teacher):
            student, other = head_parameters(model), head_parameters(teacher)
        if len(student.weight) != len(other.weight):
            return f"student and teacher have {len(student.weight)} and {len(other.weight)} tokens"
        if student.softcap != other.softcap:
            return "student and teacher have two softcaps"
    return reason


def _gkd_loss(theirs: Any) -> Any:
    def gkd_loss(student_logits, teacher_output, labels, beta, temperature, *primitives, **named):
        """ms-swift's, in one pass over the logits; with primitives of a tensor-parallel model its own runs."""
        full = teacher_output.full_logits
        other_size = full is not None and full.shape[-1] != student_logits.shape[-1]
        if primitives or named or (other_size and not teacher_output.is_topk_mode):
            return theirs(student_logits, teacher_output, labels, beta, temperature, *primitives, **named)
        teacher_output.validate()
        counts = labels != -100
        taught = teacher_output.select(counts if teacher_output.labels is None else teacher_output.labels != -100)
        topk = (taught.topk_indices, taught.topk_logprobs) if taught.is_topk_mode else None
        objective = GKDSettings(beta, temperature)
        loss, number = divergence(student_logits[counts], taught.full_logits, topk, objective)
        return loss * number.clamp(min=1), number

    return gkd_loss


def _compute_loss(theirs: Any) -> Any:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not uses_hidden_states(self, model, _why_not_hidden):
            return theirs(self, model, inputs, return_outputs, num_items_in_batch)
        return _from_hidden_states(self, model, inputs)

    return compute_loss


class SwiftPatch:
    """A patch that is on. `unpatch` takes it off, and so does leaving it as a context manager."""

    def __init__(self, module: Any, source: Source):
        trainer = module.GKDTrainer
        self._before = [(module, "gkd_loss", module.gkd_loss), (trainer, "compute_loss", trainer.compute_loss)]
        self._trainer = trainer
        trainer.fastsdpo_source = source
        module.gkd_loss = _gkd_loss(module.gkd_loss)
        trainer.compute_loss = _compute_loss(trainer.compute_loss)

    def unpatch(self) -> None:
        """Restores ms-swift's own functions; a second call does nothing."""
        for owner, name, value in self._before:
            setattr(owner, name, value)
        if self._before:
            del self._trainer.fastsdpo_source
        self._before = []

    def __enter__(self) -> SwiftPatch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unpatch()


def patch_swift(source: Source = "auto") -> SwiftPatch:
    """Makes ms-swift's GKD trainer use fastsdpo's losses, in this process.

    Args:
        source: "hidden" forms the loss from hidden states, without logits, or raises NotImplementedError in the first
            step; "logits" forms it from logits; "auto" takes hidden states where it can.

    Returns:
        `SwiftPatch`, with ``unpatch()``; also a context manager.

    Raises:
        ImportError: ms-swift is not installed, or what is replaced takes other arguments.
        RuntimeError: it is patched already.
    """
    check_source("patch_swift", source)
    module = importlib.import_module(PLACE)
    if hasattr(module.GKDTrainer, "fastsdpo_source"):
        raise RuntimeError("patch_swift: the trainer is patched already; call unpatch() of that patch first")
    for name, wanted in REPLACED.items():
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        arguments = [] if found is None else list(inspect.signature(found).parameters)
        if arguments[: len(wanted)] != wanted:
            raise ImportError(
                f"patch_swift: ms-swift {version('ms-swift')} differs from 4.6, for which this was written: "
                f"{PLACE}.{name} must take ({', '.join(wanted)}), got ({', '.join(arguments)})"
            )
    return SwiftPatch(module, source)
