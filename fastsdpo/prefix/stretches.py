"""Which packed tokens a recurrent mixer computes in one call, and the call whose states it starts from.

A recurrent layer reads a sequence from left to right and hands on states. In a plan, the states after a token
are those of every sequence that goes through it. So each run is cut where another run leaves it. Such a
*stretch* starts from the states after the token before it, and leaves its own for the stretches below.

One token and states is the decoding path of the mixers of transformers: it writes into the states, and some of
its kernels have no backward pass. So a stretch of one token leaves no states. The stretches below it run its
token once more, in front of their own, from the states before it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from fastsdpo.prefix.plan import Plan

# The shorter stretches of a call are padded to the longest, by at most a quarter of it.
SHORTEST = 0.75


class Stretch(NamedTuple):
    """Packed tokens ``[start, stop)`` and where their states come from.

    Attributes:
        before: the packed token whose states the stretch starts from; None: it starts a sequence.
        again: tokens between ``before`` and ``start`` that are run once more.
        kept: whether a stretch below starts from the states after ``stop - 1``.
    """

    start: int
    stop: int
    before: int | None
    again: tuple[int, ...]
    kept: bool

    @property
    def length(self) -> int:
        """Tokens that the mixer gets."""
        return len(self.again) + self.stop - self.start


def plan_stretches(plan: Plan) -> list[Stretch]:
    """All runs of a plan, cut where another run leaves them, in packed order."""
    cuts: dict[int, set[int]] = {run.start: set() for run in plan.runs}
    for run in plan.runs:
        if run.ancestors:
            cuts[run.ancestors[-1].start].add(run.ancestors[-1].stop)
    found: list[Stretch] = []
    stateless: dict[int, Stretch] = {}  # stretches of one token, by token
    for run in plan.runs:
        before = run.ancestors[-1].stop - 1 if run.ancestors else None
        for start, stop in itertools.pairwise(sorted({run.start, run.stop, *cuts[run.start]})):
            origin, again = before, ()
            if before in stateless:
                above = stateless[before]
                origin, again = above.before, (*above.again, above.start)
            single = stop - start == 1 and origin is not None
            goes_on = stop < run.stop or stop in cuts[run.start]
            stretch = Stretch(start, stop, origin, again, goes_on and not single)
            if single:
                stateless[start] = stretch
            found.append(stretch)
            before = stop - 1
    return found


def group_calls(plan: Plan, first: int, stop: int) -> list[list[Stretch]]:
    """The calls of a mixer that compute the packed tokens ``[first, stop)``.

    Each stretch that leaves states is a call, in packed order. Then come the others, of similar length together:
    what stands behind the end of a row changes nothing that is read.
    """
    stretches = [s for s in plan_stretches(plan) if first <= s.start < stop]
    calls = [[s] for s in stretches if s.kept]
    row: list[Stretch] = []
    for stretch in sorted((s for s in stretches if not s.kept), key=lambda s: (s.before is None, -s.length)):
        alike = row and (stretch.before is None) == (row[0].before is None)
        if alike and stretch.length >= max(SHORTEST * row[0].length, 2):
            row.append(stretch)
        else:
            row = [stretch]
            calls.append(row)
    return calls


def handed_on(plan: Plan, stop: int) -> tuple[set[int], set[int]]:
    """Tokens before ``stop`` whose states, and tokens whose inputs, the stretches from ``stop`` on need."""
    later = [s for s in plan_stretches(plan) if s.start >= stop]
    states = {s.before for s in later if s.before is not None and s.before < stop}
    return states, {token for s in later for token in s.again if token < stop}
