"""`fastsdpo online`, in order: prompts and user, model, training, what it leaves behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsdpo.commands import run
from fastsdpo.commands.options import read_config, read_text
from fastsdpo.commands.running import DEGENERATE, DONE, STOPPED
from fastsdpo.commands.users import given_user_options, make_user
from fastsdpo.online.config import OnlineSDPOConfig
from fastsdpo.online.presets import PERSONAL_LORA
from fastsdpo.online.prompts import PromptDataset
from fastsdpo.online.terminal import unechoed
from fastsdpo.online.users import UNRELATED
from fastsdpo.ops.backend import describe_backend
from fastsdpo.trainer.callbacks import StopOnSignal, clock
from fastsdpo.trainer.report import write_report

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from fastsdpo.online import OnlineSDPOTrainer
    from fastsdpo.online.users import UserSimulator


def online(options: argparse.Namespace) -> int:
    """The run; with a person at the terminal, who may type before being asked."""
    with unechoed() if options.terminal else contextlib.nullcontext():
        return train_online(options)


def train_online(options: argparse.Namespace) -> int:
    """The run, in order."""
    config = read_config(options, OnlineSDPOConfig)
    run.check_push(options)
    show = run.shows(options, config)
    say = run.printer(show)
    stop = StopOnSignal()
    prompts, eval_prompts = read_prompts(options)
    user = make_user(options)
    check_headroom(options, user)
    say(describe_backend(config.device.type, config.dtype))
    trainer = make_trainer(
        options, config, user, prompts, eval_prompts, run.callbacks(stop, show, bar=not options.terminal)
    )
    answers = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    say(
        f"{run.describe_model(trainer, options.model)}; {len(prompts)} prompts, "
        f"{answers * config.num_generations} answers a step"
    )
    checkpoint = run.choose_checkpoint(trainer, options, say)
    if checkpoint is None:
        trainer.forget_answers(0)  # those of a run before, of which nothing else is left
    headroom = measure_headroom(trainer, options, user, say, new=checkpoint is None)
    training = run.run_training(
        trainer, options, stop, checkpoint, say, lambda metrics: f"before   {summary(metrics, 'eval_')}"
    )
    if training.stopped is not None:
        return STOPPED + training.stopped
    after = training.after
    if after is None and trainer.eval_dataset is not None:
        trainer.forget_answers(training.steps)  # they are given again, the same
        after = trainer.evaluate()
    if after is not None:
        say(f"after    {summary(after, 'eval_')}")
    run.save_model(trainer, options)
    report(trainer, options, user, training, after, headroom, say)
    run.push(trainer, options, say)
    if trainer.degenerate_stop is not None:
        print(f"fastsdpo online: stopped: {trainer.degenerate_stop}", file=sys.stderr)
        return DEGENERATE
    return DONE


def read_prompts(options: argparse.Namespace) -> tuple[PromptDataset, PromptDataset | None]:
    """The prompts to train on and the held-out ones, where a file of them is named."""
    system = None if options.system is None else read_text(options.system)
    prompts = PromptDataset.from_source(options.prompts, "train_dataset", system)
    if options.eval_prompts is None:
        return prompts, None
    return prompts, PromptDataset.from_source(options.eval_prompts, "eval_dataset", system)


def check_headroom(options: argparse.Namespace, user: UserSimulator) -> None:
    """Raises ValueError where --headroom cannot be measured."""
    if options.headroom and (options.eval_prompts is None or not hasattr(user, "wishes")):
        raise ValueError("--headroom needs --eval-prompts and a user of rules (--rule or --wish)")


def measure_headroom(
    trainer: OnlineSDPOTrainer, options: argparse.Namespace, user: Any, say: Callable[[str], None], *, new: bool
) -> dict[str, dict[str, float]] | None:
    """Held-out figures with the wish in the prompt, and with an unrelated remark; None: not asked for.

    Args:
        new: measure; else read what the run that goes on has measured.
    """
    path = Path(options.output, "headroom.json")
    if not options.headroom:
        return None
    if not new and path.exists():
        return json.loads(path.read_text("utf-8"))
    if trainer.sharded:
        raise ValueError(
            "--headroom is measured before training, when FSDP2 and DeepSpeed have not divided the model yet: leave "
            "it out, or measure it in one process"
        )
    said = {"wish in the prompt": user.wishes, "unrelated remark in the prompt": UNRELATED[0]}
    found = {}
    for name, text in said.items():
        found[name] = trainer.evaluate_told(text)
        say(f"{name}: {summary(found[name], 'eval_')}")
    if trainer.is_world_process_zero():
        write_report(path, found)
    return found


def make_trainer(
    options: argparse.Namespace,
    config: OnlineSDPOConfig,
    user: UserSimulator,
    prompts: PromptDataset,
    eval_prompts: PromptDataset | None,
    callbacks: list[TrainerCallback],
) -> OnlineSDPOTrainer:
    """The trainer of the options, with the model loaded."""
    from transformers import PrinterCallback

    from fastsdpo.online.trainer import OnlineSDPOTrainer

    # The preset's learning rate is an adapter's.
    rank = PERSONAL_LORA if options.preset == "personal" else None
    model, tokenizer, adapter = run.load(options, config, lora=rank)
    trainer = OnlineSDPOTrainer(
        model, config, user, prompts, eval_prompts, tokenizer, peft_config=adapter, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def report(
    trainer: OnlineSDPOTrainer,
    options: argparse.Namespace,
    user: UserSimulator,
    training: run.Training,
    after: dict[str, float] | None,
    headroom: dict[str, dict[str, float]] | None,
    say: Callable[[str], None],
) -> None:
    """Writes ``report.json``, and says what came of the run."""
    failures = getattr(user, "failures", {})
    if trainer.is_world_process_zero():
        write_report(
            Path(options.output, "report.json"),
            {
                "model": options.model,
                "prompts": options.prompts,
                "system": options.system,
                "user": given_user_options(options),
                "user_failures": failures,
                "interactions": trainer.interactions,
                "stopped": trainer.degenerate_stop,
                "headroom": headroom,
                **run.report_of(trainer, training, after),
            },
        )
    if failures:
        say(f"interactions left out, as the user could not be asked: {failures}")
    say(f"trained {training.steps} steps in {clock(training.seconds)}; {options.output}/model, report.json")


def summary(metrics: dict[str, float], prefix: str) -> str:
    """Satisfaction, length, content and degenerate answers of a log or an evaluation."""
    parts = []
    for name, form in (
        ("satisfaction", "satisfied {:.0%}"),
        ("response_words", "{:.1f} words"),
        ("response_length", "{:.0f} tokens"),
        ("keyword_recall", "question's keywords {:.0%}"),
        ("new_keywords", "new {:.1f}"),
        ("nothing_new", "nothing new {:.0%}"),
        ("refusals", "refusals {:.0%}"),
        ("degenerate", "degenerate {:.0%}"),
    ):
        if f"{prefix}{name}" in metrics:
            parts.append(form.format(metrics[f"{prefix}{name}"]))
    return "  ".join(parts)
