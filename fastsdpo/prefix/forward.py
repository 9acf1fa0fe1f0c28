"""Hidden states of student and teacher at the positions that predict response tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastsdpo.prefix.model import causal_lm as causal_lm
from fastsdpo.prefix.model import unwrap as unwrap
from fastsdpo.prefix.plan import InteractionIds, Sharing
from fastsdpo.prefix.session import ForwardSession


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

    def body(session: ForwardSession) -> Any:
        states = ResponseStates(session.student(), session.teacher(), *session.labels)
        return states if loss_fn is None else loss_fn(states)

    session = ForwardSession(
        model,
        interactions,
        teacher_model=teacher_model,
        teacher_context=teacher_context,
        sharing=sharing,
        attention=attention,
    )
    return session.run(body)
