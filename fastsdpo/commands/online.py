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

With --then-rule the wishes change after --flip-at interactions. It leaves in the output folder:
``model/``, ``checkpoint-*/``, ``interactions.jsonl`` (which `fastsdpo train` can read),
``eval_answers.jsonl`` (held-out answers) and ``report.json``. Every setting without a flag is a field
of `OnlineSDPOConfig`: ``--set name=value``.

Exit status: that of `fastsdpo train`; 4 where --stop-when-degenerate stopped the run, with a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from fastsdpo.commands.train import (
    STOPPED,
    add_model_options,
    add_setting_options,
    choose_checkpoint,
    load,
    measure_before,
    read_config,
    run_command,
)
from fastsdpo.online.config import PRESETS, OnlineSDPOConfig
from fastsdpo.ops.backend import describe_backend

DEGENERATE = 4
USER_OPTIONS = (
    "rule",
    "wish",
    "praise",
    "flip_at",
    "then_rule",
    "then_wish",
    "persona",
    "user_url",
    "user_model",
    "user_local",
    "terminal",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsdpo online",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given stays the preset's
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "prompts", help="what users ask: a text file, one per line, or rows with 'prompt' (JSON, JSON Lines, Parquet)"
    )
    run.add_argument("-o", "--output", required=True, metavar="FOLDER")
    run.add_argument("--eval-prompts", metavar="FILE", default=None, help="held-out prompts")
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
    run.add_argument("--list-rules", action=_ListRules, nargs=0, help="print the rules, and stop")
    add_user_options(parser)
    add_model_options(parser)

    answers = parser.add_argument_group("answers")
    answers.add_argument("--num-generations", type=int, help="answers per prompt")
    answers.add_argument("--max-new-tokens", type=int)
    answers.add_argument("--sampling-temperature", type=float)
    answers.add_argument("--generation-batch-size", type=int)
    answers.add_argument("--generation-url", help="a vLLM server that samples the answers")
    answers.add_argument("--updates-per-batch", type=int, help="steps on each batch of answers")
    answers.add_argument(
        "--stop-when-degenerate",
        type=float,
        metavar="SHARE",
        help="stop, with a checkpoint, at this share of degenerate answers",
    )
    add_setting_options(parser, PRESETS)
    return parser


class _ListRules(argparse.Action):
    def __call__(self, parser: Any, *arguments: Any) -> None:
        from fastsdpo.online.rules import describe

        print(describe())
        parser.exit(0)


def add_user_options(parser: argparse.ArgumentParser) -> None:
    """Who reacts; read by `make_user`."""
    user = parser.add_argument_group("user")
    user.add_argument(
        "--rule", action="append", default=[], metavar="NAME=VALUE", help="a wish; several are all to be fulfilled"
    )
    user.add_argument(
        "--wish",
        default=None,
        metavar="TEXT",
        help="what the user says where a rule is broken (default: the rules' own)",
    )
    user.add_argument(
        "--praise", default=None, metavar="TEXT", help="what the user says where none is (default: nothing)"
    )
    user.add_argument(
        "--flip-at", type=int, default=None, metavar="N", help="from this interaction on: --then-rule, --then-wish"
    )
    user.add_argument("--then-rule", action="append", default=[], metavar="NAME=VALUE")
    user.add_argument("--then-wish", default=None, metavar="TEXT")
    user.add_argument(
        "--persona", default=None, metavar="TEXT", help="who the user is and what they want; @FILE reads it"
    )
    user.add_argument("--user-url", default=None, metavar="URL", help="http://host:8000/v1")
    user.add_argument("--user-model", default=None, metavar="NAME", help="its name there")
    user.add_argument("--user-local", default=None, metavar="MODEL", help="folder, hub id or GGUF")
    user.add_argument("--user-timeout", type=float, default=60.0, metavar="SECONDS")
    user.add_argument("--user-concurrency", type=int, default=8, metavar="REQUESTS")
    user.add_argument("--terminal", action="store_true", default=False, help="you are the user")


def make_user(options: argparse.Namespace) -> Any:
    """The user of the options.

    Raises:
        ValueError: none is named, several are, or one only in part.
    """
    from fastsdpo.online.users import EndpointUser, RuleUser, SwitchingUser, TerminalUser

    named = {
        "--rule (or --wish)": bool(options.rule or options.wish),
        "--persona": options.persona is not None,
        "--terminal": options.terminal,
    }
    if sum(named.values()) != 1:
        chosen = [name for name, given in named.items() if given]
        raise ValueError(f"name one user: {', '.join(named)}; got {' and '.join(chosen) or 'none'}")
    flips = options.flip_at is not None
    if flips != bool(options.then_rule or options.then_wish):
        raise ValueError("--flip-at needs --then-rule or --then-wish, and they need --flip-at")
    if flips and not (options.rule or options.wish):
        raise ValueError("--flip-at needs a user of rules (--rule)")
    if options.terminal:
        return TerminalUser()
    if options.persona is not None:
        return EndpointUser(chat_model(options, "user"), read_text(options.persona))
    first = RuleUser(options.rule, wish=options.wish, praise=options.praise)
    if not flips:
        return first
    if options.flip_at < 1:
        raise ValueError(f"--flip-at must be at least 1, got {options.flip_at}")
    then = RuleUser(options.then_rule, wish=options.then_wish, praise=options.praise)
    return SwitchingUser([(0, first), (options.flip_at, then)])


def chat_model(options: argparse.Namespace, role: str, **settings: Any) -> Any:
    """The language model of ``--{role}-url`` and ``--{role}-model``, or of ``--{role}-local``.

    Raises:
        ValueError: neither, both, or a url without a model.
    """
    given = vars(options)
    url, name, local = (given[f"{role}_{part}"] for part in ("url", "model", "local"))
    if (url is None) == (local is None):
        raise ValueError(f"name either --{role}-url with --{role}-model, or --{role}-local")
    if url is None:
        from fastsdpo.modeling import load_model_and_tokenizer
        from fastsdpo.online.users import LocalChat

        model, tokenizer = load_model_and_tokenizer(local)
        return LocalChat(model, tokenizer, seed=0, **settings)
    if name is None:
        raise ValueError(f"--{role}-url needs --{role}-model")
    from fastsdpo.online.endpoint import ChatEndpoint

    if "max_new_tokens" in settings:
        settings["max_tokens"] = settings.pop("max_new_tokens")
    return ChatEndpoint(
        url,
        name,
        timeout=given[f"{role}_timeout"],
        concurrency=given[f"{role}_concurrency"],
        **settings,
    )


def read_text(given: str) -> str:
    """The text, or what the file after an @ holds."""
    return Path(given[1:]).read_text("utf-8-sig").strip() if given.startswith("@") else given


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    return run_command("online", online, build_parser().parse_args(argv))


def online(options: argparse.Namespace) -> int:
    """The run, in order."""
    from transformers import PrinterCallback

    from fastsdpo.online.prompts import PromptDataset
    from fastsdpo.online.trainer import OnlineSDPOTrainer
    from fastsdpo.trainer.callbacks import Progress, StopOnSignal, clock
    from fastsdpo.trainer.checkpoints import writing
    from fastsdpo.trainer.report import write_report

    config = read_config(options, OnlineSDPOConfig)
    output = Path(options.output)
    used = (output / "report.json").exists() or any(output.glob("checkpoint-*"))
    if used and not (options.resume or options.overwrite):
        raise ValueError(f"{output} holds a run; pass --resume to go on with it, or --overwrite")
    prompts = PromptDataset.from_source(options.prompts, "train_dataset")
    eval_prompts = None
    if options.eval_prompts is not None:
        eval_prompts = PromptDataset.from_source(options.eval_prompts, "eval_dataset")
    user = make_user(options)
    show = not options.quiet and config.process_index == 0

    def say(text: str) -> None:
        if show:
            print(text, flush=True)

    say(describe_backend(config.device.type, config.dtype))
    model, tokenizer, adapter = load(options, config)
    stop = StopOnSignal()
    trainer = OnlineSDPOTrainer(
        model,
        config,
        user,
        prompts,
        eval_prompts,
        tokenizer,
        peft_config=adapter,
        callbacks=[stop, *([Progress()] if show else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say(
        f"model {options.model}: {trained:,} of "
        f"{sum(p.numel() for p in trainer.model.parameters()):,} weights are trained, on "
        f"{config.device}; {len(trainer.train_dataset)} prompts, "
        f"{trainer._step_prompts * config.num_generations} answers a step"
    )
    trainer.check_output(model=True)
    checkpoint = choose_checkpoint(trainer, options, say)
    if checkpoint is None:
        trainer.forget_answers(0)  # those of a run before, of which nothing else is left
    first = measure_before(trainer, output, checkpoint, lambda metrics: say(f"before   {summary(metrics, 'eval_')}"))
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
    trainer.forget_answers(result.global_step)  # they are given again, the same
    after = None if trainer.eval_dataset is None else trainer.evaluate()
    if after is not None:
        say(f"after    {summary(after, 'eval_')}")
    with writing(f"{output / 'model'}"):
        trainer.save_model(str(output / "model"))
    if trainer.is_world_process_zero():
        names = {field.name for field in dataclasses.fields(OnlineSDPOConfig)}
        write_report(
            output / "report.json",
            {
                "model": options.model,
                "prompts": options.prompts,
                "user": {
                    name: value
                    for name, value in vars(options).items()
                    if name in USER_OPTIONS and value not in (None, [], False)
                },
                "user_failures": getattr(user, "failures", {}),
                "interactions": trainer.interactions,
                "steps": result.global_step,
                "seconds": seconds,
                "before": first.metrics,
                "after": after,
                "stopped": trainer.degenerate_stop,
                "settings": {k: v for k, v in config.to_dict().items() if k in names},
                "history": trainer.state.log_history,
            },
        )
    failures = getattr(user, "failures", {})
    if failures:
        say(f"interactions left out, as the user could not be asked: {failures}")
    say(f"trained {result.global_step} steps in {clock(seconds)}; {output}/model, report.json")
    if trainer.degenerate_stop is not None:
        print(f"fastsdpo online: stopped: {trainer.degenerate_stop}", file=sys.stderr)
        return DEGENERATE
    return 0


def summary(metrics: dict[str, float], prefix: str) -> str:
    """Satisfaction, length and degenerate answers of a log or an evaluation."""
    parts = []
    for name, form in (
        ("satisfaction", "satisfied {:.0%}"),
        ("response_words", "{:.1f} words"),
        ("response_length", "{:.0f} tokens"),
        ("degenerate", "degenerate {:.0%}"),
    ):
        if f"{prefix}{name}" in metrics:
            parts.append(form.format(metrics[f"{prefix}{name}"]))
    return "  ".join(parts)
