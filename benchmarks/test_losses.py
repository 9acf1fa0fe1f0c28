"""The losses of this installation and of its rivals, one pytest-benchmark entry each.

    pytest benchmarks/test_losses.py --benchmark-json losses.json
    pytest benchmarks/test_losses.py --benchmark-compare        # against an earlier run

Every entry is checked against float64 first. For ratios use `fastsdpo bench`, which runs all rivals in
turns; here each has its own stretch of time, which suits a comparison with an earlier version.
"""

from __future__ import annotations

import pytest
import torch

from fastsdpo import bench

TOKENS, VOCABULARY, HIDDEN = 64, 49152, 576
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RIVALS = ("fastsdpo", "PyTorch", "torch.compile", "TRL", "Liger", "CCE")


@pytest.fixture(scope="module")
def cases():
    return {
        "logits": bench.LogitsCase(TOKENS, VOCABULARY, torch.float32, DEVICE),
        "hidden": bench.HiddenCase(TOKENS, VOCABULARY, HIDDEN, torch.float32, DEVICE),
    }


@pytest.mark.parametrize("who", RIVALS)
@pytest.mark.parametrize("mode", list(bench.MODES))
@pytest.mark.parametrize("question", ["logits", "hidden"])
def test_loss_and_gradient(question, mode, who, cases, benchmark):
    case = cases[question]
    torch._dynamo.reset()
    call = case.calls(mode, torch.compile(bench.plain_loss, dynamic=False)).get(who)
    if call is None:
        pytest.skip(f"{who} has no such loss, or is not installed")
    wrong = bench.check(case, mode, {who: call})
    assert not wrong, wrong

    def run():
        result = call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{question} {mode}"
    benchmark.extra_info["shape"] = case.label
    benchmark.pedantic(run, setup=case.restore, rounds=5, warmup_rounds=1)
