"""Plots that are not drawn: one takes a third of the time of `fastsdpo train` on a tiny model."""

import importlib.util
from pathlib import Path

INSTALLED = importlib.util.find_spec("matplotlib") is not None


def save_undrawn(figure: object, path: str, **options: object) -> None:
    """In place of `matplotlib.figure.Figure.savefig`: a file that begins as a PNG does."""
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")


def draw_nothing() -> None:
    """From here to the end of the process."""
    if INSTALLED:
        from matplotlib.figure import Figure

        Figure.savefig = save_undrawn
