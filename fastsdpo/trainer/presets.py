"""Named recipes for offline training: the settings of `SDPOConfig.preset`."""

from __future__ import annotations

from typing import Any

# The published offline recipe of https://arxiv.org/abs/2603.12273. Its 8-bit AdamW on bfloat16 weights
# is not set here: it needs bitsandbytes, and most of its steps are rounded away (see lost_steps). The
# same with those: optim="adamw_bnb_8bit", weight_update="plain".
PAPER: dict[str, Any] = {
    "mode": "sampled_token",
    "alpha": 1.0,
    "teacher": "live",
    "normalization": "sequence",
    "ignore_first_k": 2,
    "template": "offline-v1",
    "max_prompt_length": 2048,
    "max_completion_length": 2048,
    "truncation": "independent-left",
    "end_of_turn": "eos",
    "allow_special_tokens": True,
    "group_by_conversation": False,
    "learning_rate": 2e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "num_train_epochs": 2.0,
    "global_batch_size": 32,
    "per_device_train_batch_size": 32,  # at most: packs bound the memory
    "max_grad_norm": 10.0,
}

# The reverse KL over the whole vocabulary (equation 4): exact in that no token is sampled for it. It is
# another objective than the paper's runs have (docs/objectives.md).
EXACT: dict[str, Any] = {"mode": "full", "alpha": 1.0}

PRESETS = {"paper": PAPER, "exact": EXACT}
