"""What a backend's layers look up in one pass, made ahead of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastsdpo.prefix.attention.flash import flash_calls
from fastsdpo.prefix.attention.flex import block_table
from fastsdpo.prefix.attention.segments import run_blocks
from fastsdpo.prefix.attention.windows import Window, is_cut_short
from fastsdpo.prefix.plan import Plan


def pass_tables(backend: str, plan: Plan, first: int, stop: int, windows: Iterable[Window]) -> dict[Any, Any]:
    """The tables of a pass over the packed tokens ``[first, stop)``, as `SharedPass.cached` finds them.

    Args:
        backend: of `BACKENDS`; for another one, "auto" say, the first layer that needs a table makes it.
        windows: of the layers.
    """
    runs = [run for run in plan.runs if first <= run.start < stop]
    tables: dict[Any, Any] = {}
    for window in dict.fromkeys(windows):
        if backend == "segments":
            tables["blocks", window] = run_blocks(runs, first, window)
        elif backend == "flash" and not is_cut_short(runs, window):
            tables["flash"] = flash_calls(runs, first)
        elif backend in ("flash", "flex"):
            tables["blocks of flex", window] = block_table(runs, first, stop - first, stop, window)
    return tables
