"""Executes the compiled Triton kernels on the CPU: errors against float64, faults, and what they cost.

    python -m benchmarks.ptx                    # all -> results/ptx.json; goes on where it was stopped
    python -m benchmarks.ptx --targets 90       # some; cells of others stay
    python -m benchmarks.ptx --quick            # vocabularies up to 129, counts at 32000, for sm_90

Every call of `tests.ptx.cases` runs for each target, dtype, layout and vocabulary, on rows of which each is
difficult in its own way. PTX is executed, not machine code; see `tests/ptx`. Counts are of whole launches, at
two common vocabularies: instructions by threads, bytes of global memory, each address once for reading and
once for writing, and barriers; registers and spills are of the machine code. Results of other kernels than today's
are replaced. The performance page is made from them: `python -m benchmarks.report`.
"""

from __future__ import annotations

import argparse
import functools
import json
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
COLUMNS = ["instructions", "read", "written", "barriers", "programs", "registers", "spills", "accesses"]
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
    """Errors and faults of one call."""
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
    }


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
    per_element = {key: getattr(counts, key) / elements for key in COLUMNS[:3]}
    accesses = {f"{op} {width}": n for (op, width), n in sorted(counts.accesses.items())}
    return {
        **{key: float(f"{value:.4g}") for key, value in per_element.items()},
        "barriers": counts.barriers / counts.programs,
        "programs": counts.programs,
        "accesses": spelled(accesses),
        **compiled(launch.ptx, arch),
    }


def spelled(accesses: dict[str, int]) -> str:
    """Accesses by threads: "ld" or "st", bytes, number."""
    return ", ".join(f"{kind} {number}" for kind, number in accesses.items())


def summary(found: dict[str, Cell]) -> Cell:
    """The verdict of a cell: the largest errors over its sizes, and what was wrong at which."""
    return {
        "sizes": list(found),
        "loss": max(one["loss"] for one in found.values()),
        "gradient": max(one["gradient"] for one in found.values()),
        "problems": [f"V = {v}: {text}" for v, one in found.items() for text in (*one["wrong"], *one["faults"])],
    }


def work(job: tuple[str, str, int, str, tuple]) -> tuple[str, Cell]:
    """A cell: of a layout for all of its sizes, or the counts (layout "counts")."""
    name, dtype, arch, layout, sizes = job
    if layout == "counts":
        launches = {str(size): count(name, dtype, arch, size) for size in sizes}
        return key_of(job), {"sizes": list(launches), "found": launches}
    return key_of(job), summary({str(size[0]): run_size(name, dtype, arch, layout, size) for size in sizes})


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


# ---- the results file ----------------------------------------------------------------------------


def problems(cells: dict[str, Cell]) -> list[str]:
    return [f"{key}, {text}" for key, cell in cells.items() for text in cell.get("problems", [])]


def read(path: Path) -> tuple[dict[str, str], dict[str, Cell]]:
    """The kernels that a file is of (``source`` and ``triton``), and its cells by `key_of`."""
    if not path.exists():
        return {}, {}
    data = json.loads(path.read_text())
    about = {key: data[key] for key in ("source", "triton")}
    cells: dict[str, Cell] = {}
    for group, rows in data["errors"].items():
        dtype, targets, layout = group.split(" / ")
        for name, (number, loss, gradient, *found) in rows.items():
            cell = {"sizes": data["sizes"][:number], "loss": loss, "gradient": gradient, "problems": found}
            cells |= {f"{name} / {dtype} / {target} / {layout}": cell for target in targets.split()}
    for group, rows in data["counts"].items():
        for name, found in rows.items():
            launches = {
                size: {kernel: dict(zip(COLUMNS, row)) for kernel, row in kernels.items()}
                for size, kernels in found.items()
            }
            cells[f"{name} / {group}"] = {"sizes": list(found), "found": launches}
    return about, cells


def write(path: Path, about: dict[str, str], cells: dict[str, Cell]) -> None:
    """A line for each dtype and layout, shared by targets of equal rows; of a cell: sizes done, errors, problems."""
    order = {key_of(job): n for n, job in enumerate(jobs_of([80, 90, 100], False))}
    counts: dict[str, dict[str, Any]] = {}
    by_target: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for key in sorted(cells, key=lambda key: order.get(key, len(order))):
        name, dtype, target, layout = key.split(" / ")
        cell = cells[key]
        if layout == "counts":
            counts.setdefault(f"{dtype} / {target} / {layout}", {})[name] = {
                size: {kernel: [launch[c] for c in COLUMNS] for kernel, launch in kernels.items()}
                for size, kernels in cell["found"].items()
            }
        else:
            row = [len(cell["sizes"]), cell["loss"], cell["gradient"], *cell["problems"]]
            by_target.setdefault((dtype, layout), {}).setdefault(target, {})[name] = row
    errors: dict[str, dict[str, Any]] = {}
    for (dtype, layout), found in by_target.items():
        for rows in (rows for n, rows in enumerate(found.values()) if rows not in list(found.values())[:n]):
            errors[f"{dtype} / {' '.join(t for t, same in found.items() if same == rows)} / {layout}"] = rows
    groups = {"errors": errors, "counts": counts}
    head = {**about, "sizes": [str(size) for size, _ in SIZES], "columns of counts": COLUMNS}
    parts = [json.dumps(head)[:-1]]
    for part, found in groups.items():
        lines = [f"{json.dumps(group)}: {json.dumps(rows, separators=(',', ':'))}" for group, rows in found.items()]
        parts.append(f'"{part}": {{\n' + ",\n".join(lines) + "\n}")
    written = path.with_suffix(".new")
    written.write_text(",\n".join(parts) + "\n}\n")
    written.replace(path)  # a run that is stopped leaves a whole file


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--targets", default="80,90,100")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--names", default="", help="what a cell's name contains")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    about, cells = read(RESULTS)
    targets = [90] if args.quick else [int(target) for target in args.targets.split(",")]
    now = {"source": sources(), "triton": triton.__version__}
    cells = cells if about == now else {}
    jobs = [job for job in jobs_of(targets, args.quick) if args.names in key_of(job)]
    missing = [job for job in jobs if len(cells.get(key_of(job), {"sizes": ()})["sizes"]) < len(job[4])]
    print(f"{len(jobs)} cells, {len(missing)} of them to run", flush=True)
    torch.set_num_threads(1)
    last = time.monotonic()
    with ProcessPoolExecutor(args.jobs) as pool:
        for key, cell in pool.map(work, missing):
            cells[key] = cell
            if time.monotonic() > last + 10:
                write(RESULTS, now, cells)
                last = time.monotonic()
    write(RESULTS, now, cells)
    bad = problems(cells)
    print("\n".join(bad) or "no fault, no wrong value")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
