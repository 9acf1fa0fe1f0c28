"""The byte budgets of the Triton kernels, counted in the interpreter (a process of its own)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Most bytes per element (forward and backward, bfloat16), launches.
BUDGETS = {
    "log-ratio": (4.0, 1),
    "sampled token": (8.0, 2),
    "forward KL": (10.0, 2),
    "reverse KL": (10.0, 2),
    "JSD": (14.0, 3),
    "top-k": (8.5, 2),
}
PER_ROW = 200  # bytes of statistics, targets and weights that a row moves beside its logits


@pytest.mark.parametrize("vocabulary", [151936, 50257, 32001])
def test_kernels_move_no_more_than_their_budget(vocabulary):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "traffic.py"), "--ours", "--json",
         "--vocabulary", str(vocabulary)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    cells = {cell["loss"]: cell for cell in json.loads(run.stdout.strip().splitlines()[-1])}
    assert cells.keys() == BUDGETS.keys()
    for loss, (most, launches) in BUDGETS.items():
        cell = cells[loss]
        assert cell["launches"] == launches, loss
        if (
            loss == "top-k"
        ):  # the support of 20 is gathered besides, and so are its tokens' gradients
            assert 8.0 <= cell["kernels"] <= most
            assert cell["unique"] <= 6.0 + 20 * 64 / vocabulary
            continue
        assert most <= cell["kernels"] <= most + PER_ROW / vocabulary, loss
        least = 4.0 if loss == "log-ratio" else 6.0
        assert least <= cell["unique"] <= least + PER_ROW / vocabulary, loss
