"""Which tokens have to be computed once, and which of their rows predict which response token.

The sequences (a student's is prompt + completion, a teacher's teacher prompt + completion) go into
radix tries over token ids, so prefixes are found on ids and never assumed from text: a template that
renders history differently from a fresh answer simply branches. Two sequences that share a prefix
share its nodes; a token depends on nothing but the tokens above it, so its hidden state, keys and
values serve every sequence below.

Layout. The nodes are cut into *runs*, each a chain that follows the child with the most tokens below
it (heavy paths, https://doi.org/10.1016/0022-0000(83)90006-5), and every run is laid
out without a gap. Then all a token may attend to is: the tokens of its own run up to itself, and for
each run on the way to the root one unbroken slice, visible to the whole run. There are at most
log2(tokens) of those. Students' runs come first; a teacher's tokens may stand below a student's but
never above one, so the students' tokens alone are a complete plan, and the teachers' attend to them.

    packed:   [ run 0: x1 y1 x2 y2 ... ][ run 1: y1 in another rendering ] | [ o1 y1 ][ o2 y2 ] ...
               students                                                     teachers

Everything here is integer arithmetic on lists, linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Sharing = Literal["conversation", "interaction", "off"]


class TokenizedInteraction(Protocol):
    """What is read of an interaction: three lists of token ids (`fastsdpo.TokenizedInteraction`)."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def teacher_prompt_ids(self) -> Sequence[int]: ...
    @property
    def completion_ids(self) -> Sequence[int]: ...


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


def check_sharing_level(name: str, sharing: str) -> None:
    if sharing not in ("conversation", "interaction", "off"):
        raise ValueError(f"{name}: sharing must be 'conversation', 'interaction' or 'off', got {sharing!r}")


# --------------------------------------------------------------------------------------- the trie


class _Node:
    """Tokens ``ids[start:stop]``; a node's place in its sequence is its place in every other one."""

    __slots__ = (
        "children",
        "heavy",
        "ids",
        "packed",
        "parent",
        "start",
        "stop",
        "teacher",
        "tokens",
    )

    def __init__(self, ids: Sequence[int], start: int, parent: _Node | None, teacher: bool):
        self.ids, self.start, self.stop, self.parent = ids, start, len(ids), parent
        self.teacher = teacher
        self.children: dict[int, _Node] = {}
        self.packed = -1  # packed index of the first token
        self.tokens = 0  # in this node and below, students and teachers counted apart
        self.heavy: _Node | None = None


def _first_difference(a: Sequence[int], b: Sequence[int], start: int, stop: int) -> int:
    """The first index in ``[start, stop)`` where the lists differ, else ``stop``."""
    while start < stop:
        step = min(start + 64, stop)
        if a[start:step] == b[start:step]:
            start = step
            continue
        while a[start] == b[start]:
            start += 1
        return start
    return stop


def _insert(root: _Node, ids: Sequence[int], teacher: bool) -> tuple[_Node, int]:
    """The node in which ``ids`` end, and the number of tokens that were new."""
    node, start = root, 0
    while start < len(ids):
        child = node.children.get(ids[start])
        if child is None:
            child = _Node(ids, start, node, teacher)
            node.children[ids[start]] = child
            return child, len(ids) - start
        start = _first_difference(child.ids, ids, start + 1, min(child.stop, len(ids)))
        if start < child.stop:
            # The upper part is the new node: those who remember `child` as their end stay right.
            upper = _Node(child.ids, child.start, node, child.teacher)
            upper.stop = start
            node.children[child.ids[child.start]] = upper
            upper.children[child.ids[start]] = child
            child.start, child.parent = start, upper
            child = upper
        node = child
    return node, 0


def _preorder(root: _Node) -> list[_Node]:
    nodes, stack = [], list(reversed(root.children.values()))
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack.extend(reversed(node.children.values()))
    return nodes


# --------------------------------------------------------------------------------------- the plan


class Piece(NamedTuple):
    """Packed tokens ``[start, stop)``, at positions ``position, position + 1, ...`` in a sequence."""

    start: int
    stop: int
    position: int


class Run(NamedTuple):
    """A chain of tokens without a gap, and what all of them see: the way to the root, root first."""

    start: int
    stop: int
    position: int
    ancestors: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """Packed tokens and the rows of interest; tensors are int64 on the CPU.

    Attributes:
        token_ids: ``[T]``, the students' tokens first.
        position_ids: ``[T]``, the place of each token in its sequences.
        student_tokens: how many of the T tokens are the students'.
        runs: in packed order; see the module.
        subtree_start, subtree_stop: ``[T]`` times of a depth-first walk; q attends to k exactly if
            ``subtree_start[k] <= subtree_start[q] < subtree_stop[k]``.
        student_rows, teacher_rows: ``[N]`` packed index that predicts each response token;
            ``[0]`` where the plan was built without them.
        target_ids, sequence_ids, position_in_response: ``[N]``, as in `ResponseStates`.
    """

    token_ids: Tensor
    position_ids: Tensor
    student_tokens: int
    runs: tuple[Run, ...]
    subtree_start: Tensor
    subtree_stop: Tensor
    student_rows: Tensor
    teacher_rows: Tensor
    target_ids: Tensor
    sequence_ids: Tensor
    position_in_response: Tensor

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def teacher_tokens(self) -> int:
        return self.tokens - self.student_tokens


def build_plan(
    interactions: Sequence[TokenizedInteraction],
    *,
    sharing: Literal["conversation", "interaction"] = "conversation",
    students: bool = True,
    teachers: bool = True,
) -> Plan:
    """Plans one pack.

    Args:
        interactions: of one or of several conversations.
        sharing: "conversation": one trie for all; "interaction": one for each interaction.
        students, teachers: whose sequences to plan. A teacher with weights of its own gets a plan
            with ``students=False``, since it can use none of the student's keys and values.

    Raises:
        ValueError: no interactions, an empty list in one, or an unknown sharing.
    """
    check_interactions("build_plan", interactions)
    if sharing not in ("conversation", "interaction"):
        raise ValueError(f"build_plan: sharing must be 'conversation' or 'interaction', got {sharing!r}")
    if not (students or teachers):
        raise ValueError("build_plan: students or teachers must be True")

    shared_root = _Node((), 0, None, False)
    roots = [shared_root if sharing == "conversation" else _Node((), 0, None, False) for _ in interactions]
    student_ends, teacher_ends = [], []
    if students:  # before the teachers, so that every shared node is the students'
        for root, item in zip(roots, interactions):
            ids = [*item.prompt_ids, *item.completion_ids]
            student_ends.append(_insert(root, ids, teacher=False)[0])
    if teachers:
        for root, item in zip(roots, interactions):
            ids = [*item.teacher_prompt_ids, *item.completion_ids]
            teacher_ends.append(_insert(root, ids, teacher=True)[0])

    distinct = [shared_root] if sharing == "conversation" else roots
    walks = [_preorder(root) for root in distinct]
    for walk in walks:
        _choose_heavy_children(walk)
    packed = _Packed()
    for walk in walks:
        packed.lay_out(node for node in walk if not node.teacher)
    student_tokens = packed.tokens
    for walk in walks:
        packed.lay_out(node for node in walk if node.teacher)
    subtree_start, subtree_stop = _subtree_times(walks, packed.tokens)

    targets: list[int] = []
    sequence: list[int] = []
    position: list[int] = []
    student_rows: list[int] = []
    teacher_rows: list[int] = []
    for index, item in enumerate(interactions):
        count = len(item.completion_ids)
        targets.extend(item.completion_ids)
        sequence.extend([index] * count)
        position.extend(range(count))
        if students:
            student_rows.extend(_predicting_rows(student_ends[index], len(item.prompt_ids), count))
        if teachers:
            prompt = len(item.teacher_prompt_ids)
            teacher_rows.extend(_predicting_rows(teacher_ends[index], prompt, count))
    return Plan(
        token_ids=torch.tensor(packed.ids),
        position_ids=torch.tensor(packed.positions),
        student_tokens=student_tokens,
        runs=tuple(packed.runs),
        subtree_start=subtree_start,
        subtree_stop=subtree_stop,
        student_rows=torch.tensor(student_rows, dtype=torch.int64),
        teacher_rows=torch.tensor(teacher_rows, dtype=torch.int64),
        target_ids=torch.tensor(targets),
        sequence_ids=torch.tensor(sequence),
        position_in_response=torch.tensor(position),
    )


def _choose_heavy_children(preorder: list[_Node]) -> None:
    for node in reversed(preorder):
        node.tokens += node.stop - node.start
        parent = node.parent
        # A run never passes from a student's node to a teacher's: they are packed apart.
        if parent is None or parent.teacher != node.teacher:
            continue
        parent.tokens += node.tokens
        if parent.heavy is None or node.tokens > parent.heavy.tokens:
            parent.heavy = node


class _Packed:
    """The growing pack: ids, positions and runs."""

    def __init__(self):
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.runs: list[Run] = []
        self._run_of: dict[_Node, Run] = {}

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def lay_out(self, nodes: Iterable[_Node]) -> None:
        """Appends the runs that begin at one of ``nodes``, parents before children."""
        for head in nodes:
            if head.packed >= 0:
                continue  # inside a run that was laid out from its head
            start, ancestors = self.tokens, ()
            if head.parent in self._run_of:
                above = self._run_of[head.parent]
                seen = head.parent.packed + head.parent.stop - head.parent.start
                ancestors = (*above.ancestors, Piece(above.start, seen, above.position))
            chain, node = [], head
            while node is not None:
                node.packed = self.tokens
                self.ids.extend(node.ids[node.start : node.stop])
                self.positions.extend(range(node.start, node.stop))
                chain.append(node)
                node = node.heavy
            run = Run(start, self.tokens, head.start, ancestors)
            self.runs.append(run)
            for node in chain:
                self._run_of[node] = run


def _subtree_times(walks: list[list[_Node]], tokens: int) -> tuple[Tensor, Tensor]:
    """When a depth-first walk enters each packed token, and when it leaves its subtree."""
    start, stop = [0] * tokens, [0] * tokens
    time = 0
    ends: dict[_Node, int] = {}
    for walk in walks:
        for node in walk:
            count = node.stop - node.start
            start[node.packed : node.packed + count] = range(time, time + count)
            time += count
            ends[node] = time
        for node in reversed(walk):
            if node.parent in ends:
                ends[node.parent] = max(ends[node.parent], ends[node])
            count = node.stop - node.start
            stop[node.packed : node.packed + count] = [ends[node]] * count
    return torch.tensor(start), torch.tensor(stop)


def _predicting_rows(end: _Node, prompt: int, completion: int) -> list[int]:
    """Packed indices of positions ``[prompt - 1, prompt + completion - 1)`` above and in ``end``."""
    first, last = prompt - 1, prompt + completion - 1
    slices = []
    node = end
    while node is not None and node.stop > first:
        low, high = max(node.start, first), min(node.stop, last)
        slices.append(range(node.packed + low - node.start, node.packed + high - node.start))
        node = node.parent
    return [row for part in reversed(slices) for row in part]


# ------------------------------------------------------------------------------ counts and packing


class TokenCounts(NamedTuple):
    """Tokens that go through the model in a forward pass (padding aside)."""

    student: int
    teacher: int
    unshared_student: int
    unshared_teacher: int


def count_tokens(
    interactions: Sequence[TokenizedInteraction],
    *,
    sharing: Sharing = "conversation",
    live: bool = True,
) -> TokenCounts:
    """Tokens computed with sharing and without.

    Args:
        live: the teacher is the student's own model and reads its prefixes; else it has weights of
            its own, and computes its sequences (shared among themselves) anew.

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
        root = _Node((), 0, None, False)
        for i in group:
            student += _insert(root, [*i.prompt_ids, *i.completion_ids], False)[1]
        root = root if live else _Node((), 0, None, False)
        for i in group:
            teacher += _insert(root, [*i.teacher_prompt_ids, *i.completion_ids], True)[1]
    return TokenCounts(student, teacher, unshared_student, unshared_teacher)


def pack_conversations(
    interactions: Sequence[TokenizedInteraction],
    conversations: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sharing: Sharing = "conversation",
    open_packs: int = 8,
) -> list[list[int]]:
    """Packs of interactions whose plans hold at most ``max_tokens`` tokens, students' and teachers'.

    First fit over at most ``open_packs`` packs that are still open: a conversation goes to the oldest
    one with room; where none has room and all are open, the fullest is closed. Packs come in the
    order in which they were opened, so a shuffled order of conversations stays shuffled, and the
    result depends on nothing but the arguments.

    Args:
        interactions: all of them.
        conversations: for each conversation, in the order to train on, the indices of its
            interactions. One that does not fit a pack is cut between interactions.
        max_tokens: the budget. An interaction that exceeds it alone gets a pack of its own.
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
    interactions: Sequence[TokenizedInteraction],
    indices: Sequence[int],
    max_tokens: int,
    sharing: Sharing,
) -> Iterable[tuple[list[int], int]]:
    """A conversation in parts that fit the budget, each with its number of tokens."""
    part: list[int] = []
    tokens = 0
    root = _Node((), 0, None, False)
    for index in indices:
        added = _added_tokens(root, interactions[index], sharing)
        if part and tokens + added > max_tokens:
            yield part, tokens
            part, tokens = [], 0
            root = _Node((), 0, None, False)
            added = _added_tokens(root, interactions[index], sharing)
        part.append(index)
        tokens += added
    if part:
        yield part, tokens


def _added_tokens(root: _Node, item: TokenizedInteraction, sharing: Sharing) -> int:
    sequences = (
        [*item.prompt_ids, *item.completion_ids],
        [*item.teacher_prompt_ids, *item.completion_ids],
    )
    if sharing == "off":
        return sum(len(ids) for ids in sequences)
    if sharing == "interaction":
        root = _Node((), 0, None, False)
    return sum(_insert(root, ids, False)[1] for ids in sequences)
