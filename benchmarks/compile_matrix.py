"""Compiles every specialization of the Triton kernels for every target, without a GPU.

    python benchmarks/compile_matrix.py                  # all targets -> results/compile_matrix.{json,md}
    python benchmarks/compile_matrix.py --targets sm_90  # some
    python benchmarks/compile_matrix.py --check          # compare with the committed table

For each cell: registers, spills and local memory (from the compiled binary), shared memory, the widest
and narrowest global access of the hot loop, what must not be in a loop (barriers, shuffles, atomics,
float64), and SASS instructions of the hot loop per element moved. The rules are in `violations`; a cell
that breaks one, or is worse than the committed table, fails with its name. On gfx942 the assembly gives
the same but instructions per element; scalar registers that the compiler keeps in lanes of a vector
register ("scalar spills") never reach memory and are counted apart.

The statistics kernels hold colder loops beside the hot one: for a segment's first and last tile, and for a
segment that is summed again (see `fastsdpo.ops._triton_common`). The hot loop is the shortest of those that
have its accesses and its exponentials.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

RESULTS = Path(__file__).parent / "results" / "compile_matrix.json"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("bf16", "fp16", "fp32")
FORBIDDEN = ("BAR", "SHFL", "ATOM", "RED", "DADD", "DMUL", "DFMA")
AMD_FORBIDDEN = r"^(s_barrier|ds_|global_atomic|buffer_atomic|v_\w+_f64)|dpp|permlane|_swizzle"
REGISTER_FILE, WARP = 65536, 32
# 8 warps a program: 4 programs per processor on parts with 64 warps, 64 registers a thread.
MAX_REGISTERS = 64


class Variant(NamedTuple):
    """One specialization: the kernel's name, its module, its constexprs, elements moved per position."""

    name: str
    module: str
    kernel: str
    constants: dict[str, Any]
    reads: int  # elements read and written per vocabulary position in the loop that is counted


TOKENS = "fastsdpo.ops.token_logps._triton"
PAIRS = "fastsdpo.ops.divergence._triton"


def variants() -> list[Variant]:
    found = []
    base = {"HAS_OLD": True, "HAS_CAP": False, "STAGE": 0}

    def add(name: str, module: str, kernel: str, reads: int, **constants: Any) -> None:
        found.append(Variant(name, module, kernel, constants, reads))

    token = {**base, "STAT_STRIDE": 2, "LOSS": True, "ENTROPY": False, "FUSED": False, "BESIDE": 0,
             "ALIGNED": True}  # fmt: skip
    fwd, bwd = "_sampled_token_fwd_kernel", "_sampled_token_bwd_kernel"
    add("logps", TOKENS, fwd, 1, **{**token, "TEACHER": 0, "LOSS": False, "HAS_OLD": False})
    add(
        "logps entropy",
        TOKENS,
        fwd,
        1,
        **{**token, "TEACHER": 0, "LOSS": False, "ENTROPY": True, "HAS_OLD": False},
    )
    add("log-ratio", TOKENS, fwd, 1, **{**token, "TEACHER": 1, "LOSS": False, "HAS_OLD": False})
    add("sampled", TOKENS, fwd, 1, **token, TEACHER=1)
    add("sampled softcap", TOKENS, fwd, 1, **{**token, "HAS_CAP": True}, TEACHER=1)
    add("sampled given teacher", TOKENS, fwd, 1, **token, TEACHER=2)
    add("sampled split", TOKENS, fwd, 1, **{**token, "STAGE": 1}, TEACHER=1)
    add("sampled finish", TOKENS, fwd, 1, **{**token, "STAGE": 2}, TEACHER=1)
    for same in (True, False):
        name = f"sampled fused{'' if same else ' other phase'}"
        fused = {**token, "FUSED": True, "BESIDE": int(not same)}
        add(name, TOKENS, fwd, 2, **fused, TEACHER=1)
    back = {"STAT_STRIDE": 2, "LOSS": True, "HAS_CAP": False}
    for same in (True, False):
        add(
            f"sampled gradient{'' if same else ' other phase'}",
            TOKENS,
            bwd,
            2,
            **back,
            BESIDE=int(not same),
        )
    add("sampled gradient softcap", TOKENS, bwd, 2, **{**back, "HAS_CAP": True}, BESIDE=0)
    add("logps gradient", TOKENS, bwd, 2, **{**back, "LOSS": False, "STAT_STRIDE": 1}, BESIDE=0)
    for mode, label in enumerate(("forward KL", "reverse KL", "JSD")):
        pair = {**base, "MODE": mode, "FUSED": False, "BESIDE": 0}
        reads = 1 if label == "JSD" else 2  # JSD's statistics are of each row by itself
        add(label, PAIRS, "_divergence_fwd_kernel", reads, **pair)
        add(f"{label} other phase", PAIRS, "_divergence_fwd_kernel", reads, **{**pair, "BESIDE": 1})
        add(f"{label} softcap", PAIRS, "_divergence_fwd_kernel", reads, **{**pair, "HAS_CAP": True})
        add(f"{label} split", PAIRS, "_divergence_fwd_kernel", reads, **{**pair, "STAGE": 1})
        add(f"{label} finish", PAIRS, "_divergence_fwd_kernel", reads, **{**pair, "STAGE": 2})
        for same in (True, False):
            name = f"{label} fused{'' if same else ' other phase'}"
            fused = {**pair, "FUSED": True, "BESIDE": int(not same)}
            add(name, PAIRS, "_divergence_fwd_kernel", 3, **fused)
        grad = {"MODE": mode, "HAS_CAP": False}
        for same in (True, False):
            add(
                f"{label} gradient{'' if same else ' other phase'}",
                PAIRS,
                "_divergence_bwd_kernel",
                3,
                **grad,
                BESIDE=int(not same),
            )
        add(
            f"{label} gradient softcap",
            PAIRS,
            "_divergence_bwd_kernel",
            3,
            **{**grad, "HAS_CAP": True},
            BESIDE=0,
        )
        top = {**base, "MODE": mode, "FUSED": False, "BESIDE": 0, "ALIGNED": True, "KP": 32}
        for tail in (True, False):
            for given in (True, False):
                source = "given teacher" if given else "teacher logits"
                name = f"top-k {label} {'tail' if tail else 'renormalized'} {source}"
                add(name, PAIRS, "_topk_fwd_kernel", 1, **top, TAIL=tail, GIVEN=given)
        add(
            f"top-k {label} split",
            PAIRS,
            "_topk_fwd_kernel",
            1,
            **{**top, "STAGE": 1},
            TAIL=True,
            GIVEN=False,
        )
        add(
            f"top-k {label} finish",
            PAIRS,
            "_topk_fwd_kernel",
            1,
            **{**top, "STAGE": 2},
            TAIL=True,
            GIVEN=False,
        )
        for same in (True, False):
            name = f"top-k {label} fused{'' if same else ' other phase'}"
            fused = {**top, "FUSED": True, "BESIDE": int(not same)}
            add(name, PAIRS, "_topk_fwd_kernel", 2, **fused, TAIL=True, GIVEN=False)
    jsd = {"HAS_CAP": False, "BESIDE": 0}
    add("JSD loss", PAIRS, "_jsd_kernel", 2, **jsd, STAGE=0)
    add("JSD loss other phase", PAIRS, "_jsd_kernel", 2, **{**jsd, "BESIDE": 1}, STAGE=0)
    add("JSD loss softcap", PAIRS, "_jsd_kernel", 2, **{**jsd, "HAS_CAP": True}, STAGE=0)
    add("JSD loss split", PAIRS, "_jsd_kernel", 2, **jsd, STAGE=1)
    add("JSD loss finish", PAIRS, "_jsd_kernel", 2, **jsd, STAGE=2)
    for tail in (True, False):
        for same in (True, False):
            name = f"top-k gradient {'tail' if tail else 'renormalized'}{'' if same else ' other phase'}"
            back = {"HAS_CAP": False, "BESIDE": int(not same), "KP": 32}
            add(name, PAIRS, "_topk_bwd_kernel", 2, **back, TAIL=tail)
    return found  # fmt: skip


def signature(names: list[str], constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Argument types as a launch passes them."""
    types = {"s_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "g_ptr": f"*{dtype}"}
    types |= dict.fromkeys(("target_ptr", "id_ptr", "sorted_ptr"), "*i64")
    types |= dict.fromkeys(("k", "cap", "inv_temperature", "alpha", "is_clip"), "fp32")
    return {
        name: "constexpr"
        if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }


def tiles(variant: Variant, dtype: str) -> dict[str, Any]:
    """The launchers' choice of tile."""
    from fastsdpo.ops._triton_common import launch

    topk = "topk" in variant.kernel
    heavy = variant.module == PAIRS and (not topk or variant.constants.get("FUSED", False))
    heavy = heavy or (variant.kernel == "_topk_fwd_kernel" and dtype == "fp32")
    heavy = heavy or variant.constants["HAS_CAP"] or variant.constants.get("ENTROPY", False)
    pairs = ("_divergence_fwd_kernel", "_jsd_kernel", "_divergence_bwd_kernel")
    joint = variant.kernel in pairs
    joint = joint or (dtype == "fp32" and variant.name.startswith("sampled fused"))
    options = launch(
        4 if dtype == "fp32" else 2, heavy=heavy, joint=joint, beside=variant.constants["BESIDE"],
    )  # fmt: skip
    return {name: options[name] for name in ("LANES", "VEC", "A")}


def source_of(variant: Variant) -> str:
    """Names the source that a cell was compiled from: the kernel and all that it calls."""
    import importlib

    import triton

    waiting = [getattr(importlib.import_module(variant.module), variant.kernel)]
    found = set()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, triton.JITFunction) or function.src in found:
            continue
        found.add(function.src)
        known = vars(sys.modules[function.__module__])
        waiting += [known.get(name) for name in re.findall(r"\w+", function.src)]
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:10]


def compile_variant(variant: Variant, dtype: str, target: str) -> Any:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastsdpo.ops._triton_common import MAX_REGISTERS, NUM_WARPS

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    nvidia = target.startswith("sm_")
    constants = {**variant.constants, **tiles(variant, dtype), "FAST": nvidia}
    names = kernel.arg_names
    types = signature(names, constants, dtype)
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") and name not in ("log2sum_ptr",)
    }
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = {"num_warps": NUM_WARPS if nvidia else NUM_WARPS // 2}
    if nvidia:
        options["maxnreg"] = MAX_REGISTERS
    if triton.__version__.startswith("3.2."):
        from triton.backends.compiler import AttrsDescriptor

        pieces = {"tt.divisibility": [place for (place,) in aligned], "tt.equal_to": []}
        described = {"cls": "AttrsDescriptor", "arg_properties": pieces}
        attrs = AttrsDescriptor.from_dict(described)
        types = {name: kind for name, kind in types.items() if name not in constants}
        source = ASTSource(fn=kernel, signature=types, constants=constants, attrs=attrs)
    else:
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=gpu, options=options)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def hot_loop(sass: str) -> list[str]:
    """Instructions of the loop over tiles."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label.group(1)] = len(code)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction:
            code.append(instruction.group(1))
    return hottest(inner_loops(code, labels, r"BRA.*`\((\.L_x_\d+)\)"), widths, "LDG", "STG")


def amd_loops(assembly: str) -> list[list[str]]:
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in assembly.splitlines():
        label = re.match(r"(\.LBB\d+_\d+):", line)
        if label:
            labels[label.group(1)] = len(code)
        elif re.match(r"\s+[a-z]\w+(\s|$)", line):
            code.append(line.strip())
    return inner_loops(code, labels, r"s_c?branch\w*\s+(\.LBB\d+_\d+)")


def inner_loops(code: list[str], labels: dict[str, int], jump: str) -> list[list[str]]:
    loops = []
    for i, text in enumerate(code):
        found = re.search(jump, text)
        if found and labels.get(found.group(1), i + 1) <= i:
            loops.append((labels[found.group(1)], i))
    return [
        code[a : b + 1]
        for a, b in sorted(loops)
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    ]


def hottest(
    loops: list[list[str]], widths: Callable[[list[str]], list[int]], load: str, store: str
) -> list[str]:
    """The loop over tiles has the widest accesses; of several, the gradient's. One that only stores zeros
    (ignored rows) comes last."""
    return max(
        (body for body in loops if widths(body)),
        key=lambda body: (
            any(re.search(load, text) for text in body),
            max(widths(body)),
            any(re.search(store, text) for text in body),
            sum(bool(re.search(r"EX2|v_exp_f32", text)) for text in body) / len(widths(body)),
            len(widths(body)),
            -len(body),
        ),
        default=[],
    )


def amd_widths(body: list[str]) -> list[int]:
    """Bytes of each global access."""
    found = []
    for text in body:
        kind = re.match(r"(?:global|buffer|flat)_(?:load|store)_(\w+)", text)
        if kind:
            bits = re.search(r"[bu](\d+)", kind.group(1))
            words = re.search(r"dword(?:x(\d))?", kind.group(1))
            size = 2 if "short" in kind.group(1) else int(bits.group(1)) // 8 if bits else 1
            found.append(4 * int(words.group(1) or 1) if words else size)
    return found


def widths(body: list[str]) -> list[int]:
    """Bytes of each global access."""
    found = []
    for text in body:
        name = opcode(text)
        if name.startswith(("LDG", "STG")):
            bits = re.search(r"\.(?:8|16|U8|U16|S16|64|128|256)\b", name)
            found.append(int(re.sub(r"\D", "", bits.group())) // 8 if bits else 4)
    return found


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def unrolled(variant: Variant, bytes_per_position: float, dtype: str) -> int:
    """How many tiles the compiler made one round of the loop."""
    once = variant.reads * (4 if dtype == "fp32" else 2)
    if variant.constants["BESIDE"] == 1 and variant.name != "JSD other phase":
        once *= 2  # an access is one of a pair: at most twice as many
    return max(1, int(bytes_per_position / once))


def measure(variant: Variant, dtype: str, target: str) -> dict[str, Any]:
    """The cell's figures."""
    from fastsdpo.ops._triton_common import NUM_WARPS

    compiled = compile_variant(variant, dtype, target)
    if not target.startswith("sm_"):
        assembly = compiled.asm["amdgcn"]

        def number(key: str) -> int:
            match = re.search(rf"\.{key}:\s+(\d+)", assembly)
            return int(match.group(1)) if match else 0

        loop = hottest(amd_loops(assembly), amd_widths, r"_load_", r"_store_")
        accesses = amd_widths(loop)
        return {
            "registers": number("vgpr_count"),
            "spills": number("vgpr_spill_count"),
            "local": number("private_segment_fixed_size"),
            "scalar spills": number("sgpr_spill_count"),
            "shared": compiled.metadata.shared,
            "widest": max(accesses, default=0),
            "narrowest": min(accesses, default=0),
            "in loop": sorted({t.split()[0] for t in loop if re.search(AMD_FORBIDDEN, t)}),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name],
                               capture_output=True, text=True)  # fmt: skip
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name],
                              capture_output=True, text=True).stdout  # fmt: skip
    found = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr
    )
    assert found, usage.stdout + usage.stderr
    registers, stack, _, local = map(int, found.groups())
    loop = hot_loop(sass)
    accesses = widths(loop)
    bad = sorted({opcode(t).split(".")[0] for t in loop} & set(FORBIDDEN))
    tile = tiles(variant, dtype)
    per_thread = tile["LANES"] * tile["VEC"] / (NUM_WARPS * WARP)
    moved = per_thread * variant.reads * unrolled(variant, sum(accesses) / per_thread, dtype)
    warps = REGISTER_FILE // (-(-registers // 8) * 8 * WARP)
    return {
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "local": stack + local,
        "shared": compiled.metadata.shared,
        "warps": min(64, warps // NUM_WARPS * NUM_WARPS),
        "widest": max(accesses, default=0),
        "narrowest": min(accesses, default=0),
        "in loop": bad,
        "per element": round(len(loop) / moved, 1) if loop else 0.0,
    }


# Cells known to break a rule, by name, with the reason. `violations` of the committed table are these
# and no others.
MISSES: dict[str, str] = {}


def violations(name: str, cell: dict[str, Any], target: str) -> list[str]:
    """The rules that a cell breaks."""
    found = []
    if cell["spills"] or cell.get("local"):
        found.append(f"spills {cell['spills']}, local memory {cell.get('local', 0)} bytes")
    if "finish" in name:
        return found  # adds up a few numbers per row
    if cell["widest"] < 16:
        found.append(f"widest access {cell['widest']} bytes")
    if cell["narrowest"] < 16 and not name.startswith("top-k"):
        found.append(f"an access of {cell['narrowest']} bytes in the hot loop")
    if cell["in loop"]:
        found.append(f"{', '.join(cell['in loop'])} in the hot loop")
    if not target.startswith("sm_"):
        return found
    if cell["registers"] > MAX_REGISTERS:
        found.append(f"{cell['registers']} registers")
    if cell["per element"] > bar(name):
        found.append(f"{cell['per element']} instructions per element, over {bar(name):g}")
    return found


def bar(name: str) -> float:
    """SASS instructions per element moved, at most. A softcap's tanh costs about 18 more."""
    cap = 24.0 if "softcap" in name else 0.0
    statistics = ("JSD", "JSD split", "JSD other phase")
    if "JSD" in name and "top-k" not in name and name not in statistics:
        return 14.0 + cap
    return (7.0 if "gradient" in name else 9.0) + cap


def cell_name(variant: Variant, dtype: str, target: str) -> str:
    return f"{variant.name} / {dtype} / {target}"


def _work(job: tuple[Variant, str, str]) -> tuple[str, dict[str, Any], list[str]]:
    variant, dtype, target = job
    try:
        cell = {**measure(variant, dtype, target), "source": source_of(variant)}
    except Exception as error:  # a cell that does not compile is a result: the worst one
        while error.__cause__ is not None:
            error = error.__cause__
        failed = {"registers": 0, "spills": 0, "widest": 0, "narrowest": 0, "per element": 0.0}
        return cell_name(*job), failed, [f"does not compile: {str(error)[-300:]}"]
    return cell_name(*job), cell, violations(variant.name, cell, target)


def run(targets: list[str], dtypes: list[str], names: str, workers: int) -> dict[str, Any]:
    jobs = [
        (variant, dtype, target)
        for target in targets
        for dtype in dtypes
        for variant in variants()
        if re.search(names, variant.name)
    ]
    cells = {}
    broken = {}
    with ProcessPoolExecutor(workers) as pool:
        for name, cell, rules in pool.map(_work, jobs, chunksize=4):
            cells[name] = cell
            if rules:
                broken[name] = rules
    return {"cells": cells, "violations": broken}


def regressions(cells: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Cells worse than the committed ones: more registers (by 4), spills, narrower or more instructions."""
    found = []
    for name, cell in cells.items():
        if name not in committed:
            found.append(f"{name}: not in the committed table")
            continue
        old = committed[name]
        if cell["registers"] > old["registers"] + 4:
            found.append(f"{name}: registers {old['registers']} -> {cell['registers']}")
        if cell["spills"] > old["spills"]:
            found.append(f"{name}: spills {old['spills']} -> {cell['spills']}")
        if cell.get("narrowest", 0) < old.get("narrowest", 0):
            found.append(f"{name}: narrowest access {old['narrowest']} -> {cell['narrowest']}")
        if cell.get("per element", 0) > 1.1 * old.get("per element", 0) + 0.2:
            found.append(f"{name}: {old['per element']} -> {cell['per element']} per element")
    return found


def table(cells: dict[str, Any]) -> str:
    """Per variant and dtype: the worst over targets."""
    lines = [
        "| kernel | dtype | registers | spills | narrowest access in the loop, bytes | instructions "
        "per element moved |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for name, cell in cells.items():
        variant, dtype, target = name.split(" / ")
        if target.startswith("sm_"):
            grouped[variant, dtype].append(cell)
    for (variant, dtype), group in grouped.items():
        registers = sorted({cell["registers"] for cell in group})
        span = f"{registers[0]}" if len(registers) == 1 else f"{registers[0]} to {registers[-1]}"
        lines.append(
            f"| {variant} | {dtype} | {span} | {max(c['spills'] for c in group)} | "
            f"{min(c['narrowest'] for c in group)} | {max(c['per element'] for c in group)} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--names", default="", help="regular expression of variants; '^$' compiles none "
                        "and judges the committed cells again")  # fmt: skip
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    import triton

    result = run(args.targets, args.dtypes, args.names, args.workers)
    for name, rules in result["violations"].items():
        print(f"{name}: {'; '.join(rules)}")
    print(f"{len(result['cells'])} cells, {len(result['violations'])} break a rule")
    if args.check:
        worse = regressions(result["cells"], json.loads(RESULTS.read_text())["cells"])
        print("\n".join(worse) or "no cell is worse than the committed table")
        return 1 if worse else 0
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"triton": ""}
    if known["triton"] == triton.__version__:  # cells of other targets stay
        result["cells"] = {**known["cells"], **result["cells"]}
    ours = {cell_name(v, d, t) for v in variants() for d in DTYPES for t in TARGETS}
    cells = {name: cell for name, cell in result["cells"].items() if name in ours}
    judged = {
        n: violations(n.split(" / ")[0], cell, n.split(" / ")[2]) for n, cell in cells.items()
    }
    broken = {name: rules for name, rules in judged.items() if rules}
    result = {"triton": triton.__version__, "cells": cells, "violations": broken}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    now = {cell_name(v, d, t): source_of(v) for v in variants() for d in DTYPES for t in TARGETS}
    old = sum(cell.get("source") != now[name] for name, cell in cells.items())
    if len(cells) < len(now) or old:
        print(f"{len(now) - len(cells)} cells missing, {old} of an earlier version of the kernels")
    compiled = sorted({name.split(" / ")[2] for name in result["cells"]})
    missed = [f"- {n}: {'; '.join(r)}" for n, r in result["violations"].items()]
    text = (
        "# Compile matrix of the Triton kernels\n\nNothing here has run on a GPU: these are figures of "
        f"the compiled code (Triton {triton.__version__}).\n\n"
        "Command: `python benchmarks/compile_matrix.py`. Worst over "
        + ", ".join(target for target in compiled if target.startswith("sm_"))
        + f"; gfx942 is in the JSON. {len(cells)} of {len(now)} cells (kernels x dtypes x targets) are "
        f"here, {old} of them compiled from an earlier version of the kernels.\n\n"
        + table(result["cells"])
        + "\n\n## Cells that break a rule\n\n"
        + ("\n".join(missed) or "None.")
        + "\n"
    )
    RESULTS.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
