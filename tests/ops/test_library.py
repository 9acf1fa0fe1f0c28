"""The torch.library operators: schema, fakes, autograd registration, dynamic shapes under compile."""

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

import fastsdpo
from fastsdpo.ops import _operators, linear, linear_token_logps
from fastsdpo.ops.head import Plan
from fastsdpo.ops.rows import LossOptions, Tokens

BACKENDS = [name for name in ("reference", "native", "triton") if fastsdpo.available_backends()[name] == "available"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def rows(requires_grad=False):
    z, t = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
    y = torch.randint(0, 11, (6,))
    y[1] = -100
    return z.requires_grad_(requires_grad), t, y


def test_token_logps(backend):
    z, t, y = rows(True)
    options = LossOptions(0.9, 2.0).packed()
    opcheck(_operators.token_logps_op, (z, y, *options, True, backend))
    opcheck(_operators.token_log_ratio_op, (z.detach(), t, y, *options, backend))


def test_losses(backend):
    z, t, y = rows(True)
    w, old = torch.rand(6), torch.randn(6)

    def check(teacher, tokens, **options):
        packed = LossOptions(**options).packed()
        opcheck(_operators.sdpo_op, (z, teacher, list(tokens), *packed, backend))

    check(t, Tokens(y, w, old), is_clip=2.0)
    check(None, Tokens(y, w, teacher_logps=torch.randn(6)))
    for alpha in (0.0, 0.5, 1.0):
        check(t, Tokens(y, w), mode="full", alpha=alpha)
    ids = z.detach().topk(4, -1).indices.reshape(6, 4)
    check(t, Tokens(y, w, topk_ids=ids), mode="topk", alpha=0.5)
    opcheck(_operators.support_op, (z.detach(), y, 4, -100, backend))
    y = ids[:, 1].clone()  # outside the support a log-prob is NaN, which compares unequal
    logps = torch.log_softmax(t, -1).reshape(6, 11).gather(1, ids)
    tokens = Tokens(y, w, topk_ids=ids, topk_logps=logps)
    check(None, tokens, mode="topk", alpha=0.5, add_tail=False)


def test_linear(backend):
    h, t = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    weight, bias = torch.randn(11, 4, requires_grad=True), torch.randn(11, requires_grad=True)
    y, w = torch.randint(0, 11, (6,)), torch.rand(6)
    plan = Plan(4, torch.float32, torch.float32).packed()
    options = LossOptions(mode="full", alpha=0.5).packed()
    # Its backward overwrites what forward stored, so a check that runs backward twice cannot pass.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(
        linear.linear_sdpo_op,
        (
            h,
            weight,
            bias,
            [t, None, None],
            list(Tokens(y, w)),
            *options,
            *plan,
            [True] * 3,
            backend,
        ),
        test_utils=checks,
    )
    opcheck(
        linear_token_logps.linear_token_logps_op,
        (h, weight, bias, y, *LossOptions().packed(), True, *plan, backend),
    )


def test_options_survive_packing():
    for options in (
        LossOptions(),
        LossOptions(0.1 + 0.2, 1 / 3, -7, "topk", 0.7, 20, False, 1e-300, True),
    ):
        assert LossOptions.unpacked(*options.packed()) == options


@pytest.mark.parametrize("mode", ["sampled_token", "full", "topk"])
def test_compiled_equals_eager(backend, mode):
    """Compilers go through the operators, eager calls do not."""
    torch.compiler.reset()
    z, t, y = rows(True)
    options = {"mode": mode, "topk": 3 if mode == "topk" else None, "softcap": 3.0}

    def step(z, t, y):
        out = fastsdpo.sdpo_loss(z, t, y.view(2, 3), temperature=0.7, backend=backend, **options)
        return out.loss, out.log_ratio

    want, ratio = step(z, t, y)
    (expected,) = torch.autograd.grad(want, z)
    got, compiled_ratio = torch.compile(step, fullgraph=True, backend="aot_eager")(z, t, y)
    (grad,) = torch.autograd.grad(got, z)
    assert torch.equal(got, want) and torch.equal(ratio, compiled_ratio)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("own", [(), ("weight",), ("weight", "bias")], ids=str)
def test_compiled_linear_equals_eager(backend, own):
    """The teacher's head is the student's, or its own with and without a bias."""
    torch.compiler.reset()
    h, t = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    weight, bias = torch.randn(11, 4, requires_grad=True), torch.randn(11, requires_grad=True)
    y = torch.randint(0, 11, (6,))
    teacher = {"teacher_weight": torch.randn(11, 4), "teacher_bias": torch.randn(11)}
    teacher = {f"teacher_{name}": teacher[f"teacher_{name}"] for name in own}

    def loss():
        options = {"mode": "full", "alpha": 0.5, "bias": bias, "backend": backend, **teacher}
        return fastsdpo.linear_sdpo_loss(h, t, weight, y, **options).loss

    want, got = loss(), torch.compile(loss, fullgraph=True, backend="aot_eager")()
    assert torch.equal(got, want)
    leaves = (h, weight, bias)
    for mine, expected in zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * want, leaves)):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_dynamic_number_of_tokens_compiles_twice_at_most(backend, dynamic):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=dynamic)
    def step(z, t, y):
        return fastsdpo.sdpo_loss(z, t, y, mode="full", backend=backend).loss

    for tokens in (3, 5, 8, 13, 21):
        z = torch.randn(tokens, 9, requires_grad=True)
        step(z, torch.randn(tokens, 9), torch.randint(0, 9, (tokens,))).backward()
    assert counter.frame_count <= 2
