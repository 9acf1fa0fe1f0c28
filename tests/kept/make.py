"""Writes what an older version wrote, for `test_kept`: `python tests/kept/make.py FOLDER` with that version installed.

The files beside this one are of commit 8ed632b. They are not made anew when the code changes: that they still work is
what the test is about.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import fastsdpo
from fastsdpo.data.prepare import prepare
from fastsdpo.online import ConstantUser, OnlineSDPOConfig, OnlineSDPOTrainer
from fastsdpo.trainer import SDPOConfig, SDPOTrainer

WORDS = [f"w{number}" for number in range(20)]
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SETTINGS = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "template": "{o}"}
SETTINGS |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}
SETTINGS |= {"per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
SETTINGS |= {"teacher": "ema", "ema_rate": 0.3, "reference_kl": 0.1, "teacher_check": 0}
CONVERSATIONS = [
    {
        "id": f"c{c}",
        "messages": [
            {"role": role, "content": " ".join(WORDS[(3 * c + 2 * t + k) % 20] for k in range(3))}
            for t, role in enumerate(["user", "assistant", "user", "assistant", "user"])
        ],
    }
    for c in range(4)
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 25, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**shape, **tokens, max_position_embeddings=128, initializer_range=0.4))


def offline(folder: Path, data: Path, **changes) -> SDPOTrainer:
    args = SDPOConfig(output_dir=str(folder), **{**SETTINGS, **changes})
    return SDPOTrainer(make_model(), args, str(data), processing_class=make_tokenizer())


def online(folder: Path, **changes) -> OnlineSDPOTrainer:
    settings = {**SETTINGS, "updates_per_batch": 3, "max_new_tokens": 6, **changes}
    prompts = [row["messages"][0]["content"] for row in CONVERSATIONS]
    args = OnlineSDPOConfig(output_dir=str(folder), **settings)
    return OnlineSDPOTrainer(make_model(), args, ConstantUser("w3 w4"), prompts, None, make_tokenizer())


def losses(trainer: SDPOTrainer | OnlineSDPOTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def signatures() -> dict[str, list[str]]:
    """Every public function and class, and the parameters that it takes."""
    from fastsdpo import online, signal, trainer

    found = {}
    for module in (fastsdpo, fastsdpo.data, fastsdpo.prefix, trainer, online, signal):
        for name in sorted(dir(module)):
            thing = getattr(module, name)
            if name.startswith("_") or inspect.ismodule(thing) or not callable(thing):
                continue
            try:
                parameters = list(inspect.signature(thing).parameters)
            except (TypeError, ValueError):
                parameters = []
            if name.endswith("Config"):  # transformers' own settings change with its version
                parameters = [p for p in parameters if p not in inspect.signature(TrainingArguments).parameters]
            found[f"{module.__name__}.{name}"] = parameters
    return found


def main(place: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data, raw = place / "interactions.jsonl", place / "conversations.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    prepare([str(raw)], str(data))
    expected = {}
    for name, trainer in (("offline", offline(place / "offline", data)), ("online", online(place / "online"))):
        trainer.train()
        expected[name] = losses(trainer)
        shutil.rmtree(place / name / "checkpoint-4")
    (place / "expected.json").write_text(json.dumps({"losses": expected, "signatures": signatures()}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
