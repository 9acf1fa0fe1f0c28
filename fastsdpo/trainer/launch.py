"""How a run was started: what cannot work is refused by name, before any weights are loaded.

One process per GPU holds whole interactions: DDP, FSDP2, DeepSpeed ZeRO-1 to 3; ``ulysses`` processes may share
those that they hold. A plan of shared prefixes needs all tokens of its pack, and the loss all columns of the head, so
whatever else divides a sequence, a layer or the list of layers among GPUs is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from fastsdpo.prefix import is_partitioned

logger = logging.getLogger("fastsdpo.trainer")

INSTEAD = (
    "start one process per GPU and divide the weights among them with FSDP2 or DeepSpeed ZeRO-3 (accelerate launch), "
    "which also hold models that one GPU cannot"
)
LONG = "for long conversations use --ulysses PROCESSES, by which a pack is divided along its plan"
# By the name in accelerate's ParallelismConfig, and in the environment with PARALLELISM_CONFIG_ before it.
FORMS = {
    "tp_size": ("tensor parallelism", INSTEAD),
    "cp_size": ("context parallelism", LONG),
    "sp_size": ("accelerate's sequence parallelism, which cuts padded batches,", LONG),
    "dp_replicate_size": ("FSDP with replicas (HSDP)", "divide the weights among all processes: dp_replicate_size 1"),
}


def check_launch(args: TrainingArguments) -> None:
    """Refuses launches that cannot work; nothing has been started or loaded by then.

    Raises:
        NotImplementedError: tensor, context, sequence or pipeline parallelism, FSDP1, HSDP. The text says what to
            use instead.
        ValueError: DeepSpeed beside ``use_cpu``, which would leave it out; ``async_checkpoints`` where the weights
            are not written in shards; ``fsdp_config`` without ``fsdp``.
    """
    for form, instead in _unsupported(args):
        raise NotImplementedError(f"{form} is not supported: {instead}")
    if uses_deepspeed(args) and (args.use_cpu or is_set("ACCELERATE_USE_CPU")):
        raise ValueError(
            "--cpu (use_cpu) must be left out beside a DeepSpeed configuration, which would be ignored. To try "
            "DeepSpeed without a GPU set DS_ACCELERATOR=cpu in the environment"
        )
    _check_async_checkpoints(args)
    _check_fsdp_config(args)
    if args.sync_each_pass and not _uses_fsdp(args):
        raise ValueError(
            "sync_each_pass must be False without FSDP2: DDP and DeepSpeed keep whole gradients, or sum them as their "
            "own configuration says"
        )


def _check_fsdp_config(args: Any) -> None:
    """transformers reads it where ``fsdp`` is on, and else trains without FSDP."""
    config = args.fsdp_config
    if (any(config.values()) if isinstance(config, dict) else config) and not args.fsdp:
        raise ValueError(f"SDPOConfig: fsdp_config must be None without fsdp, got {config}")


def _uses_fsdp(args: Any) -> bool:
    return is_set("ACCELERATE_USE_FSDP") or bool(args.fsdp)


def _check_async_checkpoints(args: Any) -> None:
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    in_shards = _uses_fsdp(args) and kind in ("SHARDED_STATE_DICT", "2")
    if args.async_checkpoints and not in_shards:
        raise ValueError(
            "async_checkpoints must be False without FSDP2 and fsdp_state_dict_type: SHARDED_STATE_DICT: torch's "
            "distributed checkpoint alone writes beside training"
        )


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed was asked for, by accelerate's configuration or by transformers' setting."""
    return is_set("ACCELERATE_USE_DEEPSPEED") or bool(args.deepspeed)


def is_set(variable: str) -> bool:
    """Whether a variable of the environment says yes."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _unsupported(args: TrainingArguments) -> Iterator[tuple[str, str]]:
    """``(form, what to use instead)`` of each kind of parallelism that was asked for and does not work."""
    given = getattr(args, "parallelism_config", None)
    for name, (form, instead) in FORMS.items():
        value = getattr(given, name, None) or 1
        if value > 1:
            yield f"{form} (parallelism_config: {name}={value})", instead
        variable = f"PARALLELISM_CONFIG_{name.upper()}"
        value = os.environ.get(variable, "1")
        if is_set("ACCELERATE_USE_PARALLELISM_CONFIG") and value.isdigit() and int(value) > 1:
            yield f"{form} ({variable}={value})", instead
    if is_set("ACCELERATE_USE_MEGATRON_LM"):
        yield "Megatron-LM's tensor and pipeline parallelism (ACCELERATE_USE_MEGATRON_LM)", INSTEAD
    if is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        yield "FSDP1 (FSDP_VERSION is not 2)", "set fsdp_version: 2 in accelerate's configuration"
    # transformers' own settings; it has made a dict of fsdp_config where fsdp is on.
    settings = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if args.fsdp and str(settings.get("version", settings.get("fsdp_version", 2))) != "2":
        yield "FSDP1 (fsdp_config: version)", "set version to 2"


def check_deepspeed(args: Any) -> None:
    """Refuses what DeepSpeed's configuration, or a setting beside it, cannot do; without DeepSpeed it does nothing.

    Raises:
        NotImplementedError: tensor, sequence or pipeline parallelism, or a setting that its engine has no place for.
        ValueError: ZeRO-3 without what saving needs, or with weights of another dtype than it would hold.
    """
    if not uses_deepspeed(args):
        return
    config: Mapping[str, Any] = args.deepspeed_plugin.deepspeed_config
    for name, key in (("tensor_parallel", "autotp_size"), ("pipeline", "stages"), ("sequence_parallel_size", "")):
        value = config.get(name, 1) if not key else (config.get(name) or {}).get(key, 1)
        if isinstance(value, int) and value > 1:
            form = {"tensor_parallel": "tensor", "pipeline": "pipeline"}.get(name, "sequence")
            raise NotImplementedError(f"{form} parallelism (DeepSpeed: {name}) is not supported: {INSTEAD}")
    zero = config.get("zero_optimization") or {}
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ValueError(
            "DeepSpeed ZeRO-3 must gather the weights to save a model: set zero3_save_16bit_model: true in "
            "accelerate's configuration (stage3_gather_16bit_weights_on_model_save in DeepSpeed's)"
        )
    half = args.dtype in ("bfloat16", "float16")
    if zero.get("stage") == 3 and args.dtype != "auto" and args.dtype is not None and half != (args.bf16 or args.fp16):
        remedy = f"leave --{'bf16' if args.bf16 else 'fp16'} out" if not half else "add --bf16"
        raise ValueError(
            f"--dtype {args.dtype}: DeepSpeed ZeRO-3 holds the weights in float32, or with --bf16 in bfloat16 "
            f"(float32 for the optimizer): {remedy}"
        )
    if args.non_finite == "skip":
        raise NotImplementedError(
            "non_finite='skip' is not possible with DeepSpeed, whose engine takes the step together with the backward "
            "pass; use 'stop'"
        )
    if args.weight_update == "stochastic_rounding":
        raise NotImplementedError(
            "weight_update='stochastic_rounding' is not possible with DeepSpeed, which keeps float32 weights of its "
            "own for the optimizer; use 'auto'"
        )


def check_engine(args: Any, fsdp: bool, deepspeed: bool) -> None:
    """Refuses what only shows once the engine has been set up.

    Args:
        args: the settings (`SDPOConfig`).
        fsdp, deepspeed: whether the engine is one of these.

    Raises:
        NotImplementedError: several GPUs in one process.
        ValueError: FSDP was asked for, and accelerate left it out.
    """
    if args.n_gpu > 1:
        raise NotImplementedError(
            "SDPOTrainer: nn.DataParallel is not supported; start one process per GPU "
            "(torchrun or accelerate launch), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if is_set("ACCELERATE_USE_FSDP") and not fsdp:
        raise ValueError(
            "SDPOTrainer: FSDP must run on GPUs: accelerate leaves it out on this device "
            f"({args.device.type}). Start without it, or with DDP"
        )
    if deepspeed and args.max_tokens_per_pack is not None:
        # Its engine counts backward passes and steps by itself.
        logger.warning(
            "max_tokens_per_pack does not apply under DeepSpeed, which takes one backward pass per "
            "micro-batch: per_device_train_batch_size bounds the memory"
        )


def check_loaded_dtype(model: nn.Module) -> None:
    """Raises ValueError where DeepSpeed ZeRO-3 has loaded the weights in another dtype than asked for."""
    wanted = getattr(getattr(model, "config", None), "dtype", None)
    parameter = next(model.parameters())
    if is_partitioned(model) and isinstance(wanted, torch.dtype) and wanted != parameter.dtype:
        raise ValueError(
            f"SDPOTrainer: the model's weights are {wanted}, but DeepSpeed ZeRO-3 holds them in {parameter.dtype}: "
            "add --bf16 for bfloat16 (float32 for the optimizer), or --dtype float32"
        )


def check_quantized_launch(quantize: str | None, args: Any) -> None:
    """Raises NotImplementedError where weights packed by bitsandbytes would be sharded."""
    if quantize is None:
        return
    sharded = "FSDP" if is_set("ACCELERATE_USE_FSDP") or args.fsdp else None
    if uses_deepspeed(args):
        sharded = "DeepSpeed"
    if sharded is not None:
        raise NotImplementedError(
            f"--quantize {quantize} is not possible with {sharded}: bitsandbytes' packed weights cannot be divided as "
            "the others are; use DDP (torchrun), where each GPU holds the packed model"
        )


def check_placement(model: nn.Module) -> None:
    """Refuses a model whose layers or weights are divided among devices already.

    Raises:
        NotImplementedError: the ``device_map`` that it was loaded with names several devices, or it has a plan of
            tensor parallelism (``tp_plan``).
    """
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise NotImplementedError(
            f"SDPOTrainer: a model on several devices (device_map: {', '.join(sorted(devices))}) is not supported: "
            f"leave device_map out; {INSTEAD}"
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise NotImplementedError(
            f"SDPOTrainer: tensor parallelism (the model was loaded with tp_plan) is not supported: {INSTEAD}"
        )
