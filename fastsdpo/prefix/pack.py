"""Which interactions share a pack, and how many tokens a pack computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastsdpo.prefix.plan import InteractionIds, Sharing, check_interactions, check_sharing_level
from fastsdpo.prefix.trie import Node, insert


class TokenCounts(NamedTuple):
    """Tokens of the student's and the teacher's pass, without padding; and what they would be without sharing."""

    student: int
    teacher: int
    unshared_student: int
    unshared_teacher: int


def count_tokens(
    interactions: Sequence[InteractionIds], *, sharing: Sharing = "conversation", live: bool = True
) -> TokenCounts:
    """Tokens computed with sharing and without.

    Args:
        live: whether the teacher reads the student's keys and values. If not, it computes all its
            sequences, which share prefixes among themselves only.

    Raises:
        ValueError: as `build_plan`.
    """
    check_interactions("count_tokens", interactions)
    check_sharing_level("count_tokens", sharing)
    unshared_student = sum(len(i.prompt_ids) + len(i.completion_ids) for i in interactions)
    unshared_teacher = sum(len(i.teacher_prompt_ids) + len(i.completion_ids) for i in interactions)
    if sharing == "off":
        return TokenCounts(unshared_student, unshared_teacher, unshared_student, unshared_teacher)
    groups = [interactions] if sharing == "conversation" else [[i] for i in interactions]
    student = teacher = 0
    for group in groups:
        root = Node((), 0, None, False)
        for i in group:
            student += insert(root, [*i.prompt_ids, *i.completion_ids], False)[1]
        root = root if live else Node((), 0, None, False)
        for i in group:
            teacher += insert(root, [*i.teacher_prompt_ids, *i.completion_ids], True)[1]
    return TokenCounts(student, teacher, unshared_student, unshared_teacher)


def pack_conversations(
    interactions: Sequence[InteractionIds],
    conversations: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sharing: Sharing = "conversation",
    open_packs: int = 8,
) -> list[list[int]]:
    """Packs of interactions whose plans hold at most ``max_tokens`` tokens, students' and teachers' together.

    First fit over at most ``open_packs`` open packs: a conversation goes to the oldest one with room. Where none
    has room and no more may be open, the fullest is closed. Packs come in the order in which they were opened,
    so conversations in random order stay in nearly that order. The result depends on the arguments alone.

    Args:
        interactions: all of them.
        conversations: for each conversation, in the order to train on, the indices of its
            interactions. A conversation that does not fit into a pack is cut between interactions.
        max_tokens: the budget of a pack. An interaction that exceeds it gets a pack of its own.
        sharing: how the packs will be computed; "off" counts unshared tokens.

    Returns:
        Lists of indices into ``interactions``; each index of ``conversations`` once.

    Raises:
        ValueError: as `build_plan`; ``max_tokens < 1``; ``open_packs < 1``; an index out of range.
    """
    check_interactions("pack_conversations", interactions)
    check_sharing_level("pack_conversations", sharing)
    if max_tokens < 1:
        raise ValueError(f"pack_conversations: max_tokens must be >= 1, got {max_tokens}")
    if open_packs < 1:
        raise ValueError(f"pack_conversations: open_packs must be >= 1, got {open_packs}")
    for number, indices in enumerate(conversations):
        for index in indices:
            if not 0 <= index < len(interactions):
                raise ValueError(
                    f"pack_conversations: conversations[{number}] must hold indices in "
                    f"[0, {len(interactions)}), got {index}"
                )
    packs: list[list[int]] = []
    room: dict[int, int] = {}  # tokens left in each open pack, oldest first
    for indices in conversations:
        for part, tokens in _cut(interactions, indices, max_tokens, sharing):
            number = next((n for n, left in room.items() if tokens <= left), None)
            if number is None:
                if len(room) == open_packs:
                    del room[min(room, key=lambda n: room[n])]
                number = len(packs)
                packs.append([])
                room[number] = max_tokens
            packs[number].extend(part)
            room[number] -= tokens
    return packs


def _cut(
    interactions: Sequence[InteractionIds], indices: Sequence[int], max_tokens: int, sharing: Sharing
) -> Iterable[tuple[list[int], int]]:
    """The parts of a conversation that fit the budget, each with its number of tokens."""
    part: list[int] = []
    tokens = 0
    root = Node((), 0, None, False)
    for index in indices:
        added = _added_tokens(root, interactions[index], sharing)
        if part and tokens + added > max_tokens:
            yield part, tokens
            part, tokens = [], 0
            root = Node((), 0, None, False)
            added = _added_tokens(root, interactions[index], sharing)
        part.append(index)
        tokens += added
    if part:
        yield part, tokens


def _added_tokens(root: Node, item: InteractionIds, sharing: Sharing) -> int:
    """How many tokens an interaction adds to a plan; ``root`` is the trie of those before it."""
    sequences = ([*item.prompt_ids, *item.completion_ids], [*item.teacher_prompt_ids, *item.completion_ids])
    if sharing == "off":
        return sum(len(ids) for ids in sequences)
    if sharing == "interaction":
        root = Node((), 0, None, False)
    return sum(insert(root, ids, False)[1] for ids in sequences)
