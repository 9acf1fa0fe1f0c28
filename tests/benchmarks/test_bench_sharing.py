"""The steps that bench_sharing times compute one loss and one gradient; on a tiny model."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import bench_sharing
from fastsdpo.data.tokenization import TokenizedInteraction

# TRL warns of its own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    ).train()


@pytest.fixture(scope="module")
def items():
    """Five interactions of one conversation: a batch of four and one of one."""
    draw = torch.Generator().manual_seed(1)

    def tokens(count):
        return torch.randint(3, 97, (count,), generator=draw).tolist()

    found, history = [], tokens(5)
    for number in range(5):
        answer, followup = tokens(4 + number), tokens(3)
        found.append(TokenizedInteraction(history, [*history, *followup], answer, str(number), "c"))
        history = [*history, *answer, *followup]
    return found


def gradient(model, backward):
    loss = backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return loss, found


@pytest.mark.parametrize("variant", bench_sharing.VARIANTS)
def test_every_variant_is_the_official_step(variant, model, items, monkeypatch):
    if variant.startswith("trl"):
        pytest.importorskip("trl")
        words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="a"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="a"
        )
        monkeypatch.setattr(bench_sharing, "load_tokenizer", lambda: tokenizer)
    # TRL's SDPO has no option to leave out the first tokens.
    ignored = 0 if variant == "trl-sdpo" else bench_sharing.IGNORED
    want = gradient(model, lambda: bench_sharing.official_backward(model, items, ignored=ignored))
    got = gradient(model, lambda: bench_sharing.BACKWARD[variant](model, items))
    assert got[0] == pytest.approx(want[0], rel=1e-4)
    assert float((got[1] - want[1]).norm() / want[1].norm()) < 1e-4


def test_sizes(items):
    sizes = bench_sharing.sizes(items)
    assert sizes["response"] == sum(range(4, 9))
    assert sum(batch[0] for batch in sizes["batches"]) == 5
    found = sum(n * (p + t + 2 * y) for n, p, t, y in sizes["batches"])
    assert found == bench_sharing.padded_tokens(items)
