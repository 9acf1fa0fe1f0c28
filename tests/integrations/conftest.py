"""A tiny model with an offline tokenizer, as a folder: what TRL's trainers load by name."""

from __future__ import annotations

import os

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# TRL warns of its experimental modules when they are first imported.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

WORDS = [f"w{number}" for number in range(57)]
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<system>", "<unk>"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer():
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    tokenizer.chat_template = CHAT
    return tokenizer


def save_model(folder, config, model_of, seed=0):
    torch.manual_seed(seed)
    model = model_of(
        config(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=config is LlamaConfig,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.2,  # far from uniform
        )
    )
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_models(*names):
    """In the working directory, folders with the names that pages give their models; no two models are alike."""
    for seed, name in enumerate(names):
        save_model(name, Qwen3Config, Qwen3ForCausalLM, seed)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """Tied embeddings."""
    return save_model(tmp_path_factory.mktemp("llama"), LlamaConfig, LlamaForCausalLM)


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory):
    """A head of its own, biases in the attention."""
    return save_model(tmp_path_factory.mktemp("qwen2"), Qwen2Config, Qwen2ForCausalLM)
