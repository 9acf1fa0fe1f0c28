"""The measurements of finished runs as a table, sample answers and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONDITIONS = {
    "short": "wants one short sentence",
    "flip": "short, then long answers",
    "unrelated": "unrelated follow-ups",
}
PERPLEXITIES = ("perplexity", "perplexity_users", "perplexity_answers", "perplexity_brief")
# Of `numbers`; perplexities are changes in % since the first point, the other shares are in %.
COLUMNS = [
    "condition",
    "seed",
    "interactions",
    "short %",
    "long %",
    "words",
    "degenerate %",
    "perplexity %",
    "perplexity of users' text %",
    "of answers %",
    "of brief exchanges %",
]
Runs = dict[tuple[str, int], list[dict[str, Any]]]  # (condition, seed) -> points, in order


def read_points(folder: Path) -> Runs:
    """The measurements of every run in a folder of runs."""
    runs: Runs = {}
    for path in sorted(folder.glob("*-*/points.json")):
        condition, _, seed = path.parent.name.rpartition("-")
        if condition in CONDITIONS:
            runs[condition, int(seed)] = json.loads(path.read_text("utf-8"))
    return runs


def write_report(folder: Path) -> None:
    """``report.md`` (every point, sample answers beside it) and ``report.png`` from the runs' points."""
    runs = read_points(folder)
    (folder / "report.md").write_text("\n".join([*table(runs), "", *answers(runs)]), "utf-8")
    plot(runs, folder / "report.png")


def change(point: dict[str, Any], first: dict[str, Any], name: str) -> float:
    """The relative change of a perplexity since the first point."""
    return point[name] / first[name] - 1


def table(runs: Runs) -> list[str]:
    """Every point as a line of a Markdown table; perplexities as changes from the first point."""
    lines = [
        "| condition | seed | interactions | one short sentence | at least 26 words | words | "
        "degenerate | perplexity | of users' text | of answers | of brief exchanges |",
        "| --- " * 11 + "|",
    ]
    for (condition, seed), points in runs.items():
        for point in points:
            changes = [f"{change(point, points[0], name):+.1%}" for name in PERPLEXITIES]
            lines.append(
                f"| {condition} | {seed} | {point['interactions']} | {point['short']:.0%} | "
                f"{point['long']:.0%} | {point['words']:.1f} | {point['degenerate']:.0%} | {' | '.join(changes)} |"
            )
    return lines


def numbers(runs: Runs) -> list[list[Any]]:
    """Every point as a row of `COLUMNS`."""
    rows: list[list[Any]] = []
    for (condition, seed), points in runs.items():
        for point in points:
            shares = [round(100 * point[name]) for name in ("short", "long")]
            row = [condition, seed, point["interactions"], *shares, round(point["words"], 1)]
            changes = [round(100 * change(point, points[0], name), 1) for name in PERPLEXITIES]
            rows.append([*row, round(100 * point["degenerate"]), *changes])
    return rows


def one_question(runs: Runs) -> dict[str, dict[str, str]]:
    """The answers of each condition's first seed to the first question, by condition and interactions."""
    found: dict[str, dict[str, str]] = {}
    for (condition, seed), points in runs.items():
        if seed == min(other for name, other in runs if name == condition):
            for point in points:
                question, answer = next(iter(point["answers"].items()))
                found.setdefault(question, {})[f"{condition}, {point['interactions']} interactions"] = answer
    return found


def answers(runs: Runs) -> list[str]:
    """The sample answers of every point."""
    lines = []
    for (condition, seed), points in runs.items():
        lines += [f"## Answers: {condition}, seed {seed}", ""]
        for point in points:
            lines += [f"After {point['interactions']} interactions:", ""]
            for question, answer in point["answers"].items():
                lines.append(f"- {question} **{' '.join(answer.split())}**")
            lines.append("")
    return lines


def plot(runs: Runs, path: Path) -> bool:
    """Satisfaction, length and perplexity against interactions; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, 3, sharex="col", sharey="row", squeeze=False)
    for column, (condition, title) in enumerate(CONDITIONS.items()):
        grid[0, column].set_title(title)
        grid[2, column].axhline(10, color="#999999", linewidth=0.8, linestyle=":")
        grid[2, column].set_xlabel("interactions")
        seeds = [points for (name, _), points in runs.items() if name == condition]
        for number, points in enumerate(seeds):
            draw(points, grid[:, column], labelled=number == 0)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    for axes, label in zip(grid[:, 0], ("held-out answers, %", "words in an answer", "perplexity, change in %")):
        axes.set_ylabel(label)
    grid[1, 0].set_ylim(bottom=0)
    for row in grid[[0, 2]]:
        drawn = next((axes for axes in row if axes.get_legend_handles_labels()[0]), None)
        if drawn is not None:
            drawn.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return True


def draw(points: list[dict[str, Any]], column: Any, labelled: bool) -> None:
    """One run into the three axes of its condition; ``labelled``: with a name for the legend."""
    x = [point["interactions"] for point in points]

    def line(axes: Any, y: list[float], color: str, name: str | None = None) -> None:
        axes.plot(x, y, "o-", markersize=3, color=color, label=name if labelled else None)

    top, middle, bottom = column
    line(top, [100 * point["short"] for point in points], "#4477aa", "one short sentence")
    line(top, [100 * point["long"] for point in points], "#cc3311", "at least 26 words")
    line(middle, [point["words"] for point in points], "#4477aa")
    for name, color in zip(PERPLEXITIES, ("#000000", "#bbbbbb", "#ee7733", "#aa3377")):
        line(bottom, [100 * change(point, points[0], name) for point in points], color, name.replace("_", " of "))
