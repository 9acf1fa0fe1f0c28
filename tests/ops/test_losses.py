"""The from-logits contract on the backends that run here, against float64 autograd of the formulas."""

import math

import pytest
import torch

import fastsdpo
from fastsdpo.testing import assert_gradient_close, make_rows, oracle_sdpo_loss

BACKENDS = [name for name in ("reference", "native", "triton") if fastsdpo.available_backends()[name] == "available"]
LOSSES = [
    ("sampled_token", 1.0, None, True),
    ("full", 0.0, None, True),
    ("full", 1.0, None, True),
    ("full", 0.3, None, True),
    ("topk", 0.0, 5, True),
    ("topk", 1.0, 5, True),
    ("topk", 0.3, 5, True),
    ("topk", 1.0, 5, False),
    ("topk", 0.3, 5, False),
]
LOSS_IDS = [f"{m}-a{a}-{'tail' if t else 'renorm'}" for m, a, _, t in LOSSES]


def options(loss):
    mode, alpha, topk, tail = loss
    return {"mode": mode, "alpha": alpha, "topk": topk, "add_tail": tail}


def run(rows, backend, student=None, **kwargs):
    student = rows.student if student is None else student
    leaf = student.clone().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf, rows.teacher, rows.target_ids, backend=backend, **kwargs)
    out.loss.backward()
    return out, leaf.grad


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 4.0)], ids=["plain", "temp-cap"])
def test_loss_and_gradient_equal_the_formula(backend, loss, dtype, temperature, softcap):
    if backend != "reference" and dtype == torch.float64:
        pytest.skip("the kernels compute float16, bfloat16 and float32")
    rows = make_rows((3, 4), 129, dtype=dtype)
    kwargs = dict(
        **options(loss),
        weights=rows.weights,
        temperature=temperature,
        softcap=softcap,
        old_logps=torch.full((3, 4), -4.0),
        is_clip=2.0,
    )
    if loss[0] == "topk":  # a tie in half precision makes the support ambiguous: fix it
        kwargs |= {"topk": 5}
        ids = rows.student.topk(5, -1).indices
        expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, topk_ids=ids, **kwargs)
    else:
        expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, **kwargs)
    out, grad = run(rows, backend, **kwargs)
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.loss.dtype == out.per_token_loss.dtype == statistics
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=tight, atol=tight)
    for got, want in (
        (out.per_token_loss, expected.per_token_loss),
        (out.student_logps, expected.student_logps),
        (out.teacher_logps, expected.teacher_logps),
        (out.log_ratio, expected.teacher_logps - expected.student_logps),
    ):
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), want, rtol=tight, atol=tight)
    assert_gradient_close(grad, expected.grad, floor=1e-13 if dtype == torch.float64 else 4e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_default_weights_are_the_token_mean(backend, loss):
    rows = make_rows((7,), 50, seed=1, ignored=0.4)
    out, _ = run(rows, backend, **options(loss))
    keep = rows.target_ids != -100
    assert 0 < keep.sum() < 7
    torch.testing.assert_close(out.loss, out.per_token_loss[keep].mean())


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 4097])
def test_vocabulary_sizes(backend, vocabulary):
    rows = make_rows((5,), vocabulary)
    for loss in LOSSES[:4]:
        expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, **options(loss))
        out, grad = run(rows, backend, **options(loss))
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
        assert_gradient_close(grad, expected.grad)


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_a_slice_gives_the_same(backend, loss):
    rows = make_rows((2, 6), 33)
    full = torch.randn(2, 7, 40)
    full[:, :-1, :33] = rows.student
    teacher = torch.randn(2, 7, 37)
    teacher[:, 1:, 4:] = rows.teacher
    plain, grad = run(rows, backend, **options(loss))
    leaf = full.requires_grad_()
    out = fastsdpo.sdpo_loss(leaf[:, :-1, :33], teacher[:, 1:, 4:], rows.target_ids, backend=backend, **options(loss))
    out.loss.backward()
    # The Triton kernels may add up rows at another place of a 16-byte piece in another order.
    exact = {"rtol": 0, "atol": 0} if backend != "triton" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.per_token_loss, plain.per_token_loss, **exact)
    torch.testing.assert_close(leaf.grad[:, :-1, :33], grad, **exact)
    assert not leaf.grad[:, -1].any()
    assert not leaf.grad[..., 33:].any()


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_ignored_rows_may_hold_nan(backend, loss):
    rows = make_rows((8,), 30, ignored=0.5)
    ignored = rows.target_ids == -100
    assert ignored.any()
    assert not ignored.all()
    clean, clean_grad = run(rows, backend, **options(loss), weights=rows.weights)
    rows.student[ignored] = math.nan
    rows.teacher[ignored] = math.inf
    out, grad = run(rows, backend, **options(loss), weights=rows.weights)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(grad, clean_grad)
    for field in out[1:]:
        assert not field[ignored].any()
    assert not grad[ignored].any()


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (4,)])
def test_nothing_to_learn_from_gives_zero(backend, loss, shape):
    rows = make_rows(shape, 20, ignored=1.1)
    assert bool((rows.target_ids == -100).all())
    out, grad = run(rows, backend, **options(loss))
    assert out.loss.item() == 0
    assert out.per_token_loss.shape == shape
    assert grad.shape == (*shape, 20)
    assert not grad.any()


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_masked_vocabulary_is_probability_zero(backend, loss):
    """-inf in both policies is a padded vocabulary: the result of the unpadded one, gradient 0."""
    rows = make_rows((6,), 40)
    unpadded, grad = run(rows, backend, **options(loss), softcap=5.0)
    minus_inf = torch.full((6, 9), -math.inf)
    rows.student = torch.cat([minus_inf, rows.student], -1)
    rows.teacher = torch.cat([minus_inf, rows.teacher], -1)
    rows.target_ids = torch.where(rows.target_ids >= 0, rows.target_ids + 9, rows.target_ids)
    padded, padded_grad = run(rows, backend, **options(loss), softcap=5.0)
    torch.testing.assert_close(padded.per_token_loss, unpadded.per_token_loss)
    torch.testing.assert_close(padded_grad[:, 9:], grad, rtol=1e-5, atol=1e-7)
    assert not padded_grad[:, :9].any()


def test_infinite_divergence_is_inf_and_never_nan(backend):
    student = torch.zeros(1, 4)
    teacher = torch.tensor([[0.0, 0.0, -math.inf, 0.0]])
    y = torch.tensor([0])
    reverse = fastsdpo.sdpo_loss(student, teacher, y, mode="full", alpha=1.0, backend=backend)
    forward = fastsdpo.sdpo_loss(teacher, student, y, mode="full", alpha=0.0, backend=backend)
    assert reverse.loss.item() == math.inf
    assert forward.loss.item() == math.inf
    for alpha in (0.0, 0.3):
        out = fastsdpo.sdpo_loss(student, teacher, y, mode="full", alpha=alpha, backend=backend)
        assert math.isfinite(out.loss.item())
    impossible = fastsdpo.sdpo_loss(teacher, teacher, torch.tensor([2]), backend=backend)
    assert impossible.log_ratio.item() == 0
    assert impossible.loss.item() == 0


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_huge_logits(backend, loss, magnitude):
    rows = make_rows((4,), 60, ignored=0)
    offset = torch.full((4, 1), magnitude) if magnitude < 1e5 else torch.zeros(4, 1)
    rows.student = rows.student.round() + offset  # integers: the sum is exact in float32
    rows.teacher = rows.teacher.round() + offset
    if magnitude > 1e5:
        rows.student[:, 3] = magnitude
        rows.teacher[:, 3] = magnitude
        rows.target_ids[:] = 3
    if loss[0] == "topk":
        rows.student += torch.arange(60) * 2.0**-7 if magnitude < 1e5 else 0.0
    ids = rows.student.topk(5, -1).indices if loss[0] == "topk" else None
    expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, topk_ids=ids, **options(loss))
    out, grad = run(rows, backend, **options(loss))
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    assert_gradient_close(grad, expected.grad)


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_inplace_gradient_lives_in_the_logits(backend, loss):
    rows = make_rows((5,), 64)
    _, expected = run(rows, backend, **options(loss))
    leaf = rows.student.clone().requires_grad_()
    logits = leaf * 1
    out = fastsdpo.sdpo_loss(
        logits, rows.teacher, rows.target_ids, inplace_grad=True, backend=backend, **options(loss)
    )
    (grad,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_rows_beyond_two_to_the_31_elements(backend, loss):
    """Offsets of rows have 64 bits, read and written. (Of the memory only the rows' pages are touched.)"""
    rows = make_rows((2,), 64, dtype=torch.float16, ignored=0)
    plain, expected = run(rows, backend, **options(loss))
    stride = 2**31 + 8  # rows at the same place of a 16-byte piece: the same bits
    memory = torch.UntypedStorage(2 * (stride + 64))
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (2, 64), (stride, 1)).copy_(rows.student)
    leaf = far.requires_grad_()
    logits = leaf.view_as(leaf)
    out = fastsdpo.sdpo_loss(
        logits, rows.teacher, rows.target_ids, inplace_grad=True, backend=backend, **options(loss)
    )
    assert torch.equal(out.per_token_loss, plain.per_token_loss)
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert grad.stride() == (stride, 1) and grad.data_ptr() == memory.data_ptr()
    assert torch.equal(grad, expected)


def test_inplace_gradient_of_an_expanded_tensor_is_allocated(backend):
    row = torch.randn(1, 12)
    y = torch.tensor([1, 2, 3])
    leaf = row.clone().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf.expand(3, 12), torch.randn(3, 12), y, inplace_grad=True, backend=backend)
    out.loss.backward()
    assert torch.equal(leaf.detach(), row)
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_backward_is_repeatable_bit_by_bit_and_scales(backend, loss):
    rows = make_rows((6,), 77)
    leaf = rows.student.clone().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf, rows.teacher, rows.target_ids, backend=backend, **options(loss))
    (first,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(4 * out.loss, leaf)
    assert torch.equal(first, second)
    assert torch.equal(scaled, 4 * first)


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_second_derivative_raises(backend, loss):
    rows = make_rows((3,), 20)
    leaf = rows.student.clone().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf, rows.teacher, rows.target_ids, backend=backend, **options(loss))
    (grad,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
    with pytest.raises(ValueError, match="second derivative"):
        grad.sum().backward()


def test_teacher_gets_no_gradient(backend):
    rows = make_rows((3,), 20)
    teacher = rows.teacher.requires_grad_()
    leaf = rows.student.requires_grad_()
    fastsdpo.sdpo_loss(leaf, teacher, rows.target_ids, mode="full", backend=backend).loss.backward()
    assert leaf.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_no_grad_and_autocast(backend, loss):
    rows = make_rows((3,), 20)
    want, _ = run(rows, backend, **options(loss))
    with torch.no_grad():
        out = fastsdpo.sdpo_loss(
            rows.student.requires_grad_(),
            rows.teacher,
            rows.target_ids,
            backend=backend,
            **options(loss),
        )
    assert not out.loss.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = run(rows, backend, student=rows.student.detach(), **options(loss))
    assert torch.equal(cast.loss, want.loss)
    assert torch.equal(out.loss, want.loss)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[3], LOSSES[6]], ids=["sampled", "jsd", "topk"])
def test_compiles_as_one_graph(backend, loss):
    torch.compiler.reset()  # each case is a program of its own
    rows = make_rows((2, 3), 20)
    want, grad = run(rows, backend, **options(loss))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(z):
        return fastsdpo.sdpo_loss(
            z[:, :-1],
            rows.teacher,
            rows.target_ids,
            inplace_grad=True,
            backend=backend,
            **options(loss),
        ).loss

    z = torch.cat([rows.student, torch.zeros(2, 1, 20)], 1).requires_grad_()
    value = compiled(z)
    value.backward()
    assert torch.equal(value, want.loss)
    assert torch.equal(z.grad[:, :-1], grad)


def test_teacher_from_logps_and_topk(backend):
    rows = make_rows((4,), 50, ignored=0.3)
    with_logits, grad = run(rows, backend, weights=rows.weights)
    leaf = rows.student.clone().requires_grad_()
    out = fastsdpo.sdpo_loss(
        leaf,
        None,
        rows.target_ids,
        teacher_logps=with_logits.teacher_logps,
        weights=rows.weights,
        backend=backend,
    )
    out.loss.backward()
    torch.testing.assert_close(leaf.grad, grad)

    teacher = torch.log_softmax(rows.teacher, -1)
    logps, ids = teacher.topk(7, -1)
    for alpha in (0.0, 0.4, 1.0):
        for tail in (True, False):
            kwargs = dict(mode="topk", alpha=alpha, add_tail=tail, weights=rows.weights)
            expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, topk_ids=ids, **kwargs)
            leaf = rows.student.clone().requires_grad_()
            out = fastsdpo.sdpo_loss(leaf, None, rows.target_ids, teacher_topk=(ids, logps), backend=backend, **kwargs)
            out.loss.backward()
            torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-4, atol=1e-5)
            assert_gradient_close(leaf.grad, expected.grad, floor=2e-5)
            hit = (ids == rows.target_ids[:, None]).any(-1)
            assert torch.equal(out.teacher_logps.isnan(), ~hit & (rows.target_ids != -100))


def test_rounded_teacher_topk_that_sums_to_one_stays_finite(backend):
    ids = torch.tensor([[0, 1]])
    logps = torch.tensor([[0.5, 0.5]]).log()  # no mass left for the tail
    student = torch.randn(1, 6)
    out = fastsdpo.sdpo_loss(student, None, torch.tensor([0]), mode="topk", teacher_topk=(ids, logps), backend=backend)
    assert math.isfinite(out.loss.item())


def test_support_of_the_whole_vocabulary_is_the_full_divergence(backend):
    rows = make_rows((4,), 9)
    for alpha in (0.0, 0.5, 1.0):
        full, grad = run(rows, backend, mode="full", alpha=alpha)
        top, top_grad = run(rows, backend, mode="topk", topk=9, alpha=alpha)
        torch.testing.assert_close(top.loss, full.loss)
        torch.testing.assert_close(top_grad, grad, rtol=1e-5, atol=1e-7)


def test_swapping_the_policies_maps_alpha_to_one_minus_alpha(backend):
    rows = make_rows((5,), 33)
    for alpha in (0.0, 0.2, 0.5, 1.0):
        a = fastsdpo.sdpo_loss(rows.student, rows.teacher, rows.target_ids, mode="full", alpha=alpha, backend=backend)
        b = fastsdpo.sdpo_loss(
            rows.teacher,
            rows.student,
            rows.target_ids,
            mode="full",
            alpha=1 - alpha,
            backend=backend,
        )
        torch.testing.assert_close(a.per_token_loss, b.per_token_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "sampled", "full"),
    [
        (0.1, 0.1092, -0.1266),
        (0.3, 0.1114, -0.1477),
        (0.5, 0.0, 0.0),
        (0.9, -0.1092, 0.1266),
    ],
)
def test_sampled_token_and_full_divergence_are_two_objectives(backend, rate, sampled, full):
    """Two answers a, a follow-up o with P(o = a | a) = 0.9, and the teacher's P(a | o) by Bayes' rule.

    Expected ascent on the logit of a = 1. One sampled token stands for the whole divergence where o is
    drawn whatever a is; where o depends on a the two have opposite signs.
    """
    prior = torch.tensor([1 - rate, rate])
    joint = prior[:, None] * torch.tensor([[0.9, 0.1], [0.1, 0.9]])  # P(a, o)
    posterior = joint / joint.sum(0)
    answers = torch.tensor([0, 0, 1, 1])
    follow_ups = torch.tensor([0, 1, 0, 1])

    def ascent(mode, probabilities):
        student = prior.log().repeat(4, 1).requires_grad_()
        fastsdpo.sdpo_loss(
            student,
            posterior.T[follow_ups].log(),
            answers,
            mode=mode,
            alpha=1.0,
            weights=probabilities[answers, follow_ups],
            backend=backend,
        ).loss.backward()
        return -float(student.grad[:, 1].sum())

    independent = prior[:, None] * joint.sum(0)
    assert ascent("sampled_token", joint) == pytest.approx(sampled, abs=1e-4)
    assert ascent("full", joint) == pytest.approx(full, abs=1e-4)
    assert ascent("sampled_token", independent) == pytest.approx(full, abs=1e-4)
    assert ascent("full", independent) == pytest.approx(full, abs=1e-4)


def test_near_teacher_gradient_in_float32(backend):
    """Teacher a hair away from the student at large logits: merged log-sum-exps lose it."""
    rows = make_rows((4,), 1000, spread=1.0, distance=1e-2, ignored=0)
    rows.student += 200.0
    rows.teacher += 200.0
    for loss in LOSSES[:4]:
        expected = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, **options(loss))
        leaf = rows.student.clone().requires_grad_()
        s, t = torch.log_softmax(leaf, -1), torch.log_softmax(rows.teacher, -1)
        if loss[0] == "full" and loss[1] == 1.0:
            (s.exp() * (s - t)).sum(-1).mean().backward()
            plain = (leaf.grad.double() - expected.grad).norm()
            _, grad = run(rows, backend, **options(loss))
            assert (grad.double() - expected.grad).norm() <= 2 * plain + 1e-8
        else:
            _, grad = run(rows, backend, **options(loss))
            relative = (grad.double() - expected.grad).norm() / expected.grad.norm()
            assert relative < 2e-4


@pytest.mark.parametrize(("teacher", "wanted"), [(math.nan, math.nan), (-math.inf, 0.0)])
def test_sampled_values_where_the_student_is_certain(backend, teacher, wanted):
    """log p_S = 0: nothing times infinity is nothing, and NaN stays NaN."""
    student = torch.tensor([[60.0, 0.0, -10.0]])
    given = torch.tensor([[teacher, 0.0, 1.0]])
    out = fastsdpo.sdpo_loss(student, given, torch.tensor([0]), backend=backend)
    assert float(out.student_logps) == 0
    torch.testing.assert_close(out.per_token_loss, torch.tensor([wanted]), equal_nan=True)
