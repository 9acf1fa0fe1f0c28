"""The native backend's functions against float64, and the guarantees they give.

Sizes: V = 1 and 2 (nothing to sum), 127 to 129 (around a padded block), 1000 to 1025 and 4097 (a
partial, a whole and one more block), 16385 (one value more than a segment), 32000 and 50257 (several
segments, the second odd).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastsdpo
from fastsdpo import _native
from fastsdpo.ops import _native as kernels
from fastsdpo.ops.rows import LossOptions, Tokens
from fastsdpo.testing import assert_gradient_close, make_rows, oracle_sdpo_loss

pytestmark = pytest.mark.skipif(
    not _native.native_available()[0], reason=f"native kernels: {_native.native_available()[1]}"
)
INSTRUCTION_SETS = _native.instruction_sets() if _native.native_available()[0] else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 2, 127, 128, 129, 1000, 1024, 1025, 4097, 16385, 32000, 50257]
KEPT = 256 * 1024  # columns whose exponentials the kernels keep (kernels/cpu/rows.h)
LOSSES = {
    "sampled": {"mode": "sampled_token"},
    "forward_kl": {"mode": "full", "alpha": 0.0},
    "reverse_kl": {"mode": "full", "alpha": 1.0},
    "jsd": {"mode": "full", "alpha": 0.3},
    "topk_forward_kl": {"mode": "topk", "topk": 5, "alpha": 0.0},
    "topk_reverse_kl": {"mode": "topk", "topk": 5, "alpha": 1.0},
    "topk_jsd_no_tail": {"mode": "topk", "topk": 5, "alpha": 0.4, "add_tail": False},
}


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    _native.set_instruction_set(request.param)
    yield request.param
    _native.set_instruction_set(INSTRUCTION_SETS[0])


@pytest.fixture
def threads():
    """Sets the thread count; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def plain_gradient(student, teacher, ids, weights, loss, temperature, softcap):
    """Plain PyTorch in float32, rounded to the logits' dtype: the yardstick of the error budget."""
    leaf = student.detach().float().requires_grad_()
    out = fastsdpo.sdpo_loss(
        leaf,
        teacher.float(),
        ids,
        weights=weights,
        temperature=temperature,
        softcap=softcap,
        backend="reference",
        **loss,
    )
    return torch.autograd.grad(out.loss, leaf)[0].to(student.dtype)


def check_loss(case, loss, temperature=1.0, softcap=None, **options):
    if "topk" in loss:
        k = min(loss["topk"], case.student.shape[-1])
        loss = {**loss, "topk": k}
        # Of several logits equal to the K-th, the oracle's choice is not the kernel's.
        equal = case.student == case.student.topk(k, -1).values[..., -1:]
        case.student[equal & (equal.cumsum(-1) > 1)] -= 1
    student = case.student.clone().requires_grad_()
    common = {"weights": case.weights, "temperature": temperature, "softcap": softcap, **loss}
    expected = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **common)
    out = fastsdpo.sdpo_loss(student, case.teacher, case.target_ids, backend="native", **common, **options)
    (grad,) = torch.autograd.grad(out.loss, student)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=2e-5)
    for name in ("per_token_loss", "student_logps", "teacher_logps"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(expected, name), rtol=1e-5, atol=2e-5, msg=name
        )
    plain = plain_gradient(case.student, case.teacher, case.target_ids, case.weights, loss, temperature, softcap)
    assert_gradient_close(grad, expected.grad, plain, floor=2e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_losses_against_float64(vocabulary, loss, isa):
    dtype = DTYPES[vocabulary % 3]
    check_loss(make_rows((2, 3), vocabulary, dtype=dtype, seed=vocabulary), loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_temperature_softcap_and_dtypes(loss, dtype, isa):
    case = make_rows((7,), 4097, dtype=dtype, seed=3)
    check_loss(case, loss, temperature=0.7, softcap=5.0)
    check_loss(case, loss, temperature=1.3, inplace_grad=False)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_sliced_rows_in_place(loss, isa):
    """``logits[:, :-1]`` of a padded batch: odd strides, gradient written where the logits lie."""
    case = make_rows((2, 5), 1003, seed=1)
    whole = torch.full((2, 6, 1010), 7.0)
    whole[:, :-1, :1003] = case.student
    view = whole[:, :-1, :1003]
    leaf = view.detach().requires_grad_()
    out = fastsdpo.sdpo_loss(
        leaf,
        case.teacher,
        case.target_ids,
        weights=case.weights,
        backend="native",
        inplace_grad=True,
        **loss,
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    expected = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, weights=case.weights, **loss)
    assert grad.data_ptr() == whole.data_ptr()
    assert_gradient_close(grad, expected.grad)
    assert (whole[:, -1] == 7).all()
    assert (whole[:, :, 1003:] == 7).all()


@pytest.mark.parametrize(("student", "teacher", "grad"), list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_mixed_dtypes(student, teacher, grad):
    """A float32 tile of the student may take a bfloat16 teacher and give a float16 gradient."""
    case = make_rows((1, 4), 1500, ignored=0)
    s, t = case.student.to(student), case.teacher.to(teacher)
    ids, weights = case.target_ids.flatten(), case.weights.flatten()
    expected = oracle_sdpo_loss(s, t, case.target_ids, mode="full", alpha=0.3, weights=weights)
    out = torch.full((1, 4, 1500), math.nan, dtype=grad)
    options = LossOptions(mode="full", alpha=0.3)
    results = kernels.forward(s, t, Tokens(ids, weights), options, out)
    torch.testing.assert_close(results[0].double(), expected.per_token_loss.flatten(), rtol=1e-5, atol=1e-6)
    assert_gradient_close(out, expected.grad)


def all_results(case, loss_name: str) -> list[Tensor]:
    """Every tensor of forward, backward and fused of one loss on ``[B, L, V]`` logits."""
    s, t = case.student, case.teacher
    tokens = Tokens(case.target_ids.flatten(), case.weights.flatten())
    tokens = tokens._replace(old_logps=torch.full_like(tokens.weights, -6.0))
    mode, alpha = LOSSES.get(loss_name, {}).get("mode", "topk"), 0.4
    alpha = LOSSES.get(loss_name, {}).get("alpha", alpha)
    options = LossOptions(0.9, mode=mode, alpha=alpha, is_clip=2.0)
    if mode == "topk":
        tokens = tokens._replace(topk_ids=torch.topk(s, 5, -1).indices.reshape(-1, 5))
    grad, fused_grad = torch.empty_like(s), torch.empty_like(s)
    forward = kernels.forward(s, t, tokens, options)
    kernels.backward(torch.ones(1), forward, s, t, tokens, options, grad)
    fused = kernels.forward(s, t, tokens, options, fused_grad)
    columns = {"sampled_token": 2, "topk": 4, "full": 5}[mode]
    stats = forward.stats[:, :columns]
    left = [stats, forward.class_grads] if mode == "topk" else [stats]
    return [*forward[:4], *left, grad, *fused[:4], fused_grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 129, 1000, 1025, 5003, 50257])
def test_topk_support(vocabulary, dtype, isa):
    """The largest logits and of equal ones the first, whatever a row holds; the values are `torch.topk`'s."""
    torch.manual_seed(vocabulary)
    plain = torch.randn(2, 3, vocabulary + 1).to(dtype)[..., 1:]
    masked = plain.clone()
    masked[..., ::2] = -math.inf
    equal = (plain.float() * 2).round().to(dtype) / 2  # many of each, and -0 beside 0
    odd = plain.clone()
    odd[..., vocabulary // 2], odd[:, 1, vocabulary // 3] = -math.nan, math.inf
    rising = plain.sort(-1).values
    targets = torch.tensor([0, -100, 0, 0, 0, 0])
    for logits in (plain, masked, equal, odd, rising):
        for k in {1, min(20, vocabulary), min(700, vocabulary), min(vocabulary, 1025)}:
            ids = kernels.support(logits, targets, k, -100)
            assert (ids.diff(dim=-1) > 0).all()
            assert torch.equal(ids[1], torch.arange(k))
            flat, live = logits.reshape(6, -1).float(), targets == 0
            order = torch.where(flat.isnan(), math.inf, flat).sort(dim=-1, descending=True, stable=True)
            if not (flat.isnan() | flat.isposinf()).any():
                assert torch.equal(ids[live], order.indices[live, :k].sort(-1).values)
            got = flat.gather(1, ids).sort(-1, descending=True).values
            want = flat.topk(k, -1).values
            torch.testing.assert_close(got[live], want[live], rtol=0, atol=0, equal_nan=True)


def test_topk_support_names_a_bad_target():
    logits = torch.randn(1, 2, 50)
    with pytest.raises(ValueError, match="target_ids must lie in"):
        fastsdpo.sdpo_loss(logits, logits, torch.tensor([[1, 50]]), mode="topk", topk=3)
    with pytest.raises(ValueError, match="target_ids must lie in"):
        kernels.support(logits, torch.tensor([1, 50]), 3, -100)


BITWISE = ["sampled", "forward_kl", "reverse_kl", "jsd", "topk_jsd"]


@pytest.mark.parametrize("name", BITWISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_is_bitwise_forward_and_backward(name, dtype, isa):
    *forward, grad, a, b, c, d, fused_grad = all_results(make_rows((2, 4), 33000, dtype=dtype), name)
    for one, other in zip(forward[:4], (a, b, c, d)):
        assert torch.equal(one, other)
    assert torch.equal(grad, fused_grad)


def check_fused(case, name):
    """Loss and gradient of one call: against float64, and the same bits as forward and backward."""
    options = {**LOSSES.get(name, {}), "weights": case.weights, "temperature": 0.9}
    old = torch.full_like(case.weights, -6.0)
    expected = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, old_logps=old, is_clip=2.0, **options)
    *forward, grad, a, b, c, d, fused_grad = all_results(case, name)
    for one, other in zip(forward[:4], (a, b, c, d)):
        assert torch.equal(one, other)
    assert torch.equal(grad, fused_grad)
    torch.testing.assert_close(a.double(), expected.per_token_loss.flatten(), rtol=1e-5, atol=2e-5)
    leaf = case.student.float().requires_grad_()
    out = fastsdpo.sdpo_loss(
        leaf,
        case.teacher.float(),
        case.target_ids,
        old_logps=old,
        is_clip=2.0,
        backend="reference",
        **options,
    )
    plain = torch.autograd.grad(out.loss, leaf)[0].to(case.student.dtype)
    assert_gradient_close(fused_grad, expected.grad, plain, floor=2e-6)


@pytest.mark.parametrize("name", ["sampled", "forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_columns_than_are_kept(name, dtype, isa):
    """The columns beyond are computed again; the target lies there in one row, before in the other."""
    case = make_rows((1, 2), KEPT + 1500, dtype=dtype, ignored=0)
    case.target_ids[:] = torch.tensor([KEPT + 1100, KEPT - 1])
    check_fused(case, name)


@pytest.mark.parametrize("name", ["sampled", "forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("teacher", ["rises", "falls", "stays"])
def test_maximum_that_rises_late(name, teacher, isa):
    """Exponentials are taken from the max so far: here it rises in every block, by e^150 in all."""
    case = make_rows((1, 3), 40000, ignored=0)
    ramp = torch.linspace(-150, 0, 40000)
    case.student += ramp
    case.teacher += {"rises": ramp, "falls": ramp.flip(0), "stays": 0 * ramp}[teacher]
    case.target_ids[:] = torch.tensor([39999, 39000, 20000])
    check_fused(case, name)


@pytest.mark.parametrize("name", ["sampled", "forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("low", [-1e4, -math.inf])
def test_blocks_without_a_probability(name, low, isa):
    """Whole blocks that are far below the rest or masked: of both, of the student, of the teacher."""
    case = make_rows((1, 3), 9000, ignored=0)
    case.student[0, 0, :5000] = case.teacher[0, 0, :5000] = low
    if name != "forward_kl":  # which would be infinite
        case.student[0, 1, :2048] = low
    if name != "reverse_kl":
        case.teacher[0, 2, :2048] = low
    case.target_ids[:] = 8000
    check_fused(case, name)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_nan_of_the_teacher_reaches_loss_and_gradient(alpha, isa):
    case = make_rows((1, 2), 3000, ignored=0)
    case.teacher[0, 1, 7] = math.nan
    grad = torch.empty_like(case.student)
    tokens = Tokens(case.target_ids.flatten(), case.weights.flatten())
    options = LossOptions(mode="full", alpha=alpha)
    loss = kernels.forward(case.student, case.teacher, tokens, options, grad).per_token
    assert loss[1].isnan()
    assert grad[0, 1].isnan().any()
    assert loss[0].isfinite()
    assert grad[0, 0].isfinite().all()


@pytest.mark.parametrize("name", BITWISE)
def test_bitwise_for_any_thread_count_and_batch(name, threads):
    """1 thread, 2, and more threads than rows (the row is split): the same bits; so do single rows."""
    case = make_rows((1, 6), 50257, ignored=0.3)
    threads(1)
    expected = all_results(case, name)
    for count in (2, 5, 16):
        threads(count)
        for one, other in zip(all_results(case, name), expected):
            assert torch.equal(one, other), f"{count} threads"
    order = [3, 0, 5]
    for count in (1, 4):
        threads(count)
        part = type(case)(
            case.student[:, order],
            case.teacher[:, order],
            case.target_ids[:, order],
            case.weights[:, order],
        )
        for one, whole in zip(all_results(part, name), expected):
            rows = whole.reshape(6, -1)[order]
            assert torch.equal(one.reshape(3, -1), rows), f"rows {order}, {count} threads"


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("shift", [1e4, -1e4, 1e30])
def test_large_logits(loss, shift, isa):
    """A common offset changes nothing: 1e4 leaves differences of 2^-10 in float32, so they are given."""
    case = make_rows((5,), 1000, ignored=0)
    case.student = (case.student * 64).round() / 64
    case.teacher = (case.teacher * 64).round() / 64
    if abs(shift) > 1e20:
        case.student, case.teacher = case.student.clone(), case.teacher.clone()
        case.student[:, 3] = case.teacher[:, 3] = shift  # one certain token
    else:
        case.student, case.teacher = case.student + shift, case.teacher - shift
    check_loss(case, loss)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_masked_vocabulary(loss, isa):
    """-inf is probability 0, whole leading blocks of it, the same tokens for both policies."""
    case = make_rows((4,), 5000, ignored=0)
    for z in (case.student, case.teacher):
        z[:, :3000] = -math.inf
        z[:, 4100] = -math.inf
    case.target_ids[:] = torch.tensor([3000, 4999, 4101, 3500])
    check_loss(case, loss)
    check_loss(case, loss, softcap=10.0)


def test_infinite_divergence_is_inf(isa):
    student, teacher = torch.zeros(1, 2, 5000), torch.zeros(1, 2, 5000)
    student[0, 0, 7] = -math.inf  # KL(q || p) is infinite in row 0
    teacher[0, 1, 7] = -math.inf  # KL(p || q) in row 1
    ids, weights = torch.zeros(2, dtype=torch.long), torch.ones(2)
    forward, reverse, jsd = (
        kernels.forward(student, teacher, Tokens(ids, weights), LossOptions(mode="full", alpha=alpha)).per_token
        for alpha in (0.0, 1.0, 0.5)
    )
    assert forward[0] == math.inf
    assert forward[1].isfinite()
    assert reverse[1] == math.inf
    assert reverse[0].isfinite()
    assert jsd.isfinite().all()


def test_target_of_probability_zero(isa):
    """Both policies exclude the target: log-ratio and loss are 0; one of them: infinite, not NaN."""
    student, teacher = torch.zeros(1, 2, 100), torch.zeros(1, 2, 100)
    student[0, :, 7] = teacher[0, 0, 7] = -math.inf
    tokens = Tokens(torch.tensor([7, 7]), torch.ones(2))
    out = kernels.forward(student, teacher, tokens, LossOptions())
    assert out[0].tolist() == [0.0, math.inf]


@pytest.mark.parametrize("name", BITWISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_with_nan(name, dtype, isa):
    case = make_rows((2, 3), 3000, dtype=dtype, ignored=0)
    case.target_ids[1, 1] = -100
    case.student[1, 1] = math.nan
    case.teacher[1, 1] = math.nan
    for tensor in all_results(case, name):
        assert not tensor.isnan().any()
        assert (tensor.reshape(6, -1)[4] == 0).all()


@pytest.mark.parametrize("name", BITWISE)
@pytest.mark.parametrize("column", [0, 2999])
def test_nan_in_a_row_that_counts(name, column, isa):
    case = make_rows((1, 3), 3000, ignored=0)
    case.student[0, 1, column] = math.nan
    results = all_results(case, name)
    gradient = results[-1]
    assert results[0][1].isnan()
    assert gradient[0, 1].isnan().any()
    for row in (0, 2):
        assert gradient[0, row].isfinite().all()


@pytest.mark.parametrize("name", BITWISE)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows(name, shape):
    case = make_rows((1, 1), 50)
    empty = type(case)(
        case.student.new_empty(*shape, 50),
        case.teacher.new_empty(*shape, 50),
        torch.empty(shape, dtype=torch.long),
        torch.empty(shape),
    )
    for tensor in all_results(empty, name):
        assert tensor.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 129, 32000])
def test_token_logps_and_entropy(vocabulary, dtype, isa):
    case = make_rows((2, 3), vocabulary, dtype=dtype)
    ids = case.target_ids.flatten()
    leaf = case.student.double().requires_grad_()
    log_p = torch.log_softmax(leaf / 0.8, -1).reshape(6, vocabulary)
    keep = ids != -100
    expected = torch.where(keep, log_p.gather(1, ids.clamp(min=0)[:, None])[:, 0], 0.0)
    entropy = torch.where(keep, -(log_p.exp() * log_p).sum(-1), 0.0)
    options = LossOptions(0.8)
    logps, got_entropy, stats = kernels.token_forward(case.student, ids, options, True)
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got_entropy.double(), entropy.detach(), rtol=1e-5, atol=2e-6)
    upstream = torch.linspace(-1, 2, 6)
    (grad,) = torch.autograd.grad((expected * upstream.double()).sum(), leaf)
    got = torch.full_like(case.student, math.nan)
    kernels.token_backward(upstream, stats, case.student, ids, options, got)
    assert_gradient_close(got, grad)
    both = kernels.log_ratio(case.student, case.teacher, ids, options)
    assert torch.equal(both[0], logps)
    assert torch.equal(both[1], kernels.token_forward(case.teacher, ids, options).logps)


def test_given_teacher_statistics(isa):
    """The teacher's log-probs at the target, or at its top k, stand for its logits."""
    case = make_rows((6,), 2000, ignored=0)
    log_q = torch.log_softmax(case.teacher.double(), -1)
    whole = fastsdpo.sdpo_loss(case.student, case.teacher, case.target_ids, backend="native")
    given = fastsdpo.sdpo_loss(
        case.student,
        None,
        case.target_ids,
        backend="native",
        teacher_logps=log_q.gather(1, case.target_ids[:, None])[:, 0].float(),
    )
    torch.testing.assert_close(given.per_token_loss, whole.per_token_loss, rtol=1e-5, atol=1e-5)

    logps, ids = log_q.topk(10, -1)
    expected = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, mode="topk", topk_ids=ids, alpha=0.5)
    student = case.student.clone().requires_grad_()
    out = fastsdpo.sdpo_loss(
        student,
        None,
        case.target_ids,
        mode="topk",
        teacher_topk=(ids, logps.float()),
        alpha=0.5,
        backend="native",
    )
    torch.testing.assert_close(out.per_token_loss.double(), expected.per_token_loss, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(out.loss, student)
    assert_gradient_close(grad, expected.grad, floor=1e-5)
    in_support = (ids == case.target_ids[:, None]).any(-1)
    assert torch.equal(out.teacher_logps.isnan(), ~in_support)


def test_small_tail_mass_is_summed(isa):
    """With 1 - sum the tail's 1e-9 would be lost in float32."""
    student, teacher = torch.zeros(1, 3000), torch.zeros(1, 3000)
    student[0, 0], teacher[0, 0] = 29.0, 31.0
    ids = torch.zeros(1, dtype=torch.long)
    options = {"mode": "topk", "topk": 1, "alpha": 0.0}
    expected = oracle_sdpo_loss(student, teacher, ids, **options)
    out = fastsdpo.sdpo_loss(student, teacher, ids, backend="native", **options)
    assert expected.per_token_loss.item() < 1e-8
    torch.testing.assert_close(out.per_token_loss.double(), expected.per_token_loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_student_near_teacher(loss, isa):
    """Self-distillation's usual case: the gradient is small differences of large numbers."""
    case = make_rows((4,), 8000, distance=1e-2, ignored=0)
    student = case.student.clone().requires_grad_()
    expected = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **loss)
    out = fastsdpo.sdpo_loss(student, case.teacher, case.target_ids, backend="native", **loss)
    (grad,) = torch.autograd.grad(out.loss, student)
    assert (grad.double() - expected.grad).norm() < 2e-4 * expected.grad.norm()


def test_id_out_of_range_is_refused():
    case = make_rows((1, 2), 50, ignored=0)
    ids = torch.tensor([3, 50])
    with pytest.raises(ValueError, match=r"target_ids must lie in \[0, V\)"):
        kernels.token_forward(case.student, ids, LossOptions())
    tokens = Tokens(ids - 3, torch.ones(2), topk_ids=torch.tensor([[0, 50], [0, 1]]))
    with pytest.raises(ValueError, match=r"topk_ids must lie in \[0, V\)"):
        kernels.forward(case.student, case.teacher, tokens, LossOptions(mode="topk"))
