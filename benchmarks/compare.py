"""Ratios of a new run beside the recorded ones: which differ by more than 15%.

    python -m benchmarks.compare bench_output/logits_cpu.json                 # with every recorded file of its theme
    python -m benchmarks.compare new.json recorded.json --within 0.15

Times of two machines say nothing about each other; ratios inside one run do. Of each case that both files have, the
time and the peak memory of every rival are divided by those of the case's base, fastsdpo's where it is one of them.
The exit status is 1 where a ratio is outside. Peaks below 64 MiB are left out: the allocator's own habits are of
that size.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import harness
from fastsdpo.timing import markdown_table

WITHIN = 0.15
LEAST_BYTES = 64 * 2**20
# The first of these that a row has is its base; else its first rival.
BASES = ("native fused", "fastsdpo", "TRL", "plain", "official")
QUANTITIES = {"median": "time", "peak_bytes": "peak memory", "flops": "arithmetic"}


def base_of(rivals: dict[str, harness.Row]) -> str:
    return next((name for name in BASES if name in rivals), next(iter(rivals)))


def ratios(rows: list[harness.Row], bases: dict[str, str] | None = None) -> dict[str, float]:
    """Every rival's time, peak and FLOPs over its case's base, by "case: quantity: who / base".

    ``bases`` is filled with the base of each case, or, where it has it, obeyed.
    """
    bases = {} if bases is None else bases
    found = {}
    for row in rows:
        if not row.get("rivals"):
            continue  # an experiment's, or measured alone
        case = json.dumps(row["case"], sort_keys=True)
        base = row["rivals"].get(bases.setdefault(case, base_of(row["rivals"])), {})
        for field, quantity in QUANTITIES.items():
            for who, one in row["rivals"].items():
                a, b = one.get(field), base.get(field)
                least = LEAST_BYTES if field == "peak_bytes" else 0
                if who != bases[case] and a and b and min(a, b) >= least:
                    found[f"{case}: {quantity}: {who} / {bases[case]}"] = a / b
    return found


def compare(
    new: list[harness.Row], recorded: list[harness.Row], within: float = WITHIN
) -> tuple[int, list[tuple[str, float, float]]]:
    """How many ratios both have, and (name, recorded, new) of those that are not within."""
    bases: dict[str, str] = {}
    before, after = ratios(recorded, bases), ratios(new, bases)
    shared = [name for name in before if name in after]
    outside = [(n, before[n], after[n]) for n in shared if not abs(after[n] / before[n] - 1) <= within]
    return len(shared), outside


def recorded_files(new: Path) -> list[Path]:
    """The results files of the same theme, of every machine."""
    return sorted(harness.RESULTS.glob(f"{new.stem.partition('_')[0]}_*.json"))


def report(new: Path, recorded: Path, within: float = WITHIN) -> tuple[str, bool]:
    """A paragraph of Markdown, and whether all ratios are within."""
    count, outside = compare(harness.read(new), harness.read(recorded), within)
    text = (
        f"{new.name} beside {recorded.name}: {count} ratios in common, {len(outside)} differ by more "
        f"than {100 * within:g}%.\n"
    )
    if outside:
        lines = [[name, f"{a:.2f}", f"{b:.2f}", f"{100 * (b / a - 1):+.0f}%"] for name, a, b in outside]
        text += "\n" + markdown_table(["ratio", "recorded", "new", "change"], lines)
    return text, not outside


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("recorded", type=Path, nargs="?", help="default: every file of the theme")
    parser.add_argument("--within", type=float, default=WITHIN)
    args = parser.parse_args(argv)
    files = [args.recorded] if args.recorded else recorded_files(args.new)
    found = [report(args.new, path, args.within) for path in files]
    print("\n".join(text for text, _ in found) or f"{args.new.name}: no recorded file of this theme.")
    return 0 if all(good for _, good in found) else 1


if __name__ == "__main__":
    sys.exit(main())
