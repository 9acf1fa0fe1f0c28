"""Computes the win rate of a model against its base: outcomes by rule or judge, the rate and its interval."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

JUDGE_SYSTEM = (
    "You compare two answers to a user's message. {persona}Say which answer this user would prefer. "
    "Reply with one character: A or B, or C if neither is better."
)
JUDGE_TURN = "{history}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich is better, A, B or C?"


class WinRate(NamedTuple):
    """Outcomes of a comparison.

    Attributes:
        wins, ties, losses: on how many prompts the model won, tied or lost.
        left_out: how many prompts have no verdict.
        rate: ``(wins + ties / 2) / (wins + ties + losses)``; NaN if there is no verdict.
        low, high: the 95% interval of the rate.
        without_ties: the paper's rate, ``wins / (wins + losses)``; NaN if both are 0.
    """

    wins: int
    ties: int
    losses: int
    left_out: int
    rate: float
    low: float
    high: float
    without_ties: float

    @classmethod
    def of(cls, outcomes: Sequence[float | None]) -> WinRate:
        """Counts outcomes, one per prompt: 1 is a win, 0.5 a tie, 0 a loss, None no verdict."""
        known = [outcome for outcome in outcomes if outcome is not None]
        count = len(known)
        rate = sum(known) / count if count else math.nan
        low, high = wilson(rate, count)
        wins, ties, losses = (known.count(value) for value in (1, 0.5, 0))
        without_ties = wins / (wins + losses) if wins + losses else math.nan
        return cls(wins, ties, losses, len(outcomes) - count, rate, low, high, without_ties)

    def __str__(self) -> str:
        left = f", {self.left_out} left out" if self.left_out else ""
        return (
            f"win rate {self.rate:.1%} (95% interval {self.low:.1%} to {self.high:.1%}): "
            f"{self.wins} wins, {self.ties} ties, {self.losses} losses{left}; without ties {self.without_ties:.1%}"
        )


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval (low, high) for a rate among ``count`` trials; (0, 1) if there are none."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    spread = rate * (1 - rate) / count + z * z / (4 * count * count)
    half = z * math.sqrt(spread) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare_by_rules(rules: Sequence[Any], answers: list[str], base: list[str]) -> list[float]:
    """Compares answers by rules: 1 if only the model's fulfils all rules, 0 if only the base's does, else 0.5."""

    def good(text: str) -> bool:
        return all(rule.holds(text) for rule in rules)

    return [(1 + good(mine) - good(other)) / 2 for mine, other in zip(answers, base)]


def check_wording(wording: str) -> str:
    """The wording of a judge; ValueError where it lacks a placeholder."""
    for name in ("history", "first", "second"):
        if wording.count("{" + name + "}") != 1:
            raise ValueError(f"--judge-prompt must contain {{{name}}} exactly once")
    return wording


def compare_by_judge(
    judge: Any,
    prompts: list[list[dict]],
    answers: list[str],
    base: list[str],
    persona: str = "",
    wording: str | None = None,
) -> list[float | None]:
    """Has a judge compare answers: 1 (win), 0.5, 0 or None per prompt, from two verdicts in both orders.

    Args:
        judge: a `ChatEndpoint` or a `LocalChat`.
        prompts, answers, base: N message lists, the model's N answers to them and the base's.
        persona: who the user is and what they want.
        wording: what the judge is asked: one user message with ``{history}``, ``{first}`` and ``{second}``, and
            ``{persona}`` if it is wanted. None: `JUDGE_SYSTEM` and `JUDGE_TURN`.

    Raises:
        ValueError: the wording lacks a placeholder.
    """
    if wording is not None:
        check_wording(wording)
    system = JUDGE_SYSTEM.replace("{persona}", f"The user: {persona} " if persona else "")

    def question(prompt: list[dict], first: str, second: str) -> list[dict]:
        history = "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        turn = JUDGE_TURN if wording is None else wording.replace("{persona}", persona)
        for name, text in (("history", history), ("first", first), ("second", second)):
            head, _, tail = turn.partition("{" + name + "}")
            turn = head + text.replace("{", "(").replace("}", ")") + tail
        asked = [{"role": "user", "content": turn}]
        return asked if wording is not None else [{"role": "system", "content": system}, *asked]

    asked = [question(p, mine, other) for p, mine, other in zip(prompts, answers, base)]
    asked += [question(p, other, mine) for p, mine, other in zip(prompts, answers, base)]
    verdicts = [read_verdict(reply) for reply in judge.replies(asked)]
    outcomes: list[float | None] = []
    for forward, backward in zip(verdicts[: len(prompts)], verdicts[len(prompts) :]):
        if forward is None or backward is None:
            outcomes.append(None)
        elif (forward, backward) == ("A", "B"):
            outcomes.append(1.0)
        elif (forward, backward) == ("B", "A"):
            outcomes.append(0.0)
        else:
            outcomes.append(0.5)
    return outcomes


def read_verdict(reply: str | None) -> str | None:
    """Finds the verdict in a reply: the first A, B or C that stands alone; None if there is none."""
    found = re.search(r"(?<![A-Za-z])([ABC])(?![A-Za-z])", reply or "")
    return found.group(1) if found else None
