"""`make gpu` rehearsed on the CPU, where only a GPU box's packages can be imported and nothing is built."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_machine, gpu_parts, harness, run_gpu

ROOT = Path(__file__).parents[2]
# As if only torch, Triton, transformers, accelerate and pytest were installed, and nothing of the rest built.
HIDDEN = ("trl", "liger_kernel", "cut_cross_entropy", "datasets", "matplotlib", "pyarrow")
SITECUSTOMIZE = f"import sys\nsys.modules.update(dict.fromkeys({HIDDEN}))\n"


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """(checkout, environment): a copy without anything built, where `HIDDEN` cannot be imported."""
    folder = tmp_path_factory.mktemp("box")
    checkout = folder / "checkout"
    left_out = shutil.ignore_patterns("*.so", "results", "__pycache__", "native_build_failed.txt")
    for name in ("benchmarks", "fastsdpo", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (checkout / "sitecustomize.py").write_text(SITECUSTOMIZE)
    ours = ("PYTEST", "TRITON_INTERPRET", "FASTSDPO", "COV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return checkout, {**environment, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def rehearse(box, output, *arguments):
    checkout, environment = box
    command = [sys.executable, "-m", "benchmarks.run_gpu", "--rehearsal", "--output", str(output)]
    with (checkout.parent / "said").open("w") as said:
        return subprocess.Popen(
            [*command, *arguments], cwd=checkout, env=environment, stdout=said, stderr=subprocess.STDOUT
        )


def said(box):
    return (box[0].parent / "said").read_text("utf-8")


def read(output):
    """The results as they are now, or None before the first are written."""
    files = list(output.glob("gpu_rehearsal.json"))
    return json.loads(files[0].read_text("utf-8")) if files else None


@pytest.mark.slow
def test_the_whole_rehearsal(box, tmp_path):
    run = rehearse(box, tmp_path)
    while run.poll() is None:
        read(tmp_path)  # valid JSON at any time
        time.sleep(0.2)
    results = read(tmp_path)
    assert run.returncode == 0, said(box) + json.dumps(results and results["parts"], indent=1)
    assert list(results["parts"]) == list(run_gpu.LIMITS)
    for part in results["parts"].values():
        assert part["state"] == "done", part
        measured = [row for row in part["rows"] if "left_out" not in row]
        numbers = [v for row in measured for v in row.values() if isinstance(v, (int, float))]
        assert numbers and all(map(math.isfinite, numbers)), part
        for row in measured:
            for key in ("ms", "gb_per_s", "tflops", "model_ms", "host_ms", "model_peak_mb"):
                assert row.get(key, 1) > 0, row
    left_out = {row["who"]: row["left_out"] for row in results["parts"]["peers"]["rows"] if "left_out" in row}
    assert left_out["TRL"] == "trl is not importable"
    assert left_out["Liger"] == "liger_kernel is not importable"
    assert "libfastsdpo.so was not built" in results["environment"]["native"]
    assert results["parts"]["tests"]["rows"][0]["passed"] >= 1
    attention = {row["attention"]: row for row in results["parts"]["attention"]["rows"]}
    assert attention["segments"]["tokens"] < attention["separate passes"]["tokens"]
    assert "# Rehearsal on a CPU: no GPU was measured" in said(box)
    assert len(list(tmp_path.iterdir())) == 1
    assert not (box[0] / "benchmarks" / "results").exists()


PYTHON = """#!/bin/sh
rows=$5  # -m benchmarks.gpu_parts NAME --rows FILE
case $3 in
    kernels) echo '{"loss": "JSD", "ms": 1.5}' > $rows ;;
    bandwidth) echo '{"loss": "JSD", "problem": "off by 3"}' > $rows ;;
    linear) echo '{"loss": "JSD", "ms": 2.5}' > $rows; printf '{"lo' >> $rows; echo out of memory; exit 3 ;;
    host) echo '{"loss": "JSD", "ms": 3.5}' > $rows; echo begun; sleep 60 & wait ;;
esac
"""


def test_parts_that_fail_are_recorded_and_the_others_run(tmp_path, monkeypatch, capsys):
    """Parts that end wrongly, in place of the real ones: what the driver makes of it."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(run_gpu.sys, "executable", str(python))
    monkeypatch.setitem(run_gpu.LIMITS, "host", 5.5)
    monkeypatch.setattr(run_gpu.signal, "signal", lambda *_: None)
    names = ["linear", "bandwidth", "host", "kernels"]
    begun = time.monotonic()
    status = run_gpu.main(["--rehearsal", "--output", str(tmp_path / "r"), "--only", *names])
    assert status == 1 and time.monotonic() - begun < 30
    parts = read(tmp_path / "r")["parts"]
    assert list(parts) == names
    assert [part["state"] for part in parts.values()] == ["failed", "failed", "out of time", "done"]
    assert parts["linear"]["problem"] == "exit status 3\nout of memory"
    assert [part["rows"][0].get("ms") for part in parts.values()] == [2.5, None, 3.5, 1.5]
    assert parts["host"]["problem"] == "stopped after 6 s\nbegun"
    shown = capsys.readouterr().out
    for text in ("out of memory", "off by 3", "## kernels: done", "| JSD | 3.5 |", "linear: failed, 1 rows"):
        assert text in shown


def test_without_time_or_a_gpu_nothing_is_started(monkeypatch, tmp_path, capsys):
    assert list(gpu_parts.PARTS) == list(run_gpu.LIMITS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "r"
    assert run_gpu.main(["--output", str(output)]) == 1
    assert "no GPU" in capsys.readouterr().err and not output.exists()
    assert run_gpu.main(["--rehearsal", "--minutes", "0", "--output", str(output)]) == 1
    states = {part["state"] for part in read(output)["parts"].values()}
    assert states == {"not run"}


def test_what_a_cell_says_of_a_failure():
    def measure(value):
        if value == 1:
            raise gpu_machine.LeftOut("no such thing here")
        return {"ratio": 1 / value}

    rows = [gpu_machine.cell({"n": value}, measure, value) for value in (2, 1, 0)]
    assert rows[:2] == [{"n": 2, "ratio": 0.5}, {"n": 1, "left_out": "no such thing here"}]
    assert rows[2]["problem"].endswith("ZeroDivisionError: division by zero")


def test_what_is_read_of_a_test_report(tmp_path):
    cases = [
        '<testcase classname="t" name="a"/>',
        '<testcase classname="t" name="b"><skipped message="one GPU"/></testcase>',
        '<testcase classname="t" name="c"><failure message="off by one">x</failure></testcase>',
        '<testcase classname="t" name="d"><error message="no module">z</error></testcase>',
    ]
    (tmp_path / "t.xml").write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    failed = {"t::c": "off by one\nx", "t::d": "no module\nz"}
    assert harness.read_junit(tmp_path / "t.xml") == {"passed": 1, "skipped": 1, "failed": failed}
