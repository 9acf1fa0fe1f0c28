"""Hidden states of student and teacher at the positions that predict response tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastsdpo.prefix.attention import check_backend
from fastsdpo.prefix.model import causal_lm as causal_lm
from fastsdpo.prefix.model import no_grad_pass
from fastsdpo.prefix.model import unwrap as unwrap
from fastsdpo.prefix.passes import Call, alone, labels_of, live_teacher_rows, packed, rows_of, run_calls_inside
from fastsdpo.prefix.plan import (
    InteractionIds,
    Sharing,
    build_plan,
    check_interactions,
    check_sharing_level,
)
from fastsdpo.prefix.refusals import above_the_decoder


class ResponseStates(NamedTuple):
    """One row per response token; the response tokens of an interaction follow each other.

    Attributes:
        student_hidden: ``[N, D]`` after the final norm, carries the gradient.
        teacher_hidden: ``[N, D]`` after the final norm, no gradient.
        target_ids: ``[N]`` int64, the response tokens that the rows predict.
        sequence_ids: ``[N]`` int64, index of the interaction.
        position_in_response: ``[N]`` int64, 0 for an interaction's first response token.
    """

    student_hidden: Tensor
    teacher_hidden: Tensor
    target_ids: Tensor
    sequence_ids: Tensor
    position_in_response: Tensor


def shared_forward(
    model: nn.Module,
    interactions: Sequence[InteractionIds],
    *,
    teacher_model: nn.Module | None = None,
    teacher_context: Callable[[], AbstractContextManager] | None = None,
    sharing: Sharing = "conversation",
    attention: str = "auto",
    loss_fn: Callable[[ResponseStates], Any] | None = None,
) -> Any:
    """Hidden states of student and teacher at the positions that predict response tokens.

    Log-probabilities and gradients equal those of independent passes, whatever the sharing.

    Args:
        model: a transformers causal LM, bare or wrapped (DDP, FSDP, PEFT, Accelerate).
        interactions: objects with ``prompt_ids``, ``teacher_prompt_ids`` and ``completion_ids``,
            lists of token ids; the student reads prompt + completion, the teacher teacher prompt +
            completion.
        teacher_model: the teacher (EMA, frozen, ...); None is the live self-teacher: ``model``,
            whose teacher pass reads the keys and values of the student's.
        teacher_context: a context manager under which ``model`` is another teacher, such as
            ``model.disable_adapter`` of PEFT. Like a teacher of its own it shares no keys and values.
        sharing: "conversation" computes once every prefix that any of the sequences share,
            "interaction" those of each interaction's own two sequences, "off" runs every sequence
            alone and unpadded, with any model.
        attention: "auto", or a backend of `fastsdpo.prefix.attention`, which then runs or raises.
        loss_fn: called with the states in place of the head's forward pass, where FSDP and ZeRO hold
            its parameters gathered; what it returns (a tensor or a tuple) is returned in place of the
            states.

    Returns:
        ResponseStates, or what ``loss_fn`` returned.

    Raises:
        ValueError: an empty prompt or completion, an unknown sharing or attention.
        NotImplementedError: an adapter works above the decoder (prompt learning, ...); or sharing is
            not "off" and the model does something that sharing would get wrong. The message says
            what. See `check_passes` and `check_sharing`.
    """
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
    live = (teacher_model is None or teacher_model is model) and teacher_context is None
    teacher = model if teacher_model is None else teacher_model

    if sharing == "off":
        students = [alone(i.prompt_ids, i.completion_ids) for i in interactions]
        teachers = [alone(i.teacher_prompt_ids, i.completion_ids) for i in interactions]
        if live and all(list(i.teacher_prompt_ids) == list(i.prompt_ids) for i in interactions):
            teachers = []  # a pass over the history alone: both are the same
    elif live:
        plan = build_plan(interactions, sharing=sharing)
        keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        middle = plan.student_tokens
        students = [packed(model, plan, 0, middle, plan.student_rows, attention, keys_values)]
        rows = plan.teacher_rows - middle
        teachers = [packed(model, plan, middle, plan.tokens, rows, attention, keys_values)]
    else:
        plan = build_plan(interactions, sharing=sharing, teachers=False)
        students = [packed(model, plan, 0, plan.tokens, plan.student_rows, attention)]
        other = build_plan(interactions, sharing=sharing, students=False)
        teachers = [packed(teacher, other, 0, other.tokens, other.teacher_rows, attention)]

    teacher_hidden = None
    if not live:  # before the student's pass, whose activations stay in memory until the backward
        with no_grad_pass(), (teacher_context or nullcontext)():
            teacher_hidden = run_calls_inside(teacher, teachers[0], lambda run: rows_of(teachers, run))

    def body(run: Callable[[Call], Tensor]) -> Any:
        student_rows = rows_of(students, run)
        with no_grad_pass():
            if not live:
                teacher_rows = teacher_hidden
            elif sharing == "off":
                teacher_rows = rows_of(teachers, run) if teachers else student_rows.detach()
            else:
                teacher_rows = live_teacher_rows(students[0], teachers[0], run)
                if students[0].shared is not None:  # checkpointing runs the layers again later
                    students[0].shared.capture = False
                keys_values.clear()
        labels = labels_of(interactions, student_rows.device)
        states = ResponseStates(student_rows, teacher_rows, *labels)
        return states if loss_fn is None else loss_fn(states)

    return run_calls_inside(model, students[0], body)
