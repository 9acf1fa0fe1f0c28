"""`make gpu` rehearsed on the CPU, where only a GPU box's packages can be imported and nothing is built."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import gpu_losses, gpu_machine, gpu_parts, run_gpu

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "pytest", "pytest-xdist", "hypothesis")

# Python reads it at its start: other packages of this environment are as if not installed.
SITECUSTOMIZE = """
import importlib.machinery, re, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if path is not None or spec is None or name not in {modules!r}:
            return spec
        place = str(spec.origin or spec.submodule_search_locations)
        return None if "site-packages" in place else spec

    @classmethod
    def find_distributions(cls, *context):
        for found in super().find_distributions(*context):
            if re.sub(r"[-_.]+", "-", found.name).lower() in {kept!r}:
                yield found

sys.meta_path[:] = [
    Finder if finder is importlib.machinery.PathFinder else finder
    for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")
]
"""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def required(names):
    """The distributions that these need, themselves among them."""
    found, names = set(), list(names)
    while names:
        name = normal(names.pop())
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        needs = map(Requirement, needs)
        names += [n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """(checkout, environment): a copy without anything built, and `PACKAGES` alone to import."""
    for package in PACKAGES:
        pytest.importorskip({"pytest-xdist": "xdist"}.get(package, package))
    folder = tmp_path_factory.mktemp("box")
    checkout = folder / "checkout"
    left_out = shutil.ignore_patterns("*.so", "results", "__pycache__", "native_build_failed.txt")
    for name in ("benchmarks", "fastsdpo", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    kept = required(PACKAGES)
    modules = importlib.metadata.packages_distributions()
    hidden = {m for m, owners in modules.items() if not any(normal(o) in kept for o in owners)}
    hidden |= {"fastsdpo", "trl", "liger_kernel", "datasets", "pytest_timeout"}
    (folder / "site").mkdir()
    text = SITECUSTOMIZE.format(modules=hidden, kept=kept)
    (folder / "site" / "sitecustomize.py").write_text(text)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST", "TRITON_INTERPRET", "FASTSDPO", "COV"))
    }
    environment |= {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    return checkout, environment


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
    files = list(output.glob("gpu_rehearsal_*.json"))
    return json.loads(files[0].read_text("utf-8")) if files else None


def test_the_whole_rehearsal(box, tmp_path):
    run = rehearse(box, tmp_path)
    ends = {}  # of each part, the first results that hold it whole
    while run.poll() is None:
        results = read(tmp_path)  # valid JSON at any time
        for name, part in (results or {"parts": {}})["parts"].items():
            if part["state"] != "running":
                ends.setdefault(name, results)
        time.sleep(0.1)
    results = read(tmp_path)
    assert run.returncode == 0, said(box) + json.dumps(results and results["parts"], indent=1)
    assert list(results["parts"]) == list(run_gpu.LIMITS)
    assert list(ends) == list(run_gpu.LIMITS)[: len(ends)] and len(ends) >= len(run_gpu.LIMITS) - 1
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
    (page,) = tmp_path.glob("*.md")
    assert page.read_text("utf-8").startswith("# Rehearsal on a CPU: no GPU was measured")
    assert len(list(tmp_path.iterdir())) == 2
    assert not (box[0] / "benchmarks" / "results").exists()


def test_a_killed_run_leaves_what_was_done(box, tmp_path):
    run = rehearse(box, tmp_path, "--only", "host", "linear")
    while "linear" not in (read(tmp_path) or {"parts": {}})["parts"]:
        assert run.poll() is None, said(box)
        time.sleep(0.02)
    run.kill()
    run.wait()
    parts = read(tmp_path)["parts"]
    assert parts["host"]["state"] == "done" and len(parts["host"]["rows"]) == len(gpu_losses.MODES)
    assert parts["linear"]["state"] == "running"


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
    assert {name: part["state"] for name, part in parts.items()} == {
        "linear": "failed",
        "bandwidth": "failed",
        "host": "out of time",
        "kernels": "done",
    }
    assert parts["linear"]["problem"] == "exit status 3\nout of memory"
    assert [part["rows"][0].get("ms") for part in parts.values()] == [2.5, None, 3.5, 1.5]
    assert parts["host"]["problem"] == "stopped after 6 s\nbegun"
    (page,) = (tmp_path / "r").glob("*.md")
    for text in ("out of memory", "off by 3", "## kernels: done", "| JSD | 3.5 |"):
        assert text in page.read_text("utf-8")
    assert "linear: failed, 1 rows" in capsys.readouterr().out


def test_every_part_has_a_limit():
    assert list(gpu_parts.PARTS) == list(run_gpu.LIMITS)


def test_without_time_nothing_is_started(tmp_path):
    output = tmp_path / "r"
    assert run_gpu.main(["--rehearsal", "--minutes", "0", "--output", str(output)]) == 1
    states = {part["state"] for part in read(output)["parts"].values()}
    assert states == {"not run"}


def test_without_a_gpu_nothing_is_run_or_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_gpu.main(["--output", str(tmp_path / "r")]) == 1
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_what_a_cell_and_a_test_report_say_of_a_failure(tmp_path):
    def measure(value):
        if value == 1:
            raise gpu_machine.LeftOut("no such thing here")
        return {"ratio": 1 / value}

    rows = [gpu_machine.cell({"n": value}, measure, value) for value in (2, 1, 0)]
    assert rows[0] == {"n": 2, "ratio": 0.5}
    assert rows[1] == {"n": 1, "left_out": "no such thing here"}
    assert rows[2]["problem"].endswith("ZeroDivisionError: division by zero")
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><skipped message="one GPU"/></testcase>'
        '<testcase classname="t" name="c"><failure message="off by one">x\ny</failure></testcase>'
        '<testcase classname="t" name="d"><error message="no module">z</error></testcase>'
        "</testsuite></testsuites>"
    )
    counts, *failed = gpu_parts.read_junit(report)
    assert counts == {"passed": 1, "skipped": 1, "failed": 2}
    assert failed == [{"test": "t::c", "problem": "off by one\nx\ny"}, {"test": "t::d", "problem": "no module\nz"}]
