"""The tables of docs/online.md from a results file: `python -m benchmarks.personalization.report FILE`.

A cell holds one number for each seed, and where there are three, a row below their mean and 95% interval. Shares are
in percent of the answers (``standard_errors`` in the file).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.personalization.data import COUNTS, SHARES, show
from benchmarks.personalization.experiment import CONDITIONS

Row = dict[str, Any]


def cell(name: str, values: list[float]) -> str:
    """One number for each seed, with the unit once."""
    texts = [show(name, value) for value in values]
    return " / ".join([*[text.rstrip("%") for text in texts[:-1]], texts[-1]])


def line(label: str, measured: list[Row], changes: list[float]) -> str:
    cells = [cell(name, [one[name] for one in measured]) for name in COUNTS]
    perplexity = " / ".join(f"{100 * change:+.1f}" for change in changes)
    return f"| {label} | {' | '.join(cells)} | {perplexity + '%' if perplexity else ''} |"


def summary(label: str, measured: Row, change: list[float]) -> str:
    """Means and intervals over seeds."""
    texts = [(show(name, measured[name][0]), show(name, measured[name][1])) for name in COUNTS]
    cells = [f"{middle.rstrip('%')} \u00b1 {half}" for middle, half in texts]
    return f"| {label} | {' | '.join(cells)} | {100 * change[0]:+.1f} \u00b1 {100 * change[1]:.1f}% |"


def tables(rows: list[Row]) -> list[str]:
    """For each wish what is measured without training, then every condition."""
    base = {(row["case"]["condition"], row["case"]["wish"]): row for row in rows if "wish" in row["case"]}
    runs = [row for row in rows if "seed" in row["case"]]
    over = {row["case"]["summary"]: row for row in rows if "summary" in row["case"]}
    lines = []
    for wish in dict.fromkeys(wish for _, wish in base):
        lines += [f"\n{wish}:\n", "| | " + " | ".join([*COUNTS.values(), "perplexity"]) + " |", "| --- " * 9 + "|"]
        lines += [line(name, [row], []) for (name, other), row in base.items() if other == wish]
        for name, condition in CONDITIONS.items():
            if wish not in (condition.wish, condition.then):
                continue
            key = "after" if condition.then is None else f"after, {wish}"
            found = [row for row in runs if row["case"]["condition"] == name]
            if found:
                changes = [row["perplexity_change"] for row in found]
                lines.append(line(condition.about, [row[key] for row in found], changes))
            if name in over:
                label = f"mean \u00b1 interval of {len(over[name]['seeds'])} seeds"
                lines.append(summary(label, over[name][key], over[name]["perplexity_change"]))
    return lines


def curves(rows: list[Row]) -> list[str]:
    """Satisfaction of the sampled answers, round by round."""
    return [
        f"{row['case']['condition']} {row['case']['seed']}: "
        + ", ".join(show(SHARES[0], value) for value in row["satisfaction by round"])
        for row in rows
        if "seed" in row["case"]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("file", type=Path)
    rows = harness.read(parser.parse_args(argv).file)
    print("\n".join([*tables(rows), "", *curves(rows)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
