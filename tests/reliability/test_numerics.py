"""What must hold for every loss, backend, shape and value: drawn inputs, against float64 and against themselves.

`TRITON_INTERPRET=1 pytest -m interpreted` runs them on the Triton kernels, few and small.
``FASTSDPO_EXAMPLES=500`` draws 500 cases per loss (`make fuzz`).
"""

import functools
import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastsdpo
from fastsdpo.ops.rows import support
from fastsdpo.testing import Rows, assert_gradient_close, effective_logits, make_rows, oracle_sdpo_loss
from tests.ops import contract

LONG = os.environ.get("FASTSDPO_LONG") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, INF = torch.float32, math.inf
EPSILON = torch.finfo(F32).eps
NAMES = ("sampled", "forward", "reverse", "jsd", "topk-forward", "topk-reverse-renorm", "topk-jsd")
LOSSES = {name: contract.LOSSES[name] | ({"topk": 3} if "topk" in name else {}) for name in NAMES}
EXAMPLES = (6 if LONG else 2) if INTERPRETED else (300 if LONG else 8)
EXAMPLES = int(os.environ.get("FASTSDPO_EXAMPLES", EXAMPLES))
# Of which 1 - alpha is exact too. (Towards 0 and 1 the divergence goes to 0; at 0 and 1 it is a KL.)
ALPHAS = st.integers(0, 64).map(lambda number: number / 64)

no_native = fastsdpo.available_backends()["native"] != "available"
native = pytest.param("native", marks=pytest.mark.skipif(no_native, reason="no native kernels"))
triton = pytest.param("triton", marks=[pytest.mark.interpreted, pytest.mark.slow])
backends = pytest.mark.parametrize("backend", ["reference", native, triton])
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
tried: dict[str, int] = {}


@pytest.fixture(scope="module", autouse=True)
def _counted(request, results):
    failed = request.session.testsfailed
    yield
    name = "triton (interpreted)" if INTERPRETED else "reference" if no_native else "reference and native"
    lost, survived = request.session.testsfailed - failed, sum(tried.values())
    counts = {"tried": survived + lost, "survived": survived, "lost": lost, "properties": len(tried)}
    results.add(f"numerical properties, {name}", **counts)


def drawn(*parameters, **strategies):
    """A test of drawn cases, the same in every run; it counts them (one that fails ends the test)."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    limits = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=unhealthy
    )

    def decorate(function):
        @limits
        @given(**strategies)
        @functools.wraps(function)
        def counted(*arguments, **named):
            function(*arguments, **named)
            tried[function.__name__] = tried.get(function.__name__, 0) + 1

        for parameter in parameters:
            counted = parameter(counted)
        return counted

    return decorate


@st.composite
def rows(draw, dtype=None, most=40 if INTERPRETED else 300, least=1, quantum=2.0**-5) -> Rows:
    """A case with logits on a grid of ``quantum``, some targets ignored.

    On the grid, differences of logits are exact in float32, and sums with powers of two as well.
    """
    tokens = draw(st.integers(1, 5))
    vocabulary = draw(st.one_of(st.integers(least, 9), st.integers(least, most)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.5, 4.0, 20.0]))
    student = (torch.randn(tokens, vocabulary, generator=g) * spread / quantum).round() * quantum
    teacher = student + (torch.randn(tokens, vocabulary, generator=g) * 2 / quantum).round() * quantum
    # Distinct values, so that the top k is unambiguous: each at least a quantum above the next.
    steps = torch.arange(vocabulary) * quantum
    ordered, places = student.sort(-1)
    student = student.scatter(-1, places, (ordered - steps).cummax(-1).values + steps)
    targets = torch.randint(0, vocabulary, (tokens,), generator=g)
    if draw(st.booleans()):
        targets[torch.rand(tokens, generator=g) < 0.3] = -100
    weights = torch.rand(tokens, generator=g)
    dtype = dtype or draw(st.sampled_from([F32, torch.bfloat16, torch.float16]))
    return Rows(student.to(dtype), teacher.to(dtype), targets, weights)


def part_of(case: Rows, which) -> Rows:
    return Rows(case.student[which], case.teacher[which], case.target_ids[which], case.weights[which])


def options_for(loss: dict, case: Rows) -> dict:
    topk = {"topk": min(loss["topk"], case.student.shape[1])} if "topk" in loss else {}
    return {**loss, **topk, "weights": case.weights}


def run(case: Rows, backend: str, **options):
    """``(output, gradient)``"""
    leaf = case.student.detach().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf, case.teacher, case.target_ids, backend=backend, **options)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def close(left, right, scale=1.0, rel=2e-5, absolute=2e-6):
    absolute = absolute * max(1.0, float(scale))
    torch.testing.assert_close(left.double(), right.double(), rtol=rel, atol=absolute, equal_nan=True)


def rounding_of(grad) -> float:
    return 2e-5 if grad.dtype == F32 else 2.0**-7


def scale_of(out):
    """The size of a row's values: each is a sum or product of numbers of this size, in float32."""
    values = torch.cat([out.per_token_loss, out.student_logps, out.teacher_logps]).double()
    return 1 + values[values.isfinite()].abs().sum()


def placed(tensor, shift):
    """The same values as a slice whose rows start ``shift`` elements behind an odd stride's."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + shift + 3 - shift % 2), math.nan, dtype=tensor.dtype)
    wide[..., shift : shift + tensor.shape[-1]] = tensor
    return wide[..., shift : shift + tensor.shape[-1]]


@st.composite
def any_rows(draw) -> tuple[Rows, dict]:
    """A case of any dtype and spread, perhaps masked or strided, with a temperature and a softcap."""
    vocabulary = draw(st.sampled_from([1, 2, 4, 5, 17, 47, 127, 128, 129, 2049, 4111]))
    spread = draw(st.sampled_from([0.1, 3.0, 30.0]))
    dtype = draw(st.sampled_from([F32, torch.bfloat16, torch.float16]))
    tokens, seed = draw(st.integers(1, 3)), draw(st.integers(0, 1000))
    case = make_rows((tokens,), vocabulary, spread=spread, seed=seed, dtype=dtype)
    if draw(st.booleans()):
        case.student[:, 1::3] = case.teacher[:, 1::3] = -INF
        case.target_ids[case.target_ids >= 0] = 0
    shift = draw(st.sampled_from([None, 0, 1, 5, 8]))
    if shift is not None:  # the student's rows lie at another place than the teacher's
        case = replace(case, student=placed(case.student, 3), teacher=placed(case.teacher, shift))
    temperature, softcap = draw(st.sampled_from([0.5, 1.0, 3.0])), draw(st.sampled_from([None, 5.0, 30.0]))
    return case, {"temperature": temperature, "softcap": softcap}


@drawn(backends, losses, drawn_case=any_rows())
def test_drawn_values_equal_the_formula(backend, loss, drawn_case):
    """Within twice plain PyTorch's error in the same dtype and one rounding: of the largest entry, and of a
    probability, of a log-prob for the sampled token. (Of a student certain to 2^-24, plain PyTorch may get those
    digits by luck.)"""
    case, scales = drawn_case
    possible, vocabulary = int((case.student[0] > -INF).sum()), case.student.shape[1]
    assume(possible > loss.get("topk", 0) or possible == vocabulary >= loss.get("topk", 0))  # else no tail
    options = {**loss, **scales, "weights": case.weights}
    ids = {}
    if "topk" in loss:
        ids["topk_ids"] = support(case.student[None], case.target_ids, loss["topk"], -100, backend)
    want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **options, **ids)
    out, grad = run(case, backend, **options)
    plain, plain_grad = run(case, "reference", **options)
    slack, size = 2 * (plain.loss.double() - want.loss).abs().item(), 1.0
    keep = case.target_ids >= 0
    if loss["mode"] == "sampled_token" and keep.any():
        weights, s, t = (x.double()[keep] for x in (case.weights, want.student_logps, want.teacher_logps))
        largest = torch.maximum(s.abs(), t.abs()).clamp(min=1.0)
        slack += EPSILON * float((weights * largest * s.abs()).sum())
        size = float(largest.max())
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5 + slack)
    rounding = EPSILON * size * float(case.weights.abs().max()) / scales["temperature"]
    floor = 4e-6 if backend == "native" else EPSILON
    assert_gradient_close(grad, want.grad, plain_grad, floor=floor, absolute=rounding)


@drawn(backends, drawn_case=any_rows())
def test_drawn_log_probs_equal_the_formula(backend, drawn_case):
    """And the entropy, which lies between 0 and log V; the other ways to a log-ratio agree."""
    case, scales = drawn_case
    log_probs = torch.log_softmax(effective_logits(case.student, **scales), -1)
    keep = case.target_ids != -100
    want = log_probs.gather(-1, case.target_ids.clamp(min=0)[..., None])[..., 0] * keep
    wanted = -(log_probs.exp() * log_probs.masked_fill(log_probs == -INF, 0.0)).sum(-1) * keep
    scales["backend"] = backend
    logps, entropy = fastsdpo.token_logps(case.student, case.target_ids, return_entropy=True, **scales)
    torch.testing.assert_close(logps.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), wanted, rtol=1e-5, atol=1e-5)
    assert bool((logps <= 0).all())
    assert bool((entropy >= -1e-5).all() & (entropy <= math.log(case.student.shape[1]) + 1e-4).all())
    ratio = fastsdpo.token_log_ratio(case.student, case.teacher, case.target_ids, **scales)
    assert torch.equal(ratio.student_logps, fastsdpo.token_logps(case.student, case.target_ids, **scales))
    assert torch.equal(ratio.teacher_logps, fastsdpo.token_logps(case.teacher, case.target_ids, **scales))
    out = fastsdpo.sdpo_loss(case.student, case.teacher, case.target_ids, **scales)
    close(out.log_ratio, ratio.log_ratio, 50)


@drawn(backends, losses, case=rows(F32), shifts=st.tuples(st.integers(-1024, 1024), st.integers(-1024, 1024)))
def test_a_constant_added_to_a_row_changes_nothing(backend, loss, case, shifts):
    options = options_for(loss, case)
    plain, grad = run(case, backend, **options)
    shifted = replace(case, student=case.student + shifts[0], teacher=case.teacher + shifts[1])
    moved, moved_grad = run(shifted, backend, **options)
    # The inputs are exact; a log-normalizer near the constant is rounded to float32.
    rounding = 1 + max(map(abs, shifts)) * 2.0**-21 / 2e-6
    close(moved.per_token_loss, plain.per_token_loss, scale_of(plain) * rounding)
    close(moved.log_ratio, plain.log_ratio, rounding)
    close(moved_grad, grad, (1 + plain.log_ratio.abs().max()) * rounding)


@drawn(backends, losses, data=st.data())
def test_permuting_the_vocabulary_permutes_the_gradient(backend, loss, data):
    # Half precision makes ties, and ties make the top k ambiguous.
    case = data.draw(rows(F32 if loss["mode"] == "topk" else None))
    options = options_for(loss, case)
    order = torch.randperm(case.student.shape[1], generator=torch.Generator().manual_seed(3))
    place = order.argsort()  # where each token goes
    targets = torch.where(case.target_ids == -100, case.target_ids, place[case.target_ids.clamp(min=0)])
    plain, grad = run(case, backend, **options)
    permuted = Rows(case.student[:, order], case.teacher[:, order], targets, case.weights)
    moved, moved_grad = run(permuted, backend, **options)
    close(moved.per_token_loss, plain.per_token_loss, scale_of(plain))
    close(moved_grad, grad[:, order], 1 + plain.log_ratio.abs().max(), rel=rounding_of(grad))


@drawn(backends, losses, case=rows(F32), temperature=st.sampled_from([0.25, 1.0, 8.0]))
def test_gradient_rows_sum_to_zero(backend, loss, case, temperature):
    out, grad = run(case, backend, temperature=temperature, **options_for(loss, case))
    # Of p - q in float32, and of a log-ratio less the divergence, each as large as the latter.
    rounding = 1e-6 + 2.0**-23 * out.per_token_loss.abs()
    rounding = 1e-5 * grad.abs().sum(-1) + rounding * case.weights / temperature
    assert bool((grad.double().sum(-1).abs() <= rounding).all())
    assert not grad[case.target_ids == -100].any()


@drawn(backends, losses, case=rows(), at=st.integers(0, 5))
def test_pieces_of_the_tokens_add_up(backend, loss, case, at):
    whole, grad = run(case, backend, **options_for(loss, case))
    pieces = [part_of(case, slice(None, at)), part_of(case, slice(at, None))]
    parts = [run(piece, backend, **options_for(loss, piece)) for piece in pieces]
    close(sum(out.loss.double() for out, _ in parts), whole.loss, whole.per_token_loss.abs().sum())
    values, grads = torch.cat([out.per_token_loss for out, _ in parts]), torch.cat([g for _, g in parts])
    # PyTorch sums a row differently where there are fewer rows; Triton's kernels where the row starts at
    # another place of a 16-byte piece (fastsdpo/ops/_triton_kernels.py).
    if backend == "reference" or (backend == "triton" and case.student.shape[1] % 8):
        close(values, whole.per_token_loss, scale_of(whole))
        close(grads, grad, scale_of(whole), rel=rounding_of(grad))
    else:
        assert torch.equal(values, whole.per_token_loss) and torch.equal(grads, grad)


@drawn(backends, case=rows(F32), alpha=ALPHAS, everything=st.booleans())
def test_swapping_student_and_teacher_maps_alpha_to_its_complement(backend, case, alpha, everything):
    options = {"mode": "topk", "topk": case.student.shape[1]} if everything else {"mode": "full"}
    one, _ = run(case, backend, alpha=alpha, **options)
    swapped = replace(case, student=case.teacher, teacher=case.student)
    two, _ = run(swapped, backend, alpha=1 - alpha, **options)
    close(one.per_token_loss, two.per_token_loss, scale_of(one))
    close(one.log_ratio, -two.log_ratio)
    assert bool((one.per_token_loss >= -1e-6).all())


@drawn(backends, case=rows(), alpha=ALPHAS)
def test_a_policy_has_no_divergence_from_itself(backend, case, alpha):
    out, grad = run(replace(case, teacher=case.student.clone()), backend, mode="full", alpha=alpha)
    assert not out.log_ratio.any()
    assert float(out.per_token_loss.abs().max()) <= 2e-6 and float(grad.abs().max()) <= 2e-6


@drawn(backends, losses, case=rows(F32), temperature=st.sampled_from([1e-3, 1e-2, 1e2, 1e4]))
def test_extreme_temperatures_equal_the_formula(backend, loss, case, temperature):
    options = {**options_for(loss, case), "temperature": temperature}
    out, grad = run(case, backend, **options)
    want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, **options)
    size = float(torch.cat([case.student, case.teacher]).abs().max()) / temperature
    scale = scale_of(want) + size * 2.0**-21 / 2e-6
    close(out.per_token_loss, want.per_token_loss, scale)
    close(grad, want.grad, scale / temperature)
    assert bool(grad.isfinite().all())


@drawn(backends, losses, case=rows(F32, least=2), seed=st.integers(0, 1000), share=st.sampled_from([0.1, 0.6]))
def test_tokens_of_probability_zero(backend, loss, case, seed, share):
    """-inf anywhere: never NaN; infinite where the formula is, equal to it elsewhere.

    A probability that float32 has no normal number for counts as 0 in the kernels, so that an infinite
    term may be missing there: none is drawn.
    """
    g, student, teacher, targets = torch.Generator().manual_seed(seed), case.student, case.teacher, case.target_ids
    for logits in (student, teacher):
        dead = torch.rand(logits.shape, generator=g) < share
        dead[torch.arange(len(dead)), torch.randint(0, dead.shape[1], (len(dead),), generator=g)] = False
        logits[dead] = -INF
        logits[logits < logits.amax(-1, keepdim=True) - 80] = -INF
    if not loss.get("add_tail", True):  # a teacher without any of the support cannot be renormalized
        best = student.argmax(-1, keepdim=True)
        teacher.scatter_(1, best, teacher.gather(1, best).clamp(min=-30.0))
    if loss["mode"] == "sampled_token":  # the answer's token was drawn from a policy that could
        counted = targets.clamp(min=0)[:, None]
        for logits in (student, teacher):
            logits.scatter_(1, counted, logits.gather(1, counted).clamp(min=-30.0))
    options = options_for(loss, case)
    out, grad = run(case, backend, **options)
    known = {}
    if "topk" in loss:  # where less than K are possible, the rest of it is any backend's own choice
        known = {"topk_ids": support(student[None], targets, options["topk"], -100, backend)}
    want = oracle_sdpo_loss(student, teacher, targets, **options, **known)
    assert not bool(out.per_token_loss.isnan().any())
    finite = want.per_token_loss.isfinite()
    assert bool((out.per_token_loss.isinf() == ~finite).all())
    close(out.per_token_loss[finite], want.per_token_loss[finite], scale_of(want))
    if bool(finite.all()):
        assert bool(grad.isfinite().all())
        assert not grad[student == -INF].any()


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 8))


@drawn(shape=SHAPES, seed=st.integers(0, 2**31), share=st.sampled_from([0.2, 0.9]))
def test_weights_sum_to_one_and_pieces_to_the_whole(shape, seed, share):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    for make, number, name in (
        (fastsdpo.token_mean_weights, int(mask.sum()), "num_items"),
        (fastsdpo.sequence_mean_weights, int(mask.any(-1).sum()), "num_sequences"),
    ):
        weights = make(mask)
        assert not weights[~mask].any()
        assert float(weights.sum()) == pytest.approx(1.0 if number else 0.0, abs=1e-5)
        if number:
            halves = [make(part, **{name: number}) for part in mask.split((shape[0] + 1) // 2)]
            close(torch.cat(halves), weights)
