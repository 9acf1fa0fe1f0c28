"""Compiled and interpreted kernels: the compile matrix, the executed PTX and the bytes that are moved."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("compiles: not in the interpreter", allow_module_level=True)

from benchmarks import compile_matrix as matrix
from benchmarks import costmodel, harness, ptx

# The losses' names in the meter and the cost model.
LOSSES = {"log-ratio": "log_ratio", "sampled token": "sampled", "forward KL": "forward_kl"}
LOSSES |= {"reverse KL": "reverse_kl", "JSD": "jsd", "top-k": "topk"}
PER_ROW = 1200  # bytes that a row moves beside its logits: statistics, weights, the targets' logits


def run(*command, **environment):
    given = {"cwd": harness.ROOT, "env": {**os.environ, **environment}}
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, **given)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_the_committed_matrix_is_whole_and_breaks_no_rule():
    committed = matrix.read(matrix.RESULTS)["cells"]
    assert not matrix.broken(committed)
    launched = set()
    for dtype in matrix.DTYPES:
        for amd in (False, True):
            found = matrix.variants(dtype, amd)
            launched |= {variant.kernel.__name__ for variant in found}
            targets = [target for target in matrix.TARGETS if target.startswith("gfx") == amd]
            wanted = {f"{variant.name} / {dtype} / {target}" for variant in found for target in targets}
            assert not wanted - committed.keys()
    assert launched == {name for name in vars(matrix._triton_kernels) if name.endswith("_kernel")}


def test_a_sample_compiles_no_worse_than_committed():
    if matrix.read(matrix.RESULTS)["triton"] != matrix.triton.__version__:
        pytest.skip("the table is of another Triton")
    arguments = ["--check", "--targets", "sm_90", "--dtypes", "bf16", "--workers", "1", "--names"]
    said = run("benchmarks.compile_matrix", *arguments, "^(logps|JSD|top-k JSD): ")
    assert "no cell is worse" in said


def test_cells_are_judged_kept_and_read_again(tmp_path):
    cell, name = {"registers": 40, "spills": 0, "shared": 16}, "x: y / bf16 / sm_90"
    for change in ({"registers": 72}, {"spills": 8}, {"problem": "no such type"}):
        worse = {name: {**cell, **change}}
        assert len(matrix.broken(worse)[name]) == 1
        (found,) = matrix.regressions(worse, {name: cell})
        assert found.startswith(f"{name}: ")
    assert not matrix.regressions({name: {**cell, "registers": 44}}, {name: cell})
    assert not matrix.broken({"x: y / bf16 / gfx942": {**cell, "registers": 100}})
    cells = {name: cell, "x: y / bf16 / gfx942": {"problem": "no such type"}}
    matrix.write(tmp_path / "m.json", {"triton": "3", "source": "s"}, cells)
    assert matrix.read(tmp_path / "m.json")["cells"] == cells


def test_a_launch_is_compiled_as_it_was_asked_for():
    """Aligned pointers, missing ones and numbers, as Triton specializes them."""
    one = {v.name: v for v in matrix.variants("bf16")}
    gradient = one["reverse KL: gradient"]
    assert (gradient.types["s_ptr"], gradient.types["vocabulary"]) == ("*bf16", "i32")
    assert gradient.types["id_ptr"] == "constexpr" and gradient.constants["id_ptr"] is None
    assert "s_ptr" in gradient.aligned and "s_ptr" not in one["reverse KL: gradient, odd strides"].aligned
    assert gradient.options == {"num_warps": 8}
    (amd,) = [v for v in matrix.variants("bf16", amd=True) if v.name == "reverse KL: gradient"]
    assert amd.options == {"num_warps": 4} and not amd.constants["FAST"]


def test_executed_cells_are_kept_and_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ptx, "RESULTS", tmp_path / "ptx.json")
    monkeypatch.setattr(ptx, "ProcessPoolExecutor", lambda jobs: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr("sys.argv", ["ptx", "--quick", "--names", "log-ratio / bf16 / sm_90 / packed"])
    for source, missing in ((ptx.sources, 1), (ptx.sources, 0), (lambda: "other kernels", 1)):
        monkeypatch.setattr(ptx, "sources", source)
        assert ptx.main() == 0
        assert f"1 cells, {missing} of them to run" in capsys.readouterr().out
    about, cells = ptx.read(ptx.RESULTS)
    assert about["source"] == "other kernels"
    assert cells["log-ratio / bf16 / sm_90 / packed"]["sizes"] == ["1", "2", "33", "129"]


def traffic(*arguments):
    """Cells of the meter, by (loss, who)."""
    said = run("benchmarks.traffic", *arguments, TRITON_INTERPRET="1")
    return {(cell["loss"], cell["by"]): cell for cell in json.loads(said.strip().splitlines()[-1])}


@pytest.mark.parametrize("vocabulary", [50257, 32001])
@pytest.mark.slow
def test_kernels_move_what_the_cost_model_says(vocabulary):
    others = vocabulary == 32001 and all(importlib.util.find_spec(name) for name in ("trl", "liger_kernel"))
    found = traffic("--vocabulary", str(vocabulary), *([] if others else ["--ours"]))
    for loss, mode in LOSSES.items():
        cell, predicted = found[loss, "fastsdpo"], costmodel.loss_from_logits(mode, 1, vocabulary, 2)
        selected = loss == "top-k"  # torch.topk selects the support: its reads, and one launch
        assert cell["launches"] + selected == predicted.launches, loss
        over = cell["kernels"] + 2 * selected - predicted.bytes / vocabulary
        assert 0 <= over <= PER_ROW / vocabulary + 0.5 * selected, loss
        assert cell["unique"] <= (4.0 if loss == "log-ratio" else 6.0) + PER_ROW / vocabulary + 0.1 * selected, loss
        if others and (loss, "Liger JSD kernel") in found:
            cell = found[loss, "Liger JSD kernel"]
            liger = costmodel.RIVAL_BYTES_BFLOAT16["Liger JSD from logits"][mode]
            assert cell["kernels"] + cell["torch"] == pytest.approx(liger, rel=0.1), loss


def test_fused_kernels_move_what_the_cost_model_says():
    # A multiple of 16 bytes: elsewhere the teacher's tile can start out of phase with the student's and
    # its pieces are then asked for in pairs, of which the second comes from the cache.
    for (loss, _), cell in traffic("--linear", "--vocabulary", "8192").items():
        predicted = costmodel.LinearLoss(2, 8192, 16, operand=4).parts(LOSSES[loss])["loss kernel"]
        selected = 4 if loss == "top-k" else 0  # torch.topk reads the tile once
        assert cell["kernels"] + selected == pytest.approx(predicted.bytes / 2 / 8192, rel=0.1), loss
        assert cell["launches"] + (loss == "top-k") == predicted.launches, loss
