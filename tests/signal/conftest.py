"""A tiny chat model with random weights and a byte-level tokenizer, in memory and saved."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.words import SHAPE

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE over English: any other character takes one token per byte."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|start|>", "<|end|>"], **options)
    inner.train_from_iterator(["the answer to the question is short and the user is happy"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    shape = {**SHAPE, **ends, "initializer_range": 0.5}  # so that contexts matter
    rows = len(tokenizer) + 7  # a padded vocabulary, as models have it
    config = LlamaConfig(vocab_size=rows, max_position_embeddings=4096, tie_word_embeddings=False, **shape)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model, tokenizer):
    """The model as `save_pretrained` leaves it."""
    path = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
