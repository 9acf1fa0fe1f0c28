"""Results file of a finished `make personalization`.

    make personalization SEEDS="1 2 3"
    python -m benchmarks.personalization.record personalization

Writes benchmarks/results/personalization_<machine>.json: the recipe, the initial model's point, a row of numbers per
later point, and the first seed's answers to one question. ``report.md`` and ``report.png`` of the folder show people
all answers and every point.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from benchmarks.harness import RESULTS, environment
from benchmarks.personalization import experiment
from benchmarks.personalization.report import COLUMNS, numbers, one_question, read_points


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("folder", type=Path, help="what make personalization wrote")
    parser.add_argument("--machine", default="cpu", help="names the results file (default: cpu)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--command", default='make personalization SEEDS="1 2 3"')
    options = parser.parse_args(argv)
    runs = read_points(options.folder)
    if not runs:
        parser.error(f"{options.folder} holds no runs")
    data = json.loads((options.folder / "data.json").read_text("utf-8"))
    first = next(iter(runs.values()))[0]
    stored = {
        "environment": {**environment(), "command": options.command, "date": str(datetime.date.today())},
        "recipe": experiment.RECIPE,
        "changes": experiment.CHANGES,
        "texts": {name: len(rows) for name, rows in data.items()},
        "initial": {name: value for name, value in first.items() if name != "answers"},
        "columns": COLUMNS,
        "rows": numbers(runs),
        "answers": one_question(runs),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"personalization_{options.machine}.json"
    text = json.dumps(stored, ensure_ascii=False).replace('], ["', '],\n["')
    path.write_text(text + "\n", "utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
