"""Held-out interactions that stand in the training data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset

logger = logging.getLogger("fastsdpo.trainer")


@dataclass(frozen=True)
class Leaks:
    """Held-out interactions that stand in the training data.

    Attributes:
        same: that are there themselves: prompt, answer and follow-up.
        conversation: of which another part of the conversation is there: one of both stands, with
            its follow-up, in the other's prompt; or both have the conversation id and a user's
            message in common (as tokens: the id).
        total: that are one or the other.
        example: the id (or else the number) of the first.
    """

    same: int
    conversation: int
    total: int
    example: str


def find_leaks(train: InteractionDataset, held_out: InteractionDataset) -> Leaks | None:
    """Which held-out interactions, or parts of their conversations, are trained on; None: none."""
    keys, train_keys = held_out.keys, train.keys
    if 0 in keys or 0 in train_keys:  # some came as tokens
        keys, train_keys = held_out.token_keys, train.token_keys
    same = set(keys).intersection(train_keys)
    in_history = set(held_out.keys).intersection(train.history_keys)
    in_training = set(held_out.history_keys).intersection(train.keys)
    # Of conversations with ids that are in both: the users' messages in training.
    messages: dict[str, set[int]] = {}
    ids = set(held_out.conversation_ids).intersection(train.conversation_ids) - {None}
    if not (same or in_history or in_training or ids):
        return None
    for index, conversation in enumerate(train.conversation_ids):
        if conversation is not None and conversation in ids:
            messages.setdefault(conversation, set()).update(train.messages_of(index))

    def is_related(index: int) -> bool:
        start, end = held_out.history_ends[index : index + 2]
        if held_out.keys[index] in in_history or not in_training.isdisjoint(held_out.history_keys[start:end]):
            return True
        there, here = messages.get(held_out.conversation_ids[index] or ""), held_out.messages_of(index)
        return there is not None and not (there and here and there.isdisjoint(here))

    found = [(index, keys[index] in same, is_related(index)) for index in range(len(held_out))]
    found = [item for item in found if item[1] or item[2]]
    if not found:
        return None
    first = held_out.ids[found[0][0]]
    return Leaks(
        same=sum(item[1] for item in found),
        conversation=sum(item[2] for item in found),
        total=len(found),
        example=f"number {found[0][0]}" if first is None else repr(first),
    )


def check_held_out(args: SDPOConfig, train: Any, held_out: Any, name: str = "eval_dataset") -> None:
    """Refuses, or with `allow_leaks` reports, held-out interactions that are trained on.

    Args:
        held_out: a dataset, a dict of several, or None.
        name: the argument, in messages.

    Raises:
        ValueError: there are some; the text says how many, and names the first.
    """
    if isinstance(held_out, dict):
        for key, value in held_out.items():
            check_held_out(args, train, value, f"{name}[{key!r}]")
        return
    if not isinstance(train, InteractionDataset) or not isinstance(held_out, InteractionDataset):
        return  # a stream's interactions are looked at as they come, step by step
    leaks = find_leaks(train, held_out)
    if leaks is None:
        return
    found = (
        f"{leaks.total:,} of its {len(held_out):,} interactions are in train_dataset: "
        f"{leaks.same:,} themselves, of {leaks.conversation:,} another part of the conversation "
        f"(the first: {leaks.example})"
    )
    if not args.allow_leaks:
        raise ValueError(
            f"SDPOTrainer: {name} must hold no conversation that is trained on, got {found}; "
            "split the conversations with fastsdpo prepare --eval-fraction, or pass "
            "allow_leaks=True to go on"
        )
    logger.warning("%s is no measure of what was learned: %s; allow_leaks is set", name, found)
