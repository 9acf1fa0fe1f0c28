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

--stream reads DATA while training, and no more of it than --max-steps need. DATA may then be - (standard input); it is
gone through once, and training stops where it ends:

    zcat logs.jsonl.gz | fastsdpo train - --stream --max-steps 2000 --model MODEL -o runs/stream

With --resume the same command, given again and again, goes on from the newest whole checkpoint (or
begins, where there is none) and comes to the same result as a run that nothing stopped.

Exit status: 0 done; 1 an input, model or setting cannot be used, or the output cannot be written; 2
wrong options; 3 a loss or gradient was not finite, with a checkpoint of the state before it; 130 / 143
stopped by Ctrl-C / SIGTERM with a checkpoint. Errors are one sentence; the environment variable
FASTSDPO_TRACEBACK=1 shows where they come from.
"""

from __future__ import annotations

import argparse

from fastsdpo.commands.options import (
    add_model_options,
    add_push_option,
    add_resume_options,
    add_setting_options,
    choose_device,
    refuse,
)
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.paths import check_data, check_folder, check_resume, check_template, held_out
from fastsdpo.commands.running import LOST, run_command
from fastsdpo.settings import SDPOSettings
from fastsdpo.trainer.presets import PRESETS

# What only held-out interactions are read for.
HELD_OUT = (
    "eval-steps",
    "measure-rule",
    "allow-leaks",
    "measure_interactions",
    "measure_answers",
    "measure_tokens",
    "per_device_eval_batch_size",
)

# What passes over all data, or is about tokens that are there before training.
NOT_STREAMED = ("dry-run", "token-cache", "dataloader_num_workers")


def build_parser() -> Parser:
    parser = Parser("train", __doc__, settings=SDPOSettings.__dataclass_fields__)
    group = parser.add_argument_group("run")
    add_data_options(group)
    group.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        help="The folder for everything that the run leaves behind. Only --dry-run needs none.",
    )
    parser.add_config_option(group)
    group.add_argument(
        "--eval-data", metavar="FILE", help="Held-out interactions. Default: DATA's .eval file, where there is one."
    )
    group.add_argument(
        "--allow-leaks",
        action="store_true",
        default=argparse.SUPPRESS,  # what is not given stays the preset's
        help="Only warn, instead of stopping, where held-out conversations are also in DATA.",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Tokenize, report lengths, steps and memory, check what follow-ups do to a sample, and stop.",
    )
    add_forecast_options(parser.add_argument_group("dry run"))
    group.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="Print the first N interactions as the tokens that are trained on, and go on.",
    )
    group.add_argument(
        "--measure-rule",
        metavar="RULE",
        help="A rule that says what the follow-ups ask for, such as max_sentences=1 (`fastsdpo online "
        "--list-rules` lists them). The run reports how many of the model's own answers to held-out questions "
        "fulfil it, before and after.",
    )
    add_resume_options(group)
    add_push_option(group)
    add_model_options(parser)
    add_setting_options(parser, PRESETS)
    return parser


def add_data_options(group: argparse._ArgumentGroup) -> None:
    """What is trained on, and how it is read."""
    group.add_argument(
        "data",
        metavar="DATA",
        nargs="+",
        help="Interactions, as `fastsdpo prepare` writes them: files, folders, or a Hugging Face dataset.",
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="Read DATA while training, and no more of it than --max-steps need; - is standard input. Memory does not "
        "grow with it.",
    )


def add_forecast_options(group: argparse._ArgumentGroup) -> None:
    """The machine that a dry run forecasts."""
    group.add_argument("--card", metavar="SIZE", help="The memory of each GPU, such as 80GB. Default: this machine's.")
    group.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="How many processes train together, one on each GPU. Default: as many as were started.",
    )
    group.add_argument(
        "--strategy",
        choices=("ddp", "fsdp", "zero2", "zero3"),
        help="ddp: each process holds everything. fsdp: weights, gradients and optimizer states are divided. zero2, "
        "zero3: DeepSpeed's stages. Default: as started.",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if isinstance(options.data, list) and len(options.data) == 1:
        options.data = options.data[0]
    if options.output is None:
        if not options.dry_run:
            parser.error("missing: -o/--output")
        options.output = "dry-run"  # which writes nothing
    return run_command(parser, start, options, stopped=LOST)


def start(options: argparse.Namespace) -> int:
    """What needs no torch is checked first: it takes seconds to import."""
    check_folder(options.output, options.resume or options.overwrite or options.dry_run)
    check_resume(options.resume)
    if options.stream:
        refuse(
            options, NOT_STREAMED, "goes without --stream: it is about data that is passed over before the first step"
        )
    else:
        refuse(options, ("shuffle-buffer",), "needs --stream")
    eval_data = held_out(options)
    check_data(options.data, eval_data, stream=options.stream)
    if eval_data is None:
        refuse(options, HELD_OUT, "needs held-out interactions (--eval-data)")
    if options.quiet:
        refuse(options, ("show",), "goes without --quiet: it is there to be read")
    check_template(options)
    choose_device(options)
    from fastsdpo.commands.train_run import train

    return train(options)
