r"""Trains a model on interactions: `fastsdpo train` or `python -m fastsdpo.train`.

    fastsdpo prepare conversations.jsonl -o interactions.jsonl --eval-fraction 0.05
    fastsdpo train interactions.jsonl --model MODEL -o runs/first --dry-run
    fastsdpo train interactions.jsonl --model MODEL -o runs/first

It loads model and data, tokenizes, checks what hindsight does to a sample, measures held-out
interactions (docs/objectives.md), trains, measures again, says what improved and what did not, and
leaves in the output folder: ``model/`` (weights and tokenizer, for
``AutoModelForCausalLM.from_pretrained``; with --lora the adapter), ``checkpoint-*/``,
``report.json``, ``report.png`` and ``answers.json``, the model's own answers to held-out questions. It
does not prepare conversations, and it knows no scheduler: several processes are started with
``torchrun -m fastsdpo.train`` or ``accelerate launch``.

Where --model is the folder of an adapter (``model/`` of a run with --lora), training goes on with it.

Every setting that has no flag here is a field of `SDPOConfig`: ``--set name=value``.

--dry-run tokenizes, and says how long the run is and how much memory a step takes: the step is walked on tensors
without memory, from the model's configuration. The weights are loaded only for the look at what follow-ups do to a
sample, which is left out with --card, --processes or --strategy (a forecast for another machine), with
``--set teacher_check=0``, and where --model is a folder without weights:

    fastsdpo train interactions.jsonl --model Qwen/Qwen3-8B --dry-run \
        --processes 8 --strategy fsdp --card 80GB

With --resume the same command, given again and again, goes on from the newest whole checkpoint (or
begins, where there is none) and comes to the same result as a run that nothing stopped.

Exit status: 0 done; 1 an input, model or setting cannot be used, or the output cannot be written; 2
wrong options; 3 a loss or gradient was not finite, with a checkpoint of the state before it; 130 / 143
stopped by Ctrl-C / SIGTERM with a checkpoint. Errors are one sentence; the environment variable
FASTSDPO_TRACEBACK=1 shows where they come from.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastsdpo.commands import run
from fastsdpo.commands.forecast import (
    add_forecast_options,
    check_options,
    forecast,
    held_out,
    needs_weights,
    of_trainer,
    setting_of,
)
from fastsdpo.commands.options import (
    DONE,
    NOT_FINITE,
    STOPPED,
    add_model_options,
    add_resume_options,
    add_setting_options,
    read_config,
    run_command,
)
from fastsdpo.commands.tokens import show_interactions
from fastsdpo.data import load_interactions
from fastsdpo.ops.backend import describe_backend
from fastsdpo.prefix import whole_shapes
from fastsdpo.trainer import NonFiniteError
from fastsdpo.trainer.callbacks import StopOnSignal, clock
from fastsdpo.trainer.config import PRESETS, SDPOConfig
from fastsdpo.trainer.measures_verdict import changes, table, verdict
from fastsdpo.trainer.memory import card_of, memory_lines
from fastsdpo.trainer.pack_table import PackTable
from fastsdpo.trainer.report import dry_run_report, plot_history, write_report

if TYPE_CHECKING:
    from fastsdpo.online.own_answers import OwnAnswers
    from fastsdpo.trainer import SDPOTrainer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsdpo train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given stays the preset's
    )
    group = parser.add_argument_group("run")
    group.add_argument("data", help="interactions, as `fastsdpo prepare` writes them")
    group.add_argument("-o", "--output", default=None, metavar="FOLDER", help="needed but for --dry-run")
    group.add_argument(
        "--eval-data",
        metavar="FILE",
        default=None,
        help="held-out interactions (default: DATA's .eval file, if there)",
    )
    group.add_argument(
        "--allow-leaks", action="store_true", help="warn, and do not refuse, where held-out conversations are in DATA"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="tokenize, report lengths, steps and memory, check what follow-ups do to a sample, and stop",
    )
    add_forecast_options(parser.add_argument_group("dry run"))
    group.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print the first N interactions as the tokens that are trained on, and go on",
    )
    group.add_argument(
        "--measure-rule",
        metavar="RULE",
        default=None,
        help="what the follow-ups ask for, where it can be checked (max_sentences=1, ...; see `fastsdpo online "
        "--list-rules`): the share of own answers to held-out questions that fulfil it, before and after",
    )
    add_resume_options(group)
    add_model_options(parser)
    add_setting_options(parser, PRESETS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.output is None:
        if not options.dry_run:
            parser.error("the following arguments are required: -o/--output")
        options.output = "dry-run"  # which writes nothing
    return run_command("train", train, options, statuses={NonFiniteError: NOT_FINITE}, stopped=run.LOST)


def train(options: argparse.Namespace) -> int:
    """The run, in order."""
    from fastsdpo.online.own_answers import OwnAnswers
    from fastsdpo.online.rules import parse_rule

    check_options(options)
    rule = None if options.measure_rule is None else parse_rule(options.measure_rule)
    config = read_config(options, SDPOConfig)
    run.check_folder(options.output, options.resume or options.overwrite or options.dry_run)
    check_data(options.data, held_out(options))
    show = run.shows(options, config)
    say = run.printer(show)
    if options.dry_run and not needs_weights(options, config):
        return forecast(options, config, say)
    say(describe_backend(config.device.type, config.dtype))
    stop = StopOnSignal()
    trainer = make_trainer(options, config, stop, show)
    say(run.describe_model(trainer, options.model))
    if options.show > 0 and trainer.tokenize is not None:
        say(show_interactions(trainer.tokenize, load_interactions(options.data), options.show))
    table = PackTable(trainer.model, config, trainer.train_dataset, trainer.sharing)
    sets = trainer.train_dataset, trainer.eval_dataset
    say(dry_run_report(whole_shapes(trainer.model), config, *sets, table, config.world_size))
    if options.dry_run:
        for line in memory_lines(setting_of(options, config, of_trainer(trainer)), table, card_of(config.device)):
            say(line)
        say(str(trainer.check_teacher() or ""))
        return DONE

    checkpoint = run.choose_checkpoint(trainer, options, say)
    answers = OwnAnswers(trainer, Path(options.output, "answers.json"), rule)
    trainer.add_callback(answers)
    training = run.run_training(
        trainer, stop, checkpoint, say, lambda metrics: "\n".join([*before_lines(metrics), *answers.headroom()])
    )
    if training.stopped is not None:
        return STOPPED + training.stopped
    after = None if trainer.eval_dataset is None else trainer.evaluate()
    answers.after()
    run.save_model(trainer, options.output)
    report(trainer, options, training, after, answers, say)
    return DONE


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
        train_dataset=options.data,
        eval_dataset=held_out(options),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=run.callbacks(stop, show),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


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
                "interactions": len(trainer.train_dataset),
                "left_out": trainer.train_dataset.dropped,
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


def check_data(*files: str | None) -> None:
    """Reads the first interaction of each file, before minutes are spent on a model.

    Raises:
        OSError, TypeError, ValueError: there is none, with file and line.
    """
    for file in files:
        if file is not None and not Path(file).is_fifo():  # that can be read once only
            next(load_interactions(file), None)
