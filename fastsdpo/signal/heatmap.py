"""Draws the signals of several cases as one picture: tokens from left to right, follow-ups one below the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsdpo.signal.compute import SignalResult
from fastsdpo.signal.palette import LEVELS, SCALE, THEMES, hex_color, tint

COLUMNS = 3
QUOTED = 84  # characters of a follow-up
EDGE, GREY = "#b8bcc2", "#6b7078"


def draw_heatmaps(
    path: str | Path, results: Sequence[SignalResult], titles: Sequence[str], limit: float = SCALE
) -> None:
    """Draws a PNG with one strip per case, in which colours show the log-ratio of each token.

    The upper row of a strip is under the real follow-up, the lower row under the unrelated one.
    Colours mean the same values as on the HTML page and in the terminal (`fastsdpo.signal.palette`). Above a strip
    stand its title, the mean absolute log-ratio under each follow-up, and the real follow-up.

    Args:
        path: the PNG file to write.
        results: one per case. A token has the same width in all strips, so that a short answer has a short strip.
        titles: one per case.
        limit: log-ratio in nats at which colours saturate.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5.5 * columns, 0.95 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    image: Any = None
    for number, (place, result, title) in enumerate(zip(places, results, titles)):
        image = _draw_strip(place, result, title, limit)
        if number % columns == 0:
            place.set_yticks(range(len(result.followups)), ["real", "unrelated"][: len(result.followups)], fontsize=7)
        if number + columns >= len(results):
            place.tick_params(axis="x", labelbottom=True, labelsize=7, length=2, color=EDGE)
            place.set_xlabel("token of the answer", fontsize=7, color=GREY, labelpad=1)
    places[0].set_xlim(-0.5, max(len(result.token_ids) for result in results) - 0.5)  # of all: they share it
    for place in places[len(results) :]:
        place.set_axis_off()
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.08)  # type: ignore[union-attr]
    ticks = [sign * limit * share for sign in (-1, 1) for share in (1, 1 / 4, 1 / 16)]
    size = {"fraction": 0.3 / rows, "aspect": 60, "shrink": 0.5, "pad": 0.01}
    bar = figure.colorbar(image, ax=list(places), location="bottom", **size)
    bar.set_ticks([*ticks, 0.0], labels=[f"{tick:+.2g}" for tick in ticks] + ["0"])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7, length=2, color=EDGE)
    bar.outline.set_edgecolor(EDGE)  # type: ignore[operator]
    bar.set_label(
        "log-ratio of the token in nats: orange less likely, blue more likely with the follow-up\n"
        "in brackets: mean absolute log-ratio under the real / the unrelated follow-up",
        fontsize=8,
    )
    figure.savefig(path, format="png", dpi=130)


def _draw_strip(place: Any, result: SignalResult, title: str, limit: float) -> Any:
    """One case in its place; the image, for the legend."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Rectangle

    # `palette.level` as a norm: a step begins half-way to it, and its strength is the square root of the value.
    edges = [limit * ((step + 0.5) / LEVELS) ** 2 for step in range(LEVELS)]
    bounds = [-limit, *(-edge for edge in reversed(edges)), *edges, limit]
    norm = BoundaryNorm(bounds, 2 * LEVELS + 1, clip=True)
    colors = ListedColormap([hex_color(tint(step, "light")[0]) for step in range(-LEVELS, LEVELS + 1)])
    strip = [signal.log_ratio for _, signal in result.followups]
    image = place.imshow(strip, aspect="auto", cmap=colors, norm=norm, interpolation="nearest")
    for spine in place.spines.values():
        spine.set_visible(False)
    width = len(strip[0])
    place.add_patch(Rectangle((-0.5, -0.5), width, len(strip), fill=False, edgecolor=EDGE, linewidth=0.8))
    for row in range(1, len(strip)):
        place.plot((-0.5, width - 0.5), (row - 0.5, row - 0.5), color=EDGE, linewidth=0.8)
    place.tick_params(axis="both", length=0, labelbottom=False)
    place.set_yticks([])
    means = " / ".join(f"{signal.mean_absolute:.2f}" for _, signal in result.followups)
    said = " ".join(result.interaction.followup.split())
    said = said if len(said) <= QUOTED else said[: QUOTED - 1].rstrip() + "\u2026"
    text = {"parse_math": False}  # a dollar is a dollar
    ink = hex_color(THEMES["light"][1])
    place.set_title(f"{title}  ({means})\n", fontsize=8, loc="left", pad=3, color=ink, **text)
    place.annotate(said, (0, 1), (0, 4), "axes fraction", textcoords="offset points", fontsize=7, color=GREY, **text)
    return image
