"""Bugs known from other kernels, one test each, on ours in Triton's interpreter.

Run as `TRITON_INTERPRET=1 pytest tests/ops/test_triton_values.py`; without it the module is skipped.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsdpo
from fastsdpo.testing import assert_gradient_close, make_rows, oracle_sdpo_loss

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
LOSSES = {
    "sampled": {},
    "forward": {"mode": "full", "alpha": 0.0},
    "reverse": {"mode": "full", "alpha": 1.0},
    "jsd": {"mode": "full", "alpha": 0.4},
    "topk": {"mode": "topk", "alpha": 0.4, "topk": 3},
}
EXAMPLES = int(os.environ.get("FASTSDPO_EXAMPLES", "4"))


def run(student, teacher, targets, backend="triton", **options):
    leaf = student.clone().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf, teacher, targets, backend=backend, **options)
    out.loss.backward()
    return out, leaf.grad


@pytest.fixture(params=LOSSES.values(), ids=LOSSES)
def loss(request):
    return request.param


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    vocabulary=st.sampled_from([4, 5, 127, 128, 129, 2049, 4111]),
    rows=st.integers(1, 3),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_values(loss, vocabulary, rows, spread, temperature, softcap, masked, seed):
    case = make_rows((rows,), vocabulary, spread=spread, seed=seed)
    if masked:
        case.student[:, 1::3] = case.teacher[:, 1::3] = -math.inf
        case.target_ids[case.target_ids >= 0] = 0
    options = {**loss, "temperature": temperature, "softcap": softcap, "weights": case.weights}
    ids = {"topk_ids": case.student.topk(3, -1).indices} if "topk" in loss else {}
    if ids and masked and vocabulary < 6:
        return  # fewer than three tokens are left
    want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **options, **ids)
    out, grad = run(case.student, case.teacher, case.target_ids, **options)
    # Where a gradient nearly cancels, its float32 digits are gone in any kernel: plain PyTorch's error
    # in float32 is what ours is held to.
    plain, plain_grad = run(case.student, case.teacher, case.target_ids, "reference", **options)
    slack = 2 * (plain.loss.double() - want.loss).abs().item()
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=2e-5, atol=1e-5 + slack)
    assert_gradient_close(grad, want.grad, plain_grad, floor=2e-5)


def test_bfloat16_gradient_is_rounded_to_nearest(loss):
    case = make_rows((2,), 130, dtype=torch.bfloat16, ignored=0)
    _, grad = run(case.student, case.teacher, case.target_ids, **loss)
    _, exact = run(case.student.float(), case.teacher.float(), case.target_ids, **loss)
    assert (grad != exact.bfloat16()).float().mean() < 0.02  # ties of a last bit of float32


def test_both_probabilities_underflow():
    student = torch.tensor([[0.0, -500.0, -1.0, -2.0]])
    out, grad = run(student, student.flip(-1) * 2, torch.tensor([0]), mode="full", alpha=0.5)
    assert math.isfinite(out.loss.item())
    assert grad.isfinite().all()


def test_the_first_tile_may_be_minus_infinity(loss):
    case = make_rows((1,), 4400, ignored=0)
    case.student[:, :4200] = case.teacher[:, :4200] = -math.inf
    case.target_ids[:] = 4300
    out, grad = run(case.student, case.teacher, case.target_ids, **loss)
    alone, _ = run(case.student[:, 4200:], case.teacher[:, 4200:], case.target_ids - 4200, **loss)
    torch.testing.assert_close(out.loss, alone.loss, rtol=1e-5, atol=1e-6)
    assert not grad[:, :4200].any()


def test_all_logits_negative_and_a_common_offset(loss):
    """A running maximum that starts at 0, or a merged lse, would lose the digits."""
    case = make_rows((2,), 200, ignored=0)
    case.student, case.teacher = case.student.round() * 0.5, case.teacher.round() * 0.5
    case.student += torch.arange(200) * 2.0**-9
    plain, _ = run(case.student, case.teacher, case.target_ids, **loss)
    far, _ = run(case.student - 4096, case.teacher - 4096, case.target_ids, **loss)
    torch.testing.assert_close(far.per_token_loss, plain.per_token_loss, rtol=1e-4, atol=1e-5)


def test_rows_do_not_depend_on_their_number_or_order(loss):
    case = make_rows((4,), 333, ignored=0)
    w = torch.full((4,), 0.25)
    out, grad = run(case.student, case.teacher, case.target_ids, weights=w, **loss)
    order = torch.tensor([2, 0, 3, 1])
    moved, moved_grad = run(
        case.student[order].clone(), case.teacher[order].clone(), case.target_ids[order],
        weights=w, **loss,
    )  # fmt: skip
    # 333 is odd: rows start at other places of a 16-byte piece, so the comparison is of one place.
    one, one_grad = run(case.student[:1], case.teacher[:1], case.target_ids[:1],
                        weights=w[:1], **loss)  # fmt: skip
    assert torch.equal(one.per_token_loss[0], out.per_token_loss[0])
    assert torch.equal(one_grad[0], grad[0])
    torch.testing.assert_close(moved.per_token_loss, out.per_token_loss[order])
    torch.testing.assert_close(moved_grad, grad[order])


def test_aligned_rows_are_bitwise_the_same_in_any_order(loss):
    case = make_rows((4,), 320, ignored=0)
    w = torch.full((4,), 0.25)
    out, grad = run(case.student, case.teacher, case.target_ids, weights=w, **loss)
    order = torch.tensor([2, 0, 3, 1])
    moved, moved_grad = run(
        case.student[order], case.teacher[order], case.target_ids[order], weights=w, **loss
    )
    assert torch.equal(moved.per_token_loss, out.per_token_loss[order])
    assert torch.equal(moved_grad, grad[order])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_same_values_as_trl_and_liger(alpha):
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    liger = pytest.importorskip("liger_kernel.ops.jsd")
    case = make_rows((3,), 257, ignored=0)
    ours, grad = run(case.student, case.teacher, case.target_ids, mode="full", alpha=alpha)
    leaf = case.student.clone().requires_grad_()
    theirs = losses.compute_full_logit_self_distillation_loss(
        leaf, case.teacher, distillation_alpha=alpha
    )
    theirs.mean().backward()
    torch.testing.assert_close(ours.per_token_loss, theirs.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-6)
    value = liger.LigerJSDFunction.apply(
        torch.log_softmax(case.student, -1), torch.log_softmax(case.teacher, -1), None, alpha, -100
    )
    torch.testing.assert_close(ours.loss, value, rtol=1e-4, atol=1e-5)
