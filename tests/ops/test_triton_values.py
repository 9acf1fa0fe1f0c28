"""Bugs known from other kernels, one test each, on ours in Triton's interpreter; drawn values; layouts.

Run as `TRITON_INTERPRET=1 pytest tests/ops/test_triton_values.py`; without it the module is skipped.
``FASTSDPO_EXAMPLES=500`` draws 500 cases per loss (`make fuzz`).
"""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsdpo
from fastsdpo.testing import (
    assert_gradient_close,
    effective_logits,
    make_rows,
    oracle_sdpo_loss,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
interpreter = pytest.importorskip("triton.runtime.interpreter")
LOSSES = {
    "sampled": {},
    "forward": {"mode": "full", "alpha": 0.0},
    "reverse": {"mode": "full", "alpha": 1.0},
    "jsd": {"mode": "full", "alpha": 0.4},
    "topk": {"mode": "topk", "alpha": 0.4, "topk": 3},
}
EPSILON = torch.finfo(torch.float32).eps
EXAMPLES = int(os.environ.get("FASTSDPO_EXAMPLES", "4"))


def run(student, teacher, targets, backend="triton", **options):
    leaf = student.clone().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf, teacher, targets, backend=backend, **options)
    out.loss.backward()
    return out, leaf.grad


@pytest.fixture(params=LOSSES.values(), ids=LOSSES)
def loss(request):
    return request.param


def placed(tensor, shift):
    """The same values as a slice whose rows start ``shift`` elements behind an odd stride's."""
    wide = torch.randn(*tensor.shape[:-1], tensor.shape[-1] + shift + 3 - shift % 2)
    wide = wide.to(tensor.dtype)
    wide[..., shift : shift + tensor.shape[-1]] = tensor
    return wide[..., shift : shift + tensor.shape[-1]]


DRAWN = dict(
    vocabulary=st.sampled_from([1, 2, 4, 5, 17, 47, 127, 128, 129, 2049, 4111]),
    rows=st.integers(1, 3),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    masked=st.booleans(),
    shift=st.sampled_from([None, 0, 1, 5, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
drawn = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@drawn
@given(**DRAWN)
def test_drawn_values(loss, vocabulary, rows, spread, temperature, softcap, masked, shift, dtype, seed):
    case = make_rows((rows,), vocabulary, spread=spread, seed=seed, dtype=dtype)
    if masked:
        case.student[:, 1::3] = case.teacher[:, 1::3] = -math.inf
        case.target_ids[case.target_ids >= 0] = 0
    options = {**loss, "temperature": temperature, "softcap": softcap, "weights": case.weights}
    ids = {}
    if "topk" in loss:
        if vocabulary < (6 if masked else 3):
            return  # fewer than three tokens are left
        ids = {"topk_ids": case.student.topk(3, -1).indices}
    want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **options, **ids)
    student, teacher = case.student, case.teacher
    if shift is not None:  # the student's rows lie at another place than the teacher's
        student, teacher = placed(student, 3), placed(teacher, shift)
    leaf = student.detach().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf, teacher, case.target_ids, backend="triton", **options)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    # What ours is held to is twice plain PyTorch's error in the same dtype and one rounding: of the largest
    # entry, and of a probability, of a log-prob for the sampled token. (Of a student certain to 2^-24, plain
    # PyTorch may get those digits by luck.)
    plain, plain_grad = run(case.student, case.teacher, case.target_ids, "reference", **options)
    slack = 2 * (plain.loss.double() - want.loss).abs().item()
    size = 1.0
    if not loss:
        keep = case.target_ids >= 0
        weights, s, t = (x.double()[keep] for x in (case.weights, want.student_logps, want.teacher_logps))
        largest = torch.maximum(s.abs(), t.abs()).clamp(min=1.0)
        slack += EPSILON * float((weights * largest * s.abs()).sum())
        size = float(largest.max()) if keep.any() else 1.0
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5 + slack)
    rounding = EPSILON * size * float(case.weights.abs().max()) / temperature
    assert_gradient_close(grad, want.grad, plain_grad, floor=EPSILON, absolute=rounding)


@drawn
@given(**DRAWN)
def test_drawn_token_statistics(vocabulary, rows, spread, temperature, softcap, masked, shift, dtype, seed):
    case = make_rows((rows,), vocabulary, spread=spread, seed=seed, dtype=dtype)
    if masked:
        case.student[:, 1::3] = -math.inf
        case.target_ids[case.target_ids >= 0] = 0
    log_probs = torch.log_softmax(effective_logits(case.student, temperature, softcap), -1)
    keep = case.target_ids != -100
    want = log_probs.gather(-1, case.target_ids.clamp(min=0)[..., None])[..., 0] * keep
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs == -math.inf, 0.0)).sum(-1) * keep
    student = case.student if shift is None else placed(case.student, shift)
    logps, found = fastsdpo.token_logps(
        student,
        case.target_ids,
        temperature=temperature,
        softcap=softcap,
        return_entropy=True,
        backend="triton",
    )
    torch.testing.assert_close(logps.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), entropy, rtol=1e-5, atol=1e-5)
    ratio = fastsdpo.token_log_ratio(
        student,
        case.teacher,
        case.target_ids,
        temperature=temperature,
        softcap=softcap,
        backend="triton",
    )
    plain = fastsdpo.token_logps(student, case.target_ids, temperature=temperature, softcap=softcap, backend="triton")
    assert torch.equal(ratio.student_logps, plain)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(32000, torch.float16), (50257, torch.bfloat16), (151936, torch.float32)],
    ids=str,
)
def test_real_vocabularies(loss, vocabulary, dtype):
    """Whole rows, many tiles and parts; the teacher at another place of a 16-byte piece."""
    case = make_rows((1,), vocabulary, dtype=dtype, ignored=0)
    ids = {"topk_ids": case.student.topk(3, -1).indices} if "topk" in loss else {}
    want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **loss, **ids)
    out, grad = run(case.student, placed(case.teacher, 1), case.target_ids, **loss)
    torch.testing.assert_close(out.per_token_loss.double(), want.per_token_loss, rtol=1e-5, atol=1e-5)
    _, plain = run(case.student, case.teacher, case.target_ids, "reference", **loss)
    assert_gradient_close(grad, want.grad, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by", [1, 6, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_at_every_place_of_a_piece(loss, dtype, by):
    """Student, teacher or both ``by`` elements behind a boundary, and nothing beside a row is used."""
    vocabulary = 33_003  # two parts
    case = make_rows((2,), vocabulary, dtype=dtype, ignored=0)
    plain, grad = run(case.student, case.teacher, case.target_ids, **loss)

    def moved(tensor, by):
        wide = torch.full((2, vocabulary + 13), math.nan, dtype=dtype)
        wide[:, by : by + vocabulary] = tensor
        return wide[:, by : by + vocabulary]

    for s_by, t_by in ((by, 3), (0, by)):
        student, teacher = moved(case.student, s_by), moved(case.teacher, t_by)
        out, other = run(student, teacher, case.target_ids, **loss)
        torch.testing.assert_close(out.per_token_loss, plain.per_token_loss, rtol=1e-5, atol=1e-5)
        assert_gradient_close(other, grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_over_the_logits_has_the_same_bits(loss, dtype):
    """As a chunk of `linear_sdpo_loss` asks for it: with the loss, in the logits' place."""
    from fastsdpo.ops import rows

    case = make_rows((1, 3), 9001, dtype=dtype, ignored=0.3)
    options = {"mode": "sampled_token", **loss}
    support = case.student.topk(3, -1).indices.view(3, 3) if "topk" in loss else None
    tokens = rows.Tokens(case.target_ids.flatten(), case.weights.flatten(), topk_ids=support)
    options = rows.LossOptions(temperature=0.9, softcap=30.0, **options)
    grad = torch.empty_like(case.student)
    want = rows.forward(case.student, case.teacher, tokens, options, "triton", grad)
    got = rows.forward(case.student, case.teacher, tokens, options, "triton", case.student)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(case.student, grad)


def test_memory_that_starts_off_a_boundary(loss):
    """Of another library: no access of 16 bytes is possible, and none is made."""
    case = make_rows((2,), 300, dtype=torch.bfloat16, ignored=0)
    plain, grad = run(case.student, case.teacher, case.target_ids, **loss)
    memory = bytearray(2 * 300 * 2 + 64)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16 + 2
    foreign = torch.frombuffer(memory, dtype=torch.bfloat16, offset=start, count=600).view(2, 300)
    foreign.copy_(case.teacher)
    assert foreign.data_ptr() % 16 == 2
    out, moved = run(case.student, foreign, case.target_ids, **loss)
    torch.testing.assert_close(out.per_token_loss, plain.per_token_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved, grad, rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("largest", [3e5, 4e5, 1e12, 1e37])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_logits_far_above_all_others(loss, largest, temperature):
    """One token far above the others, in the second of many tiles, and its neighbour equal to it."""
    case = make_rows((1,), 3 * 8200, ignored=0)
    case.student[:, 9000:9002] = case.teacher[:, 9001:9003] = largest
    case.target_ids[:] = 9001
    options = {**loss, "temperature": temperature}
    if "topk" in loss:
        options["topk"] = 2  # a third would be a tie in float32
    ids = {"topk_ids": case.student.topk(2, -1).indices} if "topk" in loss else {}
    want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **options, **ids)
    out, grad = run(case.student, case.teacher, case.target_ids, **options)
    torch.testing.assert_close(out.student_logps, torch.tensor([math.log(0.5)]))
    torch.testing.assert_close(out.per_token_loss.double(), want.per_token_loss, rtol=1e-5, atol=1e-5)
    if want.grad.isfinite().all():
        assert_gradient_close(grad, want.grad)


@pytest.mark.parametrize("lowest", [-1e5, -1e9, -1e30, torch.finfo(torch.float32).min])
def test_masks_that_are_finite(loss, lowest):
    """Tokens masked with a large negative number instead of -inf have probability 0."""
    case = make_rows((2,), 6000, ignored=0)
    case.target_ids[:] = 4
    case.student[:, 2000:] = case.teacher[:, 2000:] = lowest
    out, grad = run(case.student, case.teacher, case.target_ids, **loss)
    alone, alone_grad = run(case.student[:, :2000].clone(), case.teacher[:, :2000].clone(), case.target_ids, **loss)
    torch.testing.assert_close(out.per_token_loss, alone.per_token_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, :2000], alone_grad, rtol=1e-4, atol=1e-7)
    assert not grad[:, 2000:].any()


def test_a_certain_token_has_probability_one_to_the_last_bit():
    """Whatever the rounding of its own logit x log2(e): log-prob 0, entropy 0, gradient 0."""
    student = torch.randn(6, 2100) - 300
    top = torch.tensor([0.1, 3.3, 77.7, 1234.567, 98765.4, 3.3e4])
    student[:, 1050] = top
    y = torch.full((6,), 1050)
    logps, entropy = fastsdpo.token_logps(student, y, return_entropy=True, backend="triton")
    assert not logps.any()
    assert not entropy.any()
    out, grad = run(student, student + 1, y)
    assert not out.per_token_loss.any()
    assert not grad.any()


@pytest.mark.parametrize("alpha", [0.0, 1.0], ids=["forward", "reverse"])
def test_the_last_bits_of_a_certain_token_that_is_not_the_target(alpha):
    """Its weight is not taken beside the target's, where 2^16 would leave four roundings of 2^-23."""
    below = torch.linspace(5, 11, 24)  # nats
    top = 3 + torch.rand(24, generator=torch.Generator().manual_seed(0)) * 90
    student = torch.full((24, 129), -200.0)
    student[:, 100], student[:, 70] = top, top - below  # beyond the first 64 tokens
    teacher = student.clone()
    teacher[:, 70] -= 0.1
    y = torch.full((24,), 70)
    options = {"mode": "full", "alpha": alpha, "weights": torch.ones(24)}
    want = oracle_sdpo_loss(student, teacher, y, **options)
    _, grad = run(student, teacher, y, **options)
    assert float((grad.double() - want.grad).abs().max()) < 2 * EPSILON


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_gradients_of_unlikely_targets_and_softcaps_are_as_exact_as_plain_pytorch(loss, softcap):
    """Every row by itself, except with a softcap and for the KLs: of a row whose target is far less likely
    than the best token, the sums are exact to a few roundings."""
    case = make_rows((24,), 300, spread=3.0, ignored=0, seed=1)
    options = {**loss, "temperature": 0.5, "softcap": softcap, "weights": torch.ones(24)}
    ids = {"topk_ids": case.student.topk(3, -1).indices} if "topk" in loss else {}
    want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **options, **ids)
    _, plain = run(case.student, case.teacher, case.target_ids, "reference", **options)
    _, grad = run(case.student, case.teacher, case.target_ids, **options)
    size = 1.0
    if not loss:  # a rounding of the log-probs that the ratio is the difference of
        size = float(torch.maximum(want.student_logps.abs(), want.teacher_logps.abs()).max())
    whole = softcap or loss.get("alpha") in (0.0, 1.0)
    parts = [slice(None)] if whole else range(24)
    for part in parts:
        assert_gradient_close(grad[part], want.grad[part], plain[part], floor=EPSILON, absolute=EPSILON * size)


def approximate(function):
    """An operation of the interpreter with a GPU's errors: 2^-22, up or down by the argument's bits."""

    def operation(self, argument):
        x = np.ascontiguousarray(argument.data)
        bits = x.view(np.uint32) * np.uint32(2654435761)
        error = np.where((bits ^ (bits >> np.uint32(15))) & np.uint32(64), 2.0**-22, -(2.0**-22))
        with np.errstate(all="ignore"):
            y = function(x.astype(np.float64), error).astype(np.float32)
        return interpreter.TensorHandle(y, argument.dtype.scalar)

    return operation


@pytest.mark.parametrize("spread", [3.0, 30.0])
def test_exponentials_that_are_as_exact_as_those_of_a_gpu(loss, spread, monkeypatch):
    """PTX documents 2^-22 for ex2.approx, and for lg2.approx near 1: no kernel makes much more of it."""
    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_exp2", approximate(lambda x, error: np.exp2(x) * (1 + error)))
    monkeypatch.setattr(builder, "create_log2", approximate(lambda x, error: np.log2(x) + error))
    case = make_rows((24,), 300, spread=spread, ignored=0, seed=1)
    options = {**loss, "temperature": 0.5, "weights": torch.ones(24)}
    ids = {"topk_ids": case.student.topk(3, -1).indices} if "topk" in loss else {}
    want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **options, **ids)
    _, plain = run(case.student, case.teacher, case.target_ids, "reference", **options)
    out, grad = run(case.student, case.teacher, case.target_ids, **options)
    error = (out.per_token_loss.double() - want.per_token_loss).abs()
    assert bool((error <= 1e-5 * want.per_token_loss.abs().clamp(min=1)).all())
    size = 1.0
    if not loss:  # of log-probs
        size = float(torch.maximum(want.student_logps.abs(), want.teacher_logps.abs()).max())
    # One rounding, and two each of a probability and of a row's sum, over the temperature.
    assert_gradient_close(grad, want.grad, plain, floor=EPSILON, absolute=5 * EPSILON * size / 0.5)


@pytest.mark.parametrize("alpha", [0.0, 1.0], ids=["forward", "reverse"])
def test_a_kl_does_not_depend_on_where_a_row_lies(alpha):
    """One constant on all of the teacher's logits: it is not the difference of two large means."""
    case = make_rows((8,), 129, ignored=0)
    y = torch.arange(8) * 16
    case.student[torch.arange(8), y] += torch.linspace(0, 30, 8)  # up to certain
    teacher = case.student + 0.01 * torch.randn(8, 129)
    options = {"mode": "full", "alpha": alpha, "weights": torch.ones(8)}
    # Multiples of 2^-10: adding a constant is exact.
    student, teacher = (torch.round(x * 1024) / 1024 for x in (case.student, teacher))
    for constant in (0.0, -100.0, 1000.0):
        moved = teacher + constant
        want = oracle_sdpo_loss(student, moved, y, **options)
        out, grad = run(student, moved, y, **options)
        _, plain = run(student, moved, y, "reference", **options)
        assert float((out.per_token_loss - want.per_token_loss).abs().max()) < 4 * EPSILON
        assert_gradient_close(grad, want.grad, plain, absolute=EPSILON)


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
        case.student[order].clone(),
        case.teacher[order].clone(),
        case.target_ids[order],
        weights=w,
        **loss,
    )
    # 333 is odd: rows start at other places of a 16-byte piece, so the comparison is of one place.
    one, one_grad = run(case.student[:1], case.teacher[:1], case.target_ids[:1], weights=w[:1], **loss)
    assert torch.equal(one.per_token_loss[0], out.per_token_loss[0])
    assert torch.equal(one_grad[0], grad[0])
    torch.testing.assert_close(moved.per_token_loss, out.per_token_loss[order])
    torch.testing.assert_close(moved_grad, grad[order])


def test_aligned_rows_are_bitwise_the_same_in_any_order(loss):
    case = make_rows((4,), 320, ignored=0)
    w = torch.full((4,), 0.25)
    out, grad = run(case.student, case.teacher, case.target_ids, weights=w, **loss)
    order = torch.tensor([2, 0, 3, 1])
    moved, moved_grad = run(case.student[order], case.teacher[order], case.target_ids[order], weights=w, **loss)
    assert torch.equal(moved.per_token_loss, out.per_token_loss[order])
    assert torch.equal(moved_grad, grad[order])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_same_values_as_trl_and_liger(alpha):
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    liger = pytest.importorskip("liger_kernel.ops.jsd")
    case = make_rows((3,), 257, ignored=0)
    ours, grad = run(case.student, case.teacher, case.target_ids, mode="full", alpha=alpha)
    leaf = case.student.clone().requires_grad_()
    theirs = losses.compute_full_logit_self_distillation_loss(leaf, case.teacher, distillation_alpha=alpha)
    theirs.mean().backward()
    torch.testing.assert_close(ours.per_token_loss, theirs.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-6)
    value = liger.LigerJSDFunction.apply(
        torch.log_softmax(case.student, -1), torch.log_softmax(case.teacher, -1), None, alpha, -100
    )
    torch.testing.assert_close(ours.loss, value, rtol=1e-4, atol=1e-5)
    for k, tail in ((5, True), (5, False)):
        ours, grad = run(case.student, case.teacher, case.target_ids, mode="topk", alpha=alpha, topk=k, add_tail=tail)
        leaf = case.student.clone().requires_grad_()
        theirs = losses.compute_topk_self_distillation_loss(
            leaf,
            case.teacher,
            distillation_topk=k,
            distillation_alpha=alpha,
            distillation_add_tail=tail,
        )
        theirs.mean().backward()
        torch.testing.assert_close(ours.per_token_loss, theirs.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-6)


def test_same_sampled_token_values_as_trl():
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    case = make_rows((3,), 257, ignored=0)
    ours, grad = run(case.student, case.teacher, case.target_ids)
    leaf = case.student.clone().requires_grad_()
    theirs = losses.compute_sampled_token_self_distillation_loss(
        leaf, case.teacher, case.target_ids, distillation_alpha=1.0
    )
    theirs.mean().backward()
    torch.testing.assert_close(ours.per_token_loss, theirs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-6)
