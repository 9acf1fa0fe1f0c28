"""Losses and gradients that are not finite: found before the optimizer's step, with the interactions' ids.

Nor does the optimizer take a step on nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastsdpo.data import TokenizedInteraction
from fastsdpo.trainer.processes import gather_list

if TYPE_CHECKING:
    from fastsdpo.trainer.step_trainer import StepTrainer

logger = logging.getLogger("fastsdpo.trainer")


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the text names the interactions."""

    exit_status = 3  # of a command


class FiniteCheck(TrainerCallback):
    """Before each optimizer step: stops the run, or drops the gradients so that the step changes nothing.

    It changes nothing either where no token of the global batch counts (nobody reacted): the weights would move by
    the steps before it and by the weight decay. (Under DeepSpeed and fp16 they do.)

    Attributes:
        items: S or N of the current step, over all processes; None: not counted.
        passes: of the current step, the interactions of each pass and ``[interactions]`` their losses.
        skipped: how many steps changed nothing (``non_finite="skip"``).
    """

    def __init__(self, trainer: StepTrainer):
        self.trainer = trainer
        self.passes: list[tuple[list[TokenizedInteraction], Tensor]] = []
        self.skipped = 0
        self.items: Tensor | None = None

    def add(self, pack: Sequence[TokenizedInteraction], sequence_loss: Tensor) -> None:
        """A pass of the current step."""
        self.passes.append((list(pack), sequence_loss))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passes = []

    def before_backward(self) -> None:
        """The check of the losses where a backward pass takes the step as well (DeepSpeed).

        Raises:
            NonFiniteError: one is not finite; the weights are as before the step.
        """
        if self.trainer.accelerator.sync_gradients and not self._all_finite():
            self._stop(self.trainer.args, self.trainer.state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            self._check_taken_step(args, state)
        elif not self._all_finite():
            self._stop(args, state)
        elif self.items is not None and int(self.items) == 0 and not args.fp16:
            self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self.trainer.model.parameters():
            parameter.grad = None

    def _check_taken_step(self, args: Any, state: Any) -> None:
        """DeepSpeed has taken the step by now; a loss scaler (fp16) leaves out what overflows by itself."""
        norm = self.trainer.accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
        if args.fp16 or norm is None or math.isfinite(norm):
            return
        raise NonFiniteError(
            f"SDPOTrainer: step {state.global_step + 1}: the gradient is not finite, and DeepSpeed has changed the "
            "weights with it; --resume goes on from the last checkpoint"
        )

    def _stop(self, args: Any, state: Any) -> None:
        """Stops the run, or with ``non_finite="skip"`` drops the gradients."""
        what, offenders = self._find_offenders()
        if args.world_size > 1:
            found = gather_list([(what, offenders)])
            certain = [names for what, names in found if what == "the loss"]
            what = "the loss" if certain else "the gradient"
            chosen = certain or [names for _, names in found]
            offenders = list(dict.fromkeys(name for names in chosen for name in names))  # processes may share packs
        names = ", ".join(offenders[:10]) + (", ..." if len(offenders) > 10 else "")
        message = f"step {state.global_step + 1}: {what} is not finite; interactions: {names}"
        if args.non_finite == "stop":
            place = self.trainer.save_before_stop()
            raise NonFiniteError(f"SDPOTrainer: {message}. Set non_finite='skip' to leave such steps out. {place}")
        logger.warning("skipped %s", message)
        self.skipped += 1
        self._drop_gradients()

    def _all_finite(self) -> bool:
        """Of all processes; one wait for the device."""
        args = self.trainer.args
        grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        local = [getattr(g, "_local_tensor", g) for g in grads]
        checked = [losses.isfinite().all() for _, losses in self.passes]
        if local and not args.fp16:  # a loss scaler sees to overflowing gradients itself
            checked.append(torch.stack(torch._foreach_norm(local)).isfinite().all())
        if not checked:
            checked.append(torch.ones((), dtype=torch.bool, device=args.device))
        bad: Any = 1.0 - torch.stack([c.to(args.device) for c in checked]).all().float()
        if args.world_size > 1:
            bad = self.trainer.accelerator.reduce(bad, "sum")
        return float(bad) == 0

    def _find_offenders(self) -> tuple[str, list[str]]:
        """What is not finite in this process's step: ("the loss" or "the gradient", interactions)."""
        losses = [(item, float(value)) for pack, values in self.passes for item, value in zip(pack, values.tolist())]
        bad = [_name(item) for item, value in losses if not math.isfinite(value)]
        if bad:
            return "the loss", bad
        everyone = [_name(item) for item, _ in losses]
        if self.trainer.args.world_size > 1:  # the processes' gradients are summed by now
            return "the gradient", everyone
        return "the gradient", self._with_bad_gradients([item for item, _ in losses]) or everyone

    def _with_bad_gradients(self, interactions: list[TokenizedInteraction]) -> list[str]:
        """One interaction at a time shows whose gradient is not finite."""
        model, bad = self.trainer.model, []
        kept = [(p, p.grad) for p in model.parameters()]
        for item in interactions:
            model.zero_grad()
            loss, _ = self.trainer.run_pass(model, [item], self.trainer.learner.count([item]))
            loss.backward()
            grads = [p.grad for p, _ in kept if p.grad is not None]
            if not torch.stack(torch._foreach_norm(grads)).isfinite().all():
                bad.append(_name(item))
        for parameter, grad in kept:
            parameter.grad = grad
        return bad


def _name(item: TokenizedInteraction) -> str:
    return repr(item.id) if item.id is not None else f"one of {len(item.completion_ids)} tokens"
