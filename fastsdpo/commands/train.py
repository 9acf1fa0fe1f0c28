"""Trains a model on interactions: `fastsdpo train` or `python -m fastsdpo.train`.

    fastsdpo prepare conversations.jsonl -o interactions.jsonl --eval-fraction 0.05
    fastsdpo train interactions.jsonl --model MODEL -o runs/first --dry-run
    fastsdpo train interactions.jsonl --model MODEL -o runs/first

It loads model and data, tokenizes, checks what hindsight does to a sample, measures the held-out
loss, trains, measures again, and leaves in the output folder: ``model/`` (weights and tokenizer,
for ``AutoModelForCausalLM.from_pretrained``; with --lora the adapter), ``checkpoint-*/``,
``report.json`` and ``report.png``. It does not prepare conversations, and it knows no scheduler:
several processes are started with ``torchrun -m fastsdpo.train`` or ``accelerate launch``.

Where --model is the folder of an adapter (``model/`` of a run with --lora), training goes on with it.

Every setting that has no flag here is a field of `SDPOConfig`: ``--set name=value``.

With --resume the same command, given again and again, goes on from the newest whole checkpoint (or
begins, where there is none) and comes to the same result as a run that nothing stopped.

Exit status: 0 done; 1 an input, model or setting cannot be used, or the output cannot be written; 2
wrong options; 3 a loss or gradient was not finite, with a checkpoint of the state before it; 130 / 143
stopped by Ctrl-C / SIGTERM with a checkpoint. Errors are one sentence; the environment variable
FASTSDPO_TRACEBACK=1 shows where they come from.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastsdpo.data import load_interactions
from fastsdpo.ops.backend import describe_backend
from fastsdpo.trainer.config import PRESETS, SDPOConfig

if TYPE_CHECKING:
    from fastsdpo.trainer.callbacks import BeforeTraining

logger = logging.getLogger("fastsdpo.train")

# Shown as one sentence; any other error is a fault of this package and shows its traceback.
USER_ERRORS = (
    ValueError,
    TypeError,
    NotImplementedError,
    OSError,
    ImportError,
    torch.OutOfMemoryError,
)
TRAINS = ("train", "online")
STOPPED = 128  # + the signal's number, as shells count: 130 for Ctrl-C, 143 for SIGTERM


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsdpo train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given stays the preset's
    )
    run = parser.add_argument_group("run")
    run.add_argument("data", help="interactions, as `fastsdpo prepare` writes them")
    run.add_argument("-o", "--output", required=True, metavar="FOLDER")
    run.add_argument(
        "--eval-data",
        metavar="FILE",
        default=None,
        help="held-out interactions (default: DATA's .eval file, if there)",
    )
    run.add_argument(
        "--allow-leaks", action="store_true", help="warn, and do not refuse, where held-out conversations are in DATA"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="load, tokenize, report lengths, memory and steps, and stop",
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="CHECKPOINT",
        help="go on from a checkpoint, or from the output folder's newest; without one, begin",
    )
    run.add_argument("--overwrite", action="store_true", default=False, help="start anew in a folder that holds a run")
    run.add_argument("--quiet", action="store_true", default=False, help="print nothing but errors")

    add_model_options(parser)
    add_setting_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, from where, and what of it is trained; read by `load`."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="folder, hub id or GGUF file; an adapter is trained on")
    model.add_argument("--gguf-file", default=None, help="the GGUF file in that folder or repository")
    model.add_argument("--tokenizer", default=None, help="default: the model's")
    model.add_argument("--revision", default=None, help="branch, tag or commit of a hub id")
    model.add_argument(
        "--dtype", help="of the weights: float32, bfloat16, auto (default: float32 on a CPU, else the checkpoint's)"
    )
    model.add_argument("--attn-implementation", default=None)
    model.add_argument("--trust-remote-code", action="store_true", default=False)
    model.add_argument(
        "--lora",
        type=int,
        default=None,
        metavar="RANK",
        help="train a new LoRA adapter of this rank on all linear layers",
    )
    model.add_argument("--lora-alpha", type=int, default=None, help="default: twice the rank")


def add_setting_options(parser: argparse.ArgumentParser, presets: Any = PRESETS) -> None:
    """Flags named as the fields of `SDPOConfig` that they set; read by `read_config`."""
    method = parser.add_argument_group("method")
    method.add_argument(
        "--preset",
        default="exact",
        choices=list(presets),
        help="exact (default): reverse KL, summed over the whole vocabulary; paper: "
        "the published recipe, which is another objective (docs/objectives.md)",
    )
    method.add_argument(
        "--mode",
        choices=("full", "topk", "sampled_token"),
        help="the divergence over all tokens, over the likeliest, or the policy gradient of the answer's own tokens",
    )
    method.add_argument("--alpha", type=float, help="0 forward KL, 1 reverse KL, between JSD")
    method.add_argument("--topk", type=int)
    method.add_argument("--teacher", choices=("live", "ema", "frozen", "trust_region"))
    method.add_argument("--ema-rate", type=float)
    method.add_argument(
        "--guidance", type=float, metavar="G", help="how much a follow-up counts in the teacher (default: 1)"
    )
    method.add_argument("--neutral-followup", metavar="TEXT", help="one that says nothing; its effect is subtracted")
    method.add_argument("--reference-kl", type=float, help="times KL(student || initial model)")
    method.add_argument("--normalization", choices=("sequence", "token"))
    method.add_argument("--ignore-first-k", type=int, help="tokens of each answer")

    text = parser.add_argument_group("text")
    text.add_argument("--template", help="offline-v1, note, ..., or a text with {o}")
    text.add_argument("--max-prompt-length", type=int, metavar="TOKENS")
    text.add_argument("--max-completion-length", type=int, metavar="TOKENS")
    text.add_argument("--max-followup-length", type=int, metavar="TOKENS")

    steps = parser.add_argument_group("optimization")
    steps.add_argument("--learning-rate", type=float)
    steps.add_argument("--epochs", type=float, dest="num_train_epochs")
    steps.add_argument("--max-steps", type=int)
    steps.add_argument(
        "--global-batch-size",
        type=int,
        metavar="N",
        help="interactions per step over all processes; --batch-size is then the most of one micro-batch",
    )
    steps.add_argument(
        "--batch-size",
        type=int,
        dest="per_device_train_batch_size",
        help="interactions per process and step, times --accumulate",
    )
    steps.add_argument("--accumulate", type=int, dest="gradient_accumulation_steps")
    steps.add_argument("--warmup", type=float, dest="warmup_steps", help="steps, or a share below 1")
    steps.add_argument("--schedule", dest="lr_scheduler_type", help="cosine, constant, linear, ...")
    steps.add_argument("--clip", type=float, dest="max_grad_norm", help="of the gradient's norm")
    steps.add_argument("--seed", type=int)

    compute = parser.add_argument_group("computation")
    compute.add_argument("--sharing", choices=("auto", "conversation", "interaction", "off"))
    compute.add_argument("--max-tokens-per-pack", type=int, metavar="TOKENS", help="of one forward pass")
    compute.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    compute.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    compute.add_argument("--cpu", action="store_true", dest="use_cpu")

    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--logging-steps", type=int)
    logs.add_argument("--eval-steps", type=int)
    logs.add_argument("--save-steps", type=int)
    logs.add_argument("--save-total-limit", type=int)
    logs.add_argument("--report-to", nargs="+", help="wandb, tensorboard, ... (default: none)")
    logs.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of the configuration; the value is JSON or text",
    )


def read_config(options: argparse.Namespace, config: Any = SDPOConfig, **settings: Any) -> Any:
    """The preset, changed by ``settings`` and then by the flags that were given.

    Args:
        config: `SDPOConfig`, or a subclass with presets of the same kind.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    names = {field.name for field in dataclasses.fields(config)}
    flags = {*names, "gradient_checkpointing"}
    given = {name: value for name, value in vars(options).items() if name in flags}
    for steps, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if steps in given:
            given[strategy] = "steps"
    for text in options.set:
        name, equals, value = text.partition("=")
        if name.endswith("_token"):
            raise ValueError(f"--set {name}: tokens are read from the environment only (HF_TOKEN)")
        if not equals or name not in names:
            raise ValueError(f"--set must be NAME=VALUE with a field of {config.__name__}, got {text!r}")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value
    if given.pop("gradient_checkpointing", False):
        # transformers is renaming it; the new name where there is one.
        new = "activation_checkpointing"
        given[new if new in names else "gradient_checkpointing"] = True
    defaults: dict[str, Any] = {
        "report_to": [],
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,  # the progress shown is our own
    }
    given = {**defaults, **settings, **given}
    return config.preset(options.preset, output_dir=options.output, **given)


def check_settings(config: Any, lora: int | None) -> None:
    """What would otherwise be found out after minutes of loading a model.

    Raises:
        ValueError: the template or a name of ``report_to`` does not exist.
        ImportError: a package that ``report_to`` or an adapter of rank ``lora`` needs is missing.
    """
    from transformers.integrations import integration_utils

    from fastsdpo.data import HindsightTemplate

    HindsightTemplate.parse(config.template)
    known = integration_utils.INTEGRATION_TO_CALLBACK
    available = integration_utils.get_available_reporting_integrations()
    for name in set(config.report_to) - set(available):
        if name not in known:
            raise ValueError(f"--report-to must be of {', '.join(known)}, got {name!r}")
        try:
            known[name]()
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"--report-to {name}: {error}") from error
    if lora and importlib.util.find_spec("peft") is None:
        raise ImportError(
            "a LoRA adapter needs the package peft; install it with: pip install peft, or train all "
            "weights with --lora 0"
        )


def check_data(*files: str | None) -> None:
    """Reads the first interaction of each file, before minutes are spent on a model.

    Raises:
        OSError, TypeError, ValueError: there is none, with file and line.
    """
    for file in files:
        if file is not None and not Path(file).is_fifo():  # that can be read once only
            next(load_interactions(file), None)


def load(options: argparse.Namespace, config: Any, *, lora: int | None = None) -> tuple[Any, Any, Any]:
    """``(model, tokenizer, adapter)`` of the model options.

    The adapter is the `LoraConfig` of a new one, or None: all weights are trained, or the adapter
    that --model names, which the model then has.

    Args:
        lora: the rank where --lora is not given; None: no new adapter.

    Raises:
        ValueError: --lora asks for another adapter than the one that --model names.
    """
    from fastsdpo.modeling import load_model_and_tokenizer
    from fastsdpo.trainer.teacher import is_peft

    rank = lora if options.lora is None else options.lora
    check_settings(config, rank)
    model, tokenizer = load_model_and_tokenizer(
        options.model,
        gguf_file=options.gguf_file,
        tokenizer=options.tokenizer,
        revision=options.revision,
        dtype=config.dtype,
        device=config.device,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    if is_peft(model):
        check_same_adapter(options, model.active_peft_config)
        logger.info("training goes on with the adapter of %s", options.model)
        return model, tokenizer, None
    if not rank:
        return model, tokenizer, None
    from peft import LoraConfig

    alpha = options.lora_alpha or 2 * rank
    return model, tokenizer, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def check_same_adapter(options: argparse.Namespace, adapter: Any) -> None:
    """Raises ValueError where --lora or --lora-alpha differ from the adapter that is trained on."""
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    for flag, wanted, name in (("--lora", options.lora, "r"), ("--lora-alpha", options.lora_alpha, "lora_alpha")):
        found = getattr(adapter, name, None) if kind == "LORA" else None
        if wanted is None or wanted == found:
            continue
        has = f"{kind} adapter" if found is None else f"LoRA adapter with {name}={found}"
        raise ValueError(
            f"{flag} must be left out for --model {options.model}, got {wanted}: it is a {has}, and "
            "training goes on with that. For anything else merge it into its base model first "
            "(merge_and_unload of PEFT)"
        )


def held_out(options: argparse.Namespace) -> str | None:
    """The held-out file: as given, or where `fastsdpo prepare --eval-fraction` puts it."""
    if options.eval_data is not None:
        return options.eval_data
    data = Path(options.data)
    beside = data.with_name(f"{data.stem}.eval{data.suffix}")
    return str(beside) if beside.is_file() else None


def choose_checkpoint(trainer: Any, options: argparse.Namespace, say: Any) -> str | None:
    """Where to go on from: what --resume names, or the newest whole checkpoint, or None: begin.

    Raises:
        ValueError: all checkpoints are damaged, or a finished run has none to go on from.
    """
    if options.resume is not True:
        return options.resume
    checkpoint = trainer.find_checkpoint()
    if checkpoint is None and (Path(options.output) / "report.json").exists():
        raise ValueError(f"{options.output} holds a run that ended without checkpoints; --overwrite starts anew")
    say(
        f"no checkpoint in {options.output}: from the beginning"
        if checkpoint is None
        else f"going on from {checkpoint}"
    )
    return checkpoint


def measure_before(
    trainer: Any, output: Path, checkpoint: str | None, tell: Callable[[dict[str, float]], None]
) -> BeforeTraining:
    """Has the held-out figures measured before the first step; a run that goes on reads them.

    Args:
        tell: called with the figures when they are measured.
    """
    from fastsdpo.trainer.callbacks import BeforeTraining

    before = BeforeTraining(trainer, output / "before.json", tell)
    if trainer.eval_dataset is not None and checkpoint is None:
        trainer.add_callback(before)
    elif trainer.eval_dataset is not None and before.path.exists():
        before.metrics = json.loads(before.path.read_text("utf-8"))
    return before


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    return run_command("train", train, build_parser().parse_args(argv))


def run_command(name: str, run: Any, options: argparse.Namespace) -> int:
    """``run(options)`` with errors as sentences and exit statuses; see the module."""
    from fastsdpo.trainer import NonFiniteError

    logger = logging.getLogger("fastsdpo")
    level = logger.level
    logger.setLevel(logging.ERROR if options.quiet else logging.INFO)
    # Not on the root: what other packages show themselves would be shown twice.
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    # What peft asks of transformers is no news to the user.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        return run(options)
    except NonFiniteError as error:
        print(f"fastsdpo {name}: {error}", file=sys.stderr)
        return 3
    except USER_ERRORS as error:
        if os.environ.get("FASTSDPO_TRACEBACK"):
            raise
        print(f"fastsdpo {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        lost = ", without a checkpoint of the steps since the last" if name in TRAINS else ""
        print(f"fastsdpo {name}: stopped at once{lost}", file=sys.stderr)
        return STOPPED + 2
    finally:
        logger.setLevel(level)


def train(options: argparse.Namespace) -> int:
    """The run, in order."""
    from transformers import PrinterCallback

    from fastsdpo.trainer import SDPOTrainer
    from fastsdpo.trainer.callbacks import Progress, StopOnSignal, clock
    from fastsdpo.trainer.checkpoints import writing
    from fastsdpo.trainer.report import dry_run_report, plot_history, write_report

    config = read_config(options)
    output = Path(options.output)
    used = (output / "report.json").exists() or any(output.glob("checkpoint-*"))
    if used and not (options.resume or options.overwrite or options.dry_run):
        raise ValueError(f"{output} holds a run; pass --resume to go on with it, or --overwrite")
    show = not options.quiet and config.process_index == 0

    def say(text: str) -> None:
        if show:
            print(text, flush=True)

    check_data(options.data, held_out(options))
    say(describe_backend(config.device.type, config.dtype))
    model, tokenizer, adapter = load(options, config)
    stop = StopOnSignal()
    trainer = SDPOTrainer(
        model=model,
        args=config,
        train_dataset=options.data,
        eval_dataset=held_out(options),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[stop, *([Progress()] if show else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say(
        f"model {options.model}: {trained:,} of "
        f"{sum(p.numel() for p in trainer.model.parameters()):,} weights are trained, on "
        f"{config.device}"
    )
    say(dry_run_report(trainer.model, config, trainer.train_dataset, trainer.eval_dataset, trainer.sharing))
    if options.dry_run:
        check = trainer.check_teacher()
        say("" if check is None else str(check))
        return 0

    trainer.check_output(model=True)
    checkpoint = choose_checkpoint(trainer, options, say)
    first = measure_before(
        trainer,
        output,
        checkpoint,
        lambda metrics: say(f"held-out loss before training: {metrics['eval_loss']:.4f}"),
    )
    started = time.perf_counter()
    with stop:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    if stop.received is not None:
        say(
            f"stopped at step {result.global_step} of {trainer.state.max_steps}; "
            "the same command with --resume goes on"
        )
        return STOPPED + stop.received
    before, after = first.metrics, None
    if trainer.eval_dataset is not None:
        after = trainer.evaluate()
    with writing(f"{output / 'model'}"):
        trainer.save_model(str(output / "model"))
    if trainer.is_world_process_zero():
        names = {field.name for field in dataclasses.fields(SDPOConfig)}
        settings = {name: value for name, value in config.to_dict().items() if name in names}
        write_report(
            output / "report.json",
            {
                "model": options.model,
                "data": options.data,
                "interactions": len(trainer.train_dataset),
                "left_out": trainer.train_dataset.dropped,
                "sharing": trainer.sharing,
                "steps": result.global_step,
                "seconds": seconds,
                "before": before,
                "after": after,
                "settings": settings,
                "history": trainer.state.log_history,
            },
        )
        plotted = plot_history(trainer.state.log_history, output / "report.png")
    if after is not None and before is not None:
        say(f"held-out loss: {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after")
    if show:
        plot = " and report.png" if plotted else " (matplotlib is not installed: no plot)"
        say(f"trained {result.global_step} steps in {clock(seconds)}; {output}/model, report.json{plot}")
    return 0
