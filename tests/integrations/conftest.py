"""A tiny model with an offline tokenizer, as a folder: what TRL's trainers load by name."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.words import SHAPE, SPECIAL, word_tokenizer

# TRL warns of its experimental modules when they are first imported.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

WORDS = [f"w{number}" for number in range(57)]
# Of TRL's trainers. A step of SGD is in proportion to the gradient: rounding stays rounding.
RUN = {"learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "gradient_checkpointing": False}
RUN |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False}
RUN |= {"seed": 3, "disable_tqdm": True}


def make_tokenizer():
    return word_tokenizer(WORDS, padding_side="left")


def save_model(folder, config, model_of, seed=0):
    torch.manual_seed(seed)
    shape = {"max_position_embeddings": 256, "tie_word_embeddings": config is LlamaConfig, **SHAPE}
    model = model_of(config(vocab_size=len(SPECIAL) + len(WORDS), **shape))
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
