"""The offline compile matrix: what is committed is whole, and a sample of it compiles no worse today."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("compiles: not in the interpreter", allow_module_level=True)

from benchmarks import compile_matrix as matrix

ROOT = Path(__file__).parents[2]
SAMPLE = "^(logps|reverse KL|JSD|top-k JSD): "


@pytest.fixture(scope="module")
def committed():
    return json.loads(matrix.RESULTS.read_text())


@pytest.mark.parametrize("dtype", matrix.DTYPES)
def test_every_variant_is_in_the_committed_table_for_every_target(committed, dtype):
    for amd in (False, True):
        names = [variant.name for variant in matrix.variants(dtype, amd)]
        targets = [target for target in matrix.TARGETS if target.startswith("gfx") == amd]
        wanted = {f"{name} / {dtype} / {target}" for name in names for target in targets}
        assert not wanted - committed["cells"].keys()


def test_every_kernel_has_variants():
    launched = {variant.kernel.__name__ for variant in matrix.variants("bf16")}
    there = {name for name in vars(matrix._triton_kernels) if name.endswith("_kernel")}
    assert launched == there


def test_no_committed_cell_breaks_a_rule(committed):
    assert not matrix.broken(committed["cells"])


def test_a_sample_compiles_no_worse_than_committed(committed):
    if committed["triton"] != matrix.triton.__version__:
        pytest.skip(f"the table is of Triton {committed['triton']}")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.compile_matrix",
            "--check",
            "--targets",
            "sm_90",
            "--dtypes",
            "bf16",
            "--names",
            SAMPLE,
            "--workers",
            "1",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "no cell is worse" in run.stdout


def test_rules_and_regressions_name_their_cell():
    cell = {"registers": 40, "spills": 0, "shared": 16}
    name = "x: y / bf16 / sm_90"
    for change in ({"registers": 72}, {"spills": 8}, {"problem": "no such type"}):
        assert len(matrix.broken({name: {**cell, **change}})[name]) == 1
        (found,) = matrix.regressions({name: {**cell, **change}}, {name: cell})
        assert found.startswith(f"{name}: ")
    assert not matrix.regressions({name: {**cell, "registers": 44}}, {name: cell})
    assert not matrix.broken({"x: y / bf16 / gfx942": {**cell, "registers": 100}})


def test_a_launch_is_compiled_as_it_was_asked_for():
    """Aligned pointers, missing ones and numbers, as Triton specializes them."""
    (gradient,) = [v for v in matrix.variants("bf16") if v.name == "reverse KL: gradient"]
    assert gradient.types["s_ptr"] == "*bf16"
    assert gradient.types["vocabulary"] == "i32"
    assert gradient.types["id_ptr"] == "constexpr"
    assert gradient.constants["id_ptr"] is None
    assert "s_ptr" in gradient.aligned
    assert gradient.options == {"num_warps": 8}
    (amd,) = [v for v in matrix.variants("bf16", amd=True) if v.name == "reverse KL: gradient"]
    assert amd.options == {"num_warps": 4}
    assert not amd.constants["FAST"]
    (odd,) = [v for v in matrix.variants("bf16") if v.name == "reverse KL: gradient, odd strides"]
    assert "s_ptr" not in odd.aligned
