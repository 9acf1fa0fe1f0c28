"""Runs of `fastsdpo train` started by a launcher, and the comparison of each with one plain process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.forked import free_port

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "examples" / "accelerate"
STEPS = 4
TORCHRUN = ["torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
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
STEPS_SAVED = ["--set", "save_strategy=steps", "--save-steps", "2"]
BEST = [*STEPS_SAVED, "--save-steps", "1", "--eval-steps", "1", "--set", "load_best_model_at_end=true"]
BEST += ["--set", "greater_is_better=true"]
ACCUMULATED = ["--batch-size", "1", "--global-batch-size", "4", "--set", "teacher_check=4"]
ONLY_FSDP2 = ("resumed_async", "each_pass")
VARIANTS = {
    "tied": Variant([]),
    "resumed": Variant(STEPS_SAVED),
    # The same data, read while it is trained on, in another order.
    "resumed_stream": Variant([*STEPS_SAVED, "--stream", "--shuffle-buffer", "6"]),
    "resumed_ema": Variant([*STEPS_SAVED, "--teacher", "ema"]),
    "resumed_async": Variant([*STEPS_SAVED, "--teacher", "ema", "--set", "async_checkpoints=true"]),
    # Of the first step, with the moving average of then.
    "best_ema": Variant([*BEST, "--teacher", "ema", "--ema-rate", "0.5"]),
    "reference": Variant(["--teacher", "frozen", "--reference-kl", "0.1"], "untied"),
    "trust_region": Variant(["--teacher", "trust_region"], "untied"),
    "lora_ema": Variant(["--lora", "4", "--teacher", "ema", "--ema-rate", "0.2"], "untied"),
    "untied": Variant([], "untied"),
    "checkpointing": Variant(["--gradient-checkpointing", "--max-tokens-per-pack", "60"]),
    "lora": Variant(["--lora", "4"]),
    "lora_frozen": Variant(["--lora", "4", "--teacher", "frozen", "--guidance", "2"], "untied"),
    "unshared": Variant(["--sharing", "off"], "untied"),
    # The rounding of each shard draws its own numbers.
    "stochastic": Variant([*HALF, "--set", "weight_update=stochastic_rounding"], tolerance=2e-2),
    "master": Variant(HALF, "untied", tolerance=2e-2),
    # Four micro-batches of one process, two of each of two.
    "accumulated": Variant(ACCUMULATED, "untied"),
    "each_pass": Variant([*ACCUMULATED, "--set", "sync_each_pass=true"], "untied"),
}


def make_place(folder, lab):
    """Models, 15 interactions and 3 held-out ones in the file that `fastsdpo train` looks for."""
    for name in ("tied", "untied"):
        lab.save(folder / name, tie_word_embeddings=name == "tied")
    lab.write_rows(folder / "data.jsonl", lab.make_interactions(8)[:15])
    lab.write_rows(folder / "data.eval.jsonl", lab.make_interactions(2, seed=9)[:3])
    return folder


def arguments(place, output, variant, processes=1, *, cpu=True):
    """Of `fastsdpo train`; DeepSpeed finds the CPU by itself (DS_ACCELERATOR)."""
    fixed = {
        "model": place / variant.model,
        "output": output,
        "template": " note {o}",
        "batch-size": 4 // processes,
        "max-steps": STEPS,
        "logging-steps": 1,
        "schedule": "constant",
        "warmup": 0,
        "learning-rate": 0.5,
        "token-cache": f"{output}-tokens",  # which the processes of a run race to make
    }
    if "--stream" in variant.arguments:
        del fixed["token-cache"]
    settings = ("optim=sgd", "save_strategy=no", "teacher_check=0", "dataloader_pin_memory=false")
    return [
        str(place / "data.jsonl"),
        *(text for name, value in fixed.items() for text in (f"--{name}", str(value))),
        *(text for setting in settings for text in ("--set", setting)),
        *(["--cpu"] if cpu else []),
        *variant.arguments,
    ]


def runs(place, kind, chosen, processes=1, *, variants=VARIANTS, cpu=True):
    """JSON for launched_worker.py: the variants, each into ``<kind><processes>-<name>``."""
    found = []
    for name in chosen:
        run = arguments(place, place / f"{kind}{processes}-{name}", variants[name], processes, cpu=cpu)
        found += [[*run, "--max-steps", "2"], [*run, "--resume"]] if name.startswith("resumed") else [run]
    return json.dumps(found)


def names(*without):
    """Of the variants that a strategy has."""
    return [name for name in VARIANTS if name not in (*without, *ONLY_FSDP2)]


def documented():
    """The command lines of docs/distributed.md."""
    text = (ROOT / "docs" / "distributed.md").read_text("utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    blocks += re.findall(r"^ {4}((?:accelerate|fastsdpo|torchrun) .*)$", text, re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def slurm(folder):
    """Environment of a job on two nodes with one process each, and stand-ins for Slurm's commands in ``folder``."""
    commands = {"sbatch": 'bash "$@"', "scontrol": "echo 127.0.0.1"}
    commands["srun"] = 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!'
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "GPUS": "1",
        "PORT": str(free_port()),
        "CONFIG": str(CONFIGURATIONS / "ddp.yaml"),
        "OMP_NUM_THREADS": "1",
    }


def worker(kind):
    return [str(Path(__file__).parent / "launched_worker.py"), kind]


def torchrun(processes, *command, fails=False, stdin=None, **environment):
    """Output of ``torchrun --nproc-per-node processes command``, which has to end with 0; not where it ``fails``."""
    return _launch([*TORCHRUN, "--nproc-per-node", str(processes), *command], environment, fails, stdin)


def accelerate(configuration, processes, *command, **environment):
    """Output of ``accelerate launch`` with a file of examples/accelerate; its GPUs are ``processes`` CPU ones."""
    launch = ["accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / f"{configuration}.yaml")]
    # The files name the port of a machine of one's own.
    return _launch([*launch, "--num_processes", str(processes), "--main_process_port", "0", *command], environment)


def _launch(module, environment, fails=False, stdin=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    printed = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, env=environment, input=stdin, timeout=1500, **printed)
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def load(folder, base):
    """The saved model (with its adapter merged), as a user reloads it."""
    if not (folder / "model" / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    from peft import PeftModel

    plain = LlamaForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(plain, folder / "model").merge_and_unload()


def compare(place, run, name, lab, variants=VARIANTS):
    """Held-out and training losses, gradient norms and saved weights are those of one plain process."""
    variant = variants[name]
    base = place / variant.model
    folders = [place / f"plain1-{name}", place / run]
    want, got = (json.loads((folder / "report.json").read_text()) for folder in folders)
    for key in ("before", "after"):
        assert got[key]["eval_loss"] == pytest.approx(want[key]["eval_loss"], rel=10 * variant.tolerance), key
    assert got["before"]["eval_loss"] != pytest.approx(got["after"]["eval_loss"], rel=1e-3)
    steps = [[row for row in report["history"] if "loss" in row] for report in (want, got)]
    assert len(steps[0]) == len(steps[1]) == STEPS
    for left, right in zip(*steps):
        for key in ("loss", "grad_norm"):
            assert right[key] == pytest.approx(left[key], rel=10 * variant.tolerance), (key, left)
        assert "sdpo/imbalance" not in left and 1 <= right.get("sdpo/imbalance", 1) <= 4
    start, want, got = (
        model.state_dict() for model in (AutoModelForCausalLM.from_pretrained(base), *(load(f, base) for f in folders))
    )
    moved = lab.largest_difference(start, want)
    assert moved > 1e-3
    assert lab.largest_difference(want, got) < variant.tolerance * max(1.0, moved)
