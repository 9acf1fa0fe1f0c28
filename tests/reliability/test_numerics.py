"""What must hold for every loss, backend, shape and value: metamorphic tests with drawn inputs.

`TRITON_INTERPRET=1` runs them on the Triton kernels, few and small.
"""

from __future__ import annotations

import functools
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsdpo
from fastsdpo.ops.rows import support
from fastsdpo.testing import oracle_sdpo_loss

LONG = os.environ.get("FASTSDPO_LONG") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AVAILABLE = fastsdpo.available_backends()
BACKENDS = [
    name for name in (["triton"] if INTERPRETED else ["reference", "native"]) if AVAILABLE[name] == "available"
]
LOSSES = [
    {"mode": "sampled_token"},
    {"mode": "full", "alpha": 0.0},
    {"mode": "full", "alpha": 1.0},
    {"mode": "full", "alpha": 0.3},
    {"mode": "topk", "alpha": 0.0, "topk": 3},
    {"mode": "topk", "alpha": 1.0, "topk": 3, "add_tail": False},
    {"mode": "topk", "alpha": 0.3, "topk": 3},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = (2 if INTERPRETED else 8) if not LONG else (6 if INTERPRETED else 300)

# Of which 1 - alpha is exact too. (Towards 0 and 1 the divergence goes to 0; at 0 and 1 it is a KL.)
ALPHAS = st.integers(0, 64).map(lambda number: number / 64)

tried: dict[str, int] = {}


@pytest.fixture(scope="module", autouse=True)
def _counted(request, results):
    failed = request.session.testsfailed
    yield
    name = "triton (interpreted)" if INTERPRETED else " and ".join(BACKENDS)
    lost, survived = request.session.testsfailed - failed, sum(tried.values())
    results.add(
        f"numerical properties, {name}", tried=survived + lost, survived=survived, lost=lost, properties=len(tried)
    )


def drawn(**strategies):
    """Draws examples, the same in every run, and counts them (one that fails ends the test)."""
    suppressed = [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ]

    def decorate(function):
        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=suppressed
        )
        @given(**strategies)
        @functools.wraps(function)
        def counted(*arguments, **named):
            function(*arguments, **named)
            tried[function.__name__] = tried.get(function.__name__, 0) + 1

        return counted

    return decorate


@st.composite
def rows(draw, dtype=None, most=40 if INTERPRETED else 300, least=1, quantum=2.0**-5):
    """Logits of both policies on a grid of ``quantum``, targets (some ignored) and weights.

    On the grid, differences of logits are exact in float32, and sums with powers of two as well.
    """
    tokens = draw(st.integers(1, 5))
    vocabulary = draw(st.one_of(st.integers(least, 9), st.integers(least, most)))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
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
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    return student.to(dtype), teacher.to(dtype), targets, weights


def options_for(loss, vocabulary):
    return {**loss, "topk": min(loss["topk"], vocabulary)} if "topk" in loss else loss


def run(student, teacher, targets, backend, **options):
    """``(output, gradient)``"""
    leaf = student.detach().clone().requires_grad_()
    out = fastsdpo.sdpo_loss(leaf, teacher, targets, backend=backend, **options)
    out.loss.backward()
    return out, leaf.grad


def close(left, right, scale=1.0, rel=2e-5, absolute=2e-6):
    torch.testing.assert_close(
        left.double(),
        right.double(),
        rtol=rel,
        atol=absolute * max(1.0, float(scale)),
        equal_nan=True,
    )


def scale_of(out):
    """The size of a row's values: each is a sum or product of numbers of this size, in float32."""
    values = torch.cat([out.per_token_loss, out.student_logps, out.teacher_logps]).double()
    return 1 + values[values.isfinite()].abs().sum()


backends = pytest.mark.parametrize("backend", BACKENDS)
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(str(value) for value in loss.values()))


@backends
@losses
@drawn(data=st.data())
def test_a_constant_added_to_a_row_changes_nothing(backend, loss, data):
    student, teacher, targets, weights = data.draw(rows(torch.float32))
    options = {**options_for(loss, student.shape[1]), "weights": weights}
    shifts = data.draw(st.lists(st.integers(-1024, 1024), min_size=2, max_size=2))
    a, b = (float(shift) for shift in shifts)
    plain, grad = run(student, teacher, targets, backend, **options)
    moved, moved_grad = run(student + a, teacher + b, targets, backend, **options)
    # The inputs are exact; a log-normalizer near the constant is rounded to float32.
    rounding = 1 + max(abs(a), abs(b)) * 2.0**-21 / 2e-6
    values = scale_of(plain)
    close(moved.per_token_loss, plain.per_token_loss, values * rounding)
    close(moved.log_ratio, plain.log_ratio, rounding)
    close(moved_grad, grad, (1 + plain.log_ratio.abs().max()) * rounding)


@backends
@losses
@drawn(data=st.data())
def test_permuting_the_vocabulary_permutes_the_gradient(backend, loss, data):
    # Half precision makes ties, and ties make the top k ambiguous.
    dtype = torch.float32 if loss["mode"] == "topk" else None
    student, teacher, targets, weights = data.draw(rows(dtype))
    options = {**options_for(loss, student.shape[1]), "weights": weights}
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(3))
    place = order.argsort()  # where each token goes
    moved_targets = torch.where(targets == -100, targets, place[targets.clamp(min=0)])
    plain, grad = run(student, teacher, targets, backend, **options)
    moved, moved_grad = run(student[:, order], teacher[:, order], moved_targets, backend, **options)
    values = scale_of(plain)
    close(moved.per_token_loss, plain.per_token_loss, values)
    rel = 2e-5 if grad.dtype == torch.float32 else 2.0**-7
    close(moved_grad, grad[:, order], 1 + plain.log_ratio.abs().max(), rel=rel)


@backends
@losses
@drawn(data=st.data())
def test_gradient_rows_sum_to_zero(backend, loss, data):
    student, teacher, targets, weights = data.draw(rows(torch.float32))
    options = {**options_for(loss, student.shape[1]), "weights": weights}
    temperature = data.draw(st.sampled_from([0.25, 1.0, 8.0]))
    out, grad = run(student, teacher, targets, backend, temperature=temperature, **options)
    # Of p - q in float32, and of a log-ratio less the divergence, each as large as the latter.
    rounding = 1e-6 + 2.0**-23 * out.per_token_loss.abs()
    rounding = 1e-5 * grad.abs().sum(-1) + rounding * weights / temperature
    assert bool((grad.double().sum(-1).abs() <= rounding).all())
    assert bool((grad[targets == -100] == 0).all())


@backends
@losses
@drawn(data=st.data())
def test_pieces_of_the_tokens_add_up(backend, loss, data):
    student, teacher, targets, weights = data.draw(rows())
    options = options_for(loss, student.shape[1])
    at = data.draw(st.integers(0, len(targets)))
    whole, grad = run(student, teacher, targets, backend, weights=weights, **options)
    parts = [
        run(student[part], teacher[part], targets[part], backend, weights=weights[part], **options)
        for part in (slice(None, at), slice(at, None))
    ]
    close(sum(out.loss.double() for out, _ in parts), whole.loss, whole.per_token_loss.abs().sum())
    values, grads = (
        torch.cat([out.per_token_loss for out, _ in parts]),
        torch.cat([g for _, g in parts]),
    )
    # PyTorch sums a row differently where there are fewer rows; Triton's kernels where the row starts at
    # another place of a 16-byte piece (fastsdpo/ops/_triton_kernels.py).
    if backend == "reference" or (backend == "triton" and student.shape[1] % 8):
        close(values, whole.per_token_loss, scale_of(whole))
        close(grads, grad, scale_of(whole), rel=2e-5 if grad.dtype == torch.float32 else 2.0**-7)
    else:
        assert torch.equal(values, whole.per_token_loss)
        assert torch.equal(grads, grad)


@backends
@drawn(data=st.data(), alpha=ALPHAS, everything=st.booleans())
def test_swapping_student_and_teacher_maps_alpha_to_its_complement(backend, data, alpha, everything):
    student, teacher, targets, _ = data.draw(rows(torch.float32))
    options = {"mode": "topk", "topk": student.shape[1]} if everything else {"mode": "full"}
    one, _ = run(student, teacher, targets, backend, alpha=alpha, **options)
    two, _ = run(teacher, student, targets, backend, alpha=1 - alpha, **options)
    close(one.per_token_loss, two.per_token_loss, scale_of(one))
    close(one.log_ratio, -two.log_ratio)
    assert bool((one.per_token_loss >= -1e-6).all())


@backends
@drawn(data=st.data(), alpha=ALPHAS)
def test_a_policy_has_no_divergence_from_itself(backend, data, alpha):
    student, _, targets, _ = data.draw(rows())
    out, grad = run(student, student.clone(), targets, backend, mode="full", alpha=alpha)
    assert bool((out.log_ratio == 0).all())
    assert float(out.per_token_loss.abs().max()) <= 2e-6
    assert float(grad.abs().max()) <= 2e-6


@backends
@losses
@drawn(data=st.data(), power=st.integers(-6, 6))
def test_temperature_divides_the_logits(backend, loss, data, power):
    student, teacher, targets, weights = data.draw(rows(torch.float32))
    options = {**options_for(loss, student.shape[1]), "weights": weights}
    temperature = 2.0**power
    hot, grad = run(student, teacher, targets, backend, temperature=temperature, **options)
    plain, plain_grad = run(student / temperature, teacher / temperature, targets, backend, **options)
    close(hot.per_token_loss, plain.per_token_loss, scale_of(plain))
    close(grad * temperature, plain_grad, 1 + plain.log_ratio.abs().max())


@backends
@losses
@drawn(data=st.data(), temperature=st.sampled_from([1e-3, 1e-2, 1e2, 1e4]))
def test_extreme_temperatures_equal_the_formula(backend, loss, data, temperature):
    student, teacher, targets, weights = data.draw(rows(torch.float32))
    options = {
        **options_for(loss, student.shape[1]),
        "weights": weights,
        "temperature": temperature,
    }
    out, grad = run(student, teacher, targets, backend, **options)
    want = oracle_sdpo_loss(student, teacher, targets, **options)
    size = float(torch.cat([student, teacher]).abs().max()) / temperature
    scale = scale_of(want) + size * 2.0**-21 / 2e-6
    close(out.per_token_loss, want.per_token_loss, scale)
    close(grad, want.grad, scale / temperature)
    assert bool(grad.isfinite().all())


@backends
def test_a_tail_too_small_for_a_float_has_a_gradient(backend):
    """Top-k where the student has e^-375 outside the support, and the teacher all but e^-800."""
    student = torch.tensor([[0.7812, -0.1562, -1.0938, 0.2812, -0.5312, -0.6875, 0.1875, 0.4062]])
    teacher = torch.tensor([[-0.6562, -0.9688, -2.2812, 0.6562, -2.25, 1.5, -1.9688, 0.6562]])
    options = {"mode": "topk", "alpha": 0.0, "topk": 3, "temperature": 1e-3}
    out, grad = run(student, teacher, torch.tensor([3]), backend, **options)
    want = oracle_sdpo_loss(student, teacher, torch.tensor([3]), **options)
    close(out.per_token_loss, want.per_token_loss)
    close(grad, want.grad, 1000 * want.per_token_loss)


@backends
@losses
@drawn(data=st.data())
def test_tokens_of_probability_zero(backend, loss, data):
    """-inf anywhere: never NaN; infinite where the formula is, equal to it elsewhere.

    A probability that float32 has no normal number for counts as 0 in the kernels, so that an infinite
    term may be missing there: none is drawn.
    """
    student, teacher, targets, weights = data.draw(rows(torch.float32, least=2))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    share = data.draw(st.sampled_from([0.1, 0.6]))
    for logits in (student, teacher):
        dead = torch.rand(logits.shape, generator=g) < share
        dead[torch.arange(len(dead)), torch.randint(0, dead.shape[1], (len(dead),), generator=g)] = False
        logits[dead] = -math.inf
        logits[logits < logits.amax(-1, keepdim=True) - 80] = -math.inf
    if not loss.get("add_tail", True):  # a teacher without any of the support cannot be renormalized
        best = student.argmax(-1, keepdim=True)
        teacher.scatter_(1, best, teacher.gather(1, best).clamp(min=-30.0))
    if loss["mode"] == "sampled_token":  # the answer's token was drawn from a policy that could
        counted = targets.clamp(min=0)[:, None]
        for logits in (student, teacher):
            logits.scatter_(1, counted, logits.gather(1, counted).clamp(min=-30.0))
    options = {**options_for(loss, student.shape[1]), "weights": weights}
    out, grad = run(student, teacher, targets, backend, **options)
    known = {}
    if "topk" in loss:  # where less than K are possible, the rest of it is any backend's own choice
        ids = support(student[None], targets, options["topk"], -100, backend)
        known = {"topk_ids": ids}
    want = oracle_sdpo_loss(student, teacher, targets, **options, **known)
    assert not bool(out.per_token_loss.isnan().any())
    finite = want.per_token_loss.isfinite()
    assert bool((out.per_token_loss.isinf() == ~finite).all())
    close(
        out.per_token_loss[finite],
        want.per_token_loss[finite],
        scale_of(want),
    )
    if bool(finite.all()):
        assert bool(grad.isfinite().all())
        assert bool((grad[student == -math.inf] == 0).all())


@backends
@losses
@drawn(data=st.data(), bad=st.sampled_from([math.nan, math.inf]))
def test_a_bad_row_stays_its_own(backend, loss, data, bad):
    """NaN or +inf in a row that counts shows in that row; in one that is ignored, nowhere."""
    student, teacher, targets, weights = data.draw(rows(torch.float32, least=4))
    options = {**options_for(loss, student.shape[1]), "weights": weights}
    where = data.draw(st.integers(0, len(targets) - 1))
    column = data.draw(st.integers(0, student.shape[1] - 1))
    if not loss.get("add_tail", True):  # what is outside the support is not looked at
        column = int(student[where].argmax())
    plain, grad = run(student, teacher, targets, backend, **options)
    broken = [student.clone(), teacher.clone()]
    broken[data.draw(st.integers(0, 1))][where, column] = bad
    out, broken_grad = run(*broken, targets, backend, **options)
    others = torch.arange(len(targets)) != where
    assert torch.equal(out.per_token_loss[others], plain.per_token_loss[others])
    assert torch.equal(broken_grad[others], grad[others])
    if targets[where] == -100:
        assert float(out.per_token_loss[where]) == 0
        assert bool((broken_grad[where] == 0).all())
        assert bool(out.loss.isfinite())
    elif math.isnan(bad):
        assert not bool(out.per_token_loss[where].isfinite())
        assert not bool(out.loss.isfinite())


@backends
@losses
@drawn(data=st.data())
def test_strides_change_nothing(backend, loss, data):
    student, teacher, targets, weights = data.draw(rows())
    options = {**options_for(loss, student.shape[1]), "weights": weights}
    (tokens, vocabulary), dtype = student.shape, student.dtype
    before, after, gap = (data.draw(st.integers(0, 5)) for _ in range(3))
    wide = torch.full((tokens * (gap + 1), vocabulary + before + after), math.nan, dtype=dtype)
    inside = wide[:: gap + 1, before : before + vocabulary]
    inside.copy_(teacher)
    columns = torch.empty(vocabulary, tokens, dtype=dtype).copy_(teacher.T).T  # rows are not contiguous
    repeated = torch.stack([targets, targets], 1).flatten()[::2]
    plain, grad = run(student, teacher, targets, backend, **options)
    for odd in (inside, columns):
        out, odd_grad = run(student, odd, repeated, backend, **options)
        assert torch.equal(out.per_token_loss, plain.per_token_loss)
        assert torch.equal(odd_grad, grad)


@backends
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 1000] if INTERPRETED else [1, 2, 3, 151_936, 262_144])
@losses
def test_tiny_and_huge_vocabularies(backend, loss, vocabulary):
    g = torch.Generator().manual_seed(vocabulary)
    student = torch.randn(2, vocabulary, generator=g) * 5
    teacher = student + torch.randn(2, vocabulary, generator=g)
    targets = torch.tensor([0, vocabulary - 1])
    options = options_for(loss, vocabulary)
    out, grad = run(student, teacher, targets, backend, **options)
    want = oracle_sdpo_loss(student, teacher, targets, **options)
    close(out.per_token_loss, want.per_token_loss, 5)
    close(grad, want.grad, 5)
    tried["vocabularies"] = tried.get("vocabularies", 0) + 1


@backends
@drawn(data=st.data())
def test_the_three_ways_to_a_log_ratio_agree(backend, data):
    student, teacher, targets, _ = data.draw(rows())
    ratio = fastsdpo.token_log_ratio(student, teacher, targets, backend=backend)
    logps = [fastsdpo.token_logps(logits, targets, backend=backend) for logits in (student, teacher)]
    out, _ = run(student, teacher, targets, backend)
    close(ratio.student_logps, logps[0], 50)
    close(ratio.teacher_logps, logps[1], 50)
    close(ratio.log_ratio, logps[1] - logps[0], 50)
    close(out.log_ratio, ratio.log_ratio, 50)
    assert bool((logps[0] <= 0).all())


@backends
@drawn(data=st.data())
def test_entropy_is_within_its_bounds(backend, data):
    student, _, targets, _ = data.draw(rows())
    _, entropy = fastsdpo.token_logps(student, targets, return_entropy=True, backend=backend)
    probabilities = student.double().softmax(-1)
    want = -(probabilities * probabilities.clamp(min=1e-300).log()).sum(-1)
    close(entropy[targets != -100], want[targets != -100], 10)
    assert bool((entropy >= -1e-5).all())
    assert bool((entropy <= math.log(student.shape[1]) + 1e-4).all())


# ------------------------------------------------------------------------------- from hidden states


@st.composite
def hidden_rows(draw):
    student, _, targets, weights = draw(rows(torch.float32, most=60, least=4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = draw(st.integers(1, 9))
    tokens, vocabulary = student.shape
    head = torch.randn(vocabulary, width, generator=g)
    bias = torch.randn(vocabulary, generator=g)
    hidden = torch.randn(tokens, width, generator=g)
    return (
        hidden,
        hidden + 0.3 * torch.randn(tokens, width, generator=g),
        head,
        bias,
        targets,
        weights,
    )


def run_linear(student, teacher, head, bias, targets, backend, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (student, head, bias)]
    out = fastsdpo.linear_sdpo_loss(leaves[0], teacher, leaves[1], targets, bias=leaves[2], backend=backend, **options)
    out.loss.backward()
    return out, [leaf.grad for leaf in leaves]


linear_backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])


@linear_backends
@losses
@drawn(data=st.data())
def test_linear_equals_the_loss_of_its_logits(backend, loss, data):
    student, teacher, head, bias, targets, weights = data.draw(hidden_rows())
    options = {**options_for(loss, len(head)), "weights": weights}
    chunk = data.draw(st.sampled_from([None, 1, 2, 64]))
    out, grads = run_linear(student, teacher, head, bias, targets, backend, chunk_size=chunk, **options)
    logits = [hidden @ head.T + bias for hidden in (student, teacher)]
    plain, grad = run(*logits, targets, backend, **options)
    scale = 10 * (1 + plain.log_ratio.abs().max())
    close(out.per_token_loss, plain.per_token_loss, scale)
    for found, want in zip(grads, (grad @ head, grad.T @ student, grad.sum(0))):
        close(found, want, scale * (1 + head.abs().max() + student.abs().max()))


@linear_backends
@losses
@drawn(data=st.data())
def test_linear_with_a_permuted_and_a_shifted_head(backend, loss, data):
    student, teacher, head, bias, targets, weights = data.draw(hidden_rows())
    options = {**options_for(loss, len(head)), "weights": weights}
    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(5))
    moved = torch.where(targets == -100, targets, order.argsort()[targets.clamp(min=0)])
    shift = data.draw(st.sampled_from([-8.0, 0.0, 32.0]))
    out, grads = run_linear(student, teacher, head, bias, targets, backend, **options)
    other, other_grads = run_linear(student, teacher, head[order], bias[order] + shift, moved, backend, **options)
    scale = 20 * (1 + out.log_ratio.abs().max()) * (1 + abs(shift) / 8)
    close(other.per_token_loss, out.per_token_loss, scale)
    close(other_grads[0], grads[0], scale * (1 + head.abs().max()))
    close(other_grads[1], grads[1][order], scale * (1 + student.abs().max()))
    # A constant in every logit changes nothing, so the bias's gradient sums to zero.
    assert float(grads[2].sum().abs()) <= 1e-5 * float(grads[2].abs().sum()) + 1e-6


@linear_backends
@drawn(data=st.data())
def test_linear_pieces_add_up(backend, data):
    student, teacher, head, bias, targets, weights = data.draw(hidden_rows())
    at = data.draw(st.integers(0, len(targets)))
    whole, grads = run_linear(student, teacher, head, bias, targets, backend, mode="full", weights=weights)
    parts = [
        run_linear(
            student[part], teacher[part], head, bias, targets[part], backend, mode="full", weights=weights[part]
        )
        for part in (slice(None, at), slice(at, None))
    ]
    close(sum(out.loss for out, _ in parts), whole.loss, 1 + whole.per_token_loss.sum())
    close(torch.cat([part[0] for _, part in parts]), grads[0], 10)
    for index in (1, 2):
        close(sum(part[index] for _, part in parts), grads[index], 10)


# ------------------------------------------------------------------------------------- the weights


@drawn(data=st.data())
def test_weights_sum_to_one_and_pieces_to_the_whole(data):
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 8)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    mask = torch.rand(shape, generator=g) < data.draw(st.sampled_from([0.2, 0.9]))
    for make, number, name in (
        (fastsdpo.token_mean_weights, int(mask.sum()), "num_items"),
        (fastsdpo.sequence_mean_weights, int(mask.any(-1).sum()), "num_sequences"),
    ):
        weights = make(mask)
        assert bool((weights[~mask] == 0).all())
        assert float(weights.sum()) == pytest.approx(1.0 if number else 0.0, abs=1e-5)
        if number:
            halves = [make(part, **{name: number}) for part in mask.split((shape[0] + 1) // 2)]
            close(torch.cat(halves), weights)
