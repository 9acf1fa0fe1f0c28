"""token_logps and token_log_ratio against float64 autograd."""

import math

import pytest
import torch

import fastsdpo
from fastsdpo.testing import assert_gradient_close, effective_logits, make_rows

BACKENDS = [name for name in ("reference", "native", "triton") if fastsdpo.available_backends()[name] == "available"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_values_entropy_and_gradient(backend, dtype, softcap):
    if backend != "reference" and dtype == torch.float64:
        pytest.skip("the kernels compute float16, bfloat16 and float32")
    rows = make_rows((2, 5), 131, dtype=dtype)
    keep = rows.target_ids != -100
    oracle_leaf = rows.student.double().clone().requires_grad_()
    log_probs = torch.log_softmax(effective_logits(oracle_leaf, 0.8, softcap), -1)
    want = log_probs.gather(-1, rows.target_ids.clamp(min=0)[..., None])[..., 0] * keep
    upstream = torch.randn(2, 5)
    (want * upstream).sum().backward()

    leaf = rows.student.clone().requires_grad_()
    logps, entropy = fastsdpo.token_logps(
        leaf,
        rows.target_ids,
        temperature=0.8,
        softcap=softcap,
        return_entropy=True,
        backend=backend,
    )
    (logps * upstream).sum().backward()
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logps.double(), want, rtol=tight, atol=tight)
    want_entropy = -(log_probs.exp() * log_probs).sum(-1) * keep
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=tight, atol=tight)
    assert not entropy.requires_grad
    assert_gradient_close(leaf.grad, oracle_leaf.grad)


def test_upstream_gradients_are_per_token(backend):
    """reduction='none' elsewhere has used one upstream gradient for all rows."""
    rows = make_rows((3,), 10, ignored=0)
    grads = []
    for token in range(3):
        leaf = rows.student.clone().requires_grad_()
        fastsdpo.token_logps(leaf, rows.target_ids, backend=backend)[token].backward()
        assert not leaf.grad[[i for i in range(3) if i != token]].any()
        grads.append(leaf.grad)
    leaf = rows.student.clone().requires_grad_()
    (fastsdpo.token_logps(leaf, rows.target_ids, backend=backend) * torch.arange(1, 4)).sum().backward()
    torch.testing.assert_close(leaf.grad, grads[0] + 2 * grads[1] + 3 * grads[2])


def test_log_ratio_is_hindsight_minus_base(backend):
    rows = make_rows((2, 4), 50)
    out = fastsdpo.token_log_ratio(
        rows.student[:, :-1], rows.teacher[:, :-1], rows.target_ids[:, :-1], backend=backend
    )
    for logits, got in ((rows.student, out.student_logps), (rows.teacher, out.teacher_logps)):
        want = fastsdpo.token_logps(logits.double(), rows.target_ids)[:, :-1]
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.log_ratio, out.teacher_logps - out.student_logps)
    same = fastsdpo.token_log_ratio(rows.student, rows.student, rows.target_ids, backend=backend)
    assert not same.log_ratio.any()


def test_single_row_and_many_axes(backend):
    logits = torch.randn(2, 3, 4, 11)
    y = torch.randint(0, 11, (2, 3, 4))
    flat = fastsdpo.token_logps(logits.reshape(-1, 11), y.reshape(-1), backend=backend)
    assert torch.equal(fastsdpo.token_logps(logits, y, backend=backend).reshape(-1), flat)
    one = fastsdpo.token_logps(logits[0, 0, 0], y[0, 0, 0], backend=backend)
    assert one.shape == ()
    assert torch.equal(one, flat[0])
    transposed = logits.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert transposed.stride(-1) != 1
    assert torch.equal(fastsdpo.token_logps(transposed, y, backend=backend).reshape(-1), flat)


def test_uniform_masked_and_certain_rows(backend):
    row = torch.full((1, 8), -math.inf)
    row[0, 3] = 2.0
    logps, entropy = fastsdpo.token_logps(row, torch.tensor([3]), return_entropy=True, backend=backend)
    assert logps.item() == 0
    assert entropy.item() == 0
    assert fastsdpo.token_logps(row, torch.tensor([2]), backend=backend).item() == -math.inf
    logps, entropy = fastsdpo.token_logps(torch.zeros(1, 8), torch.tensor([0]), return_entropy=True, backend=backend)
    assert logps.item() == pytest.approx(-math.log(8), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(8), rel=1e-6)
    nan = torch.zeros(1, 8)
    nan[0, 5] = math.nan
    assert math.isnan(fastsdpo.token_logps(nan, torch.tensor([0]), backend=backend).item())
