"""What hindsight does to a sample of the data, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsdpo.data import Interaction, InteractionTokenizer, TokenizedInteraction


class CheckedInteraction(NamedTuple):
    """Mean log-ratio (nats per token) of an answer under two follow-ups."""

    id: str | None
    tokens: int
    real: float
    unrelated: float


class TeacherCheck(NamedTuple):
    """What hindsight does to a sample, before training.

    Attributes:
        rows: one per interaction.
        real_abs, unrelated_abs: mean absolute log-ratio per token, in nats.
        warning: what is wrong, or None.
    """

    rows: list[CheckedInteraction]
    real_abs: float
    unrelated_abs: float
    warning: str | None

    def __str__(self) -> str:
        if not self.rows:
            return f"teacher check: WARNING: {self.warning}"
        lines = [
            "teacher check: log-probability of the answer's tokens with the follow-up in context, "
            "minus without (nats per token)",
            f"  {'interaction':<28} {'tokens':>6} {'real':>8} {'unrelated':>10}",
        ]
        for row in self.rows:
            name = (row.id or "-")[:28]
            lines.append(f"  {name:<28} {row.tokens:>6} {row.real:>+8.3f} {row.unrelated:>+10.3f}")
        lines.append(f"  {'mean absolute value':<28} {'':>6} {self.real_abs:>8.3f} {self.unrelated_abs:>10.3f}")
        if self.warning:
            lines.append(f"  WARNING: {self.warning}")
        return "\n".join(lines)


# Below this mean absolute log-ratio the follow-up changes no more than rounding does in bfloat16.
NO_SIGNAL = 0.01


def teacher_check(
    sample: Sequence[Interaction],
    tokenize: InteractionTokenizer,
    log_ratios: Callable[[list[TokenizedInteraction]], list[Tensor]],
) -> TeacherCheck:
    """Compares the signal of real follow-ups with that of unrelated ones.

    Args:
        sample: two interactions or more; the unrelated follow-up of each is another one's, from
            another conversation where there is one.
        log_ratios: per interaction ``[tokens]`` teacher's minus student's log-probabilities.
    """
    pairs: list[tuple[Interaction, TokenizedInteraction, TokenizedInteraction]] = []
    for index, item in enumerate(sample):
        others = [*sample[index + 1 :], *sample[:index]]
        foreign = [o for o in others if o.conversation_id != item.conversation_id or o.conversation_id is None]
        other = next((o for o in foreign or others if o.followup.strip() != item.followup.strip()), None)
        if other is None:
            continue
        swapped = Interaction(item.prompt, item.completion, other.followup, item.id)
        try:
            pairs.append((item, tokenize(item), tokenize(swapped)))
        except ValueError:
            continue  # reported when the data set was tokenized
    if not pairs:
        return TeacherCheck([], 0.0, 0.0, "no two interactions with different follow-ups to compare")
    real = log_ratios([tokens for _, tokens, _ in pairs])
    unrelated = log_ratios([tokens for _, _, tokens in pairs])
    rows = [
        CheckedInteraction(item.id, len(a), float(a.mean()), float(b.mean()))
        for (item, _, _), a, b in zip(pairs, real, unrelated)
    ]
    real_abs = float(torch.cat(real).abs().mean())
    unrelated_abs = float(torch.cat(unrelated).abs().mean())
    difference = float(torch.cat([a - b for a, b in zip(real, unrelated)]).abs().mean())
    warning = None
    if real_abs < NO_SIGNAL:
        warning = (
            f"the follow-ups change the answer's log-probabilities by {real_abs:.4f} nats per token: "
            "the teacher has nothing to teach. Check the template, and that its text survives the "
            "length limits"
        )
    elif difference < NO_SIGNAL:
        warning = (
            "real and unrelated follow-ups change the answer's log-probabilities alike: the model "
            "reacts to the template, not to what the user said. Another template (such as 'note'), or "
            "a larger model, may help"
        )
    elif real_abs < unrelated_abs:
        warning = (
            f"unrelated follow-ups move the answer's log-probabilities more ({unrelated_abs:.3f} nats "
            f"per token) than the real ones ({real_abs:.3f}), on {len(rows)} interactions: the signal "
            "may be the template's more than the users'. A larger teacher_check tells more"
        )
    return TeacherCheck(rows, real_abs, unrelated_abs, warning)
