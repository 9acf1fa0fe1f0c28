"""What the passes over a pack need besides the model, made ahead of them: in a data loader's worker, say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.prefix.attention.tables import pass_tables
from fastsdpo.prefix.attention.windows import Window
from fastsdpo.prefix.bundle import Bundle
from fastsdpo.prefix.passes import DecoderPass, sequence_pass
from fastsdpo.prefix.plan import InteractionIds, Plan, ResponseLabels, Sharing, build_plan, response_labels


class TeacherRows(NamedTuple):
    """Where the live teacher's N rows are: in its own pass, or in the student's where the prompts are equal.

    Attributes:
        own: ``[n]`` int64, tokens of the teacher's pass.
        students: ``[N - n]`` int64, tokens of the student's pass.
        order: ``[N]`` int64, of each row its place in ``[own, students]``; None: all are own.
    """

    own: Tensor
    students: Tensor
    order: Tensor | None


@dataclass
class ReadyPasses:
    """The passes of student and teacher over a pack, and what their rows predict.

    Attributes:
        live: the teacher reads the student's keys and values; else it has a plan of its own.
        plan: the student's, and the live teacher's; None without sharing.
        teacher_plan: of a teacher that is not live.
        student_tables, teacher_tables: of the attention, by the keys of `SharedPass.cached`.
        alone: without sharing the passes of student and teacher, a sequence each.
    """

    sharing: Sharing
    live: bool
    labels: ResponseLabels
    plan: Plan | None = None
    teacher_plan: Plan | None = None
    teacher_rows: TeacherRows | None = None
    student_tables: dict[Any, Any] = field(default_factory=dict)
    teacher_tables: dict[Any, Any] = field(default_factory=dict)
    alone: tuple[list[DecoderPass], list[DecoderPass]] = ((), ())  # type: ignore[assignment]

    def to(self, device: torch.device) -> ReadyPasses:
        """On the device of the model; as it is where it is there already."""
        if self.labels.target_ids.device == device:
            return self
        return Bundle(self).to(device).open()

    @property
    def tokens(self) -> int:
        """How many go through the model, shared prefixes once."""
        if self.plan is None:
            return sum(len(one.token_ids) for passes in self.alone for one in passes)
        return self.plan.tokens + (0 if self.teacher_plan is None else self.teacher_plan.tokens)

    @property
    def student_tokens(self) -> int:
        """Those of them that are the student's."""
        return sum(len(one.token_ids) for one in self.alone[0]) if self.plan is None else self.plan.student_tokens


def ready_passes(
    interactions: Sequence[InteractionIds],
    *,
    sharing: Sharing,
    live: bool,
    backend: str = "auto",
    windows: Iterable[Window] = (),
) -> ReadyPasses:
    """What `ForwardSession` would make of these interactions, on the CPU.

    Args:
        live: the teacher is the model itself, as it is.
        backend, windows: as `pass_tables`.

    Raises:
        ValueError: as `build_plan`.
    """
    labels = response_labels(interactions, torch.device("cpu"))
    if sharing == "off":
        students = [sequence_pass(i.prompt_ids, i.completion_ids) for i in interactions]
        teachers = [sequence_pass(i.teacher_prompt_ids, i.completion_ids) for i in interactions]
        same = live and all(list(i.teacher_prompt_ids) == list(i.prompt_ids) for i in interactions)
        return ReadyPasses(sharing, live, labels, alone=(students, [] if same else teachers))
    windows = list(windows)
    plan = build_plan(interactions, sharing=sharing, teachers=live)
    made = ReadyPasses(sharing, live, labels, plan)
    made.student_tables = pass_tables(backend, plan, 0, plan.student_tokens, windows)
    if live:
        made.teacher_rows = _teacher_rows(plan)
        if plan.teacher_tokens:
            made.teacher_tables = pass_tables(backend, plan, plan.student_tokens, plan.tokens, windows)
        return made
    made.teacher_plan = other = build_plan(interactions, sharing=sharing, students=False)
    made.teacher_tables = pass_tables(backend, other, 0, other.tokens, windows)
    return made


def _teacher_rows(plan: Plan) -> TeacherRows:
    middle, rows = plan.student_tokens, plan.teacher_rows
    in_student = rows < middle
    own, students = rows[~in_student] - middle, rows[in_student]
    if not len(students):
        return TeacherRows(own, students, None)
    order = torch.empty_like(rows)
    order[~in_student] = torch.arange(len(own))
    order[in_student] = torch.arange(len(own), len(rows))
    return TeacherRows(own, students, order)
