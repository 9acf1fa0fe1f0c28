"""Win rate of a model against its base: outcomes by rule or by a judge, the rate and its interval."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

JUDGE_SYSTEM = (
    "You compare two answers to a user's message. {persona}Say which answer this user would prefer. "
    "Reply with one character: A or B, or C if neither is better."
)
JUDGE_TURN = "{history}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich is better, A, B or C?"


class WinRate(NamedTuple):
    """Outcomes of a comparison.

    Attributes:
        wins, ties, losses: of the model, in prompts.
        left_out: prompts without a verdict.
        rate: ``(wins + ties / 2) / (wins + ties + losses)``, or with ties dropped, as in
            https://arxiv.org/abs/2603.12273, ``wins / (wins + losses)``; NaN without any.
        low, high: its 95% interval.
    """

    wins: int
    ties: int
    losses: int
    left_out: int
    rate: float
    low: float
    high: float
    ties_are: str = "half"

    @classmethod
    def of(cls, outcomes: Sequence[float | None], ties: str = "half") -> WinRate:
        """From one outcome per prompt: 1 a win, 0.5 a tie, 0 a loss, None without a verdict.

        Args:
            ties: "half" counts them as half a win, "drop" leaves them out of the rate.
        """
        known = [outcome for outcome in outcomes if outcome is not None]
        counted = [outcome for outcome in known if ties == "half" or outcome != 0.5]
        rate = sum(counted) / len(counted) if counted else math.nan
        low, high = wilson(rate, len(counted))
        counts = (known.count(1), known.count(0.5), known.count(0), len(outcomes) - len(known))
        return cls(*counts, rate, low, high, ties)

    def __str__(self) -> str:
        left = f", {self.left_out} left out" if self.left_out else ""
        kind = "" if self.ties_are == "half" else ", ties dropped"
        return (
            f"win rate{kind} {self.rate:.1%} (95% interval {self.low:.1%} to {self.high:.1%}): "
            f"{self.wins} wins, {self.ties} ties, {self.losses} losses{left}"
        )


def wilson(rate: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of Wilson for a rate out of ``count``; (0, 1) without any."""
    if count == 0:
        return 0.0, 1.0
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    spread = rate * (1 - rate) / count + z * z / (4 * count * count)
    half = z * math.sqrt(spread) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare_by_rules(rules: Sequence[Any], answers: list[str], base: list[str]) -> list[float]:
    """1, 0.5 or 0 per prompt: whether the answer fulfils all rules, against the base's."""

    def good(text: str) -> bool:
        return all(rule.holds(text) for rule in rules)

    return [(1 + good(mine) - good(other)) / 2 for mine, other in zip(answers, base)]


class JudgeWording(NamedTuple):
    """What a judge is asked: the system prompt, and the turn with {history}, {first} and {second}."""

    system: str = JUDGE_SYSTEM
    turn: str = JUDGE_TURN

    @classmethod
    def read(cls, path: str | None) -> JudgeWording:
        """From a file, whose text before a line ``---`` is the system prompt; None: ours.

        Raises:
            ValueError: the turn lacks a place for an answer or for the conversation.
        """
        if path is None:
            return cls()
        parts = re.split(r"(?m)^---\s*$", Path(path).read_text("utf-8-sig"), maxsplit=1)
        system, turn = parts if len(parts) == 2 else ("", parts[0])
        missing = [place for place in ("{history}", "{first}", "{second}") if place not in turn]
        if missing:
            raise ValueError(f"{path}: must contain {' and '.join(missing)}")
        return cls(system.strip(), turn.strip())


def compare_by_judge(
    judge: Any,
    prompts: list[list[dict]],
    answers: list[str],
    base: list[str],
    persona: str = "",
    wording: JudgeWording | None = None,
) -> list[float | None]:
    """1, 0.5, 0 or None per prompt, from two verdicts in both orders.

    Args:
        judge: `ChatEndpoint` or `LocalChat`.
        persona: who the user is and what they want.
        wording: None: ours.
    """
    asked_as = wording or JudgeWording()
    described = f"The user: {persona} " if persona and wording is None else persona
    system = asked_as.system.replace("{persona}", described)

    def question(prompt: list[dict], first: str, second: str) -> list[dict]:
        history = "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        places = {"history": history, "first": first, "second": second, "persona": described}
        turn = re.sub(r"\{(history|first|second|persona)\}", lambda found: places[found[1]], asked_as.turn)
        start = [{"role": "system", "content": system}] if system else []
        return [*start, {"role": "user", "content": turn}]

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
    """A, B or C: the first that stands alone in the reply; None where there is none."""
    found = re.search(r"(?<![A-Za-z])([ABC])(?![A-Za-z])", reply or "")
    return found.group(1) if found else None
