"""The held-out interactions that are measured, each with what it is compared with.

An interaction is (x, y, o). Beside its own follow-up stands an unrelated one, and beside its own answer up to
three others: the next answer y', which the log has after o, and two strangers, next answers of other
conversations, one of about the same length and one of another.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastsdpo.data import Interaction, InteractionTokenizer, TokenizedInteraction, load_interactions
from fastsdpo.data.loading import parse_interaction


class MeasuredInteraction(NamedTuple):
    """Attributes:
    interaction: x, y and o.
    next_answer: y', the answer to o; None where the log has none.
    """

    interaction: Interaction
    next_answer: str | None = None


class Contexts(NamedTuple):
    """What of one interaction is measured; student's prompt, teacher's prompt and answer each.

    Attributes:
        id: the interaction's.
        real: x, (x, o), y.
        unrelated: x, (x, a stranger's o), y.
        next: x, (x, o), y'; None where the log has no y'.
        stranger: the same with a stranger's y' of the length of y'.
        stranger_length: the same with one of another length.
        interaction: as text.
        unrelated_followup: the stranger's o.
    """

    id: str | None
    real: TokenizedInteraction
    unrelated: TokenizedInteraction
    next: TokenizedInteraction | None
    stranger: TokenizedInteraction | None
    stranger_length: TokenizedInteraction | None
    interaction: Interaction
    unrelated_followup: str

    def items(self) -> list[tuple[str, TokenizedInteraction]]:
        """``(name, tokens)`` of what there is."""
        names = ("real", "unrelated", "next", "stranger", "stranger_length")
        return [(name, item) for name in names if (item := getattr(self, name)) is not None]


def with_next_answers(items: Iterable[Any]) -> Iterator[MeasuredInteraction]:
    """Each interaction with the next answer of its conversation, which stands in the interaction after it.

    Args:
        items: interactions, or rows of them; a conversation's follow each other. Others are passed over.
    """
    before: Interaction | None = None
    for item in items:
        if isinstance(item, Mapping):
            item = parse_interaction(item)
        if not isinstance(item, Interaction):
            continue
        if before is not None:
            yield MeasuredInteraction(before, item.completion if _follows(before, item) else None)
        before = item
    if before is not None:
        yield MeasuredInteraction(before)


def _follows(before: Interaction, after: Interaction) -> bool:
    """Whether one interaction's prompt ends with the other's answer (if it goes back so far) and follow-up."""
    if before.conversation_id is None or before.conversation_id != after.conversation_id:
        return False
    *earlier, last = after.prompt
    answered = not earlier or earlier[-1]["role"] != "assistant"
    return last["content"].strip() == before.followup.strip() and (
        answered or earlier[-1]["content"].strip() == before.completion.strip()
    )


def sample_measured(source: Any, count: int) -> list[MeasuredInteraction]:
    """Up to ``count`` interactions of a source that can be read again, drawn evenly; those with a next answer first.

    Args:
        source: as `InteractionDataset.from_source`; of what can be read only once, nothing is taken.
    """
    if isinstance(source, (str, os.PathLike)):
        items: Iterable[Any] = () if Path(source).is_fifo() else load_interactions(source)
    else:
        items = source if hasattr(source, "__len__") and isinstance(source, Iterable) else ()
    draw = random.Random(0)
    kept: dict[bool, list[MeasuredInteraction]] = {True: [], False: []}
    seen = {True: 0, False: 0}
    for item in with_next_answers(items) if count else ():
        kind = item.next_answer is not None
        seen[kind] += 1
        if len(kept[kind]) < count:
            kept[kind].append(item)
        elif (place := draw.randrange(seen[kind])) < count:
            kept[kind][place] = item
    return [*kept[True], *kept[False]][:count]


def make_contexts(sample: Sequence[MeasuredInteraction], tokenize: InteractionTokenizer) -> list[Contexts]:
    """What is measured, as tokens; without the interactions that cannot be tokenized or have no counterpart."""
    found = []
    answers = [_tokens_of(item.next_answer, item.interaction, tokenize) for item in sample]
    for index, (item, next_tokens) in enumerate(zip(sample, answers)):
        own = item.interaction
        other = _unrelated(sample, index)
        if other is None:
            continue
        try:
            real, unrelated = tokenize(own), tokenize(replace(own, followup=other.followup))
        except ValueError:
            continue  # reported when the data set was tokenized

        same, different = (None, None) if next_tokens is None else _strangers(sample, answers, index)
        others = [None if ids is None else replace(real, completion_ids=ids) for ids in (next_tokens, same, different)]
        found.append(Contexts(own.id, real, unrelated, others[0], others[1], others[2], own, other.followup))
    return found


def _tokens_of(answer: str | None, item: Interaction, tokenize: InteractionTokenizer) -> list[int] | None:
    if answer is None:
        return None
    try:
        return tokenize(replace(item, completion=answer)).completion_ids
    except ValueError:
        return None


def _foreign(sample: Sequence[MeasuredInteraction], index: int) -> Iterator[int]:
    """Places of interactions of other conversations, beginning behind the one at ``index``."""
    own = sample[index].interaction.conversation_id
    for place in itertools.chain(range(index + 1, len(sample)), range(index)):
        other = sample[place].interaction.conversation_id
        if other is None or other != own:
            yield place


def _unrelated(sample: Sequence[MeasuredInteraction], index: int) -> Interaction | None:
    """An interaction of another conversation with another follow-up."""
    own = sample[index].interaction.followup.strip()
    others = (sample[place].interaction for place in _foreign(sample, index))
    return next((other for other in others if other.followup.strip() != own), None)


def _strangers(
    sample: Sequence[MeasuredInteraction], answers: Sequence[list[int] | None], index: int
) -> tuple[list[int] | None, list[int] | None]:
    """Next answers of other conversations: the one nearest in length, and the one furthest."""
    own = answers[index]
    assert own is not None
    others = [ids for place in _foreign(sample, index) if (ids := answers[place]) is not None and ids != own]
    if not others:
        return None, None

    def distance(ids: list[int]) -> float:
        return abs(math.log(len(ids) / len(own)))

    nearest, furthest = min(others, key=distance), max(others, key=distance)
    return nearest, furthest if len(furthest) != len(nearest) else None
