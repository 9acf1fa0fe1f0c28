"""Trains a model on a user's reactions to its own answers: `fastsdpo online`.

    fastsdpo online prompts.txt --model MODEL -o runs/brief --rule max_sentences=1 \
        --wish "Please answer in one very short sentence."

Prompts (lines of text, or rows as `fastsdpo prepare` writes them) are answered by the model, the user
reacts to each answer, and the model learns from the reactions. The user is one of

    --rule NAME=VALUE ...          fixed wishes, checked by rule (`fastsdpo online --list-rules`)
    --persona TEXT                 played by a language model: --user-url and --user-model for an
                                   OpenAI-compatible endpoint (its key in OPENAI_API_KEY), or
                                   --user-local for a model on this machine
    --terminal                     you

With --then-rule or --then-persona the wishes change after --flip-at interactions. --preset personal is the recipe
that was measured to learn one user's wish (docs/online.md); it trains a LoRA adapter of rank 16 where --lora says
nothing else. A run leaves in the output folder:
``model/``, ``checkpoint-*/``, ``interactions.jsonl`` (which `fastsdpo train` can read),
``eval_answers.jsonl`` (held-out answers) and ``report.json``. Every setting without a flag is a field
of `OnlineSDPOConfig`: ``--set name=value``.

Exit status: that of `fastsdpo train`; 4 where --stop-when-degenerate stopped the run, with a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsdpo.commands import run
from fastsdpo.commands.options import (
    DEGENERATE,
    DONE,
    LOST,
    STOPPED,
    add_field_options,
    add_model_options,
    add_push_option,
    add_resume_options,
    add_setting_options,
    read_config,
    read_text,
    refuse,
    run_command,
)
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.paths import check_folder
from fastsdpo.commands.users import add_user_options, given_user_options, make_user
from fastsdpo.online.config import PERSONAL_LORA, PRESETS, OnlineSDPOConfig
from fastsdpo.online.prompts import PromptDataset
from fastsdpo.online.rules import describe
from fastsdpo.online.users import UNRELATED
from fastsdpo.ops.backend import describe_backend
from fastsdpo.trainer.callbacks import StopOnSignal, clock
from fastsdpo.trainer.report import write_report

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from fastsdpo.online import OnlineSDPOTrainer
    from fastsdpo.online.users import UserSimulator


def build_parser() -> Parser:
    parser = Parser(
        "online",
        __doc__,
        settings=OnlineSDPOConfig.__dataclass_fields__,
        argument_default=argparse.SUPPRESS,  # what is not given stays the preset's
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "prompts", help="what users ask: a text file, one per line, or rows with 'prompt' (JSON, JSON Lines, Parquet)"
    )
    group.add_argument("-o", "--output", required=True, metavar="FOLDER", help="what the run leaves behind")
    parser.add_config_option(group)
    group.add_argument("--eval-prompts", metavar="FILE", default=None, help="held-out prompts")
    group.add_argument(
        "--headroom",
        action="store_true",
        default=False,
        help="first answer the held-out prompts with the wish in the prompt, and with an unrelated remark: a wish "
        "that the model does not follow when told can hardly be learned from follow-ups",
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        default=None,
        help="a system prompt, the first message of each prompt; @FILE reads it. That of the paper's experiment "
        "with TL;DR asks for a summary of one or two sentences that begins with 'TL;DR:', and nothing else",
    )
    add_resume_options(group)
    add_push_option(group)
    group.add_argument("--list-rules", action=ListRules, nargs=0, help="print the rules, and stop")
    add_user_options(parser)
    add_model_options(parser)

    add_field_options(parser.add_argument_group("answers"), OnlineSDPOConfig, ANSWERS)
    add_setting_options(parser, PRESETS, OnlineSDPOConfig, without=("data",))
    return parser


# Fields of the configuration and what their values are called.
ANSWERS = {
    "num_generations": "N",
    "max_new_tokens": "TOKENS",
    "eval_max_new_tokens": "TOKENS",
    "sampling_temperature": "T",
    "generation_batch_size": "N",
    "generation_url": "URL",
    "updates_per_batch": "STEPS",
    "stop_when_degenerate": "SHARE",
}


class ListRules(argparse.Action):
    """Prints the rules that a user can have, and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        print(describe())
        parser.exit(DONE)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    return run_command(parser, online, parser.parse_args(argv), stopped=LOST)


def online(options: argparse.Namespace) -> int:
    """The run, in order."""
    config = read_config(options, OnlineSDPOConfig)
    check_folder(options.output, options.resume or options.overwrite)
    run.check_push(options)
    show = run.shows(options, config)
    say = run.printer(show)
    stop = StopOnSignal()
    if options.eval_prompts is None:
        refuse(options, ("eval-steps", "eval-max-new-tokens"), "needs held-out prompts (--eval-prompts)")
    prompts, eval_prompts = read_prompts(options)
    user = make_user(options)
    check_headroom(options, user)
    say(describe_backend(config.device.type, config.dtype))
    trainer = make_trainer(options, config, user, prompts, eval_prompts, run.callbacks(stop, show))
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
    trainer.forget_answers(training.steps)  # they are given again, the same
    after = None if trainer.eval_dataset is None else trainer.evaluate()
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
