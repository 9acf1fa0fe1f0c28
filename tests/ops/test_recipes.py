"""What recipes of distillation add to the losses, on every backend, against float64 autograd: a cross entropy of the
targets, logits of a teacher beside hidden states, padded vocabularies, several ids, entropies."""

import os

import pytest
import torch

import fastsdpo
from fastsdpo.testing import effective_logits, oracle_sdpo_loss
from tests.ops.contract import LOSSES, Hidden, relative
from tests.ops.test_linear import Watch

BACKENDS = [name for name in ("reference", "native") if fastsdpo.available_backends()[name] == "available"]
BACKENDS += [pytest.param("triton", marks=[pytest.mark.interpreted, pytest.mark.slow])]
BACKENDS += [pytest.param("ptx", marks=pytest.mark.slow)]  # the compiled kernels of Triton, executed on the CPU
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RECIPES = {name: LOSSES[name] for name in ("sampled", "forward", "jsd", "topk-jsd")}
SCALES = {"temperature": 2.0, "softcap": 4.0}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param != "ptx":
        yield request.param
        return
    if INTERPRETED:
        pytest.skip("the kernels are the interpreter's here")
    from tests.ptx.executor import executing

    with executing(90) as executor:
        yield "triton"
    assert not executor.faults, list(map(str, executor.faults))


@pytest.fixture(params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


def label_weights(case):
    weights = torch.rand(len(case.target_ids)) * 0.3
    weights[5] = 0.0
    return weights


def wanted(case, z, z_teacher, ce_weights, **options):
    """float64: the loss, and the gradient of the logits by autograd of the formula."""
    found = oracle_sdpo_loss(z, z_teacher, case.target_ids, weights=case.weights, **options)
    leaf = z.detach().double().requires_grad_()
    logps = effective_logits(leaf, 1.0, options.get("softcap")).log_softmax(-1)
    keep = case.target_ids != -100
    ce = -(logps.gather(-1, case.target_ids.clamp(min=0)[:, None])[:, 0] * keep * ce_weights).sum()
    (grad,) = torch.autograd.grad(ce, leaf)
    return found.loss + ce.detach(), found.grad + grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_cross_entropy_joins_the_loss_of_logits(backend, recipe, dtype, inplace):
    """At temperature 1 beside a divergence at 2; rows of a slice, several blocks."""
    case = Hidden(vocabulary=131)
    z, z_teacher = ((x @ case.weight.T).to(dtype) for x in (case.student, case.teacher))
    ce = label_weights(case)
    loss, grad = wanted(case, z, z_teacher, ce, **recipe, **SCALES)
    leaf = z[None].clone().requires_grad_()
    options = {**recipe, **SCALES, "weights": case.weights[None], "ce_weights": ce[None], "inplace_grad": inplace}
    out = fastsdpo.sdpo_loss(leaf * 1, z_teacher[None], case.target_ids[None], backend=backend, **options)
    (got,) = torch.autograd.grad(3 * out.loss, leaf)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    assert relative(got[0], 3 * grad) < (5e-6 if dtype == torch.float32 else 4e-3)
    plain = fastsdpo.sdpo_loss(z, z_teacher, case.target_ids, backend=backend, **recipe, **SCALES)
    assert torch.equal(out.per_token_loss[0], plain.per_token_loss)


@pytest.mark.parametrize("teacher", ["hidden", "logits"])
def test_a_cross_entropy_joins_the_loss_of_hidden_states(backend, recipe, teacher):
    """With the head's products of the divergence alone; and so with the teacher's log-probs in place of its states."""
    case, ce, scale = Hidden(), label_weights(Hidden()), 1.7
    options = {**recipe, "temperature": 2.0}
    if teacher == "hidden":
        options["softcap"] = 4.0
    leaves64 = [x.double().requires_grad_() for x in (case.student, case.weight, case.bias)]
    z = scale * (leaves64[0] @ leaves64[1].T + leaves64[2])
    with torch.no_grad():
        z_teacher = scale * (case.teacher.double() @ leaves64[1].T + leaves64[2])
    loss, grad = wanted(case, z, z_teacher, ce, **options)
    grads = torch.autograd.grad(z, leaves64, grad)
    hidden, weight, bias = leaves = case.leaves()
    given = {"bias": bias, "weights": case.weights, "ce_weights": ce, "logit_scale": scale, "chunk_size": 4}
    states = case.teacher
    if teacher == "logits":
        given["teacher_logits"], states = z_teacher.log_softmax(-1), None
    watch = Watch()
    with watch:
        out = fastsdpo.linear_sdpo_loss(hidden, states, weight, case.target_ids, backend=backend, **options, **given)
    assert watch.flops == (4 if teacher == "hidden" else 3) * 2 * 13 * 16 * 50
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(3 * out.loss, leaves), grads):
        assert relative(got, 3 * want) < 5e-6


def test_float64_gradients_by_finite_differences():
    """Of the loss with both terms, whose divergence needs no stop-gradient, and of log-probs with an entropy."""
    case, ce = Hidden(tokens=4, hidden=3, vocabulary=7, dtype=torch.float64), torch.rand(4)
    leaves = [x.clone().requires_grad_() for x in (case.student, case.weight)]
    extra = torch.randint(0, 7, (4, 3))

    def loss(hidden, weight):
        options = {"mode": "full", "alpha": 0.3, "ce_weights": ce, "ce_temperature": 1.3, "backend": "reference"}
        options["teacher_weight"] = case.weight
        return fastsdpo.linear_sdpo_loss(hidden, case.teacher, weight, case.target_ids, **options).loss

    def logps(hidden, weight):
        options = {"return_entropy": True, "entropy_grad": True, "extra_ids": extra, "backend": "reference"}
        return fastsdpo.linear_token_logps(hidden, weight, case.target_ids, **options)

    assert torch.autograd.gradcheck(logps, leaves)
    eps = 1e-6
    found = torch.autograd.grad(loss(*leaves), leaves)
    for leaf, grad in zip(leaves, found):
        direction = torch.randn_like(leaf)
        moved = [loss(*(x + s * eps * direction if x is leaf else x for x in leaves)).item() for s in (1, -1)]
        assert (moved[0] - moved[1]) / (2 * eps) == pytest.approx((grad * direction).sum().item(), rel=1e-5)


def test_vocabularies_that_differ_by_padding(backend):
    """A student of 50 words in 56 rows, a teacher of the same words in 64."""
    case = Hidden()
    weight, head = torch.randn(56, 16), torch.randn(64, 16)
    options = {"mode": "full", "alpha": 0.5, "backend": backend}
    leaf, cut = weight.clone().requires_grad_(), weight[:50].clone().requires_grad_()
    given = {"teacher_weight": head, "vocab_size": 50}
    out = fastsdpo.linear_sdpo_loss(case.student, case.teacher, leaf, case.target_ids, **given, **options)
    given = {"teacher_weight": head[:50]}
    want = fastsdpo.linear_sdpo_loss(case.student, case.teacher, cut, case.target_ids, **given, **options)
    out.loss.backward()
    want.loss.backward()
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(leaf.grad[:50], cut.grad) and not leaf.grad[50:].any()
    z, z_teacher = case.student @ weight.T, case.teacher @ head.T
    from_logits = fastsdpo.sdpo_loss(z, z_teacher, case.target_ids, vocab_size=50, **options)
    torch.testing.assert_close(from_logits.loss, want.loss)
    with pytest.raises(ValueError, match=r"vocab_size must be an integer in \[1, 56\]"):
        fastsdpo.sdpo_loss(z, z_teacher, case.target_ids, vocab_size=60, **options)


def ids_and_logits(vocabulary, dtype):
    """Ids twice in a row, the target among them, one that does not count, an ignored row, a masked token."""
    logits, target_ids = (3 * torch.randn(2, 5, vocabulary)).to(dtype), torch.randint(0, vocabulary, (2, 5))
    extra_ids = torch.randint(0, vocabulary, (2, 5, 6))
    extra_ids[..., 1], extra_ids[..., 5] = target_ids, extra_ids[..., 0]
    extra_ids[0, 0, 3] = target_ids[1, 2] = -100
    return logits, target_ids, extra_ids


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(("vocabulary", "dtype"), [(2, torch.float32), (131, torch.bfloat16), (33_000, torch.float32)])
def test_several_ids_and_an_entropy_with_a_gradient(backend, vocabulary, dtype, entropy_grad, softcap):
    if INTERPRETED and vocabulary > 1000:
        pytest.skip("minutes in the interpreter")
    logits, target_ids, extra_ids = ids_and_logits(vocabulary, dtype)
    keep = target_ids != -100
    counts = keep[..., None] & (extra_ids != -100)
    z = logits.double().requires_grad_()
    log_probs = effective_logits(z, 0.8, softcap).log_softmax(-1)
    want = [log_probs.gather(-1, target_ids.clamp(min=0)[..., None])[..., 0] * keep]
    want += [-(log_probs.exp() * log_probs).sum(-1) * keep, log_probs.gather(-1, extra_ids.clamp(min=0)) * counts]
    slopes = [torch.rand(x.shape) - 0.3 for x in want]
    slopes[1] *= entropy_grad
    (grad,) = torch.autograd.grad(sum((a * b).sum() for a, b in zip(want, slopes)), z)
    leaf = logits.clone().requires_grad_()
    options = {"return_entropy": True, "entropy_grad": entropy_grad, "temperature": 0.8, "softcap": softcap}
    found = fastsdpo.token_logps(leaf, target_ids, extra_ids=extra_ids, backend=backend, **options)
    assert found[1].requires_grad == entropy_grad
    for got, value in zip(found, want):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(sum((a * b).sum() for a, b in zip(found, slopes)), leaf)
    assert relative(got, grad) < (2e-6 if dtype == torch.float32 else 4e-3)
    del options["entropy_grad"]
    assert torch.equal(found[0], fastsdpo.token_logps(leaf, target_ids, backend=backend, **options)[0])


def test_several_ids_from_hidden_states(backend):
    case = Hidden()
    extra_ids = torch.randint(0, 50, (13, 4))
    options = {"extra_ids": extra_ids, "return_entropy": True, "entropy_grad": True, "softcap": 3.0}
    slopes = [torch.rand(13), torch.rand(13), torch.rand(13, 4)]

    def gradients(found, leaves):
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(found, slopes)), leaves)

    leaves64 = [x.double().requires_grad_() for x in (case.student, case.weight, case.bias)]
    z = 0.5 * (leaves64[0] @ leaves64[1].T + leaves64[2])
    want = fastsdpo.token_logps(z, case.target_ids, backend="reference", **options)
    hidden, weight, bias = leaves = case.leaves()
    options |= {"bias": bias, "logit_scale": 0.5, "chunk_size": 5, "backend": backend}
    found = fastsdpo.linear_token_logps(hidden, weight, case.target_ids, **options)
    for got, value in zip(found, want):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)
    for got, value in zip(gradients(found, leaves), gradients(want, leaves64)):
        assert relative(got, value) < 5e-6


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_several_ids_of_no_tokens(backend, shape):
    none, options = torch.zeros(shape, dtype=torch.long), {"return_entropy": True, "entropy_grad": True}
    leaves = [torch.zeros(*shape, 7), torch.zeros(*shape, 4), torch.randn(7, 4)]
    logits, hidden, weight = leaves = [leaf.requires_grad_() for leaf in leaves]
    options |= {"extra_ids": none.unsqueeze(-1).expand(*shape, 3), "backend": backend}
    found = [
        *fastsdpo.token_logps(logits, none, **options),
        *fastsdpo.linear_token_logps(hidden, weight, none, **options),
    ]
    assert [part.shape for part in found[:3]] == [shape, shape, (*shape, 3)]
    sum(part.sum() for part in found).backward()
    assert not any(leaf.grad.any() for leaf in leaves)


def test_they_compile_as_one_graph():
    torch.compiler.reset()
    case, ce, extra_ids = Hidden(), label_weights(Hidden()), torch.randint(0, 50, (13, 4))

    def step(hidden, weight):
        options = {"mode": "full", "alpha": 0.5, "ce_weights": ce, "chunk_size": 4}
        loss = fastsdpo.linear_sdpo_loss(hidden, case.teacher, weight, case.target_ids, **options).loss
        logits = hidden @ weight.T
        loss = loss + fastsdpo.sdpo_loss(logits, None, case.target_ids, teacher_logps=ce, ce_weights=ce).loss
        options = {"return_entropy": True, "entropy_grad": True, "extra_ids": extra_ids}
        for found in (
            fastsdpo.token_logps(logits, case.target_ids, **options),
            fastsdpo.linear_token_logps(hidden, weight, case.target_ids, **options),
        ):
            loss = loss + sum(part.sum() for part in found)
        return loss

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves(2)
        value = function(*leaves)
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
