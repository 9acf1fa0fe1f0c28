"""Writes docs/performance.md and its plots from the results files: no figure in it is typed by hand.

python -m benchmarks.report           writes
python -m benchmarks.report --check   exit status 1 where the page is not what the files say
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._harness import RESULTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"

INTRODUCTION = """# Performance

Made by `python -m benchmarks.report` from the files in `benchmarks/results/`, each with machine, versions,
commit and commands. Times are medians of interleaved runs on one machine: what carries over to another is at
most the ratios. `make bench` measures all of it anew on yours and sets its ratios beside these
(`benchmarks/compare.py`); `fastsdpo bench` does the losses where the package is installed.

**Nothing here has run on a GPU.** What is known of the GPU kernels is in the sections on traffic and on
compiled code, and what is expected of them in the predictions, which are arithmetic.
"""

# Prefix of the results file, the plot's bars (group, rival, ratio of its time to ours) or None
Bars = Callable[[Any], list[tuple[str, str, float]]]


def _of_rivals(label: Callable[[dict], str], ours: str, leave: tuple[str, ...] = ()) -> Bars:
    def bars(data: Any) -> list[tuple[str, str, float]]:
        found = []
        for row in data["rows"]:
            base = row["rivals"][ours]["median"]
            for who, timing in row["rivals"].items():
                if who != ours and who not in leave:
                    found.append((label(row), who, timing["median"] / base))
        return found

    return bars


def _of_rows(ours: Callable[[str], bool], base: Callable[[dict], Any]) -> Bars:
    """Rows with one rival each: time of the one that is not ours over ours, per case."""

    def bars(data: Any) -> list[tuple[str, str, float]]:
        plain = {base(row): row["seconds"] for row in data["rows"] if not ours(row["who"])}
        return [
            (
                f"{row.get('theme', 'TRL')} {row['case']}",
                row["who"],
                plain[base(row)] / row["seconds"],
            )
            for row in data["rows"]
            if ours(row["who"])
        ]

    return bars


def _integration_base(row: dict) -> tuple:
    return row["theme"], row["case"], row["who"].partition(",")[2]


def _of_runs(data: Any) -> list[tuple[str, str, float]]:
    """Of bench_sharing: the official step's time over each variant's."""
    pooled: dict[str, dict[str, list[float]]] = {}
    for run in data["runs"]:
        if run["kind"] == "time":
            where = pooled.setdefault(f"{run['template']}, conversation {run['conversation']}", {})
            for who, seconds in run["seconds"].items():
                where.setdefault(who, []).extend(seconds)
    return [
        (group, who, statistics.median(found["official"]) / statistics.median(seconds))
        for group, found in pooled.items()
        for who, seconds in found.items()
        if who != "official" and "official" in found
    ]


def _of_stages(data: Any) -> list[tuple[str, str, float]]:
    """Of bench_data: each rival's time over ours."""
    ours = {row["stage"]: row["seconds"] for row in data["rows"] if row["who"] == "fastsdpo"}
    return [
        (row["stage"], row["who"], row["seconds"] / ours[row["stage"]])
        for row in data["rows"]
        if row["who"] != "fastsdpo"
    ]


def _linear_case(row: dict) -> str:
    """Of bench_linear: the loss, its shape and how it was run."""
    parts = [row["mode"], f"{row['vocabulary']} x {row['hidden']}"]
    parts += [row["dtype"]] if row["dtype"] != "float32" else []
    parts += ["bf16 products"] if row["bf16_products"] else []
    parts += ["pages kept"] if row["pages_kept"] else []
    return " ".join(parts)


THEMES: list[tuple[str, str, Bars | None]] = [
    (
        "logits_cpu_float32",
        "rival's time over ours, loss and gradient",
        _of_rivals(lambda row: row["mode"], "native fused", ("native",)),
    ),
    (
        "logits_cpu_float32_pages_kept",
        "rival's time over ours, loss and gradient",
        _of_rivals(lambda row: row["mode"], "native fused", ("native",)),
    ),
    (
        "logits_cpu_bfloat16",
        "rival's time over ours, loss and gradient",
        _of_rivals(lambda row: row["mode"], "native fused", ("native",)),
    ),
    (
        "logits_avx512",
        "rival's time over ours, loss and gradient",
        _of_rivals(
            lambda row: f"{row['mode']} {row['dtype']} {row['tokens']} x {row['vocabulary']}",
            "native fused",
            ("native",),
        ),
    ),
    (
        "logits_intel",
        "rival's time over ours, loss and gradient",
        _of_rivals(
            lambda row: f"{row['mode']} {row['dtype']} {row['tokens']} x {row['vocabulary']}",
            "native fused",
            ("native",),
        ),
    ),
    (
        "logits_intel_pages_kept",
        "rival's time over ours, loss and gradient",
        _of_rivals(lambda row: row["mode"], "native fused", ("native",)),
    ),
    (
        "linear_cpu",
        "rival's time over ours, loss and gradients",
        _of_rivals(lambda row: f"{row['mode']} {row['vocabulary']} x {row['hidden']}", "fastsdpo"),
    ),
    (
        "linear_avx512",
        "rival's time over ours, loss and gradients",
        _of_rivals(lambda row: f"{row['mode']} {row['vocabulary']} x {row['hidden']}", "fastsdpo"),
    ),
    ("linear_intel", "rival's time over ours, loss and gradients", _of_rivals(_linear_case, "fastsdpo")),
    (
        "models_cpu",
        "rival's time over ours, loss and gradients",
        _of_rivals(lambda row: f"{row['question']} {row['mode']} {row['model']}", "fastsdpo"),
    ),
    ("memory_cpu", "", None),
    ("sharing_cpu", "time of the padded two-pass step over that of the variant", _of_runs),
    (
        "trl_cpu",
        "TRL's time over that with the patch",
        _of_rows(lambda who: who != "TRL", lambda row: (row["case"], row["shape"])),
    ),
    (
        "integrations_cpu",
        "plain PyTorch's time over ours",
        _of_rows(lambda who: who.startswith("ours"), _integration_base),
    ),
    ("data_cpu", "rival's time over ours (below 1: ours takes longer)", _of_stages),
    ("processes_cpu", "", None),
    ("personalization_cpu", "", None),
    ("personalization_search_cpu", "", None),
    ("goals_cpu", "", None),
    ("goals_avx512", "", None),
    ("goals_intel", "", None),
    ("traffic", "", None),
    ("ptx", "", None),
    ("compile_matrix", "", None),
    ("costmodel_predictions", "", None),
]


def newest(prefix: str) -> Path | None:
    """The results file (.md) of a theme with the latest date."""
    pattern = re.compile(re.escape(prefix) + r"(_\d{4}-\d\d-\d\d)?\.md")
    found = sorted(path for path in RESULTS.glob("*.md") if pattern.fullmatch(path.name))
    return found[-1] if found else None


def page() -> str:
    """The page's text."""
    parts = [INTRODUCTION]
    for prefix, _, bars in THEMES:
        path = newest(prefix)
        if path is None:
            continue
        text = path.read_text("utf-8").strip()
        title, _, body = text.partition("\n")
        body = re.sub(r"^(#+) ", r"#\1 ", body, flags=re.MULTILINE)
        body = re.sub(r"\]\((?!https?://)", "](../benchmarks/results/", body)
        plot = f"![{title.lstrip('# ')}](performance/{prefix}.png)\n\n" if bars is not None else ""
        source = f"From `benchmarks/results/{path.name}`.\n\n"
        parts.append(f"## {title.lstrip('# ')}\n\n{source}{plot}{body.strip()}\n")
    return "\n".join(parts)


def draw(bars: list[tuple[str, str, float]], title: str, path: Path) -> None:
    """Horizontal bars in groups; a line at 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = ("#4477aa", "#ee7733", "#228833", "#cc3311", "#aa3377", "#bbbbbb")
    rivals = list(dict.fromkeys(who for _, who, _ in bars))
    figure = Figure(figsize=(8.5, 0.8 + 0.24 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels, ticks = [], []
    position, last = 0.0, None
    for group, who, ratio in bars:
        if group != last:
            position += 0.8
            labels.append(group)
            ticks.append(position + 0.4)
            last = group
        axes.barh(position, ratio, height=0.8, color=colors[rivals.index(who) % len(colors)])
        axes.text(ratio, position, f" {ratio:.2f}", va="center", fontsize=7)
        position += 1
    for who, color in zip(rivals, colors):
        axes.barh(0, 0, color=color, label=who)
    axes.axvline(1, color="#999999", linewidth=0.8)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    text = page()
    if options.check:
        same = PAGE.exists() and PAGE.read_text("utf-8") == text
        print(f"{PAGE.name} is {'what' if same else 'not what'} the results files say")
        return int(not same)
    PLOTS.mkdir(parents=True, exist_ok=True)
    for prefix, title, bars in THEMES:
        path = newest(prefix)
        if path is not None and bars is not None:
            draw(bars(json.loads(path.with_suffix(".json").read_text())), title, PLOTS / f"{prefix}.png")
    PAGE.write_text(text, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and {PLOTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
