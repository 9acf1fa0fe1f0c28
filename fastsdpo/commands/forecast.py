"""`fastsdpo train --dry-run` without weights: lengths, steps and memory from configuration and tokenizer alone."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastsdpo.commands import run
from fastsdpo.commands.options import model_source, read_config
from fastsdpo.commands.paths import held_out
from fastsdpo.commands.running import DONE
from fastsdpo.data.chat_template import reads_clock
from fastsdpo.data.templates import choose_template
from fastsdpo.model_config import has_weights, load_configuration
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.launch import is_set, uses_deepspeed
from fastsdpo.trainer.memory import Setting, card_of, lora_adapter, memory_lines, parse_size
from fastsdpo.trainer.memory_walk import ModelShape, Processes
from fastsdpo.trainer.memory_zero import ZeroSettings
from fastsdpo.trainer.model import CHECKPOINTING, choose_checkpointing
from fastsdpo.trainer.pack_table import PackTable
from fastsdpo.trainer.presets import default_bf16, split_batch
from fastsdpo.trainer.report import dry_run_report
from fastsdpo.trainer.sharing import PrefixSharing
from fastsdpo.trainer.template_date import run_date

if TYPE_CHECKING:
    from fastsdpo.trainer import SDPOTrainer


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for options of a dry run that are unusable, or given without one."""
    if options.card is not None:
        parse_size(options.card)
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {options.processes}")
    if not options.dry_run:
        for name in ("card", "processes", "strategy"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} describes the machine of a forecast: add --dry-run, or leave it out")


def read_forecast_config(options: argparse.Namespace) -> SDPOConfig:
    """The configuration of a dry run, whose ``--ulysses`` divides the processes of the machine that it forecasts.

    Raises:
        ValueError: it does not, or `read_config` refuses a setting.
    """
    count = options.processes
    if not options.dry_run or count is None or "ulysses" not in options:
        return read_config(options, SDPOConfig)
    size = options.ulysses
    if size < 1 or count % size:
        raise ValueError(f"--ulysses must divide the number of processes ({count}), got {size}")
    delattr(options, "ulysses")
    config = read_config(options, SDPOConfig)
    config.ulysses = size
    return config


def needs_weights(options: argparse.Namespace, config: SDPOConfig) -> bool:
    """Whether a dry run loads the model: for the teacher check on this machine, if the weights are here."""
    elsewhere = options.card, options.processes, options.strategy
    here = all(value is None for value in elsewhere)
    return here and config.teacher_check > 0 and (options.gguf_file is not None or has_weights(options.model))


def forecast(options: argparse.Namespace, config: SDPOConfig, say: Callable[[str], None]) -> int:
    """The dry run from configuration and tokenizer alone; returns the exit status."""
    run.check_settings(config, options.lora)
    device = torch.device("cuda") if options.card is not None else config.device
    source = model_source(options)
    attention = source.pop("attn_implementation")
    found = load_configuration(**source, dtype=config.dtype, device=device)
    adapter = found.adapter
    if adapter is None and options.lora:
        adapter = lora_adapter(options.lora, options.lora_alpha)
    setting = setting_of(options, config, ModelShape(found.config, found.dtype, adapter, attention))
    args = setting.args
    model = setting.shape.make()
    if choose_checkpointing(args, model, setting.kind):
        say(CHECKPOINTING)
    say(f"model {options.model}: {run.describe_weights(model)}; no weights are loaded, so there is no teacher check")
    if reads_clock(found.tokenizer, args.chat_template_kwargs):  # type: ignore[arg-type]
        args.chat_template_date = run_date(args)
    args.template = choose_template(args.template, sum(p.numel() for p in model.parameters()))
    read = {"cache": args.token_cache, "workers": args.tokenizer_workers, "progress": not options.quiet}
    sets = [
        None
        if path is None
        else InteractionDataset.from_source(
            path, found.tokenizer, args.template, name=name, **args.tokenizer_options(), **read
        )
        for name, path in (("train_dataset", options.data), ("eval_dataset", held_out(options)))
    ]
    sharing = PrefixSharing(model, args, None, sets, one_pass=False).level
    assert sets[0] is not None
    table = PackTable(model, args, sets[0], sharing)
    say(dry_run_report(model, args, sets[0], sets[1], table, setting.processes.count))
    card = card_of(config.device) if options.card is None else parse_size(options.card)
    for line in memory_lines(setting, table, card):
        say(line)
    return DONE


def setting_of(options: argparse.Namespace, config: SDPOConfig, shape: ModelShape) -> Setting:
    """What the options say of the machine, and the configuration as it would be there."""
    count = options.processes or config.world_size
    processes = Processes(count, options.strategy) if options.strategy else _as_started(config, count)
    kind = "cuda" if options.card is not None else config.device.type
    args = copy.copy(config)
    if args.global_batch_size is not None:
        args.per_device_train_batch_size, args.gradient_accumulation_steps = split_batch(
            args.global_batch_size, count, args.per_device_train_batch_size
        )
    if kind == "cuda" and not config._bf16_given:
        args.bf16 = default_bf16(config.dtype, config.fp16, True)  # as on a GPU of today
    if processes.zero:
        args.max_tokens_per_pack = None  # a micro-batch is one pass of DeepSpeed's engine
    return Setting(shape, args, processes, kind)


def _as_started(config: SDPOConfig, count: int) -> Processes:
    """How this process was started."""
    if not uses_deepspeed(config):
        return Processes(count, "fsdp" if config.fsdp or is_set("ACCELERATE_USE_FSDP") else "ddp")
    zero = config.deepspeed_plugin.deepspeed_config.get("zero_optimization") or {}
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device") or "none"
        if device != "none":
            return Processes(count, f"DeepSpeed with {name} to {device}")
    stage = zero.get("stage", 0)
    return Processes(count, f"zero{stage}" if stage in (2, 3) else f"DeepSpeed ZeRO-{stage}", ZeroSettings.read(zero))


def of_trainer(trainer: SDPOTrainer) -> ModelShape:
    """The shape of the model that a trainer has loaded."""
    from fastsdpo.prefix import causal_lm
    from fastsdpo.trainer.adapters import is_peft

    causal = causal_lm(trainer.model)
    adapter = trainer.model.active_peft_config if is_peft(trainer.model) else None
    head = causal.get_output_embeddings().weight
    return ModelShape(causal.config, head.dtype, adapter, causal.config._attn_implementation)
