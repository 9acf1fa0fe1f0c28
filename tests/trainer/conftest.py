"""A tiny model, a tokenizer whose tokens are words, and interactions of random words."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastsdpo import Interaction
from fastsdpo.trainer import SDPOConfig, SDPOTrainer
from tests.words import CHAT, SHAPE, word_tokenizer

WORDS = [f"w{number}" for number in range(60)]
TEMPLATE = " note {o}"


def make_tokenizer():
    return word_tokenizer(["note", *WORDS])


def make_clock_tokenizer():
    """Its template says what day it is: w1 to w31."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<system> w{{ strftime_now('%-d') }} <end> " + CHAT
    return tokenizer


def make_model(*, seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": 68, "max_position_embeddings": 512, "tie_word_embeddings": True, **SHAPE}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).to(dtype)


def make_interactions(conversations=6, *, turns=2, seed=0):
    """Interactions of conversations whose messages have 2 to 9 random words."""
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))

    interactions = []
    for c in range(conversations):
        history = []
        for t in range(turns):
            history = [*history, {"role": "user", "content": text()}]
            answer, followup = text(), text()
            interactions.append(Interaction(history, answer, followup, f"c{c}:{t}", f"c{c}"))
            history = [*history, {"role": "assistant", "content": answer}]
    return interactions


def write_rows(path, interactions):
    """A file as `fastsdpo prepare` writes it."""
    path.write_text("".join(json.dumps(row(item)) + "\n" for item in interactions))


def row(item):
    return {
        "prompt": item.prompt,
        "completion": {"role": "assistant", "content": item.completion},
        "user_response": {"role": "user", "content": item.followup},
        "id": item.id,
        "conversation_id": item.conversation_id,
    }


def make_config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "template": TEMPLATE,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "teacher_check": 0,
        "seed": 1,
    }
    return SDPOConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def interactions():
    return make_interactions()


def make_trainer(
    folder,
    *,
    model=None,
    interactions=None,
    eval_dataset=None,
    peft_config=None,
    callbacks=None,
    tokenizer=None,
    optimizers=(None, None),
    **changes,
):
    return SDPOTrainer(
        model=make_model() if model is None else model,
        args=make_config(folder, **changes),
        train_dataset=make_interactions() if interactions is None else interactions,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def weights_of(trainer):
    """The trained weights, copied."""
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.fixture(scope="session")
def lab():
    """The helpers above, for the tests of this folder."""
    return SimpleNamespace(
        make_tokenizer=make_tokenizer,
        make_clock_tokenizer=make_clock_tokenizer,
        make_model=make_model,
        make_interactions=make_interactions,
        write_rows=write_rows,
        make_config=make_config,
        make_trainer=make_trainer,
        weights_of=weights_of,
        largest_difference=largest_difference,
        WORDS=WORDS,
        TEMPLATE=TEMPLATE,
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """At these sizes a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
