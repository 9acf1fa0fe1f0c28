"""Interactions as the tokens that are trained on, for a person to look at: ``--show N``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from fastsdpo.data import Interaction, InteractionTokenizer, TokenizedInteraction
from fastsdpo.signal.terminal import RESET, color_depth
from fastsdpo.signal.tokens import group_tokens, visible

FAINT, CONTROL, ADDED, TRAINED = "\x1b[2m", "\x1b[35m", "\x1b[33m", ("\x1b[44;97m", "\x1b[46;30m")
LEGEND = (
    "faint: the prompt; yellow: what the hindsight adds to it; blue and cyan, token by token: what is trained "
    "on; magenta: control tokens"
)
PLAIN_LEGEND = "{+ what the hindsight adds to the prompt +}, [what is trained on, token|by|token]"


def show_interactions(tokenize: InteractionTokenizer, interactions: Iterable[Interaction], count: int) -> str:
    """The first `count` interactions as text; one that cannot be tokenized as its error."""
    colors = color_depth(sys.stdout, os.environ)
    blocks = []
    for item in tokenize.stream(islice(interactions, count)):
        blocks.append(f"{item}\n" if isinstance(item, ValueError) else show_tokens(tokenize.tokenizer, item, colors))
    return "\n".join([*blocks, LEGEND if colors else PLAIN_LEGEND])


def show_tokens(tokenizer: Any, item: TokenizedInteraction, colors: int) -> str:
    """One interaction: the student's prompt, in it what the teacher's has besides, and the trained tokens.

    Args:
        colors: bits of colour; 0: brackets instead.
    """
    prompt, teacher = item.prompt_ids, item.teacher_prompt_ids
    same = _common(prompt, teacher)
    tail = _common(prompt[same:][::-1], teacher[same:][::-1])
    before, after = prompt[: len(prompt) - tail], prompt[len(prompt) - tail :]
    added = teacher[same : len(teacher) - tail]
    instead = len(before) - same  # tokens of the prompt that the teacher's has not (a merge across the seam)
    head = f"{item.id or 'interaction'}: {len(prompt)} tokens of prompt, {len(teacher)} with hindsight, "
    head += f"{len(item.completion_ids)} trained on"
    if instead:
        head += f"; {instead} of the prompt's tokens read otherwise with hindsight"
    if not colors:
        shown = _plain(tokenizer, before) + "{+" + _plain(tokenizer, added) + "+}" + _plain(tokenizer, after)
        return f"{head}\n{shown}[{_plain(tokenizer, item.completion_ids, '|')}]\n"
    parts = [
        _painted(tokenizer, before, (FAINT,)),
        _painted(tokenizer, added, (ADDED,)),
        _painted(tokenizer, after, (FAINT,)),
        _painted(tokenizer, item.completion_ids, TRAINED, control=False),
    ]
    return f"\x1b[1m{head}{RESET}\n{''.join(parts)}\n"


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many equal tokens both begin with."""
    different = (index for index, pair in enumerate(zip(left, right)) if pair[0] != pair[1])
    return next(different, min(len(left), len(right)))


def _plain(tokenizer: Any, ids: Sequence[int], between: str = "") -> str:
    return between.join(visible(group.text, marks=bool(between)) for group in group_tokens(tokenizer, ids))


def _painted(tokenizer: Any, ids: Sequence[int], styles: Sequence[str], control: bool = True) -> str:
    pieces = []
    for number, group in enumerate(group_tokens(tokenizer, ids)):
        style = CONTROL if control and group.special else styles[number % len(styles)]
        # A background that runs over a line's end fills the rest of the line in many terminals.
        lines = visible(group.text, marks=len(styles) > 1).split("\n")
        pieces.append("\n".join(f"{style}{line}{RESET}" if line else "" for line in lines))
    return "".join(pieces)
