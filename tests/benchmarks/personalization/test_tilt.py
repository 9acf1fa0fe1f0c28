"""Greedy answers of a tilted model: at 0 those of the prompt, at 1 those of the prompt with a follow-up."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from benchmarks.personalization.tilt import tilted_answers  # noqa: E402
from fastsdpo.online.sampling import generate  # noqa: E402

END = [3]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=3,
        bos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


# Questions of different lengths (the prompts are padded), and the same with a follow-up.
PROMPTS = [
    [[5, 6, 7], [5, 6, 7, 9, 9, 10]],
    [[8, 11, 12, 13, 14], [8, 11, 12, 13, 14, 9]],
    [[20], [20, 21, 22]],
]


def answers(model, tilt, *, subtracted=0, told=(1,), tokens=12):
    groups = [[group[0], group[subtracted], *(group[i] for i in told)] for group in PROMPTS]
    return tilted_answers(model, groups, tilt, END, tokens)


@pytest.mark.parametrize(("tilt", "which"), [(0.0, 0), (1.0, 1)])
def test_the_ends_are_the_models_own_answers(model, tilt, which):
    found = answers(model, tilt)
    alone = [group[which] for group in PROMPTS]
    samples = generate(model, alone, max_new_tokens=12, temperature=0.0, end_ids=END)
    assert found == [sample.ids for sample in samples]
    assert len({tuple(answer) for answer in found}) == 3


def test_follow_ups_are_averaged(model):
    assert answers(model, 2.0, told=(1, 1)) == answers(model, 2.0)


def test_a_follow_up_that_says_what_the_neutral_one_does_changes_nothing(model):
    assert answers(model, 2.0, subtracted=1) == answers(model, 0.0)
