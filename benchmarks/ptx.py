"""Executes the compiled Triton kernels on the CPU: errors against float64, faults, and what they cost.

    python -m benchmarks.ptx                    # all -> results/ptx.{json,md}; goes on where it was stopped
    python -m benchmarks.ptx --targets 90       # some; cells of others stay
    python -m benchmarks.ptx --quick            # vocabularies up to 129, counts at 32000, for sm_90

Every call of `tests.ptx.cases` runs for each target, dtype, layout and vocabulary, on rows of which each is
difficult in its own way. PTX is executed, not machine code; see `tests/ptx`. Counts are of whole launches, at
two common vocabularies: instructions by threads, bytes of global memory, each address once for reading and
once for writing, and barriers; registers and spills are of the machine code. A cell of other kernels than
today's is run again.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
import triton

from benchmarks.compile_matrix import sources, usage
from tests.ptx import cases
from tests.ptx.executor import Launch, executing

RESULTS = Path(__file__).parent / "results" / "ptx.json"
SIZES = ((1, 9), (2, 9), (33, 36), (129, 9), (4097, 9), (32001, 3))  # (vocabulary, rows)
COUNTED = (32000, 151936)
COUNTED_ROWS = {32000: 2, 151936: 1}
FIELDS = ("instructions", "read", "written", "barriers")
Cell = dict[str, Any]


@functools.cache
def compiled(ptx: str, arch: int) -> dict[str, int]:
    """Registers and spills of a thread, by NVIDIA's assembler as Triton calls it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tool / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        subprocess.run(
            [str(assembler), "-lineinfo", f"--gpu-name=sm_{arch}{suffix}", str(source), "-o", str(cubin)],
            check=True,
            capture_output=True,
        )
        return usage(cubin.read_bytes())


def run_size(name: str, dtype: str, arch: int, layout: str, size: tuple[int, int]) -> Cell:
    """Errors, faults and variants of one call."""
    loss, values = cases.LOSSES[name], cases.rows(size[0], cases.DTYPES[dtype], size[1])
    want = cases.results(loss, *values, "reference", layout)
    with executing(arch, order=0 if "in place" in layout and size[0] < 4097 else None) as executor:
        got = cases.results(loss, *values, "triton", layout)
    found = {key: error.size for key, error in cases.errors(loss, got, want).items()}
    gradient = found.pop("gradient", 0.0)
    return {
        "loss": float(f"{max(found.values()):.3g}"),
        "gradient": float(f"{gradient:.3g}"),
        "wrong": cases.wrong(loss, got, want),
        "faults": [str(fault) for fault in executor.faults],
        "variants": sorted({digest(launch.ptx) for launch in executor.launches}),
    }


def digest(ptx: str) -> str:
    return hashlib.sha256(ptx.encode()).hexdigest()[:6]


def count(name: str, dtype: str, arch: int, vocabulary: int) -> Cell:
    """Of each launch of a call, per element of one tensor of logits."""
    number = COUNTED_ROWS[vocabulary]
    g = torch.Generator().manual_seed(vocabulary)
    student = 3 * torch.randn(number, vocabulary, generator=g)
    teacher = student + torch.randn(number, vocabulary, generator=g)
    targets = torch.randint(vocabulary, (number,), generator=g)
    kind = cases.DTYPES[dtype]
    with executing(arch) as executor:
        cases.results(cases.LOSSES[name], student.to(kind), teacher.to(kind), targets, "triton")
    elements = number * vocabulary
    return {launch.kernel.removesuffix("_kernel"): of_launch(launch, elements, arch) for launch in executor.launches}


def of_launch(launch: Launch, elements: int, arch: int) -> Cell:
    counts = launch.counts
    per_element = {key: getattr(counts, key) / elements for key in FIELDS[:3]}
    accesses = {f"{op} {width}": n for (op, width), n in sorted(counts.accesses.items())}
    return {
        **{key: float(f"{value:.4g}") for key, value in per_element.items()},
        "barriers": counts.barriers / counts.programs,
        "programs": counts.programs,
        "accesses": accesses,  # by threads, {"ld" or "st" and bytes: number}
        **compiled(launch.ptx, arch),
    }


def work(job: tuple[str, str, int, str, tuple]) -> tuple[str, Cell]:
    """A cell: of a layout for all of its sizes, or the counts (layout "counts")."""
    name, dtype, arch, layout, sizes = job
    started = time.process_time()
    if layout == "counts":
        cell = {str(size): count(name, dtype, arch, size) for size in sizes}
    else:
        cell = {str(size[0]): run_size(name, dtype, arch, layout, size) for size in sizes}
    about = {
        "source": sources(),
        "triton": triton.__version__,
        "sizes": [str(one) for one in sizes],
    }
    return key_of(job), {**about, "seconds": round(time.process_time() - started, 1), "found": cell}


def key_of(job: tuple) -> str:
    name, dtype, arch, layout, _ = job
    return f"{name} / {dtype} / sm_{arch} / {layout}"


def jobs_of(targets: list[int], quick: bool) -> list[tuple[str, str, int, str, tuple]]:
    """Counts first, then the layouts one after another: a part is a whole of something."""
    sizes: tuple = SIZES[:4] if quick else SIZES
    counted: tuple = COUNTED[:1] if quick else COUNTED
    plan = [("counts", counted), *((layout, sizes) for layout in cases.LAYOUTS)]
    return [
        (name, dtype, arch, layout, which)
        for arch in targets
        for layout, which in plan
        for dtype in cases.DTYPES
        for name in cases.LOSSES
        if layout != "counts" or arch == 90
    ]


# ---- the page ------------------------------------------------------------------------------------


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 else f"{value:.3g}"


def counts_table(cells: dict[str, Cell], dtype: str) -> list[str]:
    """A line for each loss; what is of a launch in the JSON is added up for forward and gradient."""
    lines = [
        "| loss | V | instructions: forward | gradient | bytes read | written | barriers of a program "
        "| registers | spills |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, cell in cells.items():
        name, kind, _, layout = key.split(" / ")
        if layout == "counts" and kind == dtype:
            for vocabulary, launches in cell["found"].items():
                total = {field: sum(one[field] for one in launches.values()) for field in FIELDS}
                most = [max(one[field] for one in launches.values()) for field in ("barriers", "registers", "spills")]
                back = launches.get("gradient", {"instructions": 0.0})["instructions"]
                lines.append(
                    f"| {name} | {vocabulary} | {total['instructions'] - back:.1f} | {back:.1f} | "
                    f"{total['read']:.2f} | {total['written']:.2f} | {most[0]:g} | {most[1]} | {most[2]} |"
                )
    return lines


def errors_table(cells: dict[str, Cell]) -> list[str]:
    lines = [
        "| target | dtype | calls | variants | largest error of a loss | of a gradient | wrong | faults |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    grouped: dict[tuple[str, str], list[Cell]] = collections.defaultdict(list)
    for key, cell in cells.items():
        _, dtype, target, layout = key.split(" / ")
        if layout != "counts":
            grouped[target, dtype] += cell["found"].values()
    for (target, dtype), found in sorted(grouped.items()):
        variants = {name for one in found for name in one["variants"]}
        worst = [number(max(one[key] for one in found)) for key in ("loss", "gradient")]
        bad = [sum(bool(one[key]) for one in found) for key in ("wrong", "faults")]
        lines.append(
            f"| {target} | {dtype} | {len(found)} | {len(variants)} | {worst[0]} | {worst[1]} | {bad[0]} | {bad[1]} |"
        )
    return lines


def problems(cells: dict[str, Cell]) -> list[str]:
    return [
        f"- {key}, V = {size}: {text}"
        for key, cell in cells.items()
        if not key.endswith("counts")
        for size, found in cell["found"].items()
        for text in (*found["wrong"], *found["faults"])
    ]


def page(cells: dict[str, Cell]) -> str:
    bad = problems(cells)
    sizes = ", ".join(str(vocabulary) for vocabulary, _ in SIZES)
    return "\n".join(
        [
            "# Compiled kernels, executed",
            "",
            f"Nothing here has run on a GPU: the PTX that Triton {triton.__version__} compiles is executed on a "
            "CPU (`tests/ptx`), from the library's own launches. `python -m benchmarks.ptx`; every cell is in "
            "`ptx.json`.",
            "",
            "## Errors and faults",
            "",
            f"Calls: {len(cases.LOSSES)} losses in {len(cases.LAYOUTS)} layouts at V = {sizes}, on rows with "
            "masked tokens, NaN where ignored, offsets of 1e4, a certain token, subnormal probabilities. Errors "
            "are against float64: of a loss or log-prob beside max(1, its size); of a gradient beyond half a "
            "rounding of its dtype, beside the row's largest entry. A fault is a misaligned access, one outside "
            "a row's memory, a read of what nothing wrote, a race between warps or programs, a barrier that "
            "some threads miss.",
            "",
            *errors_table(cells),
            "",
            *(bad[:50] or ["No fault, no wrong value."]),
            "",
            "## What a launch executes",
            "",
            "bfloat16, sm_90. Per element of one tensor of logits: instructions by threads, bytes of global "
            "memory (each address once for reading and once for writing). Registers and bytes of spills are of "
            "a thread. Barriers, registers and spills are the most of a loss's kernels.",
            "",
            *counts_table(cells, "bf16"),
            "",
        ]
    )


def write(cells: dict[str, Cell]) -> None:
    order = {key_of(job): n for n, job in enumerate(jobs_of([80, 90, 100], False))}
    cells = {key: cells[key] for key in sorted(cells, key=lambda key: order.get(key, math.inf))}
    written = RESULTS.with_suffix(".new")
    written.write_text(json.dumps({"cells": cells}, indent=None).replace('}}, "', '}},\n"') + "\n")
    written.replace(RESULTS)  # a run that is stopped leaves a whole file
    RESULTS.with_suffix(".md").write_text(page(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--targets", default="80,90,100")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--names", default="", help="what a cell's name contains")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    targets = [90] if args.quick else [int(target) for target in args.targets.split(",")]
    known = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else {}
    now = {"source": sources(), "triton": triton.__version__}
    cells = {k: c for k, c in known.items() if {key: c[key] for key in now} == now}
    jobs = [job for job in jobs_of(targets, args.quick) if args.names in key_of(job)]
    missing = [job for job in jobs if len(cells.get(key_of(job), {"sizes": ()})["sizes"]) < len(job[4])]
    print(f"{len(jobs)} cells, {len(missing)} of them to run", flush=True)
    torch.set_num_threads(1)
    last = time.monotonic()
    with ProcessPoolExecutor(args.jobs) as pool:
        for key, cell in pool.map(work, missing):
            cells[key] = cell
            if time.monotonic() > last + 10:
                write(cells)
                last = time.monotonic()
    write(cells)
    bad = problems(cells)
    print("\n".join(bad) or "no fault, no wrong value")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
