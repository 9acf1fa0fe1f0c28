"""`fastsdpo doctor` reports, and its exit status tells whether a kernel is wrong."""

import json
import os
import subprocess
import sys

import pytest

from fastsdpo import doctor


def test_every_available_kernel_is_right(capsys):
    assert doctor.main(["--json", "--no-bandwidth"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["wrong"] == 0
    cells = report["kernels"]["cpu"]
    assert report["checked"] == len(cells) >= 27
    for name in (*doctor.LOSSES, "log-probs, entropy, log-ratio", "JSD from hidden states"):
        dtypes = {cell["dtype"] for cell in cells if cell["loss"] == name}
        assert dtypes == {"float32", "bfloat16", "float16"}, name
    assert all(report["why"]["cpu"][kind] for kind in report["auto"]["cpu"])
    assert set(report["backends"]) == {"triton", "native", "reference"}
    assert report["auto"]["cpu"]["float64"] == "reference"
    assert report["versions"]["torch"] != "not installed"


def test_a_wrong_kernel_is_named_and_fails(monkeypatch, capsys):
    from fastsdpo.ops import reference

    plain = reference.row_divergence
    monkeypatch.setattr(reference, "row_divergence", lambda s, t, a: (plain(s, t, a)[0] * 1.01, *plain(s, t, a)[1:]))
    assert doctor.main(["--no-bandwidth"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG reverse KL float32" in shown


@pytest.mark.slow
def test_interpreted_kernels_are_right():
    """The interpreter truncates to bfloat16; the report is not about that."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "fastsdpo.doctor", "--json", "--no-bandwidth"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["wrong"] == 0
    assert sum(cell["backend"] == "triton" for cell in report["kernels"]["cpu"]) >= 27
