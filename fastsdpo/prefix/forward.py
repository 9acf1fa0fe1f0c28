"""Hidden states of student and teacher at the positions that predict response tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastsdpo.prefix.plan import InteractionIds, Sharing
from fastsdpo.prefix.session import ForwardSession
from fastsdpo.prefix.ulysses import Ulysses


class ResponseStates(NamedTuple):
    """N rows, one per response token; those of an interaction follow each other.

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
    ulysses: Ulysses | None = None,
) -> Any:
    """Hidden states of student and teacher at the positions that predict response tokens.

    Log-probabilities and gradients equal those of independent passes, whatever the sharing. `ForwardSession`
    is the same with a callback that asks for one side at a time.

    Args:
        model: a transformers causal LM, bare or wrapped (DDP, FSDP, PEFT, Accelerate).
        interactions: objects with the lists of token ids ``prompt_ids``, ``teacher_prompt_ids`` and
            ``completion_ids``. The student reads prompt + completion, the teacher teacher prompt + completion.
        teacher_model: the teacher (EMA, frozen, ...). None: the live teacher, which is ``model`` itself and
            reads the keys and values of the student's pass.
        teacher_context: a context manager under which ``model`` is another teacher, such as
            ``model.disable_adapter`` of PEFT. Such a teacher reads no keys and values either.
        sharing: "conversation" computes once what any two sequences share, "interaction" what the two
            sequences of an interaction share; "off" runs every sequence alone, unpadded, with any model.
        attention: "auto", or a backend of `fastsdpo.prefix.attention`, which then runs or raises.
        loss_fn: called with the states in place of the head's forward function, where FSDP and ZeRO hold the
            head's parameters gathered. Returns a tensor or a tuple.
        ulysses: as `ForwardSession`; the states are then this process's share of the rows.

    Returns:
        ResponseStates, or what ``loss_fn`` returned.

    Raises:
        ValueError: an empty prompt or completion, an unknown sharing or attention.
        NotImplementedError: an adapter works above the decoder (prompt learning, ...), or shared passes would
            get something wrong that the model does; the message says what. See `check_sharing`.
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
        ulysses=ulysses,
    )
    return session.run(body)
