r"""Trains a model on a user's reactions to its own answers: `fastsdpo online`.

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
from typing import Any

from fastsdpo.commands.options import (
    add_model_options,
    add_push_option,
    add_resume_options,
    add_setting_options,
    choose_device,
    refuse,
)
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.paths import check_folder, check_resume, check_template
from fastsdpo.commands.running import DONE, LOST, run_command
from fastsdpo.commands.users import add_user_options
from fastsdpo.online.presets import PRESETS
from fastsdpo.online.rules import describe
from fastsdpo.settings import OFFLINE, OnlineSDPOSettings


def build_parser() -> Parser:
    parser = Parser("online", __doc__, settings=OnlineSDPOSettings.__dataclass_fields__)
    group = parser.add_argument_group("run")
    group.add_argument(
        "prompts",
        help="What users ask: a text file with one prompt in each line, or rows with 'prompt' (JSON, JSON Lines, "
        "CSV, Parquet).",
    )
    group.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="The folder for everything that the run leaves behind."
    )
    parser.add_config_option(group)
    group.add_argument("--eval-prompts", metavar="FILE", help="Held-out prompts, answered before and after training.")
    group.add_argument(
        "--headroom",
        action="store_true",
        help="First answer the held-out prompts with the wish in the prompt, and with an unrelated remark. A wish "
        "that the model does not follow when told can hardly be learned from follow-ups.",
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="A system prompt, the first message of each prompt. @FILE reads it from a file.",
    )
    add_resume_options(group)
    add_push_option(group)
    group.add_argument(
        "--list-rules",
        action=ListRules,
        nargs=0,
        default=argparse.SUPPRESS,
        help="Print the rules that a user can have, and stop.",
    )
    add_user_options(parser)
    add_model_options(parser)
    add_setting_options(parser, PRESETS, OnlineSDPOSettings, without=("data",))
    return parser


class ListRules(argparse.Action):
    """Prints the rules that a user can have, and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        print(describe())
        parser.exit(DONE)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    return run_command(parser, start, parser.parse_args(argv), stopped=LOST)


def start(options: argparse.Namespace) -> int:
    """What needs no torch is checked first: it takes seconds to import."""
    check_folder(options.output, options.resume or options.overwrite)
    check_resume(options.resume)
    if options.eval_prompts is None:
        held_out = ("eval-steps", "eval-max-new-tokens", "eval_temperature", "per_device_eval_batch_size")
        refuse(options, held_out, "needs held-out prompts (--eval-prompts)")
    refuse(options, OFFLINE, "is of `fastsdpo train`, and not read here")
    check_template(options)
    choose_device(options)
    from fastsdpo.commands.online_run import online

    return online(options)
