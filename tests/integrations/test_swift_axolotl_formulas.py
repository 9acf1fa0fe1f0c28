"""The losses of the ms-swift and axolotl integrations against their formulas, without those packages.

`tests/integrations/peers` compares them with the packages themselves, where these are installed.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from fastsdpo.integrations._head_logits import HeadLogits
from fastsdpo.integrations.axolotl import KDSettings, kd_loss
from fastsdpo.integrations.swift import GKDSettings, divergence
from fastsdpo.prefix import HeadParameters

N, D, V, K = 11, 12, 40, 5


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def make_head(grad=False, **options):
    weight = draw(V, D).requires_grad_(grad)
    return HeadParameters(weight, draw(V), **{"softcap": None, "logit_scale": 1.0, **options})


def logits_of(hidden, head):
    z = head.logit_scale * (hidden @ head.weight.T + head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def jsd(student, teacher, beta):
    """Of log-probs, the sum over the last axis."""

    def kl(p, q):
        return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)

    if beta in (0, 1):
        return kl(teacher, student) if beta == 0 else kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def same(loss, want, leaves):
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)
    for got, right in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("support", ["full", "topk", "server"])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": 0.5}], ids=["plain", "capped"])
def test_the_loss_of_swift(beta, support, options):
    torch.manual_seed(1)
    hidden, states = draw(N, D).requires_grad_(), draw(N, D + 2)
    head = make_head(grad=True, **options)
    other = HeadParameters(draw(V, D + 2), draw(V), head.softcap, 2 * head.logit_scale)
    labels = torch.randint(0, V, (N,))
    labels[4] = -100
    objective = GKDSettings(beta, 1.7, 0.25)
    student, teacher = HeadLogits(hidden, head), HeadLogits(states, other)
    z, t, topk = logits_of(hidden, head), logits_of(states, other), None
    uncovered = torch.zeros(N, dtype=torch.bool)
    if support != "full":
        topk = teacher.topk_logits(K)
        assert torch.equal(topk[0], t.topk(K).indices)
        torch.testing.assert_close(topk[1], t.topk(K).values)
    if support == "server":
        topk[1][2] = -math.inf  # the server said nothing of this token
        topk[1][3, -1] = -math.inf if beta < 1 else -9.0  # a reverse KL would be infinite
        uncovered[2] = True
    pair = z / 1.7, t / 1.7
    if topk is not None:
        pair = z.gather(-1, topk[0]) / 1.7, topk[1] / 1.7
    rows = jsd(*(one[~uncovered].log_softmax(-1) for one in pair), beta)
    loss, number = divergence(student, teacher, topk, objective, labels)
    assert number == len(rows)
    loss_of_logits, _ = divergence(z, t, topk, objective)  # without the cross entropy
    (grad,) = torch.autograd.grad(loss_of_logits, hidden, retain_graph=True)
    (want,) = torch.autograd.grad(rows.mean(), hidden, retain_graph=True)
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-7)
    same(loss, rows.mean() + 0.25 * F.cross_entropy(z, labels), [hidden, head.weight])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", ["plain", "hot", "ragged"])
def test_the_loss_of_axolotl(normalize, beta, case):
    torch.manual_seed(2)
    temperature = 2.0 if case == "hot" else 1.0
    hidden, head = draw(2, 6, D).requires_grad_(), make_head(grad=True)
    labels = torch.randint(0, V, (2, 6))
    labels[0, :3] = -100
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(12)]).view(2, 6, K)
    logprobs = draw(2, 6, K).log_softmax(-1)
    mask = torch.ones(2, 6, K, dtype=torch.int)
    mask[0, :2] = mask[1, 5] = 0  # a prompt, the last token
    logprobs[0, :2], ids[0, :2] = -1e9, 0
    if case == "ragged":  # a token with fewer entries than the others, as axolotl pads it
        mask[1, 2, 3:], logprobs[1, 2, 3:], ids[1, 2, 3:] = 0, -1e9, 0
    z = logits_of(hidden, head)
    student = (z / temperature).log_softmax(-1).gather(-1, ids)
    if normalize:
        student = student.log_softmax(-1)
    on = mask.bool()
    pair = (one.masked_fill(~on, -1e3) for one in (student, logprobs))  # a probability of 0 under both
    kd = 0.7 * jsd(*pair, beta).sum()
    hard = 0.3 * F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss = kd_loss(hidden, head, labels, ids, logprobs, mask, KDSettings(0.7, 0.3, temperature, beta, normalize))
    same(loss, kd + hard + (temperature**2 - 1) * kd.detach(), [hidden, head.weight])
