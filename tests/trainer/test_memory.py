"""`estimate_memory` against peaks that were walked operator by operator, and measured here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastsdpo.trainer import SDPOConfig
from fastsdpo.trainer.memory import estimate_memory, memory_text

GPU = torch.device("cuda")


def config(**settings):
    return SDPOConfig(output_dir="unused", use_cpu=True, **settings)


@pytest.fixture(scope="module")
def qwen3_8b():
    """Its shape in bfloat16, without memory."""
    with torch.device("meta"):
        return Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=4096,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                intermediate_size=12288,
                vocab_size=151936,
                tie_word_embeddings=False,
            )
        ).to(torch.bfloat16)


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.fixture(scope="module")
def qwen3_8b_lora(qwen3_8b):
    frozen = with_lora(qwen3_8b)
    yield frozen
    frozen.unload().requires_grad_(True)


# Peak of everything that a step holds: the step's own operators on meta tensors of this shape, two
# passes with the gradients and states of those before, each storage counted while it is alive.
@pytest.mark.parametrize(
    ("student", "responses", "settings", "walked"),
    [
        (8400, 4800, {"gradient_checkpointing": True}, 139),
        (16800, 9600, {"gradient_checkpointing": True}, 142),
        (8400, 4800, {}, 202),
    ],
)
def test_walked_peaks(qwen3_8b, student, responses, settings, walked):
    found = estimate_memory(qwen3_8b, config(**settings), student, responses, device=GPU)
    assert found.total / 1e9 == pytest.approx(walked, rel=0.1)


def test_what_changes_the_estimate(qwen3_8b, monkeypatch):
    """Optimizers, teachers, processes and shards, in bytes per weight."""
    count = sum(p.numel() for p in qwen3_8b.parameters())

    def parts(**settings):
        return estimate_memory(qwen3_8b, config(gradient_checkpointing=True, **settings), 8400, 4800, device=GPU)

    for settings, states in (
        ({}, 12),
        ({"weight_update": "stochastic_rounding"}, 8),
        ({"weight_update": "plain"}, 4),
        ({"optim": "adamw_torch_8bit"}, 2),
        ({"optim": "adamw_bnb_8bit"}, 2),
        ({"optim": "sgd"}, 0),
    ):
        assert parts(**settings).optimizer == states * count, settings
    assert parts(teacher="ema").teacher == 6 * count
    assert parts(teacher="frozen").teacher == 2 * count
    assert parts(optim="adamw_torch_8bit").total < 60e9, "8-bit states and checkpointing: one GPU of 80 GB"
    one = parts()
    monkeypatch.setattr(SDPOConfig, "world_size", property(lambda self: 8))
    assert parts().gradients == 2 * one.gradients, "and DDP's buckets"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = parts()
    assert sharded.optimizer == one.optimizer // 8 and sharded.gradients == one.gradients // 8
    assert one.total / 8 < sharded.total < one.total / 4


def test_the_text_names_what_lowers_it(qwen3_8b):
    text = memory_text(qwen3_8b, config(), 8400, 4800)
    assert text.startswith("memory per process, an estimate: 199.")
    assert "smaller with: --gradient-checkpointing 1" in text
    assert "weight_update=stochastic_rounding" in text and "optim=adamw_torch_8bit" in text
    least = config(gradient_checkpointing=True, optim="adamw_torch_8bit")
    assert "checkpointing" not in memory_text(qwen3_8b, least, 8400, 4800).partition("smaller")[2]


@pytest.mark.parametrize(
    ("student", "responses", "settings", "walked"),
    [
        (8400, 4800, {"gradient_checkpointing": True}, 22.9),
        (16800, 9600, {}, 199),
    ],
)
def test_walked_peaks_with_lora(qwen3_8b_lora, student, responses, settings, walked):
    found = estimate_memory(qwen3_8b_lora, config(**settings), student, responses, device=GPU)
    assert found.total / 1e9 == pytest.approx(walked, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
def test_measured_peaks(tmp_path):
    runs = {
        "checkpointing": {"gradient_checkpointing": True},
        "LoRA": {"lora": True},
        "bfloat16": {"kind": "Qwen3", "dtype": "bfloat16", "teacher": "ema"},
    }
    worker = Path(__file__).parent / "memory_worker.py"
    # glibc returns what is freed, instead of keeping it for tensors of other sizes.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(runs)
    for line in lines:
        name, said, measured, parts = json.loads(line)
        assert said / measured == pytest.approx(1, abs=0.25), (name, said, measured, parts)
