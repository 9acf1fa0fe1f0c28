"""`fastsdpo train` started by `torchrun`: DDP and FSDP2 train and save what one process does.

Under FSDP2 the code that shards, gathers, saves and loads is accelerate's own (see launched_worker.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

STEPS = 4
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    # As `accelerate launch` has it: the first process alone loads the weights.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


class Variant(NamedTuple):
    """Arguments beside those of all runs; how far losses and weights may be from one process's."""

    arguments: list[str]
    model: str = "tied"
    tolerance: float = 1e-5


HALF = ["--dtype", "bfloat16", "--set", "optim=adamw_torch", "--learning-rate", "1e-3"]
VARIANTS = {
    "tied": Variant([]),
    "resumed": Variant(["--set", "save_strategy=steps", "--save-steps", "2"]),
    "untied": Variant([], "untied"),
    "checkpointing": Variant(["--gradient-checkpointing", "--max-tokens-per-pack", "60"]),
    "lora": Variant(["--lora", "4"]),
    "lora_frozen": Variant(["--lora", "4", "--teacher", "frozen", "--guidance", "2"], "untied"),
    "ema_resumed": Variant(["--teacher", "ema", "--set", "save_strategy=steps", "--save-steps", "2"], "untied"),
    "frozen": Variant(["--teacher", "frozen", "--guidance", "2"], "untied"),
    "trust_region": Variant(["--teacher", "trust_region", "--reference-kl", "0.1"], "untied"),
    "lora_ema": Variant(["--lora", "4", "--teacher", "ema", "--ema-rate", "0.2"], "untied"),
    # The rounding of each shard draws its own numbers.
    "stochastic": Variant([*HALF, "--set", "weight_update=stochastic_rounding"], tolerance=2e-2),
    "master": Variant(HALF, "untied", tolerance=2e-2),
}
FOUR = ("untied", "lora", "ema_resumed", "trust_region")


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    """Models, 15 interactions and 3 held-out ones in the file that `fastsdpo train` looks for."""
    folder = tmp_path_factory.mktemp("launched")
    for name in ("tied", "untied"):
        lab.make_model(tie_word_embeddings=name == "tied").save_pretrained(folder / name)
        lab.make_tokenizer().save_pretrained(folder / name)
    lab.write_rows(folder / "data.jsonl", lab.make_interactions(8)[:15])
    lab.write_rows(folder / "data.eval.jsonl", lab.make_interactions(2, seed=9)[:3])
    return folder


def arguments(place, output, variant, processes):
    return [
        str(place / "data.jsonl"),
        "--model",
        str(place / variant.model),
        "-o",
        str(output),
        "--cpu",
        "--template",
        " note {o}",
        "--batch-size",
        str(4 // processes),
        "--max-steps",
        str(STEPS),
        "--logging-steps",
        "1",
        "--schedule",
        "constant",
        "--warmup",
        "0",
        "--set",
        "optim=sgd",
        "--learning-rate",
        "0.5",
        "--set",
        "save_strategy=no",
        "--set",
        "teacher_check=0",
        "--set",
        "dataloader_pin_memory=false",
        "--token-cache",
        f"{output}-tokens",  # which the processes of a run race to make
        *variant.arguments,
    ]


def torchrun(processes, *command, **environment):
    """Output of ``torchrun --nproc-per-node processes command``, which has to end with 0."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            *command,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def train(place, kind, processes, names):
    """Trains the variants ``names``, each into ``<kind><processes>-<name>``, in one launch."""
    runs = []
    for name in names:
        run = arguments(place, place / f"{kind}{processes}-{name}", VARIANTS[name], processes)
        runs += [[*run, "--max-steps", "2"], [*run, "--resume"]] if name.endswith("resumed") else [run]
    environment = FSDP2 if kind == "fsdp2" else {}
    worker = Path(__file__).parent / "launched_worker.py"
    return torchrun(processes, str(worker), kind, json.dumps(runs), **environment)


@pytest.fixture(scope="module")
def one(place):
    train(place, "ddp", 1, VARIANTS)


@pytest.fixture(scope="module")
def two(place):
    return train(place, "fsdp2", 2, VARIANTS)


@pytest.fixture(scope="module")
def four(place):
    train(place, "fsdp2", 4, FOUR)


def load(folder, base):
    """The saved model (with its adapter merged), as a user reloads it."""
    if not (folder / "model" / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    from peft import PeftModel

    plain = LlamaForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(plain, folder / "model").merge_and_unload()


def compare(place, run, name, lab):
    """Held-out and training losses, gradient norms and saved weights are those of one process."""
    variant = VARIANTS[name]
    base = place / variant.model
    folders = [place / f"ddp1-{name}", place / run]
    want, got = (json.loads((folder / "report.json").read_text()) for folder in folders)
    for key in ("before", "after"):
        assert got[key]["eval_loss"] == pytest.approx(want[key]["eval_loss"], rel=10 * variant.tolerance), key
    assert got["before"]["eval_loss"] != pytest.approx(got["after"]["eval_loss"], rel=1e-3)
    steps = [[row for row in report["history"] if "loss" in row] for report in (want, got)]
    assert len(steps[0]) == len(steps[1]) == STEPS
    for left, right in zip(*steps):
        for key in ("loss", "grad_norm"):
            assert right[key] == pytest.approx(left[key], rel=10 * variant.tolerance), (key, left)
        assert "sdpo/imbalance" not in left and 1 <= right["sdpo/imbalance"] <= 4
    start, want, got = (
        model.state_dict() for model in (AutoModelForCausalLM.from_pretrained(base), *(load(f, base) for f in folders))
    )
    moved = lab.largest_difference(start, want)
    assert moved > 1e-3
    assert lab.largest_difference(want, got) < variant.tolerance * max(1.0, moved)


def test_ddp_with_held_out_data(place, one, lab):
    """The very command that a user starts; the file beside the data is evaluated before training."""
    output = place / "ddp2-untied"
    printed = torchrun(2, "-m", "fastsdpo.train", *arguments(place, output, VARIANTS["untied"], 2))
    assert "held-out loss before training: " in printed
    compare(place, "ddp2-untied", "untied", lab)


@pytest.mark.parametrize("name", VARIANTS)
def test_fsdp2(place, one, two, lab, name):
    compare(place, f"fsdp2{2}-{name}", name, lab)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_fsdp2_with_four_processes(place, one, four, lab, name):
    compare(place, f"fsdp2{4}-{name}", name, lab)
