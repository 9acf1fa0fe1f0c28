"""Settings of `transformers.TrainingArguments` that cannot work here, or that nothing would follow."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from accelerate.utils import get_int_from_env
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, TrainingArguments, trainer_log_levels

Check = Callable[[bool, str, str], None]  # of the condition, the setting and the rule

# The only value of each, and why.
COMPILED = "the Dynamo of torch.compile cannot trace the hooks that put the loss in place of the head"
CAST = "evaluation would cast the trained weights themselves, also those that are saved"
ORDER = "group_by_conversation and data_seed set the order"
NO_METRICS = "there is no compute_metrics here"
JIT = (
    "it saves in the middle of a step, in the process alone that got the signal; the commands save after the step, "
    "as the callback fastsdpo.trainer.callbacks.StopOnSignal does"
)
NO_OUTPUTS = "an evaluation adds up losses, and keeps no outputs"
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
    "length_column_name": ("length", ORDER),
    "dataloader_in_order": (True, ORDER),
    "dataloader_drop_last": (False, "the last step of an epoch trains on what is left, divided by its number"),
    "include_num_input_tokens_seen": ("no", "sdpo/tokens_per_second counts what is computed"),
    "remove_unused_columns": (False, "interactions are objects, without columns"),
    "logging_nan_inf_filter": (False, "it would hide what non_finite looks for"),
    "debug": ("", "non_finite names the interactions whose loss or gradient is not finite"),
    "include_for_metrics": ([], NO_METRICS),
    "batch_eval_metrics": (False, NO_METRICS),
    "eval_accumulation_steps": (None, NO_OUTPUTS),
    "eval_do_concat_batches": (True, NO_OUTPUTS),
    "eval_use_gather_object": (False, NO_OUTPUTS),
    "do_predict": (False, "there is nothing to predict"),
    "bf16_full_eval": (False, CAST),
    "fp16_full_eval": (False, CAST),
    "enable_jit_checkpoint": (False, JIT),
    "resume_from_checkpoint": (None, "it is an argument of train(), and the option --resume"),
}
# The same of accelerator_config.
ONLY_ACCELERATE = {
    "split_batches": "it would divide the batch of a step by the number of processes",
    "dispatch_batches": "interactions are no tensors, which alone it divides",
    "even_batches": "the sampler fills up the last batches",
    "use_seedable_sampler": ORDER,
}
NAMES = {
    "lr_scheduler_type": [item.value for item in SchedulerType],
    "optim": [item.value for item in OptimizerNames],
    "logging_strategy": [item.value for item in IntervalStrategy],
    "eval_strategy": [item.value for item in IntervalStrategy],
    "save_strategy": [item.value for item in SaveStrategy],
    "log_level": list(trainer_log_levels),
    "log_level_replica": list(trainer_log_levels),
}
BY_LOSS = ("reduce_lr_on_plateau", "greedy")  # schedules that follow an evaluation
WITHOUT_WARMUP = ("constant", *BY_LOSS)
WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor", "lomo", "adalomo")  # optimizers


def check_types(args: TrainingArguments, check: Check) -> None:
    """Numbers and booleans, of all settings. A number that came as text (YAML's 1e-5) becomes one.

    Raises:
        ValueError: another type: any text but the empty one would be true, and half a token would be counted.
    """
    for item in fields(args):
        kinds = str(getattr(item.type, "__name__", item.type)).split(" | ")
        value: Any = getattr(args, item.name)
        if value is None or not {"int", "float", "bool", "None"}.issuperset(kinds):
            continue
        if isinstance(value, str) and "float" in kinds:
            try:
                value = float(value)
            except ValueError:
                check(False, item.name, "be a number")
        if isinstance(value, float) and "int" in kinds and value.is_integer():  # JSON's 1e3
            value = int(value)
        setattr(args, item.name, value)
        if isinstance(value, bool):
            check("bool" in kinds, item.name, "be a number")
        elif "float" in kinds:
            check(isinstance(value, Real), item.name, "be a number")
        elif "int" in kinds:
            check(isinstance(value, Integral), item.name, "be a whole number")
        else:
            check(False, item.name, "be True or False")


def check_inherited(args: Any, check: Check) -> None:
    """What can be told before the processes have met."""
    for name, (value, why) in ONLY.items():
        given = getattr(args, name, value)  # not all versions have all
        if name == "include_num_input_tokens_seen" and given is False:
            given = "no"
        check(given == value or not (given or value), name, f"be {value!r}: {why}")
    for name, known in NAMES.items():
        given = getattr(args, name)
        check(getattr(given, "value", given) in known, name, f"be one of {', '.join(known)}")
    check(
        args.ddp_backend is None or get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"], 1) > 1,
        "ddp_backend",
        "be None in one process",
    )
    _check_steps(args, check)
    _check_optimizer(args, check)
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
    kept = not (args.load_best_model_at_end and args.save_only_model)
    check(kept or args.teacher != "ema", "save_only_model", "be False with load_best_model_at_end and teacher='ema'")


def _check_optimizer(args: Any, check: Check) -> None:
    """The optimizers and schedules of transformers leave out what they do not know; some take any number."""
    check(args.weight_decay >= 0, "weight_decay", "be >= 0: weights would grow")
    for name in ("adam_beta1", "adam_beta2"):
        check(0 <= getattr(args, name) < 1, name, "be in [0, 1)")
    check(args.adam_epsilon > 0, "adam_epsilon", "be > 0: the step of a weight without gradient would be 0 / 0")
    optim, schedule = (str(getattr(name, "value", name)) for name in (args.optim, args.lr_scheduler_type))
    none = f"be None with optim={optim!r}, which reads none"
    check(not args.optim_args or optim not in WITHOUT_ARGS, "optim_args", none)
    pairs = args.optim_args.split(",") if args.optim_args else []
    check(all("=" in pair for pair in pairs), "optim_args", "be NAME=VALUE,NAME=VALUE")
    low_rank = "galore" in optim or "apollo" in optim
    check(not args.optim_target_modules or low_rank, "optim_target_modules", none)
    warmup = args.warmup_steps
    check(warmup < 1 or warmup == int(warmup), "warmup_steps", "be a whole number, or below 1 a share of all steps")
    usual = type(args).__dataclass_fields__["warmup_steps"].default
    if schedule in WITHOUT_WARMUP and warmup not in (0, usual):
        other = "constant_with_warmup" if schedule == "constant" else "cosine"
        raise ValueError(
            f"SDPOConfig: warmup_steps needs a schedule that warms up: lr_scheduler_type={other}, got {schedule}"
        )
    check(
        not args.lr_scheduler_kwargs or not schedule.startswith("constant"),
        "lr_scheduler_kwargs",
        f"be None with lr_scheduler_type={schedule!r}, which reads none",
    )


def check_accelerator(config: AcceleratorConfig) -> None:
    """``accelerator_config``, which transformers has read by now.

    Raises:
        ValueError: nothing would follow it, or it would change the batch of a step.
    """
    for name, why in ONLY_ACCELERATE.items():
        given, value = getattr(config, name), getattr(AcceleratorConfig(), name)
        if given != value and (given or value):
            raise ValueError(f"SDPOConfig: {name} of accelerator_config must be {value}: {why}, got {given}")
    given = config.gradient_accumulation_kwargs or {}
    odd = [name for name, value in given.items() if name != "sync_each_batch" and (name, value) != ("num_steps", 1)]
    if odd:
        raise ValueError(
            "SDPOConfig: gradient_accumulation_kwargs of accelerator_config must have sync_each_batch alone: "
            f"gradient_accumulation_steps and global_batch_size set the steps, got {', '.join(odd)}"
        )
