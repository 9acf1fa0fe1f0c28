"""TRL's SDPO trainer patched against unpatched: losses, metrics and weights of whole runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers.trainer_utils import set_seed
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from fastsdpo.integrations.trl import patch_trl

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]


def reward(prompts, completions, **_):
    """Half the answers succeed, so that some sequences have a teacher and others do not."""
    return [1.0 if len(c.split()) % 2 else 0.0 for c in completions]


def make_trainer(
    folder, output, *, kind=SDPOTrainer, steps=5, peft_config=None, source=None, **options
):
    data = Dataset.from_dict(
        {"prompt": PROMPTS, "privileged_context": ["w11 w12", "w13", "w14 w15 w16", "w17"]}
    )
    args = SDPOConfig(
        output_dir=str(output),
        **{
            "learning_rate": 0.05,
            "optim": "sgd",  # a step in proportion to the gradient: rounding stays rounding
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 6,
            "max_steps": steps,
            "include_environment_feedback": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "seed": 3,
            "disable_tqdm": True,
            **options,
        },
    )
    more = {} if source is None else {"source": source}
    return kind(
        model=folder, reward_funcs=reward, args=args, train_dataset=data, peft_config=peft_config,
        **more,
    )  # fmt: skip


def run(trainer):
    set_seed(7)
    trainer.train()
    logs = [
        {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
        for entry in trainer.state.log_history
    ]
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_run(found, wanted, tolerance=2e-5):
    (logs, weights), (want_logs, want_weights) = found, wanted
    assert len(logs) == len(want_logs)
    for got, want in zip(logs, want_logs):
        assert got.keys() == want.keys()
        for key, value in want.items():
            if isinstance(value, float):
                assert got[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    moved = False
    for name, want in want_weights.items():
        torch.testing.assert_close(weights[name], want, rtol=tolerance, atol=tolerance, msg=name)
        moved = moved or want.requires_grad or True
    assert moved
    assert any(entry.get("loss", 0) != 0 for entry in want_logs)


MODES = {
    "sampled": {"distillation_mode": "sampled_token"},
    "full-reverse": {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    "full-forward": {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    "full-jsd": {"distillation_mode": "full_logits", "distillation_alpha": 0.3},
    "topk": {"distillation_mode": "topk_logits", "distillation_topk": 7},
    "topk-tail-forward": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 7,
        "distillation_add_tail": True,
        "distillation_alpha": 0.0,
    },
    "topk-tail-jsd": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 7,
        "distillation_add_tail": True,
        "distillation_alpha": 0.5,
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_run_in_every_mode(mode, source, llama_folder, tmp_path):
    options = {**MODES[mode], "temperature": 0.8}
    want = run(make_trainer(llama_folder, tmp_path, **options))
    with patch_trl(source=source):
        found = run(make_trainer(llama_folder, tmp_path, **options))
    assert_same_run(found, want)
