"""The byte budgets of the Triton kernels, counted in the interpreter (a process of its own)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import costmodel

ROOT = Path(__file__).parents[2]
RIVALS = all(importlib.util.find_spec(name) for name in ("trl", "liger_kernel"))
# Most bytes per element (forward and backward, bfloat16), launches.
BUDGETS = {
    "log-ratio": (4.0, 2),
    "sampled token": (8.0, 3),
    "forward KL": (10.0, 3),
    "reverse KL": (10.0, 3),
    "JSD": (14.0, 4),
    "top-k": (8.5, 3),
}
# Bytes that a row moves beside its logits: statistics of its parts and its own, weights, the targets' logits.
PER_ROW = 1200


# Their names in the cost model.
MODES = {
    "log-ratio": "log_ratio",
    "sampled token": "sampled",
    "forward KL": "forward_kl",
    "reverse KL": "reverse_kl",
    "JSD": "jsd",
    "top-k": "topk",
}


def count(*arguments):
    """Cells of the meter, by (loss, who)."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "traffic.py"), "--json", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    cells = json.loads(run.stdout.strip().splitlines()[-1])
    return {(cell["loss"], cell["by"]): cell for cell in cells}


@pytest.mark.parametrize("vocabulary", [151936, 50257, 32001])
def test_kernels_move_no_more_than_their_budget(vocabulary):
    pytest.importorskip("triton")
    others = vocabulary == 32001 and RIVALS  # in one of the runs the rivals too
    found = count("--vocabulary", str(vocabulary), *([] if others else ["--ours"]))
    cells = {loss: cell for (loss, by), cell in found.items() if by == "fastsdpo"}
    assert cells.keys() == BUDGETS.keys()
    for loss, (most, launches) in BUDGETS.items():
        cell = cells[loss]
        predicted = costmodel.loss_from_logits(MODES[loss], 1, vocabulary, 2)
        moved = cell["kernels"] + cell["torch"]  # top-k: torch.topk selects the support
        assert moved * vocabulary == pytest.approx(predicted.bytes, rel=0.1), loss
        assert launches + (loss == "top-k") == predicted.launches, loss
        assert cell["launches"] == launches, loss
        if loss == "top-k":  # the support of 20 is gathered besides, and so are its tokens' gradients
            assert 8.0 <= cell["kernels"] <= most
            assert cell["unique"] <= 6.0 + 20 * 64 / vocabulary
            continue
        assert most <= cell["kernels"] <= most + PER_ROW / vocabulary, loss
        least = 4.0 if loss == "log-ratio" else 6.0
        assert least <= cell["unique"] <= least + PER_ROW / vocabulary, loss
    if not others:
        return
    for loss in ("forward KL", "reverse KL", "JSD"):
        cell = found[loss, "Liger JSD kernel"]
        predicted = costmodel.RIVAL_BYTES_BFLOAT16["Liger JSD from logits"][MODES[loss]]
        assert cell["kernels"] + cell["torch"] == pytest.approx(predicted, rel=0.1), loss


def test_fused_kernels_move_what_the_cost_model_says():
    pytest.importorskip("triton")
    # A multiple of 16 bytes: elsewhere the teacher's tile can start out of phase with the student's and
    # its pieces are then asked for in pairs, of which the second comes from the cache.
    vocabulary, rows = 8192, 2
    found = count("--linear", "--vocabulary", str(vocabulary))
    assert len(found) == 5
    for (loss, _), cell in found.items():
        parts = costmodel.linear_loss(MODES[loss], rows, vocabulary, 16, operand=4)
        predicted = parts["loss kernel"]
        selected = 4 if loss == "top-k" else 0  # torch.topk reads the tile once
        assert cell["kernels"] + selected == pytest.approx(predicted.bytes / rows / vocabulary, rel=0.1), loss
        assert cell["launches"] + (loss == "top-k") == predicted.launches, loss
