"""Colours of log-ratios: blue above zero, orange below, the same in every output.

Blue and orange stay apart under every common colour blindness, and each tint carries the text
colour, black or white, that reads better on it. Strength is linear in the value up to `limit`, where it
saturates; the limit is common to everything that is shown together, so that tints compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

LEVELS = 8  # steps from no tint to full tint, on each side

Color = tuple[int, int, int]

# (page, text, full tint above zero, full tint below zero)
THEMES: dict[str, tuple[Color, Color, Color, Color]] = {
    "light": ((255, 255, 255), (26, 28, 31), (38, 112, 196), (214, 98, 0)),
    "dark": ((20, 22, 26), (229, 231, 235), (84, 164, 255), (255, 146, 43)),
}

SMALLEST_LIMIT = 0.5  # nats; below this nobody should see strong tints


def tint_limit(values: Iterable[float]) -> float:
    """The magnitude, in nats, at which tints saturate: the 95th percentile, rounded up to two digits."""
    magnitudes = sorted(abs(value) for value in values)
    if not magnitudes:
        return SMALLEST_LIMIT
    limit = magnitudes[math.ceil(0.95 * len(magnitudes)) - 1]
    if limit <= SMALLEST_LIMIT:
        return SMALLEST_LIMIT
    unit = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return round(math.ceil(limit / unit - 1e-9) * unit, 6)


def level(value: float, limit: float) -> int:
    """The step of a value, -LEVELS to LEVELS."""
    return max(-LEVELS, min(LEVELS, round(value / limit * LEVELS)))


def tint(step: int, theme: str) -> tuple[Color, Color]:
    """(background, text) of a step."""
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
    """``+0.53``, ``−1.20``, ``0.00``; an em dash for None."""
    if value is None:
        return "—"
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", "−")
