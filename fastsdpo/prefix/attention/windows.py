"""Which of the keys before it a query sees: all, those in a sliding window, or those in its own chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastsdpo.prefix.plan import Run, Segment


class ChunkWindow(NamedTuple):
    """A query sees the keys of its own chunk of ``size`` positions, and none before it (Llama 4)."""

    size: int


Window = int | ChunkWindow | None  # how many keys a query sees, itself included; None: all


def attention_windows(config: Any) -> dict[int, Window]:
    """The window of each layer, as the configuration says."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        # Moshi's decoder reads no window.
        if getattr(config, "use_sliding_window", True) is False or config.model_type == "moshi":
            window = None
        types = ["full_attention" if window is None else "sliding_attention"]
        types = types * config.num_hidden_layers
    by_type: dict[str, Window] = {"sliding_attention": window}
    if "chunked_attention" in types:
        by_type["chunked_attention"] = ChunkWindow(config.attention_chunk_size)
    return {layer: by_type.get(kind) for layer, kind in enumerate(types)}


def is_cut_short(runs: Sequence[Run], window: Window) -> bool:
    """Whether a window hides a token of any sequence from another one."""
    size = window.size if isinstance(window, ChunkWindow) else window
    return size is not None and any(run.position + run.stop - run.start > size for run in runs)


def within_chunks(runs: Sequence[Run], size: int) -> list[Run]:
    """Runs cut where a chunk ends: what each part sees, all of it sees, and it lies in one chunk."""
    parts = []
    for run in runs:
        end = run.position + run.stop - run.start
        for low in range(run.position - run.position % size, end, size):
            first, last = max(low, run.position), min(low + size, end)
            above = (_behind(segment, low) for segment in run.ancestors)
            start = run.start + first - run.position
            seen = tuple(segment for segment in above if segment is not None)
            parts.append(Run(start, start + last - first, first, seen))
    return parts


def _behind(segment: Segment, position: int) -> Segment | None:
    """The tokens of a segment from ``position`` on."""
    skipped = max(position - segment.position, 0)
    if segment.start + skipped >= segment.stop:
        return None
    return Segment(segment.start + skipped, segment.stop, segment.position + skipped)
