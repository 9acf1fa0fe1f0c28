"""A tiny model, a tokenizer whose tokens are words, an online trainer, and an endpoint that fails."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastsdpo.online import ConstantUser, OnlineSDPOConfig, OnlineSDPOTrainer
from tests.servers import serving
from tests.words import SHAPE, word_tokenizer

WORDS = [f"w{number}" for number in range(40)]


def make_tokenizer():
    return word_tokenizer(["note", *WORDS])


def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=47, max_position_embeddings=256, tie_word_embeddings=True, **SHAPE))


def make_trainer(folder, *, user=None, callbacks=None, peft_config=None, **changes):
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True}
    settings |= {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_steps": 4, "max_new_tokens": 12}
    settings |= {"template": " note {o}", "dataloader_pin_memory": False, "save_strategy": "no"}
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(24)]
    user = ConstantUser("w3 w4") if user is None else user
    given = make_model(), OnlineSDPOConfig(**{**settings, **changes}), user, prompts, prompts[:3], make_tokenizer()
    return OnlineSDPOTrainer(*given, callbacks=callbacks, peft_config=peft_config)


@pytest.fixture
def lab():
    return SimpleNamespace(model=make_model, tokenizer=make_tokenizer, trainer=make_trainer)


@pytest.fixture
def saved(tmp_path):
    """The tiny model and its tokenizer in a folder."""
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server():
    """An endpoint that fails as told by the last message: status, malformed JSON, empty, slow."""
    done = threading.Event()

    def answer(path, body):
        text = json.loads(body)["messages"][-1]["content"]
        said = "  " if "empty" in text else "Shorter, please."
        if "status 500" in text:
            return 500, {}
        if "malformed" in text:
            return 200, b'{"choices": ['
        if "no choices" in text:
            return 200, {"choices": []}
        if "slow" in text:
            done.wait(5)
        return 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}

    with serving(answer) as url:
        yield f"{url}/v1"
        done.set()


@pytest.fixture
def vllm():
    """Answers every prompt with the tokens 10, 11, 1 (the end); requests are kept in ``asked``."""
    state = SimpleNamespace(asked=[], spoil=lambda choices: choices, models=["base"], refuse=None)
    logprobs = {"token_logprobs": [-1.0, -2.0, -0.5], "tokens": ["a", "b", "c"]}

    def answer(path, body):
        if path == "/get_world_size":
            return 200, {"world_size": 2}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name} for name in state.models]}
        body = json.loads(body or "null")
        state.asked.append((path, body))
        if state.refuse is not None:
            return 422, {"detail": state.refuse}
        if not path.endswith("/completions"):
            return 200, "done"
        one = {"text": "", "finish_reason": "stop", "token_ids": [10, 11, 1]}
        choices = [{**one, "index": index, "logprobs": dict(logprobs)} for index, _ in enumerate(body["prompt"])]
        said = {"id": "x", "object": "text_completion", "created": 0, "model": "m"}
        return 200, {**said, "choices": state.spoil(choices)[::-1]}

    with serving(answer) as url:
        state.url = f"{url}/v1"
        yield state
