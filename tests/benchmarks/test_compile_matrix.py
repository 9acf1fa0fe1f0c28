"""The offline compile matrix: what is committed is whole, and a sample of it compiles no worse today."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SAMPLE = "^(logps|log-ratio|sampled gradient|reverse KL|JSD loss|JSD gradient|top-k JSD fused)$"


@pytest.fixture(scope="module")
def matrix():
    import importlib.util

    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    spec = importlib.util.spec_from_file_location(
        "compile_matrix", ROOT / "benchmarks" / "compile_matrix.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_matrix"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compile_matrix"]
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted


@pytest.fixture(scope="module")
def committed(matrix):
    return json.loads(matrix.RESULTS.read_text())


def test_every_mode_is_in_the_committed_table_for_every_target(matrix, committed):
    wanted = {
        matrix.cell_name(variant, "bf16", target)
        for variant in matrix.variants()
        for target in matrix.TARGETS
    }
    assert not wanted - committed["cells"].keys()


def test_the_only_broken_rules_are_the_known_ones(matrix, committed):
    for name, cell in committed["cells"].items():
        variant, _, target = name.split(" / ")
        broken = matrix.violations(variant, cell, target)
        assert broken == committed["violations"].get(name, []), name
        if broken:
            assert any(re.search(known, name) for known in matrix.MISSES), f"{name}: {broken}"


def test_a_sample_compiles_no_worse_than_committed(matrix, committed):
    import triton

    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {committed['triton']}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "compile_matrix.py"), "--check", "--targets",
         "sm_90", "--dtypes", "bf16", "--names", SAMPLE, "--workers", "1"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "no cell is worse" in run.stdout


def test_a_regression_names_its_cell(matrix):
    cell = {"registers": 40, "spills": 0, "narrowest": 16, "per element": 7.0}
    for change in ({"registers": 48}, {"spills": 2}, {"narrowest": 8}, {"per element": 9.0}):
        (found,) = matrix.regressions({"x / bf16 / sm_90": {**cell, **change}},
                                      {"x / bf16 / sm_90": cell})  # fmt: skip
        assert found.startswith("x / bf16 / sm_90: ")
