"""`FastKDPlugin` inside the installed axolotl: its loss, its trainer, its plugin manager (`make peers`)."""

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("axolotl", reason="needs axolotl: make peers")
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.integrations.base import PluginManager
from axolotl.integrations.kd.collator import DataCollatorForKD
from axolotl.integrations.kd.trainer import AxolotlKDTrainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integrations.conftest import make_models
from tests.integrations.test_adapters import make, packed
from tests.pages import ROOT, blocks, calls, program

pytestmark = pytest.mark.slow

NAME = "fastsdpo.integrations.axolotl.FastKDPlugin"
SETTINGS = {
    "normalized": {"kd_alpha": 0.9, "kd_ce_alpha": 0.1, "kd_normalize_topk": True},
    "as it is": {"kd_alpha": 0.9, "kd_ce_alpha": 0.1},
    "hot": {"kd_alpha": 0.6, "kd_ce_alpha": 0.4, "kd_temperature": 2.0, "kd_normalize_topk": True},
    "no labels, reverse": {"kd_alpha": 1.0, "kd_ce_alpha": 0.0, "kd_beta": 1.0},
    "jsd": {"kd_alpha": 1.0, "kd_ce_alpha": 0.0, "kd_beta": 0.5, "kd_normalize_topk": True},
}


def make_arguments(output, settings):
    args = AxolotlTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, use_cpu=True, report_to=[], max_steps=3, bf16=False,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    for name, value in {"kd_temperature": 1.0, "kd_beta": None, "kd_normalize_topk": None, **settings}.items():
        setattr(args, name, value)
    return args


def features(tokenizer, k=4):
    torch.manual_seed(4)
    rows = []
    for length, prompt in ((9, 3), (6, 2)):
        ids = torch.randint(6, 60, (length,)).tolist()
        logps = torch.randn(length, k).log_softmax(-1).tolist()
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * length,
                "labels": [-100] * prompt + ids[prompt:],
                "target_logprobs": logps,
                "target_token_ids": [torch.randperm(60)[:k].tolist() for _ in ids],
                "target_mask": [[int(at >= prompt)] * k for at in range(length)],
            }
        )
    return DataCollatorForKD(tokenizer)(copy.deepcopy(rows))


@pytest.fixture(scope="module")
def trainers():
    manager = PluginManager.get_instance()
    manager.register(NAME)
    plugin = manager.plugins[NAME]
    assert plugin.get_input_args() == "axolotl.integrations.kd.KDArgs"
    assert plugin.get_trainer_cls(SimpleNamespace(kd_trainer=None)) is None
    return AxolotlKDTrainer, plugin.get_trainer_cls(SimpleNamespace(kd_trainer=True))


def loss_and_grads(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(10))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


PACKED = [(4, "lora"), (4, "dora"), (4, "modules-to-save"), (8, "lora"), (8, "ia3")]


@pytest.mark.parametrize(
    ("name", "bits", "adapter"),
    [
        *((name, None, adapter) for name in SETTINGS for adapter in (None, "lora")),
        *(("normalized", *p) for p in PACKED),
    ],
)
def test_loss_and_every_gradient_are_those_of_axolotl(
    trainers, qwen2_folder, tmp_path, name, bits, adapter, monkeypatch
):
    if bits:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # axolotl compiles its loss
    tokenizer = AutoTokenizer.from_pretrained(qwen2_folder)
    batch = features(tokenizer)
    found = []
    for trainer_class in trainers:
        model = packed(qwen2_folder, bits, adapter) if bits else make(qwen2_folder, adapter)
        trainer = trainer_class(model=model, args=make_arguments(tmp_path, SETTINGS[name]), processing_class=tokenizer)
        found.append(loss_and_grads(trainer, batch))
    (want, wanted), (got, grads) = found
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert grads.keys() == wanted.keys()
    for key, grad in wanted.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def head_adapter(model):
    return [parameter for name, parameter in model.named_parameters() if "lora_B" in name]


def test_a_head_with_an_adapter_is_trained_as_the_model_computes_it(trainers, qwen2_folder, tmp_path, monkeypatch):
    """axolotl takes the weight below the adapter: the adapter of the head gets no gradient."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    tokenizer = AutoTokenizer.from_pretrained(qwen2_folder)
    batch, reached = features(tokenizer), []
    for trainer_class in trainers:
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(qwen2_folder)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
        args = make_arguments(tmp_path, SETTINGS["normalized"])
        trainer = trainer_class(model=model, args=args, processing_class=tokenizer)
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(10))
        (grad,) = torch.autograd.grad(loss, head_adapter(model), allow_unused=True) if loss.requires_grad else (None,)
        reached.append(grad is not None)
    assert reached == [False, True]


def test_a_packed_head_is_refused(trainers, qwen2_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    tokenizer = AutoTokenizer.from_pretrained(qwen2_folder)
    model = packed(qwen2_folder, 4, "lora", llm_int8_skip_modules=["none"])
    args = make_arguments(tmp_path, SETTINGS["normalized"])
    trainer = trainers[1](model=model, args=args, processing_class=tokenizer)
    with pytest.raises(NotImplementedError, match="llm_int8_skip_modules"):
        trainer.compute_loss(model, dict(features(tokenizer)))


def test_what_is_refused(trainers, qwen2_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(qwen2_folder)
    model = AutoModelForCausalLM.from_pretrained(qwen2_folder)
    trainer = trainers[1](model=model, args=make_arguments(tmp_path, SETTINGS["jsd"]), processing_class=tokenizer)
    batch = features(tokenizer)
    with pytest.raises(KeyError, match="target_mask"):
        trainer.compute_loss(model, {name: value for name, value in batch.items() if name != "target_mask"})
    model.config.lm_head_multiplier = 2.0
    with pytest.raises(NotImplementedError, match=r"use axolotl\.integrations\.kd\.KDPlugin"):
        trainer.compute_loss(model, dict(batch))


def test_the_page_runs(tmp_path, monkeypatch):
    """Its configuration by its command, two steps on a CPU, on a tiny model of the name that it has."""
    pytest.importorskip("fire", reason="axolotl's command needs fire: make peers")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/integrations/axolotl.md"
    make_models("Qwen/Qwen3-0.6B")
    rows = []
    for i in range(64):
        said = [{"role": "user", "content": f"w{i % 50} w2"}, {"role": "assistant", "content": f"w3 w{i % 40} w5"}]
        ids = [[6 + (i + k) % 50 for k in range(4)] for _ in range(5)]
        rows.append({"messages": said, "target_token_ids": ids, "logprobs": [[-1.0 - k for k in range(4)]] * 5})
    Path("teacher.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, whole = blocks(page, "yaml")
    assert before.splitlines()[0] in whole
    on_cpu = "bf16: false\nfp16: false\nfloat32: true\nmax_steps: 2\nlogging_steps: 1\n"
    Path("distil.yaml").write_text(whole.replace("bf16: auto\n", on_cpu))
    (call,) = calls(blocks(page, "bash")[0])
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
    environment["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{ROOT}"
    command = [*program("axolotl"), *call.words[1:], "--launcher", "python"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = re.findall(r"'loss': '?([\d.]+)", done.stdout + done.stderr)
    assert len(losses) == 2 and all(float(loss) > 0 for loss in losses)
    assert Path("runs/distil/model.safetensors").exists()
