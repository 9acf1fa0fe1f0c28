"""Faults that only compiled code has, executed: flushed subnormal numbers, and warps that drift apart."""

import pytest
import torch

import fastsdpo

from .executor import executing

TINY = 2.0**-126  # the smallest normal float32
LATE = tuple(range(7, -1, -1))  # warp 0, which stores a row's results, comes last


def jsd(student, teacher, alpha: float, backend: str, **mode):
    """(loss per token, the student's gradient), a row for each token: target 0."""
    student = student.detach().requires_grad_()
    out = fastsdpo.sdpo_loss(
        student,
        teacher,
        torch.zeros(len(student), dtype=torch.int64),
        alpha=alpha,
        weights=torch.ones(len(student), dtype=torch.promote_types(student.dtype, torch.float32)),
        backend=backend,
        **mode,
    )
    out.loss.backward()
    return out.per_token_loss.double(), student.grad.double()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_jsd_is_finite_where_a_mixture_probability_is_subnormal(dtype, alpha):
    """2^-126 is e^-87.3: one policy's probability is near it and the other's is 0, so the mixture's is
    subnormal, which log2 on NVIDIA takes for 0."""
    gaps = torch.tensor([85.0, 86.0, 87.0, 87.3, 87.5, 88.0, 89.0, 92.0, 103.0, 110.0])
    likely, far = torch.zeros_like(gaps), torch.full_like(gaps, 300.0)
    near = torch.stack([likely, -gaps], 1).to(dtype)
    none = torch.stack([likely, -far], 1).to(dtype)
    for student, teacher in ((near, none), (none, near)):
        for mode in ({"mode": "full"}, {"mode": "topk", "topk": 2}) if alpha == 0.5 else ({"mode": "full"},):
            want = jsd(student.double(), teacher.double(), alpha, "reference", **mode)
            with executing():
                got = jsd(student, teacher, alpha, "triton", **mode)
            for value, exact in zip(got, want, strict=True):
                assert value.isfinite().all(), (mode, value)
                assert (value - exact).abs().max() < 4 * TINY, mode


@pytest.mark.parametrize(
    "mode",
    [{"mode": "sampled_token"}, {"mode": "topk", "topk": 20}, {"mode": "full", "alpha": 0.5}],
    ids=["sampled", "top-k", "JSD"],
)
def test_a_late_warp_reads_no_gradient_for_a_logit(mode):
    """float32 weights: the gradient's tiles lie over the logits', which a warp reads when it gets there."""
    g = torch.Generator().manual_seed(0)
    hidden, teacher, weight = (torch.randn(n, 16, generator=g) for n in (3, 3, 1000))
    targets = torch.randint(0, 1000, (3,), generator=g)

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        out = fastsdpo.linear_sdpo_loss(h, teacher.to(dtype), w, targets, backend=backend, **mode)
        out.loss.backward()
        return [out.loss.detach(), out.student_logps, h.grad, w.grad]

    want = run("reference", torch.float64)
    for order in (None, LATE, 1):
        with executing(order=order) as executor:
            got = run("triton", torch.float32)
        assert executor.launches
        assert not executor.faults, order
        for value, exact in zip(got, want, strict=True):
            assert (value - exact).abs().max() < 1e-5 * exact.abs().max(), order
