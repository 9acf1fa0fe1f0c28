"""A tiny model, a tokenizer whose tokens are words, an online trainer, and an endpoint that fails."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastsdpo.online import ConstantUser, OnlineSDPOConfig, OnlineSDPOTrainer
from tests.words import SHAPE, word_tokenizer

WORDS = [f"w{number}" for number in range(40)]


def make_tokenizer():
    return word_tokenizer(["note", *WORDS])


def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=47, max_position_embeddings=256, tie_word_embeddings=True, **SHAPE))


def make_trainer(folder, *, user=None, callbacks=None, peft_config=None, **changes):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "template": " note {o}",
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
        "max_new_tokens": 12,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "max_steps": 4,
    }
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(24)]
    return OnlineSDPOTrainer(
        make_model(),
        OnlineSDPOConfig(**{**settings, **changes}),
        ConstantUser("w3 w4") if user is None else user,
        prompts,
        prompts[:3],
        make_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


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

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            status, reply = (
                200,
                {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Shorter, please."}}]},
            )
            data = json.dumps(reply).encode()
            if "status 500" in text:
                status, data = 500, b"{}"
            if "malformed" in text:
                data = b'{"choices": ['
            if "no choices" in text:
                data = b'{"choices": []}'
            if "empty" in text:
                data = data.replace(b"Shorter, please.", b"  ")
            if "slow" in text:
                done.wait(5)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have gone
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    done = threading.Event()
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    done.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def vllm():
    """Answers every prompt with the tokens 10, 11, 1 (the end); requests are kept in ``asked``."""
    state = SimpleNamespace(asked=[], spoil=lambda choices: choices, models=["base"], refuse=None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/get_world_size":
                return self.reply({"world_size": 2})
            return self.reply({"object": "list", "data": [{"id": name} for name in state.models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            state.asked.append((self.path, body))
            if state.refuse is not None:
                return self.reply({"detail": state.refuse}, 422)
            if not self.path.endswith("/completions"):
                return self.reply("done")
            choices = [
                {
                    "index": index,
                    "text": "",
                    "finish_reason": "stop",
                    "token_ids": [10, 11, 1],
                    "logprobs": {"token_logprobs": [-1.0, -2.0, -0.5], "tokens": ["a", "b", "c"]},
                }
                for index, _ in enumerate(body["prompt"])
            ]
            return self.reply(
                {
                    "id": "x",
                    "object": "text_completion",
                    "created": 0,
                    "model": "m",
                    "choices": state.spoil(choices)[::-1],
                }
            )

        def reply(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{running.server_port}/v1"
    yield state
    running.shutdown()
    running.server_close()
