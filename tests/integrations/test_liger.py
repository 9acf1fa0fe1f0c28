"""Liger's chunked JSD, as installed, against ours, and a sample of its own tests (all of them: `make liger-tests`)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("liger_kernel")

from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

from tests.integrations.liger import ChunkedJSD, FusedLinearKLDiv

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("hard", "soft", "beta", "temperature"), [(0.5, 0.5, 0.2, 2.0), (0.0, 1.0, 0.5, 1.0), (0.9, 0.1, 0.8, 0.5)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_the_chunked_loss_with_hard_labels(hard, soft, beta, temperature, biased):
    student, teacher, weight, head = (torch.randn(*s) * 0.3 for s in ((13, 16), (13, 24), (50, 16), (50, 24)))
    biases = [torch.randn(50), torch.randn(50)] if biased else [None, None]
    labels = torch.randint(0, 50, (13,))
    labels[3] = -100
    theirs = LigerFusedLinearJSDLoss(hard, soft, beta, -100, temperature, compiled=False, chunk_size=5)
    found = []
    for function in (theirs, lambda *given: ChunkedJSD.apply(*given, hard, soft, beta, -100, temperature)):
        leaves = [x if x is None else x.clone().requires_grad_() for x in (student, weight, biases[0])]
        loss = function(leaves[0], leaves[1], teacher, head, labels, leaves[2], biases[1])
        grads = torch.autograd.grad(2 * loss, [leaf for leaf in leaves if leaf is not None])
        found.append((loss.detach(), *grads))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_cross_entropy_is_reported_whatever_its_weight():
    student, teacher, weight, head = (torch.randn(*s) * 0.3 for s in ((13, 16), (13, 24), (50, 16), (50, 24)))
    labels = torch.randint(0, 50, (13,))
    for hard in (0.5, 0.0):
        theirs = LigerFusedLinearJSDLoss(hard, 1 - hard, compiled=False, return_soft_hard_loss=True)
        want = theirs(student, weight, teacher, head, labels)
        settings = (hard, 1 - hard, 0.5, -100, 1.0, False, 1024, True)
        got = ChunkedJSD.apply(student, weight, teacher, head, labels, None, None, *settings)
        torch.testing.assert_close(got, want)
        assert want[2] > 1


def test_under_bfloat16_autocast_ours_is_nearer_to_float64():
    """Liger's test of this compares with a loss whose logits are rounded to bfloat16."""
    weight, states = torch.rand(300, 512), torch.randn(8, 512, dtype=torch.bfloat16)
    target = torch.rand(8, 300).softmax(-1)

    def plain(states, weight):
        logps = F.linear(states, weight).to(torch.promote_types(states.dtype, torch.float32)).log_softmax(-1)
        return F.kl_div(logps, target.to(logps.dtype), reduction="batchmean")

    def gradients(loss_of, *given):
        leaves = [x.detach().clone().requires_grad_() for x in given]
        return [grad.double() for grad in torch.autograd.grad(loss_of(*leaves), leaves)]

    exact = gradients(plain, states.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(plain, states, weight)
        ours = gradients(lambda s, w: FusedLinearKLDiv.apply(s, w, target), states, weight)
    for want, rounded, got in zip(exact, theirs, ours):
        assert (got - want).norm() < 0.5 * (rounded - want).norm()


def test_a_sample_of_ligers_own_tests():
    folder = ROOT / "build/liger"
    if not (folder / "test").exists():
        pytest.skip("needs Liger's sources, which its wheel has not: make liger-tests")
    sample = "low_probability or (functional and 42 and 41-41 and dtype1 and not accum_dtype1)"
    command = ["-m", "tests.integrations.liger", str(folder), "-k", sample]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = re.findall(r"^(native|reference|ptx): (\d+) passed$", done.stdout, re.MULTILINE)
    assert [name for name, _ in counts] == ["native", "reference", "ptx"]
    assert {number for _, number in counts} == {"5"}
