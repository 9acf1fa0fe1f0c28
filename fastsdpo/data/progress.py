"""The progress bar of `prepare`."""

from __future__ import annotations

import sys
import time
from typing import Any

from fastsdpo.data.loading import LoadReport


class ProgressBar:
    """A tqdm bar if tqdm is installed, else a line that is rewritten. It shows nothing if stderr is no terminal."""

    def __init__(self, report: LoadReport, wanted: bool):
        self._report, self._shown = report, time.monotonic()
        self._wanted = wanted and sys.stderr.isatty()
        self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def update(self) -> None:
        if not self._wanted or time.monotonic() - self._shown < 0.2:
            return
        self._shown = time.monotonic()
        report = self._report
        if self._bar is None:
            self._bar = self._new()
        if self._bar is None:
            total = report.bytes_total
            share = f"{report.bytes_done / total:4.0%}, " if total else ""
            print(f"\rreading: {share}{report.records:,} records", end="", file=sys.stderr)
            return
        self._bar.n = report.records if report.bytes_total is None else report.bytes_done
        self._bar.set_postfix_str(f"{report.records:,} records", refresh=False)
        self._bar.refresh()

    def _new(self) -> Any:
        try:
            from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]
        except ImportError:
            return None
        total = self._report.bytes_total
        unit = "record" if total is None else "B"
        return tqdm(total=total, unit=unit, unit_scale=True, desc="reading")

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._wanted:
            print(file=sys.stderr)
