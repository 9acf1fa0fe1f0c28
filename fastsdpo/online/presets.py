"""Named recipes for online training. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

from typing import Any

from fastsdpo.trainer.presets import LATER

# The published online recipe of https://arxiv.org/abs/2603.12273.
PAPER: dict[str, Any] = {
    "mode": "sampled_token",
    "alpha": 1.0,
    "teacher": "live",
    "ppo_clip": 0.2,
    "center_advantages": True,
    "normalization": "sequence",
    "template": "online-v1",
    "sampling_temperature": 1.0,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "global_batch_size": 16,
    "per_device_train_batch_size": 16,  # at most
    "max_grad_norm": 1.0,
}

# Matches the hindsight policy: the reverse KL over the whole vocabulary, on sampled answers (equation 2). It is
# another objective than the paper's runs have (docs/objectives.md).
FULL: dict[str, Any] = {"mode": "full", "alpha": 1.0}

# Ours: what learned one user's wish from complaints with a small model (docs/online.md). Its rate is for a
# LoRA adapter of rank `PERSONAL_LORA`; the teacher is a fixed target.
PERSONAL: dict[str, Any] = {
    "mode": "full",
    "alpha": 1.0,
    "teacher": "frozen",
    "guidance": 2.0,
    "neutral_followup": "Okay.",
    "template": "note",
    "sampling_temperature": 0.5,
    "max_new_tokens": 48,
    "eval_max_new_tokens": 96,
    "learning_rate": 3.5e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "global_batch_size": 16,
    "per_device_train_batch_size": 16,  # at most
    "max_grad_norm": 1.0,
}
PERSONAL_LORA = 16

# What the code published later has; how many steps it takes on each interaction is not known to us.
LATER_ONLINE: dict[str, Any] = {**LATER, "template": "online-v1", "sampling_temperature": 1.0, "updates_per_batch": 4}

PRESETS = {"paper": PAPER, "full": FULL, "personal": PERSONAL, "paper-later": LATER_ONLINE}
