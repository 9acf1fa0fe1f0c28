"""A sample of Liger's chunked JSD, as installed, against ours; `tests.integrations.liger` runs its own tests."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("liger_kernel")

from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

from tests.integrations.liger import ChunkedJSD


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
