"""TRL's DistillationTrainer patched against unpatched, and its divergence function case by case."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from fastsdpo.integrations.trl import chunked_divergence_loss, patch_trl

ours, theirs = chunked_divergence_loss, distillation_trainer._chunked_divergence_loss


def run(student, teacher, output, **options):
    data = Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]})
    args = DistillationConfig(
        output_dir=str(output), learning_rate=0.05, optim="sgd", lr_scheduler_type="constant",
        per_device_train_batch_size=2, max_completion_length=6, max_steps=5, logging_steps=1,
        gradient_checkpointing=False, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, seed=3, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=data,
        processing_class=PreTrainedTokenizerFast.from_pretrained(student, padding_side="left"),
    )  # fmt: skip
    set_seed(7)
    trainer.train()
    logs = [
        {k: e[k] for k in ("loss", "grad_norm", "entropy") if k in e}
        for e in trainer.state.log_history
    ]
    return logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_runs(beta, llama_folder, qwen2_folder, tmp_path):
    """Another model as the teacher, with a head of its own; accumulation over two micro-batches."""
    options = {"beta": beta, "temperature": 0.9, "gradient_accumulation_steps": 2}
    want_logs, want = run(llama_folder, qwen2_folder, tmp_path, **options)
    with patch_trl():
        logs, weights = run(llama_folder, qwen2_folder, tmp_path, **options)
    assert want_logs[0]["loss"] > 0 and want_logs[0]["entropy"] > 0
    for got, wanted in zip(logs, want_logs):
        assert got == pytest.approx(wanted, rel=2e-5, abs=2e-6)
    start = AutoModelForCausalLM.from_pretrained(llama_folder).state_dict()
    assert any(not torch.equal(start[name], weight) for name, weight in want.items())
    for name, weight in want.items():
        torch.testing.assert_close(weights[name], weight, rtol=2e-5, atol=2e-6, msg=name)


def inputs(**changes):
    torch.manual_seed(1)
    V, Ds, Dt = 33, 8, 12
    return {
        "student_hidden_states": torch.randn(2, 5, Ds, requires_grad=True),
        "teacher_hidden_states": torch.randn(2, 5, Dt),
        "student_lm_head_weight": torch.randn(V, Ds, requires_grad=True),
        "teacher_lm_head_weight": torch.randn(V, Dt),
        "completion_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        "beta": 0.5,
        **changes,
    }


def result(function, given):
    given = {
        k: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in given.items()
    }
    loss, entropy, count = function(**given)
    loss.backward()
    leaves = ("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias")
    grads = {k: given[k].grad for k in leaves if k in given}
    return {"loss": loss.detach(), "entropy": entropy, "count": count, **grads}


CASES = {
    "plain": {},
    "forward": {"beta": 0.0},
    "reverse": {"beta": 1.0},
    "temperature": {"temperature": 2.5},
    "items": {"num_items_in_batch": torch.tensor(11.5)},
    "items int": {"num_items_in_batch": 9},
    "bias": {
        "student_lm_head_bias": torch.linspace(-1, 1, 33).requires_grad_(),
        "teacher_lm_head_bias": torch.linspace(1, -1, 33),
    },
    "scales": {
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 1.5,
        "teacher_lm_head_bias": torch.linspace(1, -1, 33),
    },
    "softcap": {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 3.0},
    "softcap and scales": {
        "student_final_logit_softcapping": 3.0,
        "teacher_final_logit_softcapping": 3.0,
        "student_logit_scale": 0.25,
        "teacher_logit_scale": 2.0,
    },
    "two softcaps": {
        "student_final_logit_softcapping": 3.0,
        "teacher_final_logit_softcapping": 2.0,
    },
    "negative scale": {"student_logit_scale": -1.0},
    "nothing counts": {"completion_mask": torch.zeros(2, 5, dtype=torch.long)},
    "tool mask": {"completion_mask": torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 1]])},
    "frozen head": {"student_lm_head_weight": torch.linspace(-1, 1, 33 * 8).view(33, 8)},
}


@pytest.mark.parametrize("name", CASES)
def test_divergence(name):
    given = inputs(**CASES[name])
    want, found = result(theirs, given), result(ours, given)
    for key, value in want.items():
        if value is None:
            assert found[key] is None
            continue
        torch.testing.assert_close(found[key], value, rtol=2e-5, atol=2e-6, msg=f"{name} {key}")


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_properties(beta):
    """Zero for equal distributions, positive otherwise, symmetric at 1/2, whatever the vocabulary."""
    given = inputs(beta=beta)
    same = {
        **given,
        "teacher_hidden_states": given["student_hidden_states"].detach(),
        "teacher_lm_head_weight": given["student_lm_head_weight"].detach(),
    }
    assert ours(**same)[0].abs() < 1e-6
    assert ours(**given)[0] > 0
    if beta == 0.5:
        swapped = {
            **given,
            "student_hidden_states": given["teacher_hidden_states"],
            "teacher_hidden_states": given["student_hidden_states"].detach(),
            "student_lm_head_weight": given["teacher_lm_head_weight"],
            "teacher_lm_head_weight": given["student_lm_head_weight"].detach(),
        }
        torch.testing.assert_close(ours(**swapped)[0], ours(**given)[0].detach())
