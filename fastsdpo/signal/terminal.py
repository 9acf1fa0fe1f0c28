"""Renders the signal as text for a terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastsdpo.signal.compute import FollowupSignal, SignalResult
from fastsdpo.signal.palette import LEVELS, SCALE, Color, level, signed, tint
from fastsdpo.signal.tokens import visible
from fastsdpo.signal.words import LESS, MORE, TRAINING, comparison, times, verdict

RESET = "\x1b[0m"
CUBE = (0, 95, 135, 175, 215, 255)


def color_depth(stream: Any, environ: Mapping[str, str] = os.environ) -> int:
    """Returns the bits of colour that a stream can show: 24, 8 or 0.

    It is 0 if the stream is not a terminal, if NO_COLOR (https://no-color.org) is set to anything, or with
    TERM=dumb. FORCE_COLOR overrules all of these but NO_COLOR.
    """
    if environ.get("NO_COLOR"):
        return 0
    if not environ.get("FORCE_COLOR"):
        if not getattr(stream, "isatty", lambda: False)():
            return 0
        if environ.get("TERM", "") in ("", "dumb"):
            return 0
    return 24 if environ.get("COLORTERM") in ("truecolor", "24bit") else 8


def terminal_theme(environ: Mapping[str, str] = os.environ) -> str:
    """Returns ``"light"`` if COLORFGBG (some terminals set it) says so, else ``"dark"``."""
    background = environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in ("7", "15") else "dark"


def render_terminal(
    result: SignalResult, *, colors: int = 8, theme: str = "dark", limit: float | None = None, values: bool = False
) -> str:
    """Renders the answer with tinted tokens, once per follow-up, a verdict in words and the summary.

    Args:
        colors: bits of colour, see `color_depth`. With 0 a token whose log-ratio is at least a
            quarter of `limit` is written ``[token +1.20]``.
        theme: ``"dark"`` or ``"light"``, the terminal's background.
        limit: log-ratio in nats at which tints saturate; None: `SCALE`.
        values: add a table with the numbers of every token.
    """
    limit = SCALE if limit is None else limit

    def bold(text: str) -> str:
        return f"\x1b[1m{text}{RESET}" if colors else text

    lines = [bold("Prompt"), visible(result.interaction.prompt[-1]["content"], marks=False).strip(), ""]
    for title, signal in result.followups:
        lines += [bold("Answer"), render_answer(result, signal, colors=colors, theme=theme, limit=limit), ""]
        lines += [f"{bold(title)}: {visible(signal.followup, marks=False).strip()}", _summary(signal), ""]
    lines += [
        bold(verdict(result)),
        *filter(None, [comparison(result)]),
        render_legend(colors=colors, theme=theme, limit=limit),
        "",
    ]
    lines += [f"{len(result.token_ids)} tokens" + _named(result)]
    lines += result.notes
    if values:
        lines += ["", _table(result)]
    return "\n".join(lines) + "\n"


def render_answer(
    result: SignalResult, signal: FollowupSignal, *, colors: int, theme: str = "dark", limit: float = SCALE
) -> str:
    """Renders the answer alone, with its tokens tinted by one follow-up; arguments as for `render_terminal`."""
    pieces = []
    for group in result.groups:
        value = group.value(signal.log_ratio)
        text = visible(group.text)
        if not colors:
            strong = abs(value) >= limit / 4
            stripped = text.strip() or text.rstrip("\n")
            marked = f"[{stripped} {signed(value)}]"
            pieces.append(text.replace(stripped, marked, 1) if strong else text)
            continue
        # A background that runs over a line's end fills the rest of the line in many terminals.
        for index, part in enumerate(text.split("\n")):
            pieces.append("\n" if index else "")
            pieces.append(_tinted(part, level(value, limit), colors, theme) if part else "")
    return "".join(pieces)


def _tinted(text: str, step: int, colors: int, theme: str) -> str:
    if step == 0:
        return text
    background, foreground = tint(step, theme)
    return f"\x1b[{_color(48, background, colors)};{_color(38, foreground, colors)}m{text}{RESET}"


def _color(target: int, color: Color, colors: int) -> str:
    if colors >= 24:
        return f"{target};2;{color[0]};{color[1]};{color[2]}"
    # The cube of 6 x 6 x 6 colours that every 256-colour terminal has.
    red, green, blue = (min(range(6), key=lambda i: abs(CUBE[i] - channel)) for channel in color)
    return f"{target};5;{16 + 36 * red + 6 * green + blue}"


def _summary(signal: FollowupSignal) -> str:
    return (
        f"  mean {signed(signal.mean, 3)}  sum {signed(signal.sum)}  "
        f"mean |.| {signal.mean_absolute:.3f}  first token {signed(signal.first)}  "
        f"end of turn {signed(signal.end_of_turn)}"
    )


def render_legend(*, colors: int, theme: str = "dark", limit: float = SCALE) -> str:
    """Says in words what the colours mean; arguments as for `render_terminal`."""
    if not colors:
        return (
            f"[word +1.20]: the model would say this more after reading the reply, [word −1.20]: less; in nats, "
            f"from {limit / 4:.2g}. {TRAINING}"
        )
    steps = "".join(_tinted("  ", step, colors, theme) or "  " for step in range(-LEVELS, LEVELS + 1, 2))
    return f"{times(-limit)} {steps} {times(limit)}\n{MORE}; {LESS}. {TRAINING}"


def _named(result: SignalResult) -> str:
    return f", model {visible(result.model, marks=False)}" if result.model else ""


def _table(result: SignalResult) -> str:
    header = ["#", "id", "token", "student"]
    for title, _ in result.followups:
        name = title.split()[0].lower()
        header += [f"{name} teacher", f"{name} ratio"]
    lines = ["  ".join(f"{name:>17}" if i > 3 else f"{name:>9}" for i, name in enumerate(header))]
    for group in result.groups:
        for t in range(group.start, group.end):
            text = visible(group.text).replace("\n", "")
            text = text if group.end - group.start == 1 else f"{text} ({t - group.start + 1})"
            row = f"{t:>9}  {result.token_ids[t]:>9}  {text:>9}  {result.student_logps[t]:>9.3f}"
            for _, signal in result.followups:
                row += f"  {signal.teacher_logps[t]:>17.3f}  {signed(signal.log_ratio[t], 3):>17}"
            lines.append(row)
    return "\n".join(lines)
