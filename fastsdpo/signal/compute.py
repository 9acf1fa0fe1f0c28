"""The signal of one interaction: how knowing the follow-up changes each answer token's log-probability.

    log_ratio[t] = log p(y_t | x, o, y_<t) - log p(y_t | x, y_<t)        in nats

Equation (1) of "Aligning Language Models from User Interactions" (https://arxiv.org/abs/2603.12273):
positive where the model would write the token more readily had it known what the user says next.
The same quantity under an unrelated follow-up is the yardstick: what remains there is the effect of
any text in that place, not of what the user said.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastsdpo.data import HindsightTemplate, Interaction, InteractionTokenizer, TokenizedInteraction
from fastsdpo.data.interactions import is_blank
from fastsdpo.signal.tokens import TokenGroup, group_tokens

if TYPE_CHECKING:
    import torch

NEUTRAL_FOLLOWUP = "By the way, what is the difference between a peninsula and an island?"
OTHER_NEUTRAL = (
    "What time is it in Tokyo?",
    "I have another question. Our neighbour's cat has slept on our balcony every night of this week. Do cats choose "
    "such a place for the warmth, for the view, or because nobody disturbs them there?",
)


@dataclass(frozen=True)
class FollowupSignal:
    """The signal under one follow-up.

    Attributes:
        followup: the follow-up's text, o.
        teacher_logps: log p(y_t | x, o, y_<t) of each of the T completion tokens, in nats.
        log_ratio: teacher_logps - student_logps, length T, in nats.
        ends_turn: whether the last token is the one that ends the answer.
    """

    followup: str
    teacher_logps: list[float]
    log_ratio: list[float]
    ends_turn: bool

    @property
    def sum(self) -> float:
        """The sum over all tokens: the log-ratio of the whole answer, in nats."""
        return sum(self.log_ratio)

    @property
    def mean(self) -> float:
        """The mean log-ratio over the tokens, in nats; the end-of-turn token counts."""
        return self.sum / len(self.log_ratio)

    @property
    def mean_absolute(self) -> float:
        """The mean absolute log-ratio, in nats: how strong the signal is, whatever its direction."""
        return sum(abs(value) for value in self.log_ratio) / len(self.log_ratio)

    @property
    def first(self) -> float:
        """The log-ratio of the first token, in nats."""
        return self.log_ratio[0]

    @property
    def end_of_turn(self) -> float | None:
        """The log-ratio of the end-of-turn token, in nats (positive: stop here); None if the answer was cut."""
        return self.log_ratio[-1] if self.ends_turn else None

    def summary(self) -> dict[str, float | None]:
        """Returns sum, mean, mean absolute value, first token and end of turn by name, in nats."""
        return {
            "mean": self.mean,
            "sum": self.sum,
            "mean_absolute": self.mean_absolute,
            "first_token": self.first,
            "end_of_turn": self.end_of_turn,
        }


@dataclass(frozen=True)
class SignalResult:
    """The signal of an interaction under its own and an unrelated follow-up.

    Attributes:
        interaction: prompt x, answer y and follow-up o that were shown to the model.
        template: the text by which the follow-up enters the teacher's prompt.
        token_ids: the T token ids of the completion.
        groups: the tokens as they can be displayed (a character may take several tokens).
        student_logps: log p(y_t | x, y_<t), length T, in nats.
        real: the signal under the interaction's own follow-up.
        unrelated: the signal under an unrelated follow-up, or None.
        prompt_tokens: length of the student's prompt in tokens.
        model: the model's name, for reports.
    """

    interaction: Interaction
    template: str
    token_ids: list[int]
    groups: list[TokenGroup]
    student_logps: list[float]
    real: FollowupSignal
    unrelated: FollowupSignal | None = None
    prompt_tokens: int = 0
    model: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def followups(self) -> list[tuple[str, FollowupSignal]]:
        """The signals to show as pairs ``(title, signal)``, the real follow-up first."""
        shown = [("Real follow-up", self.real)]
        return shown + ([("Unrelated follow-up", self.unrelated)] if self.unrelated else [])

    def to_dict(self) -> dict:
        """Returns everything as dicts and lists for JSON. Log-probabilities and log-ratios are per token, in nats."""

        def part(signal: FollowupSignal | None) -> dict | None:
            return signal and {
                "followup": signal.followup,
                "summary": signal.summary(),
                "teacher_logps": signal.teacher_logps,
                "log_ratio": signal.log_ratio,
            }

        return {
            "model": self.model,
            "template": self.template,
            "interaction": dataclasses.asdict(self.interaction),
            "prompt_tokens": self.prompt_tokens,
            "token_ids": self.token_ids,
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "student_logps": self.student_logps,
            "real": part(self.real),
            "unrelated": part(self.unrelated),
            "notes": self.notes,
        }


def compute_signal(
    model: Any,
    tokenizer: Any,
    interaction: Interaction,
    template: HindsightTemplate | str = "note",
    *,
    unrelated: str | None = NEUTRAL_FOLLOWUP,
    completion_ids: Sequence[int] | None = None,
    teacher_model: Any = None,
    temperature: float = 1.0,
    sharing: str = "off",
    backend: str = "auto",
    **tokenization: Any,
) -> SignalResult:
    """Computes the token-level signal of an interaction, without gradient.

    Args:
        model: the student, a transformers causal LM, bare or wrapped; also the teacher unless
            `teacher_model` is given. It runs in eval mode and is put back into the mode it had.
        tokenizer: the model's tokenizer.
        interaction: prompt x, answer y and follow-up o.
        template: how o enters the context: a `HindsightTemplate`, a preset's name or a text with
            ``{o}``.
        unrelated: a follow-up to compare with; None: no comparison. See `choose_unrelated`.
        completion_ids: the token ids of y, if they are known; None: the text of y is tokenized.
        teacher_model: a model that reads (x, o) in place of the student; None: the student.
        temperature: divides the logits.
        sharing: as in `fastsdpo.shared_forward`; ``"off"`` works with every model.
        backend: of `fastsdpo.linear_token_logps`.
        **tokenization: options of `fastsdpo.data.InteractionTokenizer`.

    Raises:
        ValueError: the interaction cannot be tokenized, or the signal is not finite.
        NotImplementedError: the model's head is not a plain linear layer.
    """
    tokenize = InteractionTokenizer(tokenizer, template, **tokenization)
    followups = [interaction.followup] + ([] if unrelated is None else [unrelated])
    tokenized = [tokenize(dataclasses.replace(interaction, followup=o), completion_ids) for o in followups]
    ids = tokenized[0].completion_ids

    student, teachers = _logps(model, teacher_model, tokenized, temperature, sharing, backend)
    ends_turn = ids[-1] == tokenize.end_of_turn_id
    signals = [_signal(o, teacher, student, ends_turn) for o, teacher in zip(followups, teachers)]
    notes = [] if ends_turn else ["The answer was cut at the length limit: no end-of-turn token."]
    return SignalResult(
        interaction=interaction,
        template=tokenize.template.text,
        token_ids=list(ids),
        groups=group_tokens(tokenizer, ids),
        student_logps=student.tolist(),
        real=signals[0],
        unrelated=signals[1] if unrelated is not None else None,
        prompt_tokens=len(tokenized[0].prompt_ids),
        model=str(getattr(getattr(model, "config", None), "name_or_path", "") or ""),
        notes=notes,
    )


def _signal(followup: str, teacher: torch.Tensor, student: torch.Tensor, ends_turn: bool) -> FollowupSignal:
    """The signal of log-probabilities ``[T]`` of both; raises ValueError where one is not finite."""
    log_ratio = teacher - student
    if not log_ratio.isfinite().all():
        raise ValueError(
            "compute_signal: the model gives log-probabilities that are not finite; float32 "
            "weights (dtype='float32') rule out an overflow"
        )
    return FollowupSignal(followup, teacher.tolist(), log_ratio.tolist(), ends_turn)


def _logps(
    model: Any,
    teacher_model: Any,
    tokenized: list[TokenizedInteraction],
    temperature: float,
    sharing: str,
    backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Student's ``[T]`` and, per follow-up, the teacher's ``[T]``; float64 on the CPU.

    From hidden states, as training does: the logits are float32 whatever the model's dtype, since
    rounding to bfloat16 would be larger than most log-ratios.
    """
    # Here, so that `fastsdpo signal --help` need not import torch.
    import torch

    from fastsdpo.ops.linear_token_logps import linear_token_logps
    from fastsdpo.prefix import head_parameters, shared_forward, training_mode

    def of_head(owner: Any, hidden: torch.Tensor) -> torch.Tensor:
        given = {"target_ids": states.target_ids[: len(hidden)], **head_parameters(owner)._asdict()}
        logps: Any = linear_token_logps(hidden, temperature=temperature, backend=backend, **given)
        return logps.to("cpu", torch.float64)

    teacher_mode = nullcontext() if teacher_model is None else training_mode(teacher_model, False)
    with torch.no_grad(), training_mode(model, False), teacher_mode:
        states = shared_forward(model, tokenized, teacher_model=teacher_model, sharing=sharing)  # type: ignore[arg-type]
        count = len(tokenized[0].completion_ids)
        student = of_head(model, states.student_hidden[:count])
        teacher = of_head(model if teacher_model is None else teacher_model, states.teacher_hidden)
    return student, list(teacher.split(count))


def choose_unrelated(interactions: Iterable[Interaction], interaction: Interaction) -> str:
    """Chooses another conversation's follow-up, the nearest in length among the first 1,000 interactions.

    Length matters because a longer text in the context moves an answer more, whatever it says. A text equal to
    the interaction's own does not count. An interaction without a conversation id counts only if its first
    message differs. If there is no such follow-up, it is `neutral_followup`.
    """

    def conversation(item: Interaction) -> Any:
        return item.conversation_id or item.prompt[0]["content"]

    own = interaction.followup.strip()
    found = [
        other.followup
        for other in itertools.islice(interactions, 1000)
        if conversation(other) != conversation(interaction)
        and other.followup.strip() != own
        and not is_blank(other.followup)
    ]
    return nearest(found, own) if found else neutral_followup(own)


def neutral_followup(followup: str) -> str:
    """Returns the built-in question nearest in length to `followup`; it has nothing to do with any answer."""
    return nearest((NEUTRAL_FOLLOWUP, *OTHER_NEUTRAL), followup)


def nearest(texts: Sequence[str], text: str) -> str:
    """Returns the one of `texts` whose length in characters is nearest to that of `text`; the first of equals.

    Lengths are compared by their ratio.
    """
    return min(texts, key=lambda other: abs(math.log(len(other.strip()) / max(1, len(text.strip())))))
