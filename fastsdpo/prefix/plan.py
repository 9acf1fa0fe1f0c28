"""Which tokens a pack has to compute, each shared prefix once, and which of them are the rows.

The sequences go into radix tries over token ids (`fastsdpo.prefix.trie`). Prefixes are found on ids and never
assumed from text: a template that renders the history differently from a fresh answer simply branches. Two
sequences that share a prefix share its nodes. A token depends only on the tokens above it, so its hidden
state, keys and values serve every sequence below.

Layout. The nodes are cut into *runs*. A run is a chain that always follows the child with the most tokens below
it (heavy paths, https://doi.org/10.1016/0022-0000(83)90006-5), and its tokens are packed without a gap. A
token then attends to the tokens of its own run up to itself, and to one *segment* of each run on the way to
the root; the whole run attends to the same segments. There are at most log2(tokens) of them. Students' runs
come first. A teacher's tokens may stand below a student's but never above one, so the students' tokens alone
are a complete plan, and the teachers' tokens attend to them.

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

from fastsdpo.prefix.trie import Node, insert, preorder

Sharing = Literal["conversation", "interaction", "off"]


class InteractionIds(Protocol):
    """What is read of an interaction: three lists of token ids (`fastsdpo.TokenizedInteraction`)."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def teacher_prompt_ids(self) -> Sequence[int]: ...
    @property
    def completion_ids(self) -> Sequence[int]: ...


def check_interactions(name: str, interactions: Sequence[InteractionIds]) -> None:
    """Checks that every list holds tokens: without a prompt nothing predicts the first response token.

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
    """Raises ValueError for an unknown sharing, in the name of the function ``name``."""
    if sharing not in ("conversation", "interaction", "off"):
        raise ValueError(f"{name}: sharing must be 'conversation', 'interaction' or 'off', got {sharing!r}")


class Segment(NamedTuple):
    """Packed tokens ``[start, stop)``; the first is token ``position`` of its sequences, the next follow it."""

    start: int
    stop: int
    position: int


class Run(NamedTuple):
    """A chain of packed tokens ``[start, stop)``: each attends to those of the run before it and to itself.

    All of them attend to ``ancestors`` too, the segments of other runs on the way to the root, root first.
    """

    start: int
    stop: int
    position: int
    ancestors: tuple[Segment, ...]


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
        student_rows, teacher_rows: ``[N]`` packed index of the token that predicts each response token. A
            teacher's row may be a student's token. ``[0]`` where the plan was built without them.
    """

    token_ids: Tensor
    position_ids: Tensor
    student_tokens: int
    runs: tuple[Run, ...]
    subtree_start: Tensor
    subtree_stop: Tensor
    student_rows: Tensor
    teacher_rows: Tensor

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def teacher_tokens(self) -> int:
        return self.tokens - self.student_tokens


def build_plan(
    interactions: Sequence[InteractionIds],
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

    root = Node((), 0, None, False)
    roots = [root if sharing == "conversation" else Node((), 0, None, False) for _ in interactions]
    # Students before teachers, so that every node that both share is a student's.
    student_ends = _insert_all(roots, interactions, teacher=False) if students else []
    teacher_ends = _insert_all(roots, interactions, teacher=True) if teachers else []
    walks = [preorder(root) for root in dict.fromkeys(roots)]
    for walk in walks:
        _choose_heavy_children(walk)
    packed = _Packed()
    for walk in walks:
        packed.lay_out(node for node in walk if not node.teacher)
    student_tokens = packed.tokens
    for walk in walks:
        packed.lay_out(node for node in walk if node.teacher)
    subtree_start, subtree_stop = _subtree_times(walks, packed.tokens)
    return Plan(
        token_ids=torch.tensor(packed.ids),
        position_ids=torch.tensor(packed.positions),
        student_tokens=student_tokens,
        runs=tuple(packed.runs),
        subtree_start=subtree_start,
        subtree_stop=subtree_stop,
        student_rows=_predicting_rows(student_ends, interactions),
        teacher_rows=_predicting_rows(teacher_ends, interactions),
    )


def positions_without(plan: Plan, padding: int) -> Tensor:
    """``[T]`` positions as RoBERTa counts them: from ``padding + 1``, and not over tokens with the id ``padding``."""
    counted = plan.token_ids != padding
    before = torch.cat([torch.zeros(1, dtype=torch.int64), counted.cumsum(0)])
    positions = torch.empty_like(plan.token_ids)
    for run in plan.runs:
        above = sum(int(before[segment.stop] - before[segment.start]) for segment in run.ancestors)
        positions[run.start : run.stop] = before[run.start + 1 : run.stop + 1] - before[run.start] + above
    return positions * counted + padding


def _insert_all(roots: list[Node], interactions: Sequence[InteractionIds], *, teacher: bool) -> list[Node]:
    """Inserts one side's sequences; the nodes in which they end."""
    ends = []
    for root, item in zip(roots, interactions):
        prompt = item.teacher_prompt_ids if teacher else item.prompt_ids
        ends.append(insert(root, [*prompt, *item.completion_ids], teacher=teacher)[0])
    return ends


def _choose_heavy_children(preorder: list[Node]) -> None:
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
        self._run_of: dict[Node, Run] = {}

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def lay_out(self, nodes: Iterable[Node]) -> None:
        """Appends the runs that begin at one of ``nodes``, parents before children."""
        for head in nodes:
            if head.packed >= 0:
                continue  # inside a run that was laid out from its head
            start, ancestors = self.tokens, ()
            if head.parent in self._run_of:
                above = self._run_of[head.parent]
                seen = head.parent.packed + head.parent.stop - head.parent.start
                ancestors = (*above.ancestors, Segment(above.start, seen, above.position))
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


def _subtree_times(walks: list[list[Node]], tokens: int) -> tuple[Tensor, Tensor]:
    """When a depth-first walk enters each packed token, and when it leaves its subtree."""
    start, stop = [0] * tokens, [0] * tokens
    time = 0
    ends: dict[Node, int] = {}
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


def _predicting_rows(ends: list[Node], interactions: Sequence[InteractionIds]) -> Tensor:
    """``[N]`` packed index of the token before each response token; ``[0]`` where ``ends`` is empty."""
    rows: list[int] = []
    for end, item in zip(ends, interactions):
        last = end.stop - 1  # the position of the sequence's last token, which predicts nothing
        first = last - len(item.completion_ids)
        slices = []
        node: Node | None = end
        while node is not None and node.stop > first:
            low, high = max(node.start, first), min(node.stop, last)
            slices.append(range(node.packed + low - node.start, node.packed + high - node.start))
            node = node.parent
        rows.extend(row for part in reversed(slices) for row in part)
    return torch.tensor(rows, dtype=torch.int64)


class ResponseLabels(NamedTuple):
    """What the N rows of a pack predict; ``[N]`` int64 each.

    Attributes:
        target_ids: the response tokens.
        sequence_ids: the index of the interaction.
        position_in_response: 0 for an interaction's first response token.
    """

    target_ids: Tensor
    sequence_ids: Tensor
    position_in_response: Tensor


def response_labels(interactions: Sequence[InteractionIds], device: torch.device) -> ResponseLabels:
    """The labels of a pack: the responses of its interactions, one after the other."""
    labels = [
        (token, index, position)
        for index, item in enumerate(interactions)
        for position, token in enumerate(item.completion_ids)
    ]
    return ResponseLabels(*torch.tensor(labels, device=device).T.contiguous())
