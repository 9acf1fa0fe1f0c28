"""Answers that show a model coming apart: empty, repetitive, or drawn from a collapsed distribution.

A user who wants short answers is "satisfied" by a model that says "Yes yes yes", so satisfaction alone
would call a ruined model a success.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, deque
from collections.abc import Sequence

# A share of repeated 4-grams above this is repetition; ordinary prose of 200 words is below 0.1.
REPEATED = 0.5
LONGEST_RUN = 4  # the same word five times in a row
_WORD = re.compile(r"\w+|[^\w\s]")


def degenerate(response: str) -> str | None:
    """Says why an answer is degenerate: "empty", "repetition", or None if it is not.

    An empty answer has no letter and no digit. A repetitive one has a word more than four times in a row, or
    (from 12 words on) more than half of its 4-grams of words occur earlier in the answer.
    """
    if not any(c.isalnum() for c in response):
        return "empty"
    words = [word.lower() for word in _WORD.findall(response)]
    run = 1
    for before, word in itertools.pairwise(words):
        run = run + 1 if word == before and word[0].isalnum() else 1
        if run > LONGEST_RUN:
            return "repetition"
    if len(words) >= 12:
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        repeated = sum(count - 1 for count in Counter(grams).values())
        if repeated > REPEATED * len(grams):
            return "repetition"
    return None


class CollapseDetector:
    """Watches the share of degenerate answers and the entropy over the last interactions of a run.

    Args:
        window: how many of the last interactions are looked at.
        min_entropy_share: an entropy below this share of the first full window's entropy is a problem.
        max_share: a share of degenerate answers from here on is a problem; None: 0.5.
    """

    def __init__(self, *, window: int, min_entropy_share: float, max_share: float | None):
        self.window, self.min_entropy_share, self.max_share = window, min_entropy_share, max_share
        self.answers: deque[bool] = deque(maxlen=window)
        self.entropies: deque[float] = deque(maxlen=window)
        self.first_entropy: float | None = None

    def add(self, responses: Sequence[str]) -> None:
        self.answers.extend(degenerate(response) is not None for response in responses)

    def add_entropies(self, values: Sequence[float]) -> None:
        """Adds entropies per token in nats, one value per answer."""
        self.entropies.extend(values)
        if self.first_entropy is None and len(self.entropies) == self.window:
            self.first_entropy = sum(self.entropies) / self.window

    @property
    def share(self) -> float:
        """The share of degenerate answers in the window, 0 to 1."""
        return sum(self.answers) / max(1, len(self.answers))

    @property
    def entropy_share(self) -> float:
        """The window's mean entropy divided by that of the first full window; 1 before that window is full."""
        if self.first_entropy is None or self.first_entropy <= 0:
            return 1.0
        return sum(self.entropies) / len(self.entropies) / self.first_entropy

    def problem(self) -> str | None:
        """Says in words what is wrong, or None. Nothing is wrong before the window is full."""
        limit = 0.5 if self.max_share is None else self.max_share
        if len(self.answers) == self.window and self.share >= limit:
            return f"{self.share:.0%} of the last {self.window} answers are empty or repetitive"
        if self.entropy_share < self.min_entropy_share:
            return f"the entropy of the answers fell to {self.entropy_share:.0%} of what it was at the start"
        return None

    def state_dict(self) -> dict:
        return {"answers": list(self.answers), "entropies": list(self.entropies), "first_entropy": self.first_entropy}

    def load_state_dict(self, state: dict) -> None:
        self.answers = deque(state["answers"], maxlen=self.window)
        self.entropies = deque(state["entropies"], maxlen=self.window)
        self.first_entropy = state["first_entropy"]
