"""Named recipes for offline training, and how a global batch is split: what `SDPOConfig` is made with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The published offline recipe of https://arxiv.org/abs/2603.12273: the answer's own tokens, weighed by its own
# hindsight. Its 8-bit AdamW on bfloat16 weights is not set here: it needs bitsandbytes, and most of its steps are
# rounded away (see lost_steps). The same with those: optim="adamw_bnb_8bit", weight_update="plain".
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

# Matches the hindsight policy: the reverse KL over the whole vocabulary (equation 4). It is another
# objective than the paper's runs have (docs/objectives.md).
FULL: dict[str, Any] = {"mode": "full", "alpha": 1.0}

# What the code published later takes for online training: the reverse KL over the student's 20 likeliest tokens
# and a bucket for the rest, one interaction a step. It trains LoRA of rank 256 (--lora 256 --lora-alpha 512).
LATER: dict[str, Any] = {
    "mode": "topk",
    "topk": 20,
    "add_tail": True,
    "alpha": 1.0,
    "teacher": "live",
    "normalization": "sequence",
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "adam_epsilon": 1e-6,
    "global_batch_size": 1,
    "per_device_train_batch_size": 1,
    "max_grad_norm": 1.0,
}

# The same objective and steps on logged interactions, tokenized as for the published offline recipe.
TEXT = ("template", "max_prompt_length", "max_completion_length", "truncation", "end_of_turn", "allow_special_tokens")
LATER_OFFLINE = {**LATER, **{name: PAPER[name] for name in TEXT}, "group_by_conversation": False}

PRESETS = {"paper": PAPER, "full": FULL, "paper-later": LATER_OFFLINE}


def with_preset(preset: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A preset changed by settings."""
    chosen = dict(preset)
    if {"per_device_train_batch_size", "gradient_accumulation_steps"} & settings.keys():
        chosen.pop("global_batch_size", None)
    return {**chosen, **settings}


def split_batch(global_batch: int, processes: int, per_device: int, accumulation: int = 1) -> tuple[int, int]:
    """``(per_device_train_batch_size, gradient_accumulation_steps)`` of a global batch.

    Args:
        per_device: the most interactions of a process in one micro-batch.
        accumulation: 1, or what follows from the other three.

    Raises:
        ValueError: the processes cannot have equal shares, or the accumulation contradicts them.
    """
    if global_batch < 1 or global_batch % processes:
        below = max(1, global_batch // processes) * processes
        raise ValueError(
            f"SDPOConfig: global_batch_size must be a multiple of the {processes} processes, got "
            f"{global_batch}; take {below} or {below + processes}, or another number of processes"
        )
    share = global_batch // processes
    if per_device * accumulation == share:
        return per_device, accumulation
    if accumulation != 1:
        raise ValueError(
            "SDPOConfig: gradient_accumulation_steps must be left out with global_batch_size (it "
            f"follows from it), got {accumulation}: {per_device} x {accumulation} x {processes} "
            f"processes is not {global_batch}"
        )
    micro = max(size for size in range(1, min(per_device, share) + 1) if share % size == 0)
    return micro, share // micro


def checkpointing_given(args: TrainingArguments) -> bool:
    """Whether it is said that layers run again in the backward pass, or that they do not."""
    said = [args.gradient_checkpointing, getattr(args, "activation_checkpointing", None)]
    in_fsdp = isinstance(args.fsdp_config, dict) and args.fsdp_config.get("activation_checkpointing")
    # Versions of transformers without the new name cannot tell False from nothing.
    explicit = hasattr(args, "activation_checkpointing") and False in said
    return True in said or explicit or bool(in_fsdp)


def default_bf16(dtype: str | None, fp16: bool, has_bf16: bool) -> bool:
    """Whether matrix products are in bfloat16 (autocast) where nothing is said about it.

    They are on a GPU that has it, whatever the checkpoint's dtype, as in other trainers. Who asks for weights of
    float32, float16 or float64, or for ``fp16``, gets products of that dtype.
    """
    return has_bf16 and not fp16 and dtype in (None, "auto", "bfloat16")


def gpu_is_there(use_cpu: bool) -> bool:
    """Whether training is on a GPU of CUDA."""
    import torch  # not above: the commands show the presets' names without it

    return not use_cpu and torch.cuda.is_available()


def gpu_has_bf16(use_cpu: bool) -> bool:
    """Whether it has units for bfloat16."""
    import torch

    return gpu_is_there(use_cpu) and torch.cuda.is_bf16_supported(including_emulation=False)
