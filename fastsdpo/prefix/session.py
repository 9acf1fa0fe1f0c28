"""One forward call of a model over a pack: the student's pass, the teacher's pass and the loss in it.

The model is called as the caller wrapped it, so the hooks of DDP, FSDP, PEFT, Accelerate, autocast and
gradient checkpointing run. FSDP and ZeRO hold the head's parameters gathered only inside the head's own
forward call. That is why a session takes one callback: it runs in place of the head, and asks the session for
the hidden states it needs. No logit is formed; the result of the callback is returned in place of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from fastsdpo.prefix.attention import Kept, check_backend
from fastsdpo.prefix.model import no_grad_pass
from fastsdpo.prefix.passes import DecoderPass, PassRunner, sequence_pass
from fastsdpo.prefix.plan import (
    InteractionIds,
    Plan,
    ResponseLabels,
    Sharing,
    build_plan,
    check_interactions,
    check_sharing_level,
    response_labels,
)
from fastsdpo.prefix.refusals import above_the_decoder

Result = TypeVar("Result")


class ForwardSession:
    """One forward call of ``model`` over a pack of interactions.

        def step(session):
            student, teacher, labels = session.student(), session.teacher(), session.labels
            head = head_parameters(model)
            return linear_sdpo_loss(student, teacher, head.weight, labels.target_ids).loss

        loss = ForwardSession(model, interactions).run(step)

    The student's pass runs first, in the call of the model itself. The live teacher's pass reads the keys, values
    and states that the student's pass leaves, which are freed right after it. Another teacher's pass runs before
    the student's, whose activations stay in memory until the backward pass.

    Args:
        model, interactions, teacher_model, teacher_context, sharing, attention: as `shared_forward`.

    Raises:
        ValueError, NotImplementedError: as `shared_forward`.
    """

    def __init__(
        self,
        model: nn.Module,
        interactions: Sequence[InteractionIds],
        *,
        teacher_model: nn.Module | None = None,
        teacher_context: Callable[[], AbstractContextManager] | None = None,
        sharing: Sharing = "conversation",
        attention: str = "auto",
    ):
        name = "shared_forward"
        check_interactions(name, interactions)
        check_sharing_level(name, sharing)
        check_backend(attention)
        if teacher_model is not None and teacher_context is not None:
            raise ValueError(f"{name}: teacher_model and teacher_context must not both be given")
        for checked in (model, teacher_model):
            reason = None if checked is None else above_the_decoder(checked)
            if reason is not None:
                raise NotImplementedError(f"{name}: the model is not supported: {reason}")

        self._interactions = interactions
        self._runner = PassRunner(model, attention)
        self._teacher_runner = self._runner if teacher_model is None else PassRunner(teacher_model, attention)
        self._teacher_context = teacher_context or nullcontext
        self._live = (teacher_model is None or teacher_model is model) and teacher_context is None
        self._plan: Plan | None = None
        self._student_passes: list[DecoderPass] = []
        self._teacher_passes: list[DecoderPass] = []  # empty where the live teacher reads the student's pass
        if sharing == "off":
            self._student_passes = [sequence_pass(i.prompt_ids, i.completion_ids) for i in interactions]
            self._teacher_passes = [sequence_pass(i.teacher_prompt_ids, i.completion_ids) for i in interactions]
        else:
            self._plan_passes(sharing)

        self._used = False
        self._hidden: Tensor | None = None
        self._kept: Kept | None = None
        self._student_rows: Tensor | None = None
        self._teacher_rows: Tensor | None = None

    def _plan_passes(self, sharing: Sharing) -> None:
        assert sharing != "off"
        plan = build_plan(self._interactions, sharing=sharing, teachers=self._live)
        self._runner.prepare_to_share(plan)
        keep = plan.teacher_tokens > 0  # the live teacher reads them
        self._student_passes = [
            self._runner.plan_pass(plan, 0, plan.student_tokens, plan.student_rows, keep=keep),
        ]
        self._plan = plan
        if not self._live:
            other = build_plan(self._interactions, sharing=sharing, students=False)
            self._teacher_runner.prepare_to_share(other)
            self._teacher_passes = [self._teacher_runner.plan_pass(other, 0, other.tokens, other.teacher_rows)]

    def run(self, body: Callable[[ForwardSession], Result]) -> Result:
        """What ``body(session)`` returns, called in place of the head. A session runs once.

        Args:
            body: may call `student`, `teacher`, `labels` and `head_parameters`. DDP and FSDP look for the
                tensors to differentiate in its result: a tensor or a tuple.

        Raises:
            RuntimeError: the session has run before.
            NotImplementedError: the model does not call its head, or a layer does not call the attention.
        """
        if self._used:
            raise RuntimeError("ForwardSession: run must be called once, got a second call")
        self._used = True
        if not self._live:
            runner, passes = self._teacher_runner, self._teacher_passes
            with no_grad_pass(), self._teacher_context():
                self._teacher_rows = runner.run_first(passes[0], partial(runner.rows, passes))
        try:
            return self._runner.run_first(self._student_passes[0], partial(self._in_place_of_head, body))
        finally:
            self._hidden = self._kept = self._student_rows = self._teacher_rows = None

    def _in_place_of_head(self, body: Callable[[ForwardSession], Result], hidden: Tensor) -> Result:
        self._hidden = hidden
        shared = self._student_passes[0].shared
        if shared is not None:  # also where no teacher reads them: layers that run again must keep nothing
            self._kept = shared.take_kept()
        return body(self)

    def student(self) -> Tensor:
        """The student's rows ``[N, D]`` after the final norm, with gradient; the same tensor at every call."""
        if self._student_rows is None:
            self._student_rows = self._runner.rows(self._student_passes, self._first_hidden())
        return self._student_rows

    def teacher(self) -> Tensor:
        """The teacher's rows ``[N, D]`` after the final norm, no gradient; the same tensor at every call."""
        hidden = self._first_hidden()
        if self._teacher_rows is None:
            if self._plan is not None:
                with no_grad_pass():
                    self._teacher_rows = self._live_teacher(self._plan, hidden.detach())
            elif all(list(i.teacher_prompt_ids) == list(i.prompt_ids) for i in self._interactions):
                self._teacher_rows = self.student().detach()  # the same sequences through the same model
            else:
                with no_grad_pass():
                    self._teacher_rows = self._runner.rows(self._teacher_passes)
        return self._teacher_rows

    @property
    def labels(self) -> ResponseLabels:
        """What the rows predict, on the device of the hidden states."""
        return response_labels(self._interactions, self._first_hidden().device)

    def _first_hidden(self) -> Tensor:
        if self._hidden is None:
            raise RuntimeError("ForwardSession: student, teacher and labels must be called in the body of run")
        return self._hidden

    def _live_teacher(self, plan: Plan, student_hidden: Tensor) -> Tensor:
        """The live teacher's rows.

        Where a teacher prompt equals the student's, the teacher's tokens are the student's: such rows are
        read from the student's hidden states ``[T, D]``, and the teacher's pass holds all others.
        """
        device, middle = student_hidden.device, plan.student_tokens
        if plan.teacher_tokens == 0:
            return student_hidden[plan.teacher_rows.to(device)]
        in_student = plan.teacher_rows < middle
        rows = plan.teacher_rows - middle
        teacher_pass = self._runner.plan_pass(plan, middle, plan.tokens, rows, before=self._kept)
        hidden = self._runner.run(teacher_pass)
        self._kept = None
        if not bool(in_student.any()):
            return hidden[rows.to(device)]
        states = hidden.new_empty(len(rows), hidden.shape[-1])
        states[in_student.to(device)] = student_hidden[plan.teacher_rows[in_student].to(device)]
        states[~in_student.to(device)] = hidden[rows[~in_student].to(device)]
        return states
