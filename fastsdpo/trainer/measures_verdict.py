"""What changed between two measurements of the same interactions, with intervals, and what that says in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastsdpo.trainer.measures import NAMES

FEW = 8  # interactions below which no verdict is given


class Change(NamedTuple):
    """Of a measure, over the interactions that have it in both measurements.

    Attributes:
        before, after: means.
        change: after - before.
        standard_error: of the change, from the pairs; NaN with one interaction.
        interactions: how many.
    """

    before: float
    after: float
    change: float
    standard_error: float
    interactions: int

    @property
    def direction(self) -> int:
        """1 or -1 where the change is more than twice its standard error, else 0."""
        certain = abs(self.change) > 2 * self.standard_error  # False for NaN
        return int(math.copysign(1, self.change)) if certain else 0

    def __str__(self) -> str:
        return f"{self.change:+.3f} +- {2 * self.standard_error:.3f}"


def paired_change(before: Sequence[float], after: Sequence[float]) -> Change:
    """The mean change of pairs, and its standard error."""
    count = len(before)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(differences) / count
    error = math.nan
    if count > 1:
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    return Change(sum(before) / count, sum(after) / count, mean, error, count)


def changes(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Change]:
    """By measure; the two lists of rows are of the same interactions, in the same order.

    Raises:
        ValueError: they are not (the held-out data have changed).
    """
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise ValueError("the held-out interactions are not those that were measured before training")
    found = {}
    pairs = list(zip(before, after))
    for name in NAMES:
        both = [(a[name], b[name]) for a, b in pairs if name in a and name in b]
        if both:
            found[name] = paired_change(*zip(*both))
    both = [
        (a["margin"] - a["stranger_margin"], b["margin"] - b["stranger_margin"])
        for a, b in pairs
        if "stranger_margin" in a and "stranger_margin" in b
    ]
    if both:
        found["margin_over_stranger"] = paired_change(*zip(*both))
    return found


def verdict(found: dict[str, Change]) -> list[str]:
    """What improved, what did not, and whether the model forgets to listen; one sentence each."""
    if not found or found["answer_logp"].interactions < FEW:
        count = found["answer_logp"].interactions if found else 0
        return [f"{count} held-out interactions are too few for a verdict (at least {FEW})"]
    lines = [_margin(found), _listening(found)]
    drift = found["answer_logp"]
    if drift.direction:
        moved = "lost" if drift.direction < 0 else "gained"
        lines.append(f"drift: the logged answers {moved} {drift} nats per token (neither good nor bad by itself)")
    else:
        lines.append(f"drift: the logged answers are as likely as before ({drift})")
    return lines


def _margin(found: dict[str, Change]) -> str:
    margin, over = found.get("margin"), found.get("margin_over_stranger")
    if margin is None or over is None or over.interactions < FEW:
        return (
            "improved: cannot be told, since too few of the held-out interactions have a next answer in the log "
            f"({0 if over is None else over.interactions}, at least {FEW})"
        )
    if margin.direction > 0 and over.direction > 0:
        return (
            f"improved: the answers that came after the follow-ups gained on the logged ones ({margin}), more than "
            f"strangers' answers of their length ({over} beyond those)"
        )
    if margin.direction > 0:
        return (
            f"not improved: the answers that came after the follow-ups gained on the logged ones ({margin}), but "
            f"strangers' answers of their length did so too ({over} beyond those): style or drift, not what users said"
        )
    what = "lost" if margin.direction < 0 else "did not gain"
    return f"not improved: the answers that came after the follow-ups {what} on the logged ones ({margin})"


def _listening(found: dict[str, Change]) -> str:
    real, unrelated = found["real_abs"], found["unrelated_abs"]
    both = f"real {real}, unrelated {unrelated}"
    if real.change < 0 and unrelated.change < 0 and -1 in (real.direction, unrelated.direction):
        return f"worse: the model forgets to listen; follow-ups move its answers less, whatever they say ({both})"
    if real.direction < 0:
        return (
            f"listening: real follow-ups move its answers less and unrelated ones do not ({both}), as where it does "
            "already what they ask for"
        )
    return f"listening: no sign that the model forgets to listen ({both})"


def table(found: dict[str, Change]) -> list[str]:
    """Lines: each measure before, after and its change with twice its standard error."""
    lines = [f"{'held out, nats per token':<46} {'before':>8} {'after':>8} {'change':>17} {'n':>4}"]
    for name, title in NAMES.items():
        if name in found:
            row = found[name]
            lines.append(f"{title:<46} {row.before:>8.3f} {row.after:>8.3f} {row!s:>17} {row.interactions:>4}")
    return lines
