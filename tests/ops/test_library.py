"""The torch.library operators: schema, fakes, autograd registration, dynamic shapes under compile."""

import pytest
import torch
from torch.library import opcheck

import fastsdpo
from fastsdpo.ops import _library, linear

BACKENDS = [
    name
    for name in ("reference", "native", "triton")
    if fastsdpo.available_backends()[name] == "available"
]


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
    opcheck(_library.token_logps_op, (z, y, 0.9, 2.0, -100, True, backend))
    opcheck(_library.token_log_ratio_op, (z.detach(), t, y, 0.9, 2.0, -100, backend))


def test_losses(backend):
    z, t, y = rows(True)
    w, old = torch.rand(6), torch.randn(6)
    tail = (1.0, 0.0, -100, False, backend)
    opcheck(_library.sampled_token_op, (z, t, None, y, w, old, 2.0, *tail))
    opcheck(_library.sampled_token_op, (z, None, torch.randn(6), y, w, None, 0.0, *tail))
    for alpha in (0.0, 0.5, 1.0):
        opcheck(_library.divergence_op, (z, t, y, w, None, 0.0, alpha, *tail))
    ids = z.detach().topk(4, -1).indices.reshape(6, 4)
    opcheck(_library.topk_op, (z, t, ids, None, y, w, None, 0.0, 0.5, True, *tail))
    if backend == "native":
        opcheck(_library.support_op, (z.detach(), y, 4, -100))
    y = ids[
        :, 1
    ].clone()  # a target outside the support has the log-prob NaN, which compares unequal
    logps = torch.log_softmax(t, -1).reshape(6, 11).gather(1, ids)
    opcheck(_library.topk_op, (z, None, ids, logps, y, w, None, 0.0, 0.5, False, *tail))


def test_linear(backend):
    h, t = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    weight, bias = torch.randn(11, 4, requires_grad=True), torch.randn(11, requires_grad=True)
    y, w = torch.randint(0, 11, (6,)), torch.rand(6)
    float32 = torch.float32
    args = (h, t, weight, bias, None, None, y, w, None, None, None, None)
    options = ("full", 0.5, 0, True, 0.0, 1.0, 0.0, -100, 4, float32, float32, True, True, True)
    # Its backward overwrites what forward stored, so a check that runs backward twice cannot pass.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(linear.linear_sdpo_op, (*args, *options, backend), test_utils=checks)
    opcheck(
        linear.linear_token_logps_op,
        (h, weight, bias, y, 1.0, 0.0, -100, True, 4, float32, float32, backend),
    )


def test_inplace_backward_declares_its_mutation(backend):
    z, t, y = rows()
    w = torch.rand(6)
    _, _, s, q, coef, stats = _library.sampled_token_op(
        z, t, None, y, w, None, 0.0, 1.0, 0.0, -100, False, backend
    )
    version = z._version
    _library.sampled_token_backward_inplace_op(
        torch.ones(()), coef, s, q, z, y, stats, 1.0, 0.0, -100, backend
    )
    assert z._version > version


def test_dynamic_number_of_tokens_compiles_twice_at_most(backend):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(z, t, y):
        return fastsdpo.sdpo_loss(z, t, y, mode="full", backend=backend).loss

    for tokens in (3, 5, 8, 13, 21):
        z = torch.randn(tokens, 9, requires_grad=True)
        step(z, torch.randn(tokens, 9), torch.randint(0, 9, (tokens,))).backward()
    assert counter.frame_count <= 2
