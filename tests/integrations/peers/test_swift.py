"""`patch_swift` inside the installed ms-swift: its trainer, its templates, its batches (`make peers`)."""

import copy
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("swift", reason="needs ms-swift: make peers")
from datasets import Dataset
from swift.model import get_model_processor
from swift.rlhf_trainers import gkd_trainer
from swift.rlhf_trainers.arguments import GKDConfig
from swift.template import get_template

from fastsdpo.integrations.swift import patch_swift
from fastsdpo.quantized import keep_differentiable
from tests.integrations.conftest import make_models, make_tokenizer
from tests.integrations.test_adapters import adapted, bits_and_bytes
from tests.pages import ROOT, blocks, calls, program

pytestmark = pytest.mark.slow

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"w{i} w{i + 1}"},
            {"role": "assistant", "content": " ".join(f"w{(7 * i + k) % 50}" for k in range(2 + i))},
        ],
        "teacher_prompt": f"w9 w{i} w{i + 1} w4",
    }
    for i in range(4)
]
CASES = {
    "jsd": {"beta": 0.3},
    "forward": {"beta": 0, "temperature": 0.7},
    "reverse with cross entropy": {"beta": 1, "sft_alpha": 0.4},
    "topk": {"beta": 0.5, "topk": 7},
    "server": {"beta": 0.0, "server": True, "sft_alpha": 0.4},
    "opsd": {"beta": 0.5, "self": True},
    "adapter": {"beta": 1, "adapter": "lora-head"},
    "4 bits, LoRA on embeddings and head": {"beta": 0.5, "adapter": "lora-embeddings-head", "bits": 4},
    "4 bits, DoRA": {"beta": 0.5, "adapter": "dora", "bits": 4},
    "4 bits, modules to save": {"beta": 0.5, "adapter": "modules-to-save", "bits": 4},
    "8 bits, IA3": {"beta": 0.5, "adapter": "ia3", "bits": 8},
}


def make_trainer(folder, output, case, skipped=("lm_head",)):
    def load(bits=None):
        given = {"model_type": "qwen2", "torch_dtype": torch.float32, "device_map": "cpu"}
        if bits:
            pytest.importorskip("bitsandbytes")
            given["quantization_config"] = bits_and_bytes(bits, llm_int8_skip_modules=list(skipped))
        model, processor = get_model_processor(folder, **given)
        keep_differentiable(model)
        tokenizer = make_tokenizer()  # transformers would make one of Qwen2's of the files, with other words
        tokenizer.model_info, tokenizer.model_meta = processor.model_info, processor.model_meta
        return model, tokenizer

    model, processor = load(case.get("bits"))
    teacher = None
    if not case.get("self") and not case.get("adapter"):
        teacher = load()[0].eval().requires_grad_(False)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    if case.get("adapter"):
        model = adapted(model, case["adapter"])
    settings = {"lmbda": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 3}
    settings |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True}
    settings |= {"remove_unused_columns": False, "bf16": False, "gradient_checkpointing": False}
    settings |= {"temperature": case.get("temperature", 1.0), "sft_alpha": case.get("sft_alpha", 0)}
    args = GKDConfig(output_dir=str(output), beta=case["beta"], **settings)
    template = get_template(processor, template_type="dummy", max_length=64)
    template.set_mode("train")
    rows = [
        {"messages": row["messages"], **({"teacher_prompt": row["teacher_prompt"]} if case.get("self") else {})}
        for row in ROWS
    ]
    more = {"teacher_model": teacher, "teacher_use_disable_adapter": bool(case.get("adapter"))}
    more |= {"train_dataset": Dataset.from_list(rows), "gkd_logits_topk": case.get("topk")}
    return gkd_trainer.GKDTrainer(model, args=args, template=template, **more), rows


def loss_and_grads(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, copy.deepcopy(inputs))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_those_of_ms_swift(qwen2_folder, tmp_path, name, caplog):
    trainer, rows = make_trainer(qwen2_folder, tmp_path, CASES[name])
    trainer.model.train()
    inputs = trainer._prepare_inputs(copy.deepcopy(rows[:2]))
    if CASES[name].get("server"):
        trainer.use_teacher_api = True
        labels = inputs["teacher_model_inputs"]["labels"]
        logps = torch.randn(*labels.shape, 63).log_softmax(-1).topk(6)
        inputs["gkd_batch"].teacher_topk_logprobs, inputs["gkd_batch"].teacher_topk_indices = logps
    want, wanted = loss_and_grads(trainer, inputs)
    assert want > 1e-3 and wanted
    for source in ("hidden", "logits"):
        with patch_swift(source):
            got, grads = loss_and_grads(trainer, inputs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert grads.keys() == wanted.keys()
        for key, grad in wanted.items():
            torch.testing.assert_close(
                grads[key], grad, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
    again, _ = loss_and_grads(trainer, inputs)
    assert torch.equal(again, want)  # ms-swift's own again


def test_a_run_ends_with_the_same_weights(qwen2_folder, tmp_path):
    ends = []
    for patched in (False, True):
        trainer, _ = make_trainer(qwen2_folder, tmp_path, CASES["jsd"])
        if patched:
            with patch_swift("hidden"):
                trainer.train()
        else:
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3
        ends.append((torch.tensor(losses), trainer.model.state_dict()))
    torch.testing.assert_close(*(losses for losses, _ in ends), rtol=1e-4, atol=1e-5)
    for key, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][key], value, rtol=1e-3, atol=1e-4)


def test_what_is_refused(qwen2_folder, tmp_path, monkeypatch):
    with patch_swift(), pytest.raises(RuntimeError, match="patched already"):
        patch_swift()
    trainer, rows = make_trainer(qwen2_folder, tmp_path, CASES["jsd"])
    monkeypatch.setattr(trainer.args, "offload_teacher_model", True)
    with patch_swift("hidden"), pytest.raises(NotImplementedError, match="offload_teacher_model"):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(copy.deepcopy(rows[:2])))
    trainer, rows = make_trainer(qwen2_folder, tmp_path, CASES["4 bits, DoRA"], ["none"])
    with patch_swift("hidden"), pytest.raises(NotImplementedError, match="llm_int8_skip_modules"):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(copy.deepcopy(rows[:2])))
    monkeypatch.setattr(gkd_trainer, "gkd_loss", lambda logits: None)
    with pytest.raises(ImportError, match=r"gkd_loss must take .* got \(logits\)"):
        patch_swift()


@pytest.mark.parametrize("number", [0, 1], ids=["before", "after"])
def test_the_page_runs(number, tmp_path, monkeypatch):
    """Its command, two steps on a CPU, on tiny models of the names that it has; the loss is in ms-swift's log."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/integrations/swift.md"
    make_models("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")
    Path("data.jsonl").write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in ROWS * 16))
    Path("fast.py").write_text(blocks(page, "python")[0], "utf-8")
    (call,) = calls(blocks(page, "bash")[number])
    more = shlex.split("--max_steps 2 --logging_steps 1 --report_to none --output_dir runs --lmbda 0 --seed 5")
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{ROOT}"}
    command = [*program("swift"), *call.words[1:], *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = Path("runs").rglob("logging.jsonl")
    losses = [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
    assert len(losses) == 2 and all(float(loss) > 0 for loss in losses)
    assert number == 0 or "external_plugins: ['fast.py']" in done.stdout + done.stderr
