"""The forecast of a step's memory: against peaks that are measured, a walk made apart from it, and by its parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from fastsdpo.data import TokenizedInteraction
from fastsdpo.train import main
from fastsdpo.trainer import SDPOConfig, optim
from fastsdpo.trainer.memory_walk import ModelShape, Processes, walk_step

CHECKPOINTED = {"gradient_checkpointing": True}
WIDE = {"hidden_size": 512, "vocab_size": 512}


def config(**settings):
    return SDPOConfig(**{"output_dir": "unused", "use_cpu": True, "optim": "adamw_torch", **settings})


def pack(interactions):
    """Student 350 tokens each, teacher 260 more, answers 200."""
    made = []
    for number in range(interactions):
        prompt = [3 + number] * 150
        made.append(TokenizedInteraction(prompt, prompt + [500 + number] * 60, [800 + number] * 200))
    return made


def qwen3(layers, hidden, vocabulary, *, lora=False, tied=False):
    """A model of Qwen3-8B's proportions in bfloat16."""
    adapter = None
    if lora:
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": max(1, hidden // 512), "head_dim": 128}
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden}
    shape = Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes, **heads)
    return ModelShape(shape, torch.bfloat16, adapter)


# The same step, walked apart from this package: two passes with the gradients and states of those before.
@pytest.mark.parametrize(
    ("interactions", "lora", "settings", "walked"),
    [
        (24, False, CHECKPOINTED, 139),
        pytest.param(48, False, CHECKPOINTED, 142, marks=pytest.mark.slow),
        pytest.param(24, False, {}, 202, marks=pytest.mark.slow),
        pytest.param(24, True, CHECKPOINTED, 22.9, marks=pytest.mark.slow),
        pytest.param(48, True, {}, 199, marks=pytest.mark.slow),
    ],
)
def test_an_8b(interactions, lora, settings, walked):
    packs = [pack(interactions)] * 2
    found = walk_step(qwen3(36, 4096, 151936, lora=lora), config(**settings), packs)
    assert found.peak / 1e9 == pytest.approx(walked, rel=0.02)
    assert sum(found.parts.values()) == found.peak


def test_what_the_parts_are(monkeypatch):
    """Optimizers, teachers and processes, in bytes per trained weight."""
    monkeypatch.setattr(optim, "PART", 2**18)  # as small a share of this model as it is of a large one
    shape = qwen3(2, 256, 4096)
    count = sum(p.numel() for p in shape.make().parameters())

    def bytes_of(part, processes=None, **settings):
        found = walk_step(shape, config(**CHECKPOINTED, **settings), [pack(4)], processes=processes)
        return found.parts[part] / count

    for settings, states in (
        ({}, 12),
        ({"weight_update": "stochastic_rounding"}, 8),
        ({"weight_update": "plain"}, 4),
        ({"optim": "adamw_torch_fused", "weight_update": "plain"}, 4),
        ({"optim": "adamw_torch_8bit"}, 2),
        ({"optim": "sgd"}, 0),
    ):
        assert bytes_of("optimizer", **settings) == pytest.approx(states, rel=0.03), settings
    assert bytes_of("teacher", teacher="ema") >= 4
    assert bytes_of("teacher", teacher="frozen") == pytest.approx(2, rel=0.01)
    assert bytes_of("buckets", Processes(4, "ddp")) == pytest.approx(2, rel=0.01)
    sharded = Processes(8, "fsdp")
    for part, whole in (("weights", 2), ("optimizer", 12)):
        assert bytes_of(part, sharded) == pytest.approx(whole / 8, rel=0.01), part
    # Trained weights are float32 in the shards where they are gathered in bfloat16.
    assert bytes_of("weights", sharded, bf16=True) == pytest.approx(4 / 8, rel=0.01)
    with pytest.raises(NotImplementedError, match="optim='stable_adamw'"):
        bytes_of("optimizer", optim="stable_adamw")


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
@pytest.mark.parametrize(
    "runs",
    [
        {"checkpointing": CHECKPOINTED},
        pytest.param(
            {
                "bfloat16": {"kind": "Qwen3", "dtype": "bfloat16", "teacher": "ema"},
                "plain": {},
                "LoRA": {"lora": True},
                "stochastic rounding": {"dtype": "bfloat16", "weight_update": "stochastic_rounding"},
                "no sharing": {"sharing": "off"},
                "trust region": {"teacher": "trust_region"},
                "reference": {"reference_kl": 0.1},
                "sampled token": {"mode": "sampled_token", "is_clip": 2.0},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda runs: ",".join(runs),
)
def test_measured_peaks(tmp_path, runs):
    # glibc returns what is freed, instead of keeping it for tensors of other sizes.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    for name, said, measured, parts in results("memory_worker.py", str(tmp_path), runs, **environment):
        if measured > said / 0.9:  # with pages of libraries that a busy machine had put out: the lower of two
            ((_, _, again, _),) = results("memory_worker.py", str(tmp_path), {name: runs[name]}, **environment)
            measured = min(measured, again)
        assert said / measured == pytest.approx(1, abs=0.1), (name, said, measured, parts)


def results(script, *arguments, **environment):
    """What a worker prints of its runs, the last argument."""
    *before, runs = arguments
    command = [sys.executable, str(Path(__file__).parent / script), *before, json.dumps(runs)]
    given = {"env": {**os.environ, "OMP_NUM_THREADS": "1", **environment}}
    done = subprocess.run(command, capture_output=True, text=True, **given)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert [name for name, *_ in found] == list(runs)
    return found


@pytest.mark.parametrize(
    "runs",
    [
        {"two passes": {"passes": 2}, "Ulysses": {"passes": 2, "ulysses": 2}},
        pytest.param(
            {
                "autocast, one process": {"mixed": True, "processes": 1},
                "one pass": {},
                "mixed precision": {"mixed": True},
                "tied": {"tied": True, "checkpointed": False},
                "bfloat16": {"dtype": "bfloat16", "passes": 2, **WIDE},
                "mixed, two passes": {"mixed": True, "checkpointed": False, "passes": 2},
                "Ulysses, one pass": {"mixed": True, "ulysses": 4},
                "Ulysses, whole weights": {"checkpointed": False, "ulysses": 4, "processes": 1},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda runs: ",".join(runs),
)
def test_shards_as_fsdp2_has_them(runs):
    """Storages alive in a step of torch's FSDP2, with the whole gradients of its first passes, and under autocast."""
    for name, said, measured, parts in results("sharded_memory_worker.py", runs):
        assert said / measured == pytest.approx(1, abs=0.02), (name, said, measured, parts)


STAGE_2 = [{}, {"passes": 2}, {"dtype": "float32"}]
STAGE_3 = [{}, {"num_hidden_layers": 24, "vocab_size": 512}, WIDE]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "more"), [*((2, more) for more in STAGE_2), *((3, more) for more in STAGE_3)])
def test_parts_as_deepspeed_has_them(tmp_path, stage, more):
    """In a folder of its own for what torch compiles: a lock that a killed process left is waited for without end."""
    pytest.importorskip("deepspeed")
    environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    ((_, said, measured, parts),) = results("zero_memory_worker.py", {"run": {"stage": stage, **more}}, **environment)
    assert not any(tmp_path.iterdir())  # nothing was
    assert said / measured == pytest.approx(1, abs=0.1), (said, measured, parts)


def test_strategies_by_name(tmp_path, lab, capsys, monkeypatch):
    """Ulysses and DeepSpeed have forecasts of their own, and another set-up of DeepSpeed is named as having none."""
    command = [*shape_only(tmp_path, lab, qwen3(2, 256, 4096)), "--template", " note {o}", "--card", "80GB"]

    def memory(*more):
        assert main([*command, *more]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
        return line

    divided = memory("--processes", "4", "--ulysses", "2")
    assert "(ddp, --ulysses 2)" in divided and "a pack's tokens among 2" in divided
    for stage in ("zero2", "zero3"):
        line = memory("--processes", "4", "--strategy", stage)
        assert f"each of 4 processes ({stage})" in line and "buckets 1.0 GB" in line
    # A moving average would need whole weights.
    assert "ZeRO-3" in memory("--processes", "4", "--strategy", "zero3", "--teacher", "ema")
    started = Processes(2, "DeepSpeed with offload_optimizer to cpu")
    monkeypatch.setattr("fastsdpo.commands.forecast._as_started", lambda *_: started)
    line = memory()
    assert "no forecast" in line and "DeepSpeed with offload_optimizer to cpu has none" in line


def shape_only(folder, lab, shape):
    """A folder with configuration and tokenizer, and data beside it."""
    shape.config.dtype = "bfloat16"
    shape.config.save_pretrained(folder / "model")
    lab.make_tokenizer().save_pretrained(folder / "model")
    lab.write_rows(folder / "data.jsonl", lab.make_interactions(20))
    return [str(folder / "data.jsonl"), "--model", str(folder / "model"), "--dry-run"]


def test_the_command_walks_a_model_without_weights(tmp_path, lab, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*shape_only(tmp_path, lab, qwen3(2, 256, 4096)), "--template", " note {o}", "--batch-size", "8"]
    assert main([*command, "--card", "80GB"]) == 0
    printed = capsys.readouterr().out
    assert "no weights are loaded, so there is no teacher check" in printed
    assert "it fits a card of 80.0 GB, of which 75.2 GB" in printed
    assert main([*command, "--card", "60MB", "--processes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "6 optimizer steps of 16 interactions over 2 processes" in printed
    assert "each of 2 processes (ddp)" in printed and "WARNING: it does not fit a card of 0.06 GB" in printed
    tried = [line.strip() for line in printed.splitlines() if line.startswith("  --")]
    assert tried[0].startswith("--gradient-checkpointing: ")
    assert any("--set optim=adamw_torch_8bit" in line for line in tried) and tried[-1].endswith("fits"), tried
    assert main(command) == 0, "weights are not missed where there are none"
    assert "on a CPU" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "model"], "nothing is written"
    with pytest.raises(SystemExit):
        main([word for word in command if word != "--dry-run"])
    assert "missing: -o/--output" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["", "--set auto_checkpointing=false", "--set gradient_checkpointing=false"])
def test_large_models_are_checkpointed_on_gpus(tmp_path, lab, capsys, monkeypatch, more):
    monkeypatch.setattr("fastsdpo.trainer.model.LARGE_MODEL", 10**5)
    command = shape_only(tmp_path, lab, qwen3(2, 256, 4096))
    command += ["--template", " note {o}"]
    assert main([*command, "--card", "80GB", *more.split()]) == 0
    assert ("gradient checkpointing is on" in capsys.readouterr().out) == (not more)
    assert main(command) == 0
    assert "gradient checkpointing is on" not in capsys.readouterr().out, "on a CPU"


@pytest.mark.slow
def test_the_commands_of_the_readme_fit(tmp_path, lab, capsys):
    """An 8B: LoRA on one card of 80 GB, and all weights on eight."""
    command = [*shape_only(tmp_path, lab, qwen3(36, 4096, 151936)), "--card", "80GB", "--template", " note {o}"]
    for more in (["--lora", "16"], ["--processes", "8", "--strategy", "fsdp"]):
        assert main([*command, *more]) == 0
        assert "it fits a card of 80.0 GB" in capsys.readouterr().out, more
