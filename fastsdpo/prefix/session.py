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

import torch
from torch import Tensor, nn

from fastsdpo.prefix.attention import Kept, check_backend
from fastsdpo.prefix.model import no_grad_pass
from fastsdpo.prefix.passes import PassRunner
from fastsdpo.prefix.plan import InteractionIds, Plan, ResponseLabels, Sharing, check_interactions, check_sharing_level
from fastsdpo.prefix.ready import ReadyPasses, ready_passes
from fastsdpo.prefix.refusals import above_the_decoder
from fastsdpo.prefix.ulysses import Ulysses

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
        ready: what `ready_passes` has made of these interactions and settings; None: it is made here.
        ulysses: the processes among which the passes are divided; all call the session with the same interactions,
            and each has its share of the rows. None: they are not divided.

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
        ready: ReadyPasses | None = None,
        ulysses: Ulysses | None = None,
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

        if ulysses is not None and sharing == "off":
            raise NotImplementedError(
                f"{name}: sharing must not be 'off' with ulysses, which divides the shared passes among processes"
            )
        self._ulysses = ulysses
        self._runner = PassRunner(model, attention, ulysses)
        self._teacher_runner = self._runner if teacher_model is None else PassRunner(teacher_model, attention, ulysses)
        self._teacher_context = teacher_context or nullcontext
        self._live = (teacher_model is None or teacher_model is model) and teacher_context is None
        if ready is None:
            ready = ready_passes(interactions, sharing=sharing, live=self._live)
        elif (ready.sharing, ready.live) != (sharing, self._live):
            raise ValueError(f"{name}: ready must be made for this sharing and teacher")
        self._ready = ready = ready.to(self._runner.device)
        self._student_passes, self._teacher_passes = ready.alone
        if ready.plan is not None:
            self._plan_passes(ready, ready.plan)

        self._used = False
        self._hidden: Tensor | None = None
        self._kept: Kept | None = None
        self._student_rows: Tensor | None = None
        self._teacher_rows: Tensor | None = None

    def _plan_passes(self, ready: ReadyPasses, plan: Plan) -> None:
        self._runner.prepare_to_share(plan)
        keep = plan.teacher_tokens > 0  # the live teacher reads them
        students = plan.student_tokens
        self._student_passes = [
            self._runner.plan_pass(plan, 0, students, plan.student_rows, tables=ready.student_tables, keep=keep)
        ]
        other = ready.teacher_plan
        if other is not None:
            self._teacher_runner.prepare_to_share(other)
            self._teacher_passes = [
                self._teacher_runner.plan_pass(other, 0, other.tokens, other.teacher_rows, tables=ready.teacher_tables)
            ]

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
                self._teacher_rows = self._share(runner.run_first(passes[0], partial(runner.rows, passes)))
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
            self._student_rows = self._share(self._runner.rows(self._student_passes, self._first_hidden()))
        return self._student_rows

    def teacher(self) -> Tensor:
        """The teacher's rows ``[N, D]`` after the final norm, no gradient; the same tensor at every call."""
        hidden = self._first_hidden()
        if self._teacher_rows is None:
            if self._ready.plan is not None:
                with no_grad_pass():
                    self._teacher_rows = self._share(self._live_teacher(self._ready.plan, hidden.detach()))
            elif not self._teacher_passes:
                self._teacher_rows = self.student().detach()  # the same sequences through the same model
            else:
                with no_grad_pass():
                    self._teacher_rows = self._runner.rows(self._teacher_passes)
        return self._teacher_rows

    @property
    def labels(self) -> ResponseLabels:
        """What the rows predict, on the device of the hidden states."""
        self._first_hidden()
        return ResponseLabels(*map(self._share, self._ready.labels))

    def _share(self, rows: Tensor) -> Tensor:
        return rows if self._ulysses is None else self._ulysses.share(rows)

    def _first_hidden(self) -> Tensor:
        if self._hidden is None:
            raise RuntimeError("ForwardSession: student, teacher and labels must be called in the body of run")
        return self._hidden

    def _live_teacher(self, plan: Plan, student_hidden: Tensor) -> Tensor:
        """The live teacher's rows.

        Where a teacher prompt equals the student's, the teacher's tokens are the student's: such rows are
        read from the student's hidden states ``[T, D]``, and the teacher's pass holds all others.
        """
        if plan.teacher_tokens == 0:
            return self._runner.take(student_hidden, plan.teacher_rows)
        middle, rows = plan.student_tokens, self._ready.teacher_rows
        assert rows is not None
        tables = self._ready.teacher_tables
        teacher_pass = self._runner.plan_pass(plan, middle, plan.tokens, rows.own, tables=tables, before=self._kept)
        hidden = self._runner.take(self._runner.run(teacher_pass), rows.own)
        self._kept = None
        if rows.order is None:
            return hidden
        students = self._runner.take(student_hidden, rows.students)
        return torch.cat([hidden, students.to(hidden.dtype)])[rows.order]
