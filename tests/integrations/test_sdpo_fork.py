"""The loss of verl's SDPO fork against its definition, written down here in plain PyTorch."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastsdpo.integrations import sdpo_fork
from fastsdpo.prefix import HeadParameters

B, T, V, D, K = 3, 5, 23, 8, 4
AGGREGATIONS = sdpo_fork.AGGREGATIONS


def settings(**changes):
    defaults = {"full_logit_distillation": True, "distillation_topk": None, "distillation_add_tail": False}
    return SimpleNamespace(**{**defaults, "alpha": 1.0, "is_clip": None, **changes})


def definition(s, t, ids, mask, config, old, aggregation, rollout):
    """From whole log-probs ``[B, T, V]``: https://arxiv.org/abs/2601.20802, sections 3 and 4."""
    s_token = s.gather(-1, ids[..., None])[..., 0]
    t_token = t.gather(-1, ids[..., None])[..., 0]
    if not config.full_logit_distillation:
        loss = (s_token - t_token).detach() * s_token
    else:
        if config.distillation_topk:
            support = s.topk(config.distillation_topk).indices
            s, t = s.gather(-1, support), t.gather(-1, support)
            if config.distillation_add_tail:
                s, t = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).clamp(min=1e-7).log()], -1) for x in (s, t))
            else:
                s, t = s.log_softmax(-1), t.log_softmax(-1)
        a = config.alpha
        if a == 0:
            loss = (t.exp() * (t - s)).sum(-1)
        elif a == 1:
            loss = (s.exp() * (s - t)).sum(-1)
        else:
            m = ((1 - a) * s.exp() + a * t.exp()).log()
            loss = ((1 - a) * s.exp() * (s - m) + a * t.exp() * (t - m)).sum(-1)
    if config.is_clip is not None:
        loss = loss * (s_token - old).detach().clamp(-20, 20).exp().clamp(max=config.is_clip)
    if rollout is not None:
        loss = loss * rollout
    total, counts = (loss * mask).sum(-1), mask.sum(-1)
    some = counts > 0
    if aggregation == "token-mean":
        return total.sum() / counts.sum().clamp(min=1)
    if aggregation == "seq-mean-token-sum":
        return total[some].sum() / some.sum()
    if aggregation == "seq-mean-token-mean":
        return (total[some] / counts[some]).sum() / some.sum()
    return total.sum() / mask.shape[-1]


CONFIGS = {
    "sampled": settings(full_logit_distillation=False, is_clip=1.5),
    "full reverse": settings(is_clip=0.9),
    "full forward": settings(alpha=0.0),
    "full jsd": settings(alpha=0.3),
    "topk reverse": settings(distillation_topk=K, is_clip=2.0),
    "topk jsd": settings(distillation_topk=K, alpha=0.5),
    "topk tail forward": settings(distillation_topk=K, alpha=0.0, distillation_add_tail=True),
    "topk tail reverse": settings(distillation_topk=K, distillation_add_tail=True),
    "topk tail jsd": settings(distillation_topk=K, alpha=0.7, distillation_add_tail=True),
}


@pytest.fixture
def given():
    torch.manual_seed(3)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    states = {"student": torch.randn(B, T, D), "teacher": torch.randn(B, T, D)}
    head = HeadParameters(torch.randn(V, D) * 0.5, torch.randn(V), None, 1.0)
    tokens = {"ids": torch.randint(V, (B, T)), "mask": mask, "chosen": torch.tensor([1.0, 0.0, 1.0])}
    tokens |= {"old": -3 * torch.rand(B, T), "rollout": torch.rand(B, T) + 0.5}
    return SimpleNamespace(**states, **tokens, head=head, temperature=0.7)


def logits(hidden, given):
    return hidden @ given.head.weight.T + given.head.bias


def wanted(given, config, aggregation):
    """Loss and the gradient of the student's hidden states."""
    hidden = given.student.clone().requires_grad_()
    s, t = ((logits(h, given) / given.temperature).log_softmax(-1) for h in (hidden, given.teacher))
    mask = given.mask * given.chosen[:, None]
    loss = definition(s, t, given.ids, mask, config, given.old, aggregation, given.rollout)
    loss.backward()
    return loss.detach(), hidden.grad


def options(given, config, aggregation):
    return {
        "old_log_probs": given.old if config.is_clip is not None else None,
        "self_distillation_mask": given.chosen,
        "loss_agg_mode": aggregation,
        "rollout_is_weights": given.rollout,
    }


def close(found, hidden, want):
    loss, grad = want
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6, check_dtype=False)
    found.backward()
    torch.testing.assert_close(hidden.grad, grad, rtol=1e-4, atol=1e-6)


def from_states(given, config, aggregation, hidden, source="hidden"):
    """`self_distillation_loss` of hidden states, or of the logits that they give."""
    rows, head = (hidden, given.teacher), given.head
    if source == "logits":
        rows, head = [logits(h, given) for h in rows], None
    more = {"head": head, "temperature": given.temperature, **options(given, config, aggregation)}
    return sdpo_fork.self_distillation_loss(*rows, given.ids, given.mask, config, **more)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_from_hidden_states_and_logits(source, name, aggregation, given):
    want = wanted(given, CONFIGS[name], aggregation)
    hidden = given.student.clone().requires_grad_()
    loss, metrics = from_states(given, CONFIGS[name], aggregation, hidden, source)
    close(loss, hidden, want)
    assert set(metrics) == {"self_distillation/log_ratio_mean", "self_distillation/loss_per_token"}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["log-probs", "logits"])
def test_with_the_forks_signature(form, name, aggregation, given):
    """The tensors that the fork passes: log-probs of the tokens, of everything, or of a support."""
    config = CONFIGS[name]
    want = wanted(given, config, aggregation)
    hidden = given.student.clone().requires_grad_()
    s, t = (logits(h, given) / given.temperature for h in (hidden, given.teacher))
    everything = (s, t) if form == "logits" else (s.log_softmax(-1), t.log_softmax(-1))
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    tensors = {}
    if config.distillation_topk:
        support = s.topk(config.distillation_topk).indices
        tensors["student_topk_log_probs"] = s.gather(-1, support)
        tensors["teacher_topk_log_probs"] = t.gather(-1, support)
    elif config.full_logit_distillation:
        tensors["student_all_log_probs"], tensors["teacher_all_log_probs"] = everything
    scores = (x.gather(-1, given.ids[..., None])[..., 0] for x in (s, t))
    more = {**tensors, **options(given, config, aggregation)}
    loss, metrics = sdpo_fork.compute_self_distillation_loss(*scores, given.mask, config, **more)
    close(loss, hidden, want)
    assert metrics == {}


def test_tail_bound(given):
    """Tails below 1e-7 stay there, as in the fork; in float64, where 1 - sum(p) has digits left."""
    config = CONFIGS["topk tail forward"]
    for name in ("student", "teacher", "old", "rollout", "chosen"):
        setattr(given, name, getattr(given, name).double())
    given.head = HeadParameters(given.head.weight.double() * 12, torch.zeros(V).double(), None, 1.0)
    want = wanted(given, config, "token-mean")
    hidden = given.student.clone().requires_grad_()
    close(from_states(given, config, "token-mean", hidden)[0], hidden, want)
    p = (logits(given.student, given) / given.temperature).softmax(-1)
    tails = 1 - p.topk(K).values.sum(-1)
    assert (tails < 1e-7).any() and (tails > 1e-7).any()  # both sides of the bound


@pytest.mark.parametrize("name", ["sampled", "full forward", "topk tail jsd"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_counts(name, aggregation, given):
    """0 with a zero gradient; the fork's means over sequences are NaN."""
    hidden = given.student.clone().requires_grad_()
    given.chosen = torch.zeros(B)
    loss, _ = from_states(given, CONFIGS[name], aggregation, hidden)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()


FULL = {"full_logit_distillation": True}
ERRORS = [
    (settings(is_clip=2.0), "old_log_probs must be given with is_clip"),
    (settings(), "student_all_log_probs and teacher_all_log_probs must be"),
    (settings(distillation_topk=3), "student_topk_log_probs and teacher_topk_log_probs must be"),
    ({"full_logit_distillation": False, "alpha": 0.0}, r"alpha must be 1\.0 without full_logit_distillation, got 0"),
    ({"full_logits": True, "alpha": 0.0}, "self_distillation_config must have full_logit_distillation, got"),
    (FULL, "self_distillation_config must have alpha, got"),
    ({**FULL, "alpha": 0.0, "distillation_topk": 3}, "self_distillation_config must have distillation_add_tail, got"),
]


def test_errors(given):
    values = torch.zeros(B, T)
    for config, message in ERRORS:
        with pytest.raises(ValueError, match=message):
            sdpo_fork.compute_self_distillation_loss(values, values, given.mask, config)
    with pytest.raises(ValueError, match="loss_agg_mode must be one of"):
        sdpo_fork.compute_self_distillation_loss(values, values, given.mask, CONFIGS["sampled"], loss_agg_mode="mean")
    with pytest.raises(ValueError, match="self_distillation_loss: old_log_probs must be given"):
        sdpo_fork.self_distillation_loss(given.student, given.teacher, given.ids, given.mask, settings(is_clip=2.0))


def test_without_verl(monkeypatch):
    for name in ("verl", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"github\.com/lasgroup/SDPO"):
        sdpo_fork.patch_sdpo_fork()


def test_patched_fork(monkeypatch):
    """The fork is on no package index: modules with its names stand in for it."""

    def original(*arguments):
        raise AssertionError

    original.__signature__ = inspect.signature(sdpo_fork.compute_self_distillation_loss)
    modules = [ModuleType(name) for name in ("verl.trainer.ppo.core_algos", "verl.workers.actor.dp_actor")]
    for module in modules:
        module.compute_self_distillation_loss = original
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with sdpo_fork.patch_sdpo_fork():
        for module in modules:
            assert module.compute_self_distillation_loss is sdpo_fork.compute_self_distillation_loss
    assert all(module.compute_self_distillation_loss is original for module in modules)

    def other(student_log_probs, teacher_log_probs, ref_all_log_probs):
        raise AssertionError

    modules[1].compute_self_distillation_loss = other
    with pytest.raises(ImportError, match=r"dp_actor\.compute_.*\(.*, ref_all_log_probs\), not"):
        sdpo_fork.patch_sdpo_fork()
    assert modules[0].compute_self_distillation_loss is original
    assert modules[1].compute_self_distillation_loss is other
    del modules[0].compute_self_distillation_loss
    with pytest.raises(ImportError, match="has no compute_self_distillation_loss"):
        sdpo_fork.patch_sdpo_fork()
