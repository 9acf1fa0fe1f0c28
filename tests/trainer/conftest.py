"""A tiny model, a tokenizer whose tokens are words, and interactions of random words."""

import datetime
import json
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

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


def make_conversations(count):
    """Interactions of three turns each, in which a follow-up is the next turn's question, as in a log."""
    draw, found = random.Random(9), []
    for c in range(count):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(7)]
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        for t in range(3):
            names = f"c{c}:{t}", f"c{c}"
            found.append(Interaction(messages[: 2 * t + 1], texts[2 * t + 1], texts[2 * t + 2], *names))
    return found


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


def save(folder, **changes):
    """The tiny model, with other shapes where they are given, and its tokenizer."""
    make_model(**changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_place(folder, interactions=None, held_out=None):
    """``model/`` and the files that `fastsdpo train` looks for: 12 interactions, and 4 that are held out."""
    save(folder / "model")
    write_rows(folder / "data.jsonl", make_interactions() if interactions is None else interactions)
    write_rows(folder / "data.eval.jsonl", make_interactions(2, seed=9) if held_out is None else held_out)
    return folder


def command(place, output, *more, model="model", data="data.jsonl"):
    """Arguments of `fastsdpo train`: an epoch in steps of 4, where ``more`` does not say otherwise."""
    files = [str(place / data), "--model", str(place / model), "-o", str(output), "--template", TEMPLATE]
    settings = (
        "--cpu --batch-size 4 --epochs 1 --logging-steps 1 --learning-rate 1e-2 "
        "--set save_strategy=no --set dataloader_pin_memory=false"
    )
    return [*files, *settings.split(), *more]


def report_of(output):
    return json.loads((output / "report.json").read_text())


def clock(day):
    """In the place of `datetime.datetime`: it is a day of January."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 1, day)

    return Clock


class Overflow(torch.autograd.Function):
    """The identity, with a gradient that overflows."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class StopAt(TrainerCallback):
    """Ends training after a step, as a signal does; the schedule is still that of the whole run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 1}
    settings |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}
    settings |= {"template": TEMPLATE, "per_device_train_batch_size": 4, "save_strategy": "no", "teacher_check": 0}
    return SDPOConfig(**{**settings, "dataloader_pin_memory": False, **changes})


def make_trainer(folder, *, model=None, interactions=None, tokenizer=None, **given):
    """``given``: other arguments of `SDPOTrainer`, and changes of `make_config`."""
    names = given.keys() & {"eval_dataset", "peft_config", "callbacks", "optimizers"}
    own = {name: given.pop(name) for name in names}
    own["processing_class"] = make_tokenizer() if tokenizer is None else tokenizer
    interactions = make_interactions() if interactions is None else interactions
    return SDPOTrainer(make_model() if model is None else model, make_config(folder, **given), interactions, **own)


def weights_of(trainer):
    """The trained weights, copied."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def gradients_of(trainer, batches=None):
    """Loss and gradients of a step over micro-batches, lists of places in the training set; or over all of it."""
    items = [[trainer.train_dataset[i] for i in batch] for batch in batches or [range(len(trainer.train_dataset))]]
    total = torch.tensor(sum(trainer.learner.count(batch) for batch in items))
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.create_optimizer()
    loss = sum(trainer.training_step(trainer.model, {"interactions": batch}, total) for batch in items)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    return float(loss), found


def assert_close(found, wanted, relative):
    """Of tensors by name, each relative to its largest entry."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < relative, f"{name}: {float(error):.2e}"


def assert_same_logs(pairs):
    """Of one process and of two, but for times and for what several processes alone have."""
    for left, right in pairs:
        assert right.pop("sdpo/imbalance", right.pop("eval_sdpo/imbalance", 1)) >= 1
        assert left.keys() == right.keys()
        for key in left:
            if not any(word in key for word in ("per_second", "time", "data_wait", "peak_memory")):
                assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-5), key


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.fixture(scope="session")
def lab():
    """The helpers above, for the tests of this folder."""
    from tests.trainer import conftest

    return conftest


@pytest.fixture(autouse=True)
def _one_thread():
    """At these sizes a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
