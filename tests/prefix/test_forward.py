"""Shared passes against independent ones: log-probabilities and the gradient of every parameter."""

from __future__ import annotations

import copy

import pytest
import torch

from fastsdpo.prefix import head_parameters, shared_forward

MODELS = ["llama", "qwen3", "gemma3", "mistral", "qwen3_moe", "gpt2", "granite", "cohere"]


def compare(lab, model, items, tolerance, *, teacher=None, exact_zero_grad=(), **options):
    """Asserts equality; gradients relative to the largest of all, log-probabilities absolute."""
    weights = torch.linspace(0.2, 1.0, sum(len(i.completion_ids) for i in items))
    weights = weights.to(next(model.parameters()).dtype)
    want = lab.independent_logps(model, items)
    (want * weights).sum().backward()
    want_grads = lab.gradients(model)
    with torch.no_grad():
        want_teacher = lab.independent_logps(teacher or model, items, teacher=True)

    states = shared_forward(model, items, teacher_model=teacher, **options)
    head = head_parameters(model)
    got = lab.hidden_logps(states.student_hidden, states.target_ids, head)
    (got * weights).sum().backward()
    got_grads = lab.gradients(model)
    teacher_head = head_parameters(teacher or model)
    with torch.no_grad():
        got_teacher = lab.hidden_logps(states.teacher_hidden, states.target_ids, teacher_head)

    assert not states.teacher_hidden.requires_grad
    assert (got - want).abs().max() < tolerance
    assert (got_teacher - want_teacher).abs().max() < tolerance
    assert got_grads.keys() == want_grads.keys()
    scale = max(g.abs().max() for g in want_grads.values())
    for name, wanted in want_grads.items():
        assert (got_grads[name] - wanted).abs().max() < tolerance * scale, name
    return states


@pytest.mark.parametrize("sharing", ["conversation", "interaction", "off"])
@pytest.mark.parametrize("think", [False, True], ids=["chain", "think"])
@pytest.mark.parametrize("name", MODELS)
def test_float64(lab, name, think, sharing):
    items = lab.conversation(4, think=think) + lab.conversation(2, think=think, seed=1)
    compare(lab, lab.tiny_model(name), items, 1e-12, sharing=sharing)


@pytest.mark.parametrize("name", MODELS)
def test_float32(lab, name):
    items = lab.conversation(4, think=True)
    compare(lab, lab.tiny_model(name, torch.float32), items, 1e-5)
