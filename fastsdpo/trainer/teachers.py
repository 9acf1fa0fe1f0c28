"""The teachers: whose distribution of the answer's tokens the student is compared with.

    live            the student itself, as it is now
    ema             a moving average of the student's weights
    frozen          the initial model
    trust_region    exp((1-a) log frozen + a log live), normalized
    guided          one of the first three, with the follow-up's effect times g

All of them read the history and the follow-up. `states` gives a teacher's hidden states and head; the
teacher's logits are ``hidden @ head.weight.T``, and never stored as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import (
    ForwardSession,
    HeadParameters,
    ReadyPasses,
    ResponseStates,
    Ulysses,
    count_tokens,
    head_parameters,
    no_grad_pass,
    shared_forward,
)
from fastsdpo.trainer.adapters import adapter_is_silent, is_peft
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.loss import guide, mix_teachers
from fastsdpo.trainer.processes import agreed
from fastsdpo.trainer.sharded_weights import ShardedTeacherWeights
from fastsdpo.trainer.teacher_weights import DisabledAdapter, TeacherContext, TeacherWeights


class PackPasses:
    """The forward passes over one pack, with one sharing.

    Args:
        ulysses: the processes among which they are divided, or None.

    Attributes:
        tokens: how many went through the model so far, shared prefixes once.
    """

    def __init__(self, model: nn.Module, sharing: Any, attention: str, ulysses: Ulysses | None = None):
        self.model = model
        self.options: dict[str, Any] = {"sharing": sharing, "attention": attention, "ulysses": ulysses}
        self.tokens = 0

    def ahead(self, interactions: Sequence[TokenizedInteraction], context: TeacherContext | None) -> ResponseStates:
        """States without gradient, of the model under a context, before the student's pass."""
        counts = count_tokens(interactions, sharing=self.options["sharing"], live=True)
        self.tokens += counts.student
        if any(item.teacher_prompt_ids != item.prompt_ids for item in interactions):
            self.tokens += counts.teacher  # else both are the same, and one pass
        with no_grad_pass(), nullcontext() if context is None else context():
            return shared_forward(self.model, interactions, **self.options)

    def student(
        self,
        interactions: Sequence[TokenizedInteraction],
        context: TeacherContext | None,
        loss_fn: Callable[[ForwardSession], Any],
        ready: ReadyPasses,
    ) -> Any:
        """The student's pass, and in place of its head ``loss_fn``; the teacher's pass is under ``context``."""
        self.tokens += ready.tokens
        session = ForwardSession(self.model, interactions, teacher_context=context, ready=ready, **self.options)
        return session.run(loss_fn)


class Ahead(NamedTuple):
    """States from passes ahead of the student's; None where nothing needs them.

    Attributes:
        initial: the initial model's, ``student_hidden`` given the history alone and ``teacher_hidden``
            with the follow-up.
        unguided: of the guided teacher's weights, ``student_hidden`` given the history alone and
            ``teacher_hidden`` with the neutral follow-up.
    """

    initial: ResponseStates | None = None
    unguided: ResponseStates | None = None


class TeacherStates(NamedTuple):
    """Attributes:
    hidden: ``[N, D]``, or ``[N, 2 D]`` of two models side by side.
    head: None: the student's head.
    """

    hidden: Tensor
    head: HeadParameters | None


class Teacher(Protocol):
    """What the trainer needs of a teacher.

    Attributes:
        context: under which the model is this teacher; None: the model as it is.
    """

    context: TeacherContext | None

    def unguided(self, passes: PackPasses, pack: Sequence[TokenizedInteraction]) -> ResponseStates | None:
        """What `guide` goes from; None where the follow-up counts once."""
        ...

    def states(self, model: nn.Module, session: ForwardSession, head: HeadParameters, ahead: Ahead) -> TeacherStates:
        """Called inside the forward pass of the student's head, where FSDP holds its parameters gathered.

        Args:
            session: of the student's pass; its `teacher` is the model under `context`.
            head: the student's.
        """
        ...


class ModelTeacher:
    """The model with the follow-up in context, as it is or under a context: with other weights, or without an adapter.

    The live, frozen and ema teachers.
    """

    def __init__(self, context: TeacherContext | None = None):
        self.context = context

    def unguided(self, passes: PackPasses, pack: Sequence[TokenizedInteraction]) -> ResponseStates | None:
        return None

    def states(self, model: nn.Module, session: ForwardSession, head: HeadParameters, ahead: Ahead) -> TeacherStates:
        head_there = None if self.context is None else self.context.head(model)
        return TeacherStates(session.teacher(), head_there)


class TrustRegionTeacher(ModelTeacher):
    """Between the initial model and the live one: exp((1-a) log frozen + a log live), normalized."""

    def __init__(self, initial: InitialModel, mix: float):
        super().__init__()
        self.initial, self.mix = initial, mix

    def states(self, model: nn.Module, session: ForwardSession, head: HeadParameters, ahead: Ahead) -> TeacherStates:
        assert ahead.initial is not None
        frozen_head = self.initial.head(model)
        return TeacherStates(
            *mix_teachers(ahead.initial.teacher_hidden, session.teacher(), frozen_head, head, self.mix)
        )


class GuidedTeacher:
    """Another teacher, in which what this follow-up does beyond a neutral one counts ``guidance`` times.

    Args:
        neutral: interactions have a neutral follow-up (`neutral_prompt_ids`); else it is empty.
    """

    def __init__(self, teacher: ModelTeacher, guidance: float, *, neutral: bool):
        self.teacher, self.guidance, self.neutral = teacher, guidance, neutral
        self.context = teacher.context

    def unguided(self, passes: PackPasses, pack: Sequence[TokenizedInteraction]) -> ResponseStates | None:
        read = []
        for item in pack:
            neutral = item.neutral_prompt_ids if self.neutral else item.prompt_ids
            assert neutral is not None  # the dataset has seen to that
            read.append(TokenizedInteraction(item.prompt_ids, neutral, item.completion_ids))
        return passes.ahead(read, self.context)

    def states(self, model: nn.Module, session: ForwardSession, head: HeadParameters, ahead: Ahead) -> TeacherStates:
        assert ahead.unguided is not None
        found = self.teacher.states(model, session, head, ahead)
        return found._replace(hidden=guide(found.hidden, ahead.unguided, self.guidance))


class InitialModel:
    """The model as it was at the start: teacher, part of one, or reference.

    Args:
        context: under which the model is the initial one: other weights, or a new adapter disabled.
        history: its states given the history alone are needed (the reference).
        followup: its states with the follow-up are needed (the trust region).
    """

    def __init__(self, context: TeacherContext, *, history: bool, followup: bool):
        self.context, self.history, self.followup = context, history, followup

    def states(self, passes: PackPasses, pack: Sequence[TokenizedInteraction]) -> ResponseStates | None:
        """``student_hidden`` given the history, ``teacher_hidden`` with the follow-up, where needed."""
        if not (self.history or self.followup):
            return None
        read = [
            TokenizedInteraction(
                item.prompt_ids if self.history else item.teacher_prompt_ids,
                item.teacher_prompt_ids if self.followup else item.prompt_ids,
                item.completion_ids,
            )
            for item in pack
        ]
        return passes.ahead(read, self.context)

    def head(self, model: nn.Module) -> HeadParameters | None:
        """Its head; None where it is the student's."""
        return self.context.head(model)


class Teachers(NamedTuple):
    """What the settings ask for.

    Attributes:
        initial: None where nothing needs it.
        copies: by name the weights that are no longer the model's, to save and to load.
    """

    teacher: Teacher
    initial: InitialModel | None
    copies: dict[str, TeacherWeights]


def make_teachers(
    args: SDPOConfig, model: nn.Module, unwrapped: Callable[[], Any], sharded: Literal["fsdp2", "zero3"] | None
) -> Teachers:
    """The teacher of the settings, and copies of the trained weights as far as it needs them.

    Args:
        unwrapped: gives the model without its wrapper, which training may put around it.
        sharded: by what the weights are held in shards; None: they are not.

    Raises:
        NotImplementedError: this model or kind of distributed training cannot have that teacher.
    """
    if (args.teacher == "trust_region" or args.is_guided) and head_parameters(model).softcap is not None:
        if args.is_guided:
            what, why = "guidance and neutral_followup are", "their differences are"
        else:
            what, why = "teacher='trust_region' is", "their mixture is"
        raise NotImplementedError(
            f"SDPOTrainer: {what} not possible for a model with a softcap on its logits: {why} not linear in "
            "the hidden states"
        )
    needs_initial = args.teacher in ("frozen", "trust_region") or args.needs_reference
    # An adapter that changes nothing yet is the initial model when it is off.
    silent = needs_initial and is_peft(model) and agreed(adapter_is_silent(model))
    copies: dict[str, TeacherWeights] = {}
    if sharded == "zero3" and (args.teacher == "ema" or (needs_initial and not silent)):
        raise NotImplementedError(
            f"SDPOTrainer: teacher={args.teacher!r} (or a reference) copies the trained weights, "
            "which DeepSpeed ZeRO-3 holds in shards; use FSDP2, ZeRO-2, teacher='live', a new LoRA adapter "
            "with a frozen teacher, or DDP"
        )
    kind = TeacherWeights if sharded is None else ShardedTeacherWeights
    if args.teacher == "ema":
        copies["ema"] = kind(model, moving=True)
    initial = None
    if needs_initial:
        if not silent:
            copies["frozen"] = kind(model, moving=False)
        context: TeacherContext = DisabledAdapter(unwrapped) if silent else copies["frozen"]
        initial = InitialModel(context, history=args.needs_reference, followup=args.teacher == "trust_region")
    if initial is not None and args.teacher == "trust_region":
        teacher = TrustRegionTeacher(initial, args.trust_region_mix)
    elif initial is not None and args.teacher == "frozen":
        teacher = ModelTeacher(initial.context)
    else:
        teacher = ModelTeacher(copies.get("ema"))
    if args.is_guided:
        teacher = GuidedTeacher(teacher, args.guidance, neutral=args.neutral_followup is not None)
    return Teachers(teacher, initial, copies)
