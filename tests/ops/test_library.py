"""The torch.library operators: schema, fakes, autograd registration."""

import pytest
import torch
from torch.library import opcheck

import fastsdpo
from fastsdpo.ops import _operators, linear, token_terms
from fastsdpo.ops.head import ChunkPlan
from fastsdpo.ops.rows import LossOptions, Tokens

BACKENDS = [name for name in ("reference", "native") if fastsdpo.available_backends()[name] == "available"]
BACKENDS += [pytest.param("triton", marks=[pytest.mark.interpreted, pytest.mark.slow])]


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
    extra = torch.randint(0, 11, (6, 3))
    opcheck(token_terms.token_terms_op, (z, y, extra, *options, True, backend))
    h, weight, plan = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4), (4, "torch.float32 torch.float32")
    opcheck(token_terms.linear_token_terms_op, (h, weight, None, [y, extra], *options, True, *plan, backend))


def test_losses(backend):
    z, t, y = rows(True)
    w, old = torch.rand(6), torch.randn(6)

    def check(teacher, tokens, **options):
        packed = LossOptions(**options).packed()
        opcheck(_operators.sdpo_op, (z, teacher, list(tokens), *packed, backend))

    check(t, Tokens(y, w, old), is_clip=2.0)
    check(t, Tokens(y, w, ce_weights=w), ce_temperature=2.0)
    check(None, Tokens(y, w, teacher_logps=torch.randn(6)))
    for alpha in (0.0, 0.5, 1.0):
        check(t, Tokens(y, w), mode="full", alpha=alpha)
    ids = z.detach().topk(4, -1).indices.reshape(6, 4)
    check(t, Tokens(y, w, topk_ids=ids), mode="topk", topk=4, alpha=0.5)
    opcheck(_operators.support_op, (z.detach(), y, 4, -100, backend))
    y = ids[:, 1].clone()  # outside the support a log-prob is NaN, which compares unequal
    logps = torch.log_softmax(t, -1).reshape(6, 11).gather(1, ids)
    tokens = Tokens(y, w, topk_ids=ids, topk_logps=logps)
    check(None, tokens, mode="topk", topk=4, alpha=0.5, add_tail=False)


def test_losses_from_hidden_states(backend):
    h, t = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    weight, bias = torch.randn(11, 4, requires_grad=True), torch.randn(11, requires_grad=True)
    y, w = torch.randint(0, 11, (6,)), torch.rand(6)
    plan = ChunkPlan(4, torch.float32, torch.float32).packed()
    options = LossOptions(mode="full", alpha=0.5).packed()
    # Its backward overwrites what forward stored, so a check that runs backward twice cannot pass.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    teacher, tokens = [t, None, None, None], list(Tokens(y, w, ce_weights=w))
    arguments = (h, weight, bias, teacher, tokens, *options, *plan, [True] * 3, backend)
    opcheck(linear.linear_sdpo_op, arguments, test_utils=checks)
    ids = [y, y.new_zeros(6, 0)]
    opcheck(token_terms.linear_token_terms_op, (h, weight, bias, ids, *LossOptions().packed(), True, *plan, backend))


def test_options_survive_packing():
    for options in (LossOptions(), LossOptions(0.1 + 0.2, 1 / 3, -7, "topk", 0.7, 20, False, 1e-300, True)):
        assert LossOptions.unpacked(*options.packed()) == options
