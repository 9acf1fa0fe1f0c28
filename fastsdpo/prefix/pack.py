"""Which tokens have to be computed, and which of their rows predict which response token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenizedInteraction(Protocol):
    """What is read of an interaction: three lists of token ids."""

    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]


def check_interactions(name: str, interactions: Sequence[TokenizedInteraction]) -> None:
    """Every list must hold tokens: without a prompt nothing predicts the first response token.

    Raises:
        ValueError: no interactions, or an empty list in one, named by its index.
    """
    if len(interactions) == 0:
        raise ValueError(f"{name}: interactions must not be empty")
    for index, interaction in enumerate(interactions):
        for field in ("prompt_ids", "teacher_prompt_ids", "completion_ids"):
            if len(getattr(interaction, field)) == 0:
                raise ValueError(f"{name}: interactions[{index}].{field} must not be empty")
