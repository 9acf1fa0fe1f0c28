"""Compiles every variant of the Triton kernels for every target, without a GPU.

    python -m benchmarks.compile_matrix                  # all -> results/compile_matrix.json
    python -m benchmarks.compile_matrix --targets sm_90  # some; cells of others stay
    python -m benchmarks.compile_matrix --check          # compare with the committed table

The variants are what the library launches in the calls of `tests.ptx.cases`. For each cell: registers and
bytes of spills of a thread, bytes of shared memory of a program, from the compiled code. The rules are in
`violations`. A cell that breaks one, or is worse than the committed table, fails with its name. What the
compiled kernels execute is counted by `benchmarks.ptx`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsdpo.ops import _triton, _triton_kernels
from tests.ptx.cases import DTYPES, LOSSES, results, rows

RESULTS = Path(__file__).parent / "results" / "compile_matrix.json"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
MAX_REGISTERS = 64  # 1,024 threads, half of the largest number, in the 65,536 registers of a processor
VOCABULARY = 1000  # of the calls: other sizes launch the same variants
CALLS = [(name, how) for how in ("packed", "fused in place", "odd strides") for name in LOSSES]


class Variant(NamedTuple):
    """One specialization, as a launch asked for it: arguments' types, constants, alignments, options."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    options: dict[str, int]


@functools.cache
def sources() -> str:
    """Names the kernels' source and that of their launches, as they were imported; not their layout."""
    texts = [ast.unparse(ast.parse(Path(str(module.__file__)).read_text())) for module in (_triton, _triton_kernels)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:10]


@contextlib.contextmanager
def recording(found: list[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Launches are recorded as (kernel, arguments) and not run."""

    def run(kernel, *args, grid, warmup=False, **arguments):
        assert not args
        found.append((kernel, arguments))

    with mock.patch.object(triton.JITFunction, "run", run):
        yield


def variant_of(name: str, kernel: Any, arguments: dict[str, Any]) -> Variant:
    """What Triton would compile for a launch."""
    types, constants, aligned = {}, {}, []
    values = dict(arguments)
    for parameter in kernel.params:
        key, value = parameter.name, values.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            types[key], constants[key] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            short = {torch.float32: "fp32", torch.int64: "i64", torch.bfloat16: "bf16", torch.float16: "fp16"}[
                value.dtype
            ]
            types[key] = f"*{short}"
            if value.data_ptr() % 16 == 0:
                aligned.append(key)
        else:
            assert parameter.do_not_specialize, f"{kernel.__name__} is compiled for values of {key}"
            types[key] = "fp32" if isinstance(value, float) else "i32"
    return Variant(name, kernel, types, constants, aligned, values)


def variants(dtype: str, amd: bool = False) -> list[Variant]:
    """Every variant once, named by the first call that launches it."""
    found: dict[str, Variant] = {}
    student, teacher, targets = rows(VOCABULARY, DTYPES[dtype], count=2)
    with contextlib.ExitStack() as stack:
        if amd:
            stack.enter_context(mock.patch.object(torch.version, "hip", "6"))
            stack.enter_context(mock.patch.object(_triton, "FAST", False))
        for name, layout in CALLS:
            launches: list[tuple[Any, dict[str, Any]]] = []
            with recording(launches):
                results(LOSSES[name], student, teacher, targets, "triton", layout)
            for kernel, arguments in launches:
                short = kernel.__name__.removesuffix("_kernel")
                label = f"{name}: {short}" + (f", {layout}" if layout != "packed" else "")
                one = variant_of(label, kernel, arguments)
                found.setdefault(repr((short, one.types, one.constants, one.options)), one)
    return list(found.values())


def compile_variant(variant: Variant, target: str) -> Any:
    nvidia = target.startswith("sm_")
    names = variant.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    types, constants = variant.types, variant.constants
    if triton.__version__.startswith("3.2."):
        from triton.backends.compiler import AttrsDescriptor

        places = {"tt.divisibility": [place for (place,) in attributes], "tt.equal_to": []}
        described = {"cls": "AttrsDescriptor", "arg_properties": places}
        attrs = AttrsDescriptor.from_dict(described)
        types = {name: kind for name, kind in types.items() if name not in constants}
        source = ASTSource(fn=variant.kernel, signature=types, constants=constants, attrs=attrs)
    else:
        source = ASTSource(fn=variant.kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu, options=variant.options)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of spills of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown.stdout + shown.stderr)
    assert found, shown.stdout + shown.stderr
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spills": stack + local}


def measure(variant: Variant, target: str) -> dict[str, Any]:
    """A cell's figures."""
    compiled = compile_variant(variant, target)
    shared = {"shared": compiled.metadata.shared}
    if target.startswith("sm_"):
        return {**usage(compiled.asm["cubin"]), **shared}

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"])
        return int(found[1]) if found else 0

    # Scalar registers that are kept in lanes of a vector register never reach memory.
    spills = number("private_segment_fixed_size")
    return {"registers": number("vgpr_count"), "spills": spills, **shared}


def violations(cell: dict[str, Any], target: str) -> list[str]:
    """The rules that a cell breaks."""
    if "problem" in cell:
        return [f"does not compile: {cell['problem']}"]
    found = [f"spills {cell['spills']} bytes"] if cell["spills"] else []
    if target.startswith("sm_") and cell["registers"] > MAX_REGISTERS:
        found.append(f"{cell['registers']} registers")
    return found


def _work(job: tuple[str, str, str]) -> dict[str, dict[str, Any]]:
    dtype, target, names = job
    found = {}
    for variant in variants(dtype, amd=not target.startswith("sm_")):
        if re.search(names, variant.name):
            try:
                cell = measure(variant, target)
            except Exception as error:  # a cell that does not compile is a result: the worst one
                while error.__cause__ is not None:
                    error = error.__cause__
                cell = {"problem": str(error)[-300:]}
            found[f"{variant.name} / {dtype} / {target}"] = cell
    return found


def run(targets: list[str], dtypes: list[str], names: str, workers: int) -> Iterator[dict[str, Any]]:
    """Cells, a dtype and target after the other."""
    jobs = [(dtype, target, names) for target in targets for dtype in dtypes]
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_work, jobs)


def broken(cells: dict[str, Any]) -> dict[str, list[str]]:
    judged = {name: violations(cell, name.split(" / ")[2]) for name, cell in cells.items()}
    return {name: rules for name, rules in judged.items() if rules}


def regressions(cells: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Cells worse than the committed ones: more registers (by more than 4) or spills."""
    found = []
    for name, cell in cells.items():
        old = committed.get(name)
        if old is None or "problem" in cell:
            found.append(f"{name}: {cell.get('problem', 'not in the committed table')}")
        elif cell["registers"] > old["registers"] + 4:
            found.append(f"{name}: registers {old['registers']} -> {cell['registers']}")
        elif cell["spills"] > old["spills"]:
            found.append(f"{name}: spills {old['spills']} -> {cell['spills']}")
    return found


def read(path: Path) -> dict[str, Any]:
    """``{"triton", "source", "cells"}``; a cell's name is "variant / dtype / target"."""
    data = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    cells = {}
    for variant, row in data.pop("cells").items():
        for target, cell in zip(data["targets"], row):
            if cell is not None:
                found = dict(zip(data["columns"], cell)) if isinstance(cell, list) else {"problem": cell}
                cells[f"{variant} / {target}"] = found
    return {**data, "cells": cells}


def write(path: Path, about: dict[str, str], cells: dict[str, Any]) -> None:
    """A line for each variant and dtype: of each of ``targets`` the figures of ``columns``, or what was wrong."""
    columns = ["registers", "spills", "shared"]
    rows: dict[str, dict[str, Any]] = {}
    for name, cell in cells.items():
        variant, _, target = name.rpartition(" / ")
        rows.setdefault(variant, {})[target] = cell.get("problem") or [cell[column] for column in columns]
    targets = list(dict.fromkeys(target for row in rows.values() for target in row))
    lines = [
        f"{json.dumps(name)}: {json.dumps([row.get(target) for target in targets], separators=(',', ':'))}"
        for name, row in rows.items()
    ]
    head = json.dumps({**about, "columns": columns, "targets": targets})[:-1]
    path.write_text(head + ', "cells": {\n' + ",\n".join(lines) + "\n}}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--names", default="", help="regular expression of variants")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    now = {"triton": triton.__version__, "source": sources()}
    known = read(RESULTS)
    kept = known["cells"] if {key: known.get(key) for key in now} == now else {}
    cells: dict[str, Any] = {}
    for found in run(args.targets, args.dtypes, args.names, args.workers):
        cells |= found
        for name, rules in broken(found).items():
            print(f"{name}: {'; '.join(rules)}", flush=True)
        if not args.check:  # a run that is stopped leaves what it has; cells of other targets stay
            write(RESULTS, now, kept | cells)
    print(f"{len(cells)} cells, {len(broken(cells))} break a rule")
    if args.check:
        worse = regressions(cells, known["cells"])
        print("\n".join(worse) or "no cell is worse than the committed table")
        return int(bool(worse))
    return 0


if __name__ == "__main__":
    sys.exit(main())
