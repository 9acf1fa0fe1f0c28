"""Writes docs/performance.md from the results files: no figure in it is typed by hand.

python -m benchmarks.report            writes
python -m benchmarks.report --check    exit status 1 where the page is not what the files say
python -m benchmarks.report --plot F   draws the ratios of the results file F to F with the ending .png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import compare, harness
from fastsdpo.timing import markdown_table

PAGE = harness.ROOT / "docs" / "performance.md"
MODES = ("sampled", "forward_kl", "reverse_kl", "jsd", "topk")
INTRODUCTION = """# Performance

`python -m benchmarks.report` makes this page from the files in `benchmarks/results/`. They hold the machine, versions,
commit and command of every row. All ratios compare medians of runs that alternate in one process, on machines with two
cores. A ratio may carry over to another machine; a time does not. `make bench` measures the same on yours.
**Nothing here has run on a GPU.** Figures about the GPU kernels come from counting their bytes and executing their
compiled code on a CPU. Expected times are arithmetic, and are marked so.
"""
# Goals that were set for the losses, by machine's results: rival, and the least ratio of its time to ours.
GOALS = {"logits": {"TRL": (10.0, 30.0), "torch.compile": (4.0, 8.0)}, "linear": {"TRL": 1.4, "Liger compiled": 1.4}}


def files(theme: str) -> list[Path]:
    """The results files of a theme, a machine each."""
    return sorted(harness.RESULTS.glob(f"{theme}_*.json"))


def recorded(theme: str) -> Iterator[harness.Row]:
    """The rows of all machines."""
    for path in files(theme):
        yield from harness.read(path)


def named(theme: str) -> str:
    return ", ".join(f"`{path.name}`" for path in files(theme))


def span(values: Iterable[float | None]) -> str:
    """Least and greatest of ratios."""
    known = sorted(f"{value:.3g}" if value >= 100 else f"{value:.2f}" for value in values if value is not None)
    known.sort(key=float)
    if not known:
        return ""
    return known[0] if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


def ratio(row: harness.Row, who: str, base: str, field: str = "median") -> float | None:
    a, b = (row["rivals"].get(name, {}).get(field) for name in (who, base))
    return a / b if a and b else None


def grouped(theme: str) -> Iterator[tuple[str, list[harness.Row]]]:
    """Machine and dtype, and the rows of their losses and shapes."""
    for path in files(theme):
        groups: dict[str, list[harness.Row]] = {}
        for row in harness.read(path):
            about = [path.stem.partition("_")[2], row["case"]["dtype"]]
            about += [name.replace("_", " ") for name in ("pages_kept", "bf16_products") if name in row["case"]]
            groups.setdefault(", ".join(about), []).append(row)
        yield from groups.items()


def shapes(rows: list[harness.Row]) -> str:
    """Tokens x vocabulary (x width) of the rows."""
    found = [
        " x ".join(str(row["case"][size]) for size in ("tokens", "vocabulary", "hidden") if size in row["case"])
        for row in rows
    ]
    return "; ".join(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------- sections


def logits() -> str:
    lines = []
    for label, rows in grouped("logits"):
        rivals = [span(ratio(row, who, "native fused") for row in rows) for who in ("TRL", "torch.compile", "Liger")]
        peaks = []
        for who in ("TRL", "native fused"):
            found = [(row["rivals"].get(who, {}).get("peak_bytes"), row["tensor_bytes"]) for row in rows]
            peaks.append(span(peak and peak / tensor for peak, tensor in found))
        rates = [3 * row["tensor_bytes"] / row["rivals"]["native fused"]["median"] for row in rows]
        copy = span(rate / row["ceilings"]["copy"] for rate, row in zip(rates, rows))
        lines.append([label, shapes(rows), *rivals, copy, *peaks])
    header = ["machine, dtype", "T x V", "TRL eager", "torch.compile", "Liger", "of a copy", "TRL's peak", "ours"]
    return f"""
## Losses from logits

Time of loss and gradient over ours (in place), the range over sampled token, forward KL, reverse KL and JSD. "Of a
copy": the three tensors that must move, over our time, as a share of a copy's rate. Peaks: in tensors of (T, V).
"Pages kept": all with an allocator that keeps its memory; otherwise much of the eager rivals' time is page faults.
`python -m benchmarks.bench_logits`; {named("logits")}.

{markdown_table(header, lines)}"""


def linear() -> str:
    who = ("bare GEMMs", "TRL", "Liger", "Liger compiled", "CCE", "PyTorch", "torch.compile")
    lines = []
    for label, rows in grouped("linear"):
        ours = span(ratio(row, "fastsdpo", "bare GEMMs") for row in rows)
        lines.append([label, shapes(rows), ours, *(span(ratio(row, w, "fastsdpo") for row in rows) for w in who[1:])])
    header = ["machine, dtype", "T x V x D", "ours over bare GEMMs", *(f"{w} / ours" for w in who[1:])]
    return f"""
## Losses from hidden states

Time of loss and gradients of hidden states and head, the range over the losses measured. In bfloat16 on a CPU the
products are taken in float32, because PyTorch has none there from bfloat16 to float32; rivals round the logits and are
off by percents (`errors` in the files). `python -m benchmarks.bench_linear`; {named("linear")}.

{markdown_table(header, lines)}"""


def models() -> str:
    found = []
    for row in recorded("models"):
        case = row["case"]
        cap = f", softcap {case['softcap']:g}" if "softcap" in case else ""
        others = [who for who in row["rivals"] if who not in ("fastsdpo", "bare GEMMs")]
        rivals = ", ".join(f"{who} {ratio(row, who, 'fastsdpo'):.2f}" for who in others)
        found.append(f"- {case['model']}{cap}, from {case['question']}, {case['mode'].replace('_', ' ')}: {rivals}.\n")
    return f"""
At the shapes of real models, float32, 128 tokens, time over ours (`python -m benchmarks.bench_models`;
{named("models")}):

{"".join(found)}"""


def memory() -> str:
    lines = []
    for row in recorded("memory"):
        ours, plain = (row["rivals"][who]["peak_bytes"] for who in ("fastsdpo", "PyTorch"))
        shape = " x ".join(str(size) for size in row["case"].values())
        cells = [f"{b / 2**20:.0f}" for b in (ours, row["gradient_bytes"], plain)]
        lines.append([shape, *cells, f"{plain / ours:.1f}", f"{row['predicted_bytes'] / ours:.2f}"])
    header = ["T x V x D", "ours, MiB", "of it gradients", "plain PyTorch, MiB", "PyTorch / ours"]
    header.append("predicted / measured")
    return f"""
## Memory of a loss from hidden states

Peak of the process, reverse KL with both gradients. `python -m benchmarks.bench_memory`; {named("memory")}.

{markdown_table(header, lines)}"""


def sharing() -> str:
    fields = {"time": "median", "memory": "peak_bytes", "flops": "flops"}
    lines = []
    for row in recorded("sharing"):
        case = row["case"]
        count = row.get("interactions", case.get("conversations"))
        of = f"{count} {'interactions' if 'interactions' in row else 'conversations'}, template {case['template']}"
        found = [(name, ratio(row, "official", name, fields[case["what"]])) for name in row["rivals"]]
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in found if value and name != "official")
        lines.append([case["what"], of, ratios])
    return f"""
## A full optimizer step

The padded two-pass step of published code over each other step (`benchmarks/steps.py`). SmolLM2-135M, real
conversations; memory is the whole process's peak, flops are by formula. `python -m benchmarks.bench_sharing`;
{named("sharing")}.

{markdown_table(["what", "of", "official / this step"], lines)}"""


def trainers() -> str:
    lines: dict[str, list[str]] = {}
    for theme, base in (("trl", "TRL"), ("integrations", "plain")):
        for row in recorded(theme):
            case = row["case"]
            line = lines.setdefault(f"{case.get('helper', 'TRL')}, {case['mode']}", [""] * 4)
            for who in (who for who in row["rivals"] if who != base):
                at = 0 if "logits" in (who, case.get("from")) else 2
                values = ratio(row, who, base), ratio(row, who, base, "peak_bytes")
                line[at : at + 2] = ["" if value is None else f"{value:.2f}" for value in values]
    header = ["where, loss", "time, from logits", "peak memory", "time, from hidden states", "peak memory"]
    return f"""
## In other trainers

Ours over TRL's own trainer, and over plain PyTorch. `python -m benchmarks.bench_trl`, `bench_integrations`;
{named("trl")}, {named("integrations")}.

{markdown_table(header, [[name, *cells] for name, cells in lines.items()])}"""


def data() -> str:
    lines = []
    for path in files("data"):
        stages = []
        for row in harness.read(path):
            others = [f"{who} {ratio(row, who, 'fastsdpo'):.2f}" for who in row["rivals"] if who != "fastsdpo"]
            rate = row["case"]["interactions"] / row["rivals"]["fastsdpo"]["median"]
            stages.append(
                f"{row['case']['stage']}, {row['case']['conversations']}: {rate:.0f} interactions/s"
                + "".join(f", {text}" for text in others)
            )
        lines.append(f"- {path.stem.partition('_')[2]}: " + "; ".join(stages))
    for row in recorded("processes"):
        first, *others = row["rivals"]
        speed = [f"{who} {1 / (ratio(row, who, first) or 1):.2f} times as fast" for who in others]
        lines.append(f"- training steps: beside {first}, " + ", ".join(speed))
    return f"""
## Data and processes

The others' time over ours; below 1 ours takes longer (the loops check nothing). `python -m benchmarks.bench_data`,
`bench_processes`; {named("data")}, {named("processes")}.
Stage, conversations. Plain `prepare` copies bytes, where a second process gains little; a hook (redacted) is work.

{f".{chr(10)}".join(lines)}.
"""


def against_us() -> str:
    """Every recorded row in which a rival takes less time, and the goals that were missed."""
    faster: dict[str, list[str]] = {}
    missed: dict[tuple[str, str, float], list[float]] = {}
    for theme, base in (("logits", "native fused"), ("linear", "fastsdpo"), ("models", "fastsdpo")):
        for label, row in ((label, row) for label, rows in grouped(theme) for row in rows):
            mode = row["case"]["mode"]
            for who in (who for who in row["rivals"] if who not in (base, "bare GEMMs")):
                found = ratio(row, who, base) or 1.0
                if found < 1:
                    faster.setdefault(f"{theme}, {label}, {mode}", []).append(f"{who} {found:.2f}")
                goal = GOALS.get(theme, {}).get(who, 0.0)
                least = goal[mode == "jsd"] if isinstance(goal, tuple) else goal
                if found < least and row["case"]["dtype"] == "float32":
                    missed.setdefault((theme, who, least), []).append(found)
    lines = [f"- {case}: {', '.join(rivals)} of our time.\n" for case, rivals in faster.items()]
    for (theme, who, least), ratios in missed.items():
        said = f"{who} should take {least:g} times our time, and took {span(ratios)} in {len(ratios)} cases"
        lines.append(f"- Goal missed, {theme}: {said}.\n")
    return f"""
## Against us

Rows in which a rival was faster, and goals that were missed (float32; of a KL from hidden states, compiled Liger is so
near to the bare GEMMs that its goal is out of reach):

{"".join(lines)}"""


def gpu() -> str:
    cells = json.loads((harness.RESULTS / "traffic.json").read_text())["cells"]
    vocabulary = max(cell["V"] for cell in cells)
    table: dict[str, dict[str, str]] = {}
    for cell in (cell for cell in cells if cell["V"] == vocabulary):
        moved = "not run" if "error" in cell else f"{cell['kernels'] + cell['torch']:.1f}"
        table.setdefault(cell["loss"], {})[cell["by"]] = moved
    who = list(dict.fromkeys(name for row in table.values() for name in row))
    traffic = markdown_table(["loss", *who], [[loss, *(row.get(w, "") for w in who)] for loss, row in table.items()])
    ptx = json.loads((harness.RESULTS / "ptx.json").read_text())
    by_target: dict[str, list[list[Any]]] = {}
    for group, rows in ptx["errors"].items():
        for target in group.split(" / ")[1].split():
            by_target.setdefault(target, []).extend(rows.values())
    calls = ", ".join(f"{sum(row[0] for row in rows)} for {target}" for target, rows in by_target.items())
    every = [row for rows in by_target.values() for row in rows]
    matrix = json.loads((harness.RESULTS / "compile_matrix.json").read_text())
    found = [(t, c) for row in matrix["cells"].values() for t, c in zip(matrix["targets"], row) if c is not None]
    good = [(target, cell) for target, cell in found if isinstance(cell, list)]
    registers = max(cell[0] for target, cell in good if target.startswith("sm_"))
    targets = ", ".join(dict.fromkeys(target for target, _ in found))
    return f"""
## GPU kernels, without a GPU

Bytes per token and word in bfloat16, forward and backward, V = {vocabulary}, counted in Triton's interpreter
(`python -m benchmarks.traffic`; `traffic.json`); PyTorch operations count operands and results.

{traffic}
Compiled PTX executed on a CPU against float64, every memory access checked (`python -m benchmarks.ptx`; `ptx.json`):
calls: {calls}; largest error {max(row[1] for row in every):.1e} of a loss, {max(row[2] for row in every):.1e} of a
gradient; {sum(len(row) - 3 for row in every)} faults. Compiled by Triton {matrix["triton"]} for {targets}
(`python -m benchmarks.compile_matrix`; `compile_matrix.json`): {len(found)} cells, {len(found) - len(good)} that
do not compile, {sum(cell[1] > 0 for _, cell in good)} that spill, at most {registers} registers a thread on NVIDIA's.
What a GPU is expected to take is arithmetic from shapes: `python -m benchmarks.predictions` prints it with its
assumptions, `python -m benchmarks.counted` counts a step of Qwen3-8B operator by operator, `fastsdpo train --dry-run`
walks the memory of a run.
"""


SECTIONS = (logits, linear, models, memory, sharing, trainers, data, against_us, gpu)


def page() -> str:
    return INTRODUCTION + "".join(section().rstrip("\n") + "\n" for section in SECTIONS)


def draw(path: Path) -> Path:
    """Bars of every ratio of a results file. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ratios = {name: value for name, value in compare.ratios(harness.read(path)).items() if ": time: " in name}
    figure = Figure(figsize=(10, 1 + 0.2 * len(ratios)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(range(len(ratios)), list(ratios.values()))
    axes.set_yticks(range(len(ratios)), list(ratios), fontsize=6)
    axes.axvline(1, color="#999999", linewidth=0.8)
    axes.invert_yaxis()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    return path.with_suffix(".png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a results file instead")
    args = parser.parse_args(argv)
    if args.plot:
        print(f"wrote {draw(args.plot)}")
        return 0
    return harness.keep_page(PAGE, page(), args.check)


if __name__ == "__main__":
    sys.exit(main())
