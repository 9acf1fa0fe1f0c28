"""Puts the signal into words, for readers who know nothing of log-probabilities."""

from __future__ import annotations

import math

from fastsdpo.signal.compute import SignalResult
from fastsdpo.signal.tokens import TokenGroup, visible

MORE = "blue: the model would say this more after reading the reply"
LESS = "orange: the model would say this less"
TRAINING = "Training moves the model that way."

STILL = math.log(1.05)  # nats; a smaller change is none to a reader
CLEAR = 1.2  # times as much; less is no difference between two replies


def times(log_ratio: float) -> str:
    """Says what a log-ratio in nats means, such as ``"8.1 times more likely"``."""
    if abs(log_ratio) < STILL:
        return "as likely as before"
    factor = math.exp(min(abs(log_ratio), math.log(10_000)))
    number = "over 10,000 times" if factor >= 9_999 else f"{factor:.{1 if factor < 10 else 0}f} times"
    return f"{number} {'more' if log_ratio > 0 else 'less'} likely"


def verdict(result: SignalResult) -> str:
    """Says in one sentence what the follow-up does to the answer, and at which word it does most."""
    real, unrelated = result.real, result.unrelated
    other = [0.0] * len(real.log_ratio) if unrelated is None else unrelated.log_ratio
    shown = [group for group in result.groups if group.text.strip() and not group.special]

    def beyond(group: TokenGroup) -> float:
        """How much more the reply moves a word than an unrelated one does; 0 where it moves it less."""
        mine, others = group.value(real.log_ratio), group.value(other)
        return abs(mine - others) if abs(mine) > abs(others) else 0.0

    top = max(shown, key=beyond, default=None)
    if top is None or real.mean_absolute < STILL:
        return "The reply hardly changes what the model would say."
    if beyond(top) < STILL:
        return "The reply moves no word of the answer more than an unrelated reply does."
    said = (
        f"Knowing the reply, the model would be {'more' if real.sum > 0 else 'less'} likely to give this answer, and "
        f"“{' '.join(visible(top.text, marks=False).split())}” is {times(top.value(real.log_ratio))}"
    )
    return f"{said}." if unrelated is None else f"{said} (after an unrelated reply: {times(top.value(other))})."


def comparison(result: SignalResult) -> str:
    """Compares in one sentence how much the follow-up and an unrelated one move the answer; "" without the latter."""
    if result.unrelated is None:
        return ""
    ratio = result.real.mean_absolute / max(1e-9, result.unrelated.mean_absolute)
    if ratio >= CLEAR:
        return f"Over the whole answer the reply moves the model {ratio:.1f} times as much as an unrelated one."
    amount = "as much" if ratio > 1 / CLEAR else f"{1 / ratio:.1f} times as much"
    return f"Over the whole answer an unrelated reply moves the model {amount}, so look for where the two differ."
