"""Results files of the benchmarks; the timing itself is `fastsdpo.bench`'s.

Results go to ``benchmarks/results/<name>.json`` (another folder with ``--output``) and, made from it,
``.md``; a run replaces the rows it measured and keeps the others, so that a long benchmark can be taken in
parts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsdpo import bench
from fastsdpo.bench import Rival as Rival
from fastsdpo.bench import Timing as Timing
from fastsdpo.bench import copy_bandwidth as copy_bandwidth
from fastsdpo.bench import gemm_flops as gemm_flops
from fastsdpo.bench import interleave as interleave
from fastsdpo.bench import peak_memory as peak_memory
from fastsdpo.bench import table as table

RESULTS = Path(__file__).parent / "results"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "../kernels", "../fastsdpo/ops", ".", ":(exclude)results"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + (" and uncommitted changes" if dirty.stdout else "")


def environment() -> dict[str, Any]:
    """Device, versions, commit and command of this run."""
    return {**bench.environment(), "commit": _commit()}


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where results files go (default: benchmarks/results)",
    )


def record(
    name: str,
    rows: list[dict[str, Any]],
    key: tuple[str, ...],
    markdown: Callable[[list[dict[str, Any]]], str],
    folder: Path = RESULTS,
) -> None:
    """Merges ``rows`` (equal ``key`` fields replace) into ``<folder>/<name>.json`` and rewrites ``.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new_keys = {tuple(row.get(field) for field in key) for row in rows}
    kept = [row for row in old if tuple(row.get(field) for field in key) not in new_keys]
    merged = sorted(kept + rows, key=lambda row: tuple(str(row.get(field)).rjust(12) for field in key))
    path.write_text(json.dumps({"rows": merged}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(merged))
