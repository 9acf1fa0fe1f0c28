"""Signals of several cases as one picture: tokens along, the follow-ups below each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fastsdpo.signal.compute import SignalResult
from fastsdpo.signal.palette import SCALE

COLUMNS = 3


def draw_heatmaps(
    path: str | Path, results: Sequence[SignalResult], titles: Sequence[str], limit: float = SCALE
) -> None:
    """A PNG with one strip per case: log-ratio by token, above under the real follow-up, below under the unrelated.

    Args:
        results: one per case; the strips share one scale, and are as wide as the longest answer.
        titles: one per case.
        limit: log-ratio in nats at which colours saturate.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    strips = [[signal.log_ratio for _, signal in result.followups] for result in results]
    columns = min(COLUMNS, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5.5 * columns, 1.1 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    longest = max(len(result.token_ids) for result in results)
    image = None
    for place, strip, title in zip(places, strips, titles):
        image = place.imshow(strip, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        place.set_xlim(-0.5, longest - 0.5)
        place.set_yticks(range(len(strip)), ["real", "unrelated"][: len(strip)], fontsize=7)
        place.tick_params(axis="x", labelsize=6)
        place.set_title(title, fontsize=8, loc="left")
    for place in places[len(results) :]:
        place.set_axis_off()
    figure.colorbar(image, ax=list(places), shrink=0.6, label="log-ratio of the token, nats")
    figure.savefig(path, format="png", dpi=130)
