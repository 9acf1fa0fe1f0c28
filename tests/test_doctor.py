"""`fastsdpo doctor` reports, and its exit status tells whether a backend computes something wrong."""

import json
import os
import subprocess
import sys

import pytest

import fastsdpo
from fastsdpo import doctor
from fastsdpo.cli import main


def test_every_usable_backend_is_right(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["wrong"] == 0 and report["checked"] >= 15
    assert report["backends"] == fastsdpo.available_backends()
    assert "reference" in report["problems"]["cpu"]
    assert ("native" in report["problems"]["cpu"]) == (report["backends"]["native"] == "available")
    assert report["auto"]["cpu"]["float64"] == "reference"
    assert report["versions"]["torch"] != "not installed"
    assert report["advice"] == [] or report["backends"]["native"] != "available"


def test_a_wrong_backend_is_named_and_fails(monkeypatch, capsys):
    from fastsdpo.ops import reference

    plain = reference.divergence_values
    monkeypatch.setattr(reference, "divergence_values", lambda *read: (plain(*read)[0] * 1.01, plain(*read)[1]))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "cpu reference: WRONG" in shown and "reverse KL, float32" in shown
    assert "sampled token, float32" not in shown


def test_what_is_missing_comes_with_what_to_do():
    installed = {package: "not installed" for package in doctor.PACKAGES}
    text = "\n".join(doctor.advice(installed, {"native": "its build failed", "triton": "available"}))
    assert "FASTSDPO_REQUIRE_NATIVE=1" in text and "pip install 'fastsdpo[train]'" in text


@pytest.mark.slow
def test_interpreted_kernels_are_right():
    """The interpreter truncates to bfloat16; the report is not about that."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "fastsdpo", "doctor", "--json"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["problems"]["cpu"]["triton"] == []
