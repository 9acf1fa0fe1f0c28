"""The process of one part of `benchmarks.run_gpu`: its rows of numbers go to a file as they come.

    python -m benchmarks.gpu_parts bandwidth --rows rows.jsonl [--rehearsal]

A row with "problem" failed; one with "left_out" says what this machine lacks. A rehearsal takes small sizes
and the CPU. Times are in milliseconds: the median of several runs after a warm-up, by CUDA events on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.gpu_machine import Machine, Row

# The module of each part, which is a function there: a Machine -> rows.
LOSSES, MODELS = "benchmarks.gpu_losses", "benchmarks.gpu_models"
PARTS = {
    "kernels": LOSSES,
    "bandwidth": LOSSES,
    "linear": LOSSES,
    "attention": MODELS,
    "step": MODELS,
    "host": LOSSES,
    "tests": "benchmarks.gpu_parts",
    "peers": LOSSES,
}


def tests(machine: Machine) -> Iterator[Row]:
    """The GPU tests: counts, and a row with the end of the report of each that failed."""
    import pytest

    files = sorted(harness.ROOT.glob("tests/**/test_*.py"))  # others need not be imported
    marked = [str(path) for path in files if "mark.gpu" in path.read_text("utf-8")]
    processes, chosen = "4", []
    if machine.rehearsal:
        os.environ["FASTSDPO_GPU_TEST_DEVICE"] = "cpu"
        processes, chosen = "0", ["-k", "two_runs_agree and sampled"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        status = pytest.main(
            [
                "-q",
                "-m",
                "gpu",
                "-n",
                processes,
                f"--junitxml={report}",
                "-p",
                "no:cacheprovider",
                # Without pytest-timeout its setting is unknown, and every warning is an error.
                "-W",
                "ignore:Unknown config option:pytest.PytestConfigWarning",
                *chosen,
                *marked,
            ]
        )
        if not report.exists():
            raise RuntimeError(f"pytest ended with {status} and without a report")
        found = harness.read_junit(report)
    yield {**found, "failed": len(found["failed"])}
    for name, text in found["failed"].items():
        yield {"test": name, "problem": "\n".join(text.splitlines()[-7:])}


def end_with_parent() -> None:
    """Ends this process and what it started when standard input does: when run_gpu is killed."""
    if os.getsid(0) != os.getpid():  # started by hand
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--rows", type=Path, required=True, help="a row of JSON a line goes there")
    parser.add_argument("--rehearsal", action="store_true", help="small sizes on the CPU")
    options = parser.parse_args()
    end_with_parent()
    torch.manual_seed(0)
    with options.rows.open("a", encoding="utf-8") as file:
        measure = getattr(importlib.import_module(PARTS[options.part]), options.part)
        for row in measure(Machine(options.rehearsal)):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
