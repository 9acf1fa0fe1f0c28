"""What `train`, `online` and `chat` do around the training: the model of the options, checkpoints, the report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsdpo.commands.options import model_source
from fastsdpo.data import HindsightTemplate
from fastsdpo.data.templates import choose_template
from fastsdpo.prefix import whole_size
from fastsdpo.trainer.by_time import ByTime
from fastsdpo.trainer.callbacks import BeforeTraining, LastEvaluation, Progress, StopOnSignal
from fastsdpo.trainer.checkpoint_folders import writing

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from fastsdpo.online import OnlineSDPOTrainer
    from fastsdpo.trainer import SDPOConfig, SDPOTrainer

    AnyTrainer = SDPOTrainer | OnlineSDPOTrainer

# What belongs to one start of a run and not to the run; see `keep_options`.
NOT_KEPT = ("resume", "overwrite", "quiet", "dry-run", "show", "card", "processes", "strategy")
logger = logging.getLogger(__name__)


def shows(options: argparse.Namespace, config: SDPOConfig) -> bool:
    """Whether this process prints: the first one does, unless --quiet."""
    return not options.quiet and config.process_index == 0


def printer(show: bool) -> Callable[[str], None]:
    """Prints a line at once, or nothing."""
    return lambda text: print(text, flush=True) if show else None


def check_settings(config: SDPOConfig, lora: int | None) -> None:
    """What would otherwise be found out after minutes of loading a model.

    Raises:
        ValueError: the template or a name of ``report_to`` does not exist.
        ImportError: a package that ``report_to`` or an adapter of rank ``lora`` needs is missing.
    """
    from transformers.integrations import integration_utils

    HindsightTemplate.parse(choose_template(config.template, 0))
    known = integration_utils.INTEGRATION_TO_CALLBACK
    available = integration_utils.get_available_reporting_integrations()
    for name in set(config.report_to or []) - set(available):
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


def load(
    options: argparse.Namespace, config: SDPOConfig, *, lora: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LoraConfig | None]:
    """``(model, tokenizer, adapter)`` of the model options.

    The adapter is the `LoraConfig` of a new one, or None: all weights are trained, or the adapter
    that --model names, which the model then has.

    Args:
        lora: the rank where --lora is not given; None: no new adapter.

    Raises:
        ValueError: --lora asks for another adapter than the one that --model names; --quantize or --lora-alpha
            without one.
        ImportError: --quantize without bitsandbytes.
        NotImplementedError: --quantize where the weights would be sharded.
    """
    from transformers.utils.logging import disable_progress_bar

    from fastsdpo.modeling import is_adapter, load_model_and_tokenizer
    from fastsdpo.quantized import check_quantize
    from fastsdpo.trainer.adapters import is_peft
    from fastsdpo.trainer.launch import check_quantized_launch

    if options.quiet or not sys.stderr.isatty():
        disable_progress_bar()  # of loading, whose every state would be a line
    rank = lora if options.lora is None else options.lora
    for flag, value, least in (("--lora", rank, 0), ("--lora-alpha", options.lora_alpha, 1)):
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, got {value}")
    check_settings(config, rank)
    check_quantize(options.quantize)
    check_quantized_launch(options.quantize, config)
    adapts = options.quantize or options.lora_alpha is not None
    if adapts and not rank and not is_adapter(options.model, options.revision):
        if not options.quantize:
            raise ValueError("--lora-alpha needs an adapter: add --lora RANK")
        raise ValueError(
            f"--quantize {options.quantize} needs an adapter to train, since packed weights cannot take a step: add "
            "--lora RANK, or let --model name an adapter"
        )
    model, tokenizer = load_model_and_tokenizer(
        **model_source(options), dtype=config.dtype, device=config.device, quantize=options.quantize
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


def check_same_adapter(options: argparse.Namespace, adapter: PeftConfig) -> None:
    """Raises ValueError where --lora or --lora-alpha differ from the adapter that is trained on."""
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    for flag, wanted, name in (("--lora", options.lora, "r"), ("--lora-alpha", options.lora_alpha, "lora_alpha")):
        has = getattr(adapter, name, None) if kind == "LORA" else None
        if wanted is None or wanted == has:
            continue
        what = f"{kind} adapter" if has is None else f"LoRA adapter with {name}={has}"
        raise ValueError(
            f"{flag} must be left out for --model {options.model}, got {wanted}: it is a {what}, and "
            "training goes on with that. For anything else merge it into its base model first "
            "(fastsdpo merge)"
        )


def callbacks(stop: StopOnSignal, show: bool, *, bar: bool = True) -> list[TrainerCallback]:
    """What watches the training: signals, and on the process that prints its progress; ``bar``: as `Progress`."""
    return [stop, *([Progress(bar=bar)] if show else [])]


def keep_options(options: argparse.Namespace, trainer: AnyTrainer) -> None:
    """Writes ``run.yaml`` into the output folder: what was given, for ``--config``."""
    if not trainer.is_world_process_zero():
        return
    import yaml

    from fastsdpo._version import __version__

    given = {name: value for name, value in options.given.items() if name not in NOT_KEPT}
    command = "online" if "prompts" in given else "train" if "data" in given else "chat"
    text = (
        f"# What fastsdpo {__version__} {command} was given. Again, into another folder:\n"
        f"#   fastsdpo {command} --config {options.output}/run.yaml --output FOLDER\n"
        f"# All settings are in report.json.\n"
    )
    Path(options.output, "run.yaml").write_text(text + yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def describe_model(trainer: AnyTrainer, name: str) -> str:
    """How many of the model's weights are trained, and where."""
    return f"model {name}: {describe_weights(trainer.model)}, on {trainer.args.device}"


def describe_weights(model: Any) -> str:
    """How many of the weights are trained."""
    sizes = [(whole_size(p), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    return f"{trained:,} of {sum(size for size, _ in sizes):,} weights are trained"


def choose_checkpoint(trainer: AnyTrainer, options: argparse.Namespace, say: Callable[[str], None]) -> str | None:
    """Where to go on from: what --resume names, or the newest whole checkpoint, or None: begin.

    Raises:
        OSError: the output folder cannot be written to, or lacks room for the model.
        ValueError: all checkpoints are damaged, or a finished run has none to go on from.
    """
    trainer.check_output(model=True)
    if options.resume is not True:
        return options.resume
    checkpoint = trainer.find_checkpoint()
    if checkpoint is None and Path(options.output, "report.json").exists():
        raise ValueError(f"{options.output} holds a run that ended without checkpoints; --overwrite starts anew")
    begins = f"no checkpoint in {options.output}: from the beginning"
    say(begins if checkpoint is None else f"going on from {checkpoint}")
    return checkpoint


class Training(NamedTuple):
    """A training that has ended.

    Attributes:
        steps: of the optimizer, those of the runs before included.
        seconds: of this run.
        before: held-out figures before the first step; None without held-out data.
        stopped: the signal's number, where one stopped it.
        measured: the measures of each held-out interaction before the first step.
        after: held-out figures of the trained model, where training has measured them; else None.
    """

    steps: int
    seconds: float
    before: dict[str, float] | None
    stopped: int | None
    measured: list[dict[str, Any]]
    after: dict[str, float] | None


def run_training(
    trainer: AnyTrainer,
    options: argparse.Namespace,
    stop: StopOnSignal,
    checkpoint: str | None,
    say: Callable[[str], None],
    describe: Callable[[dict[str, float]], str],
) -> Training:
    """Trains, with the held-out figures measured before the first step; a run that goes on reads them.

    Where no steps are given for them, checkpoints and evaluations come by the clock.

    Args:
        stop: one of the trainer's callbacks.
        checkpoint: where to go on from; None: the beginning.
        say: prints a line.
        describe: the line about the held-out figures.
    """
    keep_options(options, trainer)
    evaluates = trainer.eval_dataset is not None and trainer.args.eval_strategy == "no"
    saves = trainer.args.save_strategy != "no" and not hasattr(options, "save_steps")
    trainer.add_callback(ByTime(evaluates, saves))
    path = Path(trainer.args.output_dir or "", "before.json")
    before = BeforeTraining(trainer, path, lambda metrics: say(describe(metrics)))
    if trainer.eval_dataset is not None and checkpoint is None:
        trainer.add_callback(before)
    elif trainer.eval_dataset is not None:
        before.read()
    last = LastEvaluation()
    trainer.add_callback(last)
    started = time.perf_counter()
    with stop:
        steps = trainer.train(resume_from_checkpoint=checkpoint).global_step
    if stop.received is not None:
        say(f"stopped at step {steps} of {trainer.state.max_steps}; the same command with --resume goes on")
    seconds = time.perf_counter() - started
    return Training(steps, seconds, before.metrics, stop.received, before.measured, last.of(trainer))


def save_model(trainer: AnyTrainer, options: argparse.Namespace) -> None:
    """Writes ``model/`` into the output folder, with a card.

    Raises:
        OSError: it cannot be written.
    """
    folder = str(Path(options.output, "model"))
    with writing(folder):
        trainer.save_model(folder)


def check_push(options: argparse.Namespace) -> None:
    """Finds out now whether --push-to-hub can work: makes the repository, private, where it is new.

    Raises:
        OSError: the hub cannot be reached, or does not let this user write there.
    """
    if options.push_to_hub is None or int(os.environ.get("RANK", 0)) or getattr(options, "dry_run", False):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        HfApi().create_repo(options.push_to_hub, private=True, exist_ok=True)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub must be OWNER/NAME, got {options.push_to_hub!r}: {error}") from error
    except Exception as error:  # whatever the hub's HTTP library raises
        raise OSError(
            f"--push-to-hub {options.push_to_hub}: the repository cannot be made or written to (is HF_TOKEN set, or "
            f"did `hf auth login` run?): {error}"
        ) from error


def push(trainer: AnyTrainer, options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Uploads ``model/`` where --push-to-hub says.

    Raises:
        OSError: that failed; the text says how to upload it by hand.
    """
    if options.push_to_hub is None or not trainer.is_world_process_zero():
        return
    from huggingface_hub import HfApi

    folder, name = Path(options.output, "model"), options.push_to_hub
    try:
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Trained with fastsdpo")
    except Exception as error:  # whatever the hub's HTTP library raises
        raise OSError(f"{folder} is saved, but not uploaded: {error}. Again: hf upload {name} {folder}") from error
    say(f"uploaded to {name}")


def report_of(trainer: AnyTrainer, training: Training, after: dict[str, float] | None) -> dict[str, Any]:
    """What ``report.json`` holds of any training: steps, time, held-out figures, settings, logs."""
    names = {field.name for field in dataclasses.fields(trainer.args)}
    return {
        "steps": training.steps,
        "seconds": training.seconds,
        "before": training.before,
        "after": after,
        "settings": {name: value for name, value in trainer.args.to_dict().items() if name in names},
        "history": trainer.state.log_history,
    }
