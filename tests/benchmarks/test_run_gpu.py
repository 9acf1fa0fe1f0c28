"""`make gpu`: what it writes of each part, and that it says where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import types

import torch

from benchmarks import run_gpu

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu" name="a"/>
<testcase classname="tests.gpu" name="b"><skipped message="one GPU"/></testcase>
<testcase classname="tests.gpu" name="c"><failure message="off by one">trace</failure></testcase>
<testcase classname="tests.gpu" name="d"><error message="no module">trace</error></testcase>
</testsuite></testsuites>"""


def test_without_a_gpu_nothing_is_run_or_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run_gpu, "run", None)
    assert run_gpu.main(["--results", str(tmp_path / "r")]) == 1
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_every_part_is_written_also_where_one_fails(monkeypatch, tmp_path, capsys):
    def run(module, *arguments):
        if module == "pytest":
            report = next(a for a in arguments if a.startswith("--junitxml=")).partition("=")[2]
            with open(report, "w") as file:
                file.write(JUNIT)
            return subprocess.CompletedProcess([], 1, "", "")
        if arguments[0] == "doctor":
            return subprocess.CompletedProcess([], 0, json.dumps({"kernels": "right"}), "")
        return subprocess.CompletedProcess([], 2, "", "out of memory")

    monkeypatch.setattr(run_gpu, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(
        run_gpu,
        "_harness",
        types.SimpleNamespace(environment=lambda: {"torch": "2"}, RESULTS=tmp_path),
    )
    assert run_gpu.main(["--results", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("gpu_nvidia-h100-80gb-hbm3_*.json")
    found = json.loads(path.read_text())
    assert found["tests"] == {
        "ok": False, "passed": 1, "skipped": 1,
        "failed": {"tests.gpu::c": "off by one", "tests.gpu::d": "no module"},
    }  # fmt: skip
    assert found["doctor"]["report"] == {"kernels": "right"}
    assert found["benchmark"] == {"ok": False, "problem": "out of memory"}
    text = path.with_suffix(".md").read_text()
    assert "1 passed, 1 skipped, 2 failed." in text
    assert "off by one" in text
    assert "out of memory" in text
    assert "tests FAILED, doctor ok, benchmark FAILED" in capsys.readouterr().out
