"""Colours of log-ratios: blue above zero, orange below, the same in every output.

Blue and orange stay apart under every common colour blindness, and each tint carries the text
colour, black or white, that reads better on it. The same colour means the same value everywhere: tints
saturate at `SCALE` unless a reader asks for another limit. Strength goes with the square root of the
value, so that weak and strong signals both show on that one scale.
"""

from __future__ import annotations

import math

LEVELS = 8  # steps from no tint to full tint, on each side

Color = tuple[int, int, int]

# (page, text, full tint above zero, full tint below zero)
THEMES: dict[str, tuple[Color, Color, Color, Color]] = {
    "light": ((255, 255, 255), (26, 28, 31), (38, 112, 196), (214, 98, 0)),
    "dark": ((20, 22, 26), (229, 231, 235), (84, 164, 255), (255, 146, 43)),
}

SCALE = 3.0  # nats at which tints saturate: 20 times as likely, or a twentieth


def level(value: float, limit: float) -> int:
    """Returns the colour step of a log-ratio in nats, -LEVELS to LEVELS; from `limit` on it is the last."""
    strength = min(1.0, math.sqrt(abs(value) / limit))
    return round(math.copysign(strength * LEVELS, value))


def tint(step: int, theme: str) -> tuple[Color, Color]:
    """Returns the colours (background, text) of a step; `theme` is "light" or "dark"."""
    page, text, above, below = THEMES[theme]
    if step == 0:
        return page, text
    strength = abs(step) / LEVELS
    full = above if step > 0 else below
    mixed = tuple(round(a + (b - a) * strength) for a, b in zip(page, full))
    background: Color = (mixed[0], mixed[1], mixed[2])
    readable = max(((0, 0, 0), (255, 255, 255)), key=lambda c: contrast(c, background))
    return background, readable


def contrast(a: Color, b: Color) -> float:
    """Contrast ratio of two colours, 1 to 21 (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""
    lighter, darker = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: Color) -> float:
    def linear(channel: int) -> float:
        c = channel / 255
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    red, green, blue = map(linear, color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def hex_color(color: Color) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in color)


def signed(value: float | None, digits: int = 2) -> str:
    """Formats a number with its sign: ``+0.53``, ``−1.20``, ``0.00``; None is an em dash."""
    if value is None:
        return "—"
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", "−")
