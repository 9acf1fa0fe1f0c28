"""`fastsdpo train`, in order: model and data, checks, training, what it leaves behind."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsdpo.commands import run
from fastsdpo.commands.forecast import (
    check_options,
    forecast,
    needs_weights,
    of_trainer,
    read_forecast_config,
    setting_of,
)
from fastsdpo.commands.options import refuse
from fastsdpo.commands.paths import held_out
from fastsdpo.commands.running import DONE, STOPPED
from fastsdpo.commands.tokens import show_interactions
from fastsdpo.data import load_interactions
from fastsdpo.online.own_answers import OwnAnswers
from fastsdpo.online.rules import parse_rule
from fastsdpo.ops.backend import describe_backend
from fastsdpo.prefix import whole_shapes
from fastsdpo.trainer.callbacks import StopOnSignal, clock
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import SAMPLE_SIZE, InteractionDataset
from fastsdpo.trainer.measures_verdict import changes, table, verdict
from fastsdpo.trainer.memory import card_of, memory_lines
from fastsdpo.trainer.pack_table import PackTable
from fastsdpo.trainer.report import dry_run_report, plot_history, stream_text, write_report
from fastsdpo.trainer.stream import InteractionStream

if TYPE_CHECKING:
    from fastsdpo.trainer import SDPOTrainer

# What only training, saving and uploading read.
NOT_DRY = ("push-to-hub", "resume", "overwrite", "measure-rule", "report-to", "eval-steps", "save-steps")
NOT_DRY += ("save-total-limit", "logging-steps")


def train(options: argparse.Namespace) -> int:
    """The run, in order."""
    check_options(options)
    rule = None if options.measure_rule is None else parse_rule(options.measure_rule)
    config = read_forecast_config(options)
    if options.stream and config.max_steps <= 0:
        raise ValueError("--stream needs --max-steps: how long its data is, is not known")
    if options.stream and options.show > SAMPLE_SIZE:
        raise ValueError(f"--show must be at most {SAMPLE_SIZE} with --stream, got {options.show}")
    run.check_push(options)
    show = run.shows(options, config)
    say = run.printer(show)
    say_unread(options, say)
    if options.dry_run and not needs_weights(options, config):
        refuse(options, ("show",), "needs the model's weights, which this dry run does not load")
        return forecast(options, config, say)
    say(describe_backend(config.device.type, config.dtype))
    stop = StopOnSignal()
    trainer = make_trainer(options, config, stop, show)
    say(run.describe_model(trainer, options.model))
    if options.lora and {"learning-rate", "preset"}.isdisjoint(options.given):
        say(
            f"learning rate {config.learning_rate:g}, made for all weights: an adapter takes about ten times more "
            f"(--learning-rate {10 * config.learning_rate:g})"
        )
    if options.show > 0 and trainer.tokenize is not None:
        shown = load_interactions(options.data) if trainer.stream is None else trainer.stream.sample
        say(show_interactions(trainer.tokenize, shown, options.show))
    sets = trainer.train_dataset, trainer.eval_dataset
    if trainer.stream is not None:
        say(stream_text(config, trainer.stream))
    elif show or options.dry_run:
        packs = PackTable(trainer.model, config, trainer.train_dataset, trainer.sharing)
        say(dry_run_report(whole_shapes(trainer.model), config, *sets, packs, config.world_size))
    if options.dry_run:
        for line in memory_lines(setting_of(options, config, of_trainer(trainer)), packs, card_of(config.device)):
            say(line)
        say(str(trainer.check_teacher() or ""))
        return DONE

    checkpoint = run.choose_checkpoint(trainer, options, say)
    answers = OwnAnswers(trainer, Path(options.output, "answers.json"), rule)
    trainer.add_callback(answers)
    training = run.run_training(
        trainer,
        options,
        stop,
        checkpoint,
        say,
        lambda metrics: "\n".join([*before_lines(metrics), *answers.headroom()]),
    )
    if training.stopped is not None:
        return STOPPED + training.stopped
    after = training.after
    if after is None and trainer.eval_dataset is not None:
        after = trainer.evaluate()
    answers.after()
    run.save_model(trainer, options)
    report(trainer, options, training, after, answers, say)
    run.push(trainer, options, say)
    return DONE


def say_unread(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Says what a dry run does not use; it may be the whole command of a run with --dry-run behind it."""
    unread = [f"--{name}" for name in NOT_DRY if name in options.given]
    if options.dry_run and unread:
        say(f"dry run: nothing is trained, saved or uploaded; not used here: {', '.join(unread)}")


def before_lines(metrics: dict[str, float]) -> list[str]:
    """What the held-out figures before training say."""
    lines = [f"held-out loss before training: {metrics['eval_loss']:.4f}"]
    share = metrics.get("eval_measures/headroom_share")
    if share is not None:
        stranger = metrics.get("eval_measures/stranger_headroom_share")
        lines.append(
            "headroom: the follow-up makes the answer that came next likelier, against the logged one, in "
            f"{share:.0%} of the {metrics['eval_measures/next_answers']:.0f} held-out interactions that have one"
            + ("" if stranger is None else f"; a stranger's answer of its length in {stranger:.0%}")
            + " (a follow-up that is a new question counts too)"
        )
    return lines


def make_trainer(options: argparse.Namespace, config: SDPOConfig, stop: StopOnSignal, show: bool) -> SDPOTrainer:
    """The trainer of the options, with the model loaded and the data tokenized."""
    from transformers import PrinterCallback

    from fastsdpo.trainer import SDPOTrainer

    model, tokenizer, adapter = run.load(options, config)
    trainer = SDPOTrainer(
        model=model,
        args=config,
        train_dataset=InteractionStream(options.data) if options.stream else options.data,
        eval_dataset=held_out(options),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=run.callbacks(stop, show),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def counts_of(data: InteractionDataset | InteractionStream) -> dict[str, Any]:
    """What ``report.json`` says of the training data; of a stream, of what was read of it."""
    if isinstance(data, InteractionDataset):
        return {"interactions": len(data), "left_out": data.dropped}
    return {"interactions": data.interactions, "left_out": data.dropped, "left_out_of_stream": data.left_out}


def report(
    trainer: SDPOTrainer,
    options: argparse.Namespace,
    training: run.Training,
    after: dict[str, float] | None,
    answers: OwnAnswers,
    say: Callable[[str], None],
) -> None:
    """Writes ``report.json`` and ``report.png``, and says what came of the run."""
    plotted = False
    found = changes(training.measured, trainer.measured_rows) if training.measured else {}
    said = verdict(found) if found else []
    if trainer.is_world_process_zero():
        folder = Path(options.output)
        write_report(
            folder / "report.json",
            {
                "model": options.model,
                "data": options.data,
                **counts_of(trainer.train_dataset),
                "sharing": trainer.sharing,
                **run.report_of(trainer, training, after),
                "measures": {name: {**row._asdict(), "interval": str(row)} for name, row in found.items()},
                "verdict": said,
                "answers": answers.rows,
            },
        )
        plotted = plot_history(trainer.state.log_history, folder / "report.png")
    for line in [*(table(found) if found else []), *said, *answers.changes()]:
        say(line)
    if after is not None and training.before is not None:
        say(
            f"held-out loss: {training.before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after (a model that "
            "ignores its user lowers it too)"
        )
    plot = " and report.png" if plotted else " (matplotlib is not installed: no plot)"
    say(f"trained {training.steps} steps in {clock(training.seconds)}; {options.output}/model, report.json{plot}")
