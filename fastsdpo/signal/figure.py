"""The signal as a PNG picture: the tinted answer under each follow-up and the running sums.

Tokens are laid out on a grid of character cells, left to right in logical order. That is right for
most scripts; right-to-left text reads correctly in the page that `render_html` gives.
"""

from __future__ import annotations

import io
import textwrap
import unicodedata
import warnings
from typing import Any

from fastsdpo.signal.compute import SignalResult
from fastsdpo.signal.palette import LEVELS, THEMES, hex_color, level, signed, tint, tint_limit
from fastsdpo.signal.tokens import TokenGroup, visible

COLUMNS = 96  # character cells in a line
MAX_LINES = 45  # of an answer; what does not fit is counted in the picture
FONT_SIZE = 9.0  # points
CELL = 0.602 * FONT_SIZE / 72  # inches, the advance of DejaVu Sans Mono
LINE = 1.55 * FONT_SIZE / 72
FONTS = [  # the first comes with matplotlib, of the others those that are installed
    "DejaVu Sans Mono",
    "Noto Sans Mono",
    "Noto Sans Mono CJK SC",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "DejaVu Sans",
]


def render_png(result: SignalResult, *, limit: float | None = None, theme: str = "light", dpi: int = 150) -> bytes:
    """A PNG file's bytes.

    Args:
        limit: log-ratio in nats at which tints saturate; None: `tint_limit`.
        theme: ``"light"`` or ``"dark"``.
        dpi: pixels per inch; the picture is about 8.5 inches wide.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import fontManager
    except ImportError as error:
        raise ImportError(
            "render_png: needs the package matplotlib; install it with: pip install matplotlib"
        ) from error
    if theme not in THEMES:
        raise ValueError(f"render_png: theme must be one of {', '.join(THEMES)}, got {theme!r}")
    if limit is None:
        limit = tint_limit(group.value(signal.log_ratio) for _, signal in result.followups for group in result.groups)
    page, ink = (hex_color(color) for color in THEMES[theme][:2])
    installed = set(fontManager.get_font_names())
    fonts = [name for name in FONTS if name in installed]

    # One column of text; y counts lines downwards, x counts cells.
    drawn: list[tuple[float, float, str, dict]] = []  # x, y, text, style
    boxes: list[tuple[float, float, float, str]] = []  # x, y, width, colour
    y = 0.0
    drawn.append((0, y, "Prompt", {"weight": "bold"}))
    y += 1.2
    for line in _wrapped(result.interaction.prompt[-1]["content"], 4):
        drawn.append((0, y, line, {}))
        y += 1
    y += 0.8
    for title, signal in result.followups:
        drawn.append((0, y, title, {"weight": "bold"}))
        y += 1.2
        for line in _wrapped(signal.followup, 4):
            drawn.append((0, y, line, {"style": "italic"}))
            y += 1
        y += 0.4
        cells, lines, left_out = _layout(result.groups)
        for group, text, column, line in cells:
            background, foreground = tint(level(group.value(signal.log_ratio), limit), theme)
            if hex_color(background) != page:
                boxes.append((column, y + line, _width(text), hex_color(background)))
            drawn.append((column, y + line, text, {"color": hex_color(foreground)}))
        y += lines
        if left_out:
            drawn.append((0, y, f"... and {left_out} more tokens", {"style": "italic"}))
            y += 1
        summary = (
            f"mean {signed(signal.mean, 3)}   sum {signed(signal.sum)}   first token "
            f"{signed(signal.first)}   end of turn {signed(signal.end_of_turn)}"
        )
        drawn.append((0, y + 0.3, summary, {"weight": "bold"}))
        y += 2.2
    for step in range(-LEVELS, LEVELS + 1):
        boxes.append((8 + 2 * (step + LEVELS), y, 2, hex_color(tint(step, theme)[0])))
    drawn.append((0, y, f"−{limit:g}", {}))
    drawn.append((9 + 4 * LEVELS + 2, y, f"+{limit:g} nats (blue: more likely given the follow-up)", {}))
    y += 1.5

    margin, chart = 0.35, 2.1  # inches
    width = COLUMNS * CELL + 2 * margin
    height = y * LINE + 2 * margin + chart + 0.5
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=page)
    FigureCanvasAgg(figure)
    text_axes: Any = figure.add_axes(
        (
            margin / width,
            1 - (margin + y * LINE) / height,
            COLUMNS * CELL / width,
            y * LINE / height,
        )
    )
    text_axes.set(xlim=(0, COLUMNS), ylim=(y, 0))
    text_axes.axis("off")
    for x, top, cells_wide, color in boxes:
        text_axes.add_patch(_rectangle(x, top, cells_wide, color))
    for x, top, text, style in drawn:
        text_axes.text(
            x,
            top + 0.5,
            text,
            **{
                "color": ink,
                "size": FONT_SIZE,
                "family": fonts,
                "va": "center_baseline",
                "parse_math": False,
                **style,
            },
        )

    sums: Any = figure.add_axes(
        ((margin + 0.45) / width, (margin + 0.3) / height, (width - 2 * margin - 0.5) / width, (chart - 0.5) / height)
    )
    _running_sums(sums, result, theme)
    output = io.BytesIO()
    with warnings.catch_warnings():
        # A character that no installed font has is drawn as a box.
        warnings.filterwarnings("ignore", message=".*missing from.*font", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*Matplotlib currently does not support.*")
        figure.savefig(output, format="png", facecolor=page)
    return output.getvalue()


def _running_sums(axes: Any, result: SignalResult, theme: str) -> None:
    page, ink, above, _ = (hex_color(color) for color in THEMES[theme])
    axes.set_facecolor(page)
    styles = [{"color": above, "linestyle": "-"}, {"color": ink, "linestyle": "--", "alpha": 0.7}]
    for (title, signal), style in zip(result.followups, styles):
        total, sums = 0.0, []
        for value in signal.log_ratio:
            total += value
            sums.append(total)
        axes.plot(range(1, len(sums) + 1), sums, label=title, linewidth=1.6, **style)
    axes.axhline(0, color=ink, linewidth=0.6, alpha=0.6)
    axes.set_xlabel("token", size=8, color=ink)
    axes.set_title("Sum of log-ratios up to each token (nats)", size=9, color=ink, loc="left")
    axes.tick_params(colors=ink, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    axes.legend(frameon=False, fontsize=8, labelcolor=ink, loc="best")


def _rectangle(x: float, y: float, width: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    # A sliver between neighbours keeps tokens of one tint apart.
    return Rectangle((x + 0.04, y + 0.02), width - 0.08, 0.96, facecolor=color, linewidth=0)


def _layout(groups: list[TokenGroup]) -> tuple[list[tuple[TokenGroup, str, int, int]], int, int]:
    """``([(group, text, column, line)], lines, tokens left out)`` for MAX_LINES of COLUMNS cells."""
    cells: list[tuple[TokenGroup, str, int, int]] = []
    column = line = 0
    for group in groups:
        for index, part in enumerate(visible(group.text).split("\n")):
            if index:
                column, line = 0, line + 1
            pieces = [part[i : i + COLUMNS // 2] for i in range(0, len(part), COLUMNS // 2)]
            for piece in pieces:
                if column + _width(piece) > COLUMNS:
                    column, line = 0, line + 1
                if line >= MAX_LINES:
                    return cells, MAX_LINES, groups[-1].end - group.start
                cells.append((group, piece.replace("\t", " "), column, line))
                column += _width(piece)
    return cells, line + 1, 0


def _width(text: str) -> int:
    """Character cells that a text takes: two for East Asian wide characters, none for marks."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _wrapped(text: str, lines: int) -> list[str]:
    flat = visible(" ".join(text.split()), False)
    return textwrap.wrap(flat, COLUMNS, max_lines=lines, placeholder=" ...") or [""]
