"""Ratios of a new run beside the recorded ones: which differ by more than 15%.

    python -m benchmarks.compare bench_output/logits_cpu_float32.json     # with the newest file of its theme
    python -m benchmarks.compare new.json recorded.json --within 0.15

Times of two machines say nothing about each other; ratios inside one run do. Of each case that both files
have, the time (and the peak memory) of every rival is divided by that of the case's base, fastsdpo's where
it is one of them. The exit status is 1 where a ratio is outside. Peaks below 64 MiB are left out: the
allocator's own habits are of that size.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._harness import RESULTS, table

WITHIN = 0.15
LEAST_BYTES = 64 * 2**20
# The first of these that a case has is the base; else its first name in alphabetical order.
BASES = ("native fused", "fastsdpo", "TRL", "plain", "official")
CASE = (
    "template",
    "conversation",
    "characters",
    "threads",
    "question",
    "stage",
    "theme",
    "case",
    "model",
    "dtype",
    "shape",
    "tokens",
    "vocabulary",
    "hidden",
    "what",
    "mode",
    "softcap",
    "batch",
    "conversations",
    "interactions",
)


def _case(row: dict[str, Any], *leave_out: str) -> str:
    return " ".join(f"{name}={row[name]}" for name in CASE if row.get(name) is not None and name not in leave_out)


def _measured(data: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """(case, quantity, who, value) of every measurement of a results file."""
    for row in data.get("rows", []):
        case = _case(row, "threads" if "processes" in row else "")
        if "rivals" in row:
            found = [(who, t["median"], t["peak_bytes"]) for who, t in row["rivals"].items()]
        else:
            who = row.get("who") or f"{row['processes']} processes of {row['threads']}"
            found = [(who, row.get("seconds"), row.get("peak_bytes"))]
        for who, seconds, peak in found:
            if seconds:
                yield case, "time", who, seconds
            if peak and peak >= LEAST_BYTES:
                yield case, "peak memory", who, peak
    for run in data.get("runs", []):  # of bench_sharing
        case = _case(run)
        if run["kind"] == "time":
            for who, seconds in run["seconds"].items():
                for second in seconds:
                    yield case, "time", who, second
        if run["kind"] == "memory":
            for who, (_, peak) in run["gib"].items():
                yield case, "peak memory", who, peak * 2**30


def ratios(data: dict[str, Any], bases: dict[tuple[str, str], str] | None = None) -> dict[str, float]:
    """Every rival's time and peak over its case's base, by "case: quantity: who / base".

    Measurements of one case that a file holds several times are pooled to their median. ``bases``
    is filled with the base of each case, or, where it has it, obeyed.
    """
    bases = {} if bases is None else bases
    cases: dict[tuple[str, str], dict[str, list[float]]] = {}
    for case, quantity, who, value in _measured(data):
        cases.setdefault((case, quantity), {}).setdefault(who, []).append(value)
    found = {}
    for key, values in cases.items():
        medians = {who: statistics.median(v) for who, v in values.items()}
        base = bases.setdefault(key, next((b for b in BASES if b in medians), min(medians)))
        if base not in medians:
            continue
        for who, value in medians.items():
            if who != base:
                found[f"{key[0]}: {key[1]}: {who} / {base}"] = value / medians[base]
    return found


def compare(
    new: dict[str, Any], recorded: dict[str, Any], within: float = WITHIN
) -> tuple[int, list[tuple[str, float, float]]]:
    """How many ratios both have, and (name, recorded, new) of those that are not within."""
    bases: dict[tuple[str, str], str] = {}
    before = ratios(recorded, bases)
    after = ratios(new, bases)
    shared = [name for name in before if name in after]
    outside = [
        (name, before[name], after[name]) for name in shared if not abs(after[name] / before[name] - 1) <= within
    ]
    return len(shared), outside


def recorded_file(new: Path) -> Path | None:
    """The newest dated file in benchmarks/results of the same theme."""
    theme = re.sub(r"_\d{4}-\d\d-\d\d$", "", new.stem)
    pattern = re.compile(re.escape(theme) + r"(_\d{4}-\d\d-\d\d)?\.json")
    found = sorted(path for path in RESULTS.glob("*.json") if pattern.fullmatch(path.name))
    return found[-1] if found else None


def report(new: Path, recorded: Path | None, within: float = WITHIN) -> tuple[str, bool]:
    """A paragraph of Markdown, and whether all ratios are within."""
    if recorded is None:
        return f"{new.name}: no recorded file of this theme.\n", True
    count, outside = compare(json.loads(new.read_text()), json.loads(recorded.read_text()), within)
    if count == 0:
        return f"{new.name}: no case in common with {recorded.name}.\n", True
    text = (
        f"{new.name} beside {recorded.name}: {count} ratios in common, {len(outside)} differ by more "
        f"than {100 * within:g}%.\n"
    )
    if outside:
        lines = [[name, f"{a:.2f}", f"{b:.2f}", f"{100 * (b / a - 1):+.0f}%"] for name, a, b in outside]
        text += "\n" + table(["ratio", "recorded", "new", "change"], lines)
    return text, not outside


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("recorded", type=Path, nargs="?", help="default: the theme's newest")
    parser.add_argument("--within", type=float, default=WITHIN)
    args = parser.parse_args(argv)
    text, good = report(args.new, args.recorded or recorded_file(args.new), args.within)
    print(text, end="")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
