"""What `sampled_token` and `full` ascend, on tables where hindsight is Bayes' rule (docs/objectives.md)."""

import pytest
import torch

import fastsdpo

F64 = torch.float64


def user(prior, reward):
    """P(o | y), ``[Y, O]``, of a user with P(o | y) proportional to P(o) exp(reward[y, o]).

    P(o) has to be what follows from P(y) and P(o | y): the fixed point of that.
    """
    marginal = torch.full((reward.shape[1],), 1 / reward.shape[1], dtype=F64)
    for _ in range(3000):
        tilted = marginal * reward.exp()
        given = tilted / tilted.sum(1, keepdim=True)
        marginal = prior @ given
    return given, marginal


class Table:
    """Answers of one token or two from 3, as a table of logits: P(first), P(second | first)."""

    def __init__(self, tokens, seed):
        g = torch.Generator().manual_seed(seed)
        self.first = torch.randn(3, generator=g, dtype=F64, requires_grad=True)
        self.second = torch.randn(3, 3, generator=g, dtype=F64, requires_grad=True)
        self.parameters = [self.first, self.second][:tokens]
        answers = torch.cartesian_prod(*[torch.arange(3)] * tokens)
        self.answers = answers.view(-1, tokens)

    def rows(self):
        """``[answers, tokens, 3]`` log-probabilities at each token of each answer."""
        parts = [self.first.log_softmax(-1).expand(len(self.answers), 3)]
        if self.answers.shape[1] == 2:
            parts.append(self.second.log_softmax(-1)[self.answers[:, 0]])
        return torch.stack(parts, 1)

    def probabilities(self):
        return self.rows().gather(-1, self.answers[..., None])[..., 0].sum(-1).exp()

    def hindsight(self, given):
        """``[answers, O, tokens, 3]`` the same rows given o, by Bayes' rule from P(o | y)."""
        joint = (self.probabilities().detach()[:, None] * given).T.view(given.shape[1], *[3] * self.answers.shape[1])
        first = joint if joint.ndim == 2 else joint.sum(-1)
        parts = [(first / first.sum(-1, keepdim=True)).log()[None].expand(len(self.answers), -1, -1)]
        if joint.ndim == 3:
            second = (joint / first[..., None]).log()
            parts.append(second[:, self.answers[:, 0]].transpose(0, 1))
        return torch.stack(parts, 2)


def expected(table, given, mode):
    """Loss and log-ratios ``[answers, O, tokens]``, all answers and follow-ups weighed by their probability."""
    answers, follow_ups = given.shape
    tokens = table.answers.shape[1]
    shape = (answers, follow_ups, tokens)
    weights = (table.probabilities().detach()[:, None] * given)[..., None].expand(shape)
    student = table.rows()[:, None].expand(*shape, 3).reshape(-1, 3)
    teacher, ids = table.hindsight(given).reshape(-1, 3), table.answers[:, None].expand(shape).reshape(-1)
    options = {"mode": mode, "alpha": 1.0, "weights": weights.reshape(-1), "backend": "reference"}
    out = fastsdpo.sdpo_loss(student, teacher, ids, **options)
    return out.loss, out.log_ratio.view(shape)


@pytest.mark.parametrize("tokens", [1, 2])
def test_proposition_one_own_answer_hindsight_is_the_latent_reward_and_a_step_ascends_it(tokens):
    """E_o[log pi(y | o) - log pi(y)] = E_o[r(y, o)] - log Z(y), for a user whose r was chosen freely."""
    table = Table(tokens, seed=tokens)
    g = torch.Generator().manual_seed(5)
    reward = 2.0 * torch.eye(3, dtype=F64)[table.answers[:, 0]] + 0.3 * torch.rand(
        3**tokens, 3, generator=g, dtype=F64
    )
    given, marginal = user(table.probabilities().detach(), reward)
    assert marginal.min() > 0.01
    log_z = (marginal * reward.exp()).sum(1).log()
    loss, ratios = expected(table, given, "sampled_token")
    latent = (given * reward).sum(1) - log_z
    torch.testing.assert_close((given * ratios.sum(-1)).sum(1).to(F64), latent, rtol=1e-5, atol=1e-6)
    assert latent.std() > 0.05  # the user prefers some answers

    loss.backward()
    gradient = [p.grad.clone() for p in table.parameters]
    if tokens == 1:  # the gradient is the reward's own
        (wanted,) = torch.autograd.grad(table.probabilities() @ latent, table.parameters)
        torch.testing.assert_close(-gradient[0], wanted, rtol=1e-5, atol=1e-6)
    before = float(table.probabilities().detach() @ latent)
    with torch.no_grad():
        for p, grad in zip(table.parameters, gradient):
            p -= 0.1 * grad
    assert float(table.probabilities().detach() @ latent) > before + 1e-4
