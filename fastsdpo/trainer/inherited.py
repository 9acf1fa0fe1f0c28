"""Settings of `transformers.TrainingArguments` that cannot work here, or that nothing would follow."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Check = Callable[[bool, str, str], None]  # of the condition, the setting and the rule

# The only value of each, and why.
COMPILED = "the Dynamo of torch.compile cannot trace the hooks that put the loss in place of the head"
CAST = "evaluation would cast the trained weights themselves, also those that are saved"
ORDER = "group_by_conversation and data_seed set the order"
NO_METRICS = "there is no compute_metrics here"
ONLY: dict[str, tuple[Any, str]] = {
    "torch_compile": (False, COMPILED),
    "torch_compile_backend": (None, COMPILED),
    "torch_compile_mode": (None, COMPILED),
    "neftune_noise_alpha": (None, "the teacher would be noisy too"),
    "label_smoothing_factor": (0, "the loss is between two policies and has no labels"),
    "label_names": (None, "interactions have no labels"),
    "auto_find_batch_size": (False, "it would change the batch of a step; max_tokens_per_pack bounds the memory"),
    "average_tokens_across_devices": (True, "the loss is normalized over the whole global batch"),
    "train_sampling_strategy": ("random", ORDER),
    "group_by_length": (False, ORDER),
    "include_num_input_tokens_seen": ("no", "sdpo/tokens_per_second counts what is computed"),
    "include_for_metrics": ([], NO_METRICS),
    "batch_eval_metrics": (False, NO_METRICS),
    "bf16_full_eval": (False, CAST),
    "fp16_full_eval": (False, CAST),
}


def check_inherited(args: Any, check: Check) -> None:
    """What can be told before the processes have met."""
    _check_steps(args, check)
    for name, (value, why) in ONLY.items():
        given = getattr(args, name, value)  # not all versions have all
        if name == "include_num_input_tokens_seen" and given is False:
            given = "no"
        check(given == value, name, f"be {value!r}: {why}")
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise ValueError(
            "SDPOConfig: the environment's ACCELERATE_DYNAMO_BACKEND (accelerate launch "
            f"--dynamo_backend) must be 'no': {COMPILED}, got {dynamo!r}"
        )


def _check_steps(args: Any, check: Check) -> None:
    """transformers takes numbers with which nothing is trained, or something is never done, or at other steps."""
    check(args.max_steps == -1 or args.max_steps >= 1, "max_steps", "be at least 1, or -1 where the epochs decide")
    check(args.per_device_eval_batch_size >= 1, "per_device_eval_batch_size", "be at least 1")
    for what in ("logging", "eval", "save"):
        strategy, name = getattr(args, f"{what}_strategy"), f"{what}_steps"
        steps = getattr(args, name)
        counts = getattr(strategy, "value", strategy) == "steps"
        check(not counts or steps is None or steps > 0, name, f"be > 0 ({what}_strategy='no' turns it off)")
    check(
        args.save_total_limit is None or args.save_total_limit >= 1,
        "save_total_limit",
        "be at least 1 or None (all)",
    )
