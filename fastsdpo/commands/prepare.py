"""``fastsdpo prepare SOURCE... -o interactions.jsonl``: conversations of any layout -> interactions."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastsdpo.commands import prepare_prompts
from fastsdpo.commands.options import refuse
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.running import DONE, FAILED, run_command
from fastsdpo.data import InteractionTokenizer, load_interactions
from fastsdpo.data.answers import RatingFollowups
from fastsdpo.data.filters import PRESETS, ConversationFilter
from fastsdpo.data.output import LAYOUTS
from fastsdpo.data.prepare import PrepareReport, prepare
from fastsdpo.data.readers.registry import BY_NAME, RecordParser
from fastsdpo.data.schema import ROW_SCHEMA
from fastsdpo.data.times import parse_time

SHOWN = "online-v1"  # the template of --show: how large the model is cannot be told from its tokenizer
# Arguments of `prepare` that are named as their options.
PASSED_ON = ("seed", "eval_fraction", "eval_output", "eval_after", "limit", "split", "strict", "redact", "workers")
PASSED_ON += ("overwrite", "resume", "keep", "layout")


def format_report(report: PrepareReport) -> str:
    """The table that the command prints."""
    formats = [name if len(report.formats) == 1 else f"{name} {n:,}" for name, n in sorted(report.formats.items())]
    done = ["already done: the same command has written this before (--overwrite does it again)"]
    lines = done if report.already_done else []
    lines += [f"read      {report.records:>9,} records{': ' if formats else ''}{', '.join(formats)}"]

    def kept(title: str, conversations: int, interactions: int, path: str | None) -> None:
        where = f" -> {path}" if report.interactions + report.eval_interactions else ""
        lines.append(f"{title:<9} {conversations:>9,} conversations, {interactions:,} interactions{where}")

    kept("kept", report.conversations, report.interactions, report.output)
    if report.eval_output is not None:
        kept("held out", report.eval_conversations, report.eval_interactions, report.eval_output)
    if report.merged_records:
        lines.append(f"merged    {report.merged_records:>9,} records into their conversations")
    if report.duplicate_interactions:
        lines.append(f"dropped   {report.duplicate_interactions:>9,} interactions that are there already")
    if report.rating_followups:
        lines.append(f"made      {report.rating_followups:>9,} interactions with a rating's wording as the follow-up")
    for reason, count in prepare_prompts.by_count(report.left_out):
        lines.append(f"left out  {count:>9,} follow-ups {reason}")
    lines += prepare_prompts.lines_of_losses(report)
    if report.lost_bytes:
        lines.append(f"lost      {report.lost_bytes:>9,} bytes of damaged text")
    return "\n".join(lines)


class _PrintSchema(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        print(json.dumps(ROW_SCHEMA, indent=2))
        parser.exit()


def _parser() -> Parser:
    parser = Parser(
        "prepare",
        "Turns conversations in any known layout into a file of interactions, each of which is what "
        "was said,\nan answer, and the user's next message.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="A file (JSON, JSON Lines, CSV or Parquet; .gz and .zst too), a folder, a pattern such as "
        "logs/*.jsonl, or the name of a dataset on the hub.",
    )
    parser.add_argument(
        "--schema", action=_PrintSchema, nargs=0, help="Print a JSON Schema of the rows that are written, and stop."
    )
    parser.add_argument(
        "-o", "--output", required=True, help="The JSON Lines file to write, or a folder (with / at the end)."
    )
    parser.add_config_option()
    parser.add_argument("--strict", action="store_true", help="Stop at the first damaged record.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an output that exists.")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Do nothing where the same command has finished before, and replace what a killed one has written. "
        "Default: yes.",
    )
    parser.add_argument("--quiet", action="store_true", help="Print no progress bar and no table.")

    _add_reading(parser)
    _add_layout(parser)
    _add_rules(parser)
    _add_rows(parser)
    _add_held_out(parser)
    prepare_prompts.add_prompt_options(parser)
    return parser


def _add_rows(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rows")
    group.add_argument(
        "--keep",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=[],
        metavar="KEY,...",
        help="Keys of the records to copy into the rows, such as model,timestamp,toxic.",
    )
    group.add_argument(
        "--layout",
        default="fastsdpo",
        choices=LAYOUTS,
        help="trl writes the answer as a list of one message, as TRL reads it.",
    )

    group.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="Print the first N rows as tokens of --tokenizer: the prompt, the follow-up's place, and what is "
        "trained on.",
    )
    group.add_argument(
        "--template",
        metavar="NAME|TEXT",
        help=f"The template that places the follow-up, for --show. Default: {SHOWN}, which train takes for models of "
        "a billion weights and more; it takes note for smaller ones.",
    )


def _add_held_out(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("order and held-out part")
    group.add_argument("--seed", type=int, default=42, help="Decides the random order, and what is held out.")
    group.add_argument(
        "--eval-fraction", type=float, default=0.0, metavar="SHARE", help="Hold out this share of the conversations."
    )
    group.add_argument(
        "--eval-after", metavar="DATE", help="Hold out the conversations from this time on, instead of a share."
    )
    group.add_argument(
        "--eval-output", help="The file for what is held out. Default: OUTPUT's name with .eval before its ending."
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sources")
    group.add_argument("--limit", type=int, metavar="N", help="Read at most N records. Default: all.")
    group.add_argument("--subset", metavar="NAME", help="The subset of a dataset of the hub that has several.")
    group.add_argument("--split", default="train", metavar="NAME", help="The split of a dataset of the hub.")
    group.add_argument(
        "--redact",
        metavar="MODULE:FUNCTION",
        help="Your own function, text -> text, applied to every text before anything else.",
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="How many processes read. Default: one for each core, at most 8."
    )


def _add_rules(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "which conversations", "A preset, and changes to it. The value none takes the preset's limit away."
    )
    group.add_argument(
        "--preset",
        default="default",
        choices=list(PRESETS),
        help="wildchat and wildfeedback have the paper's limits. paper-wildchat and paper-wildfeedback select "
        "exactly what the code published with the paper selects (docs/paper-data.md). The dataset "
        "microsoft/WildFeedback needs --subset wildfeedback.",
    )
    group.add_argument(
        "--languages",
        nargs="*",
        metavar="NAME",
        help="Languages, as the records name them. Default: the preset's; without a name behind it: any.",
    )
    group.add_argument(
        "--models",
        nargs="*",
        metavar="NAME",
        help="Names of models, or patterns such as gpt-4*. Default: the preset's; without a name behind it: any.",
    )
    for option in fields(ConversationFilter):
        flag = "--" + option.name.replace("_", "-")
        about = f"{_HELP.get(option.name, '')} Default: the preset's."
        if option.name in ("shuffle", "drop_toxic", "drop_redacted"):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=about)
        elif option.name in ("after", "before"):
            group.add_argument(flag, type=_time_or_none, metavar="DATE", help=about)
        elif option.name not in ("languages", "models", "published"):
            group.add_argument(flag, type=_number_or_none, metavar="N", help=about)


_HELP = {
    "min_messages": "Leave out conversations with fewer messages, system messages not counted.",
    "max_conversation_chars": "Leave out conversations with more characters in all.",
    "max_assistant_chars": "Leave out conversations with a longer answer, in characters.",
    "max_user_chars": "Leave out conversations with a longer message of the user, in characters.",
    "max_history_messages": "Keep the last N messages of each history.",
    "max_conversations": "Stop after N conversations.",
    "max_interactions": "Stop at the conversation with which there are N interactions.",
    "shuffle": "Write conversations in random order (by --seed), or in the order of the sources.",
    "drop_toxic": 'Leave out records that are marked "toxic", or not marked at all.',
    "drop_redacted": 'Leave out records that are marked "redacted", or not marked at all.',
    "after": "Take records from this time on: an ISO date, or seconds since 1970.",
    "before": "Take records from before this time.",
    "enough_conversations": "Stop early at N conversations; with --enough-interactions where there are both.",
    "enough_interactions": "Stop early at N interactions; with --enough-conversations where there are both.",
}


def _add_layout(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "layout of the records",
        "Layouts are found by the records' keys, unless --format, --map or --reader is given. Known are "
        f"{', '.join(BY_NAME)}.",
    )
    group.add_argument(
        "--format", metavar="NAME", help="Read every record as this layout. Default: found by the record's keys."
    )
    group.add_argument(
        "--map",
        metavar="NAME=PATH,...",
        help="Where things are in records of another layout, such as "
        "role=author.role,content=text,messages=chat.items.",
    )
    group.add_argument(
        "--reader", metavar="MODULE:FUNCTION", help="Your own function: record -> messages or a Conversation."
    )
    group.add_argument(
        "--branches",
        default="active",
        metavar="NAME",
        help="Which branches of a tree of messages to read: the active one, or all.",
    )
    group.add_argument(
        "--rating-followup",
        action="append",
        metavar="RATING=TEXT",
        help="The follow-up to write for an answer with this rating (up, down or a number) where the user said "
        "nothing more. {comment} is the user's comment. Can be given several times.",
    )


def _number_or_none(text: str) -> int | str:
    return "none" if text == "none" else int(text)


def _time_or_none(text: str) -> float | str:
    try:
        return "none" if text == "none" else parse_time(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rules(arguments: argparse.Namespace) -> ConversationFilter:
    changes: dict[str, Any] = {}
    for option in fields(ConversationFilter):
        value = getattr(arguments, option.name, None)
        if value is not None:
            changes[option.name] = option.default if value == "none" else value
    for name in ("languages", "models"):
        if name in changes:
            changes[name] = tuple(changes[name]) or None
    return replace(PRESETS[arguments.preset], **changes)


def main(argv: list[str]) -> int:
    """Runs the command; 0 done, 1 failed (with the reason on stderr), 130 interrupted."""
    parser = _parser()
    arguments = parser.parse_args(argv)

    def run(arguments: argparse.Namespace) -> int:
        if all(Path(source).exists() for source in arguments.sources):
            refuse(arguments, ("subset", "split"), "needs a dataset of the hub, and the sources are files")
        prepare_prompts.check_options(parser, arguments)
        if arguments.prompts is None:
            return _interactions(arguments)
        arguments.output = _file(arguments.output, "prompts.jsonl")
        prompts = prepare_prompts.write_prompts(arguments)
        if not arguments.quiet:
            print(prepare_prompts.format_report(prompts))
        return DONE

    return run_command(parser, run, arguments, stopped="interrupted; the same command starts again")


def _file(output: str, name: str) -> str:
    """The file to write: ``name`` in a folder that is there, or that is meant by a slash at the end."""
    folder = output.endswith(("/", os.sep)) or Path(output).is_dir()
    return str(Path(output, name)) if folder else output


def _interactions(arguments: argparse.Namespace) -> int:
    if not arguments.show:
        refuse(arguments, ("template",), "needs --show")
    rules = _rules(arguments)
    if not rules.shuffle and not arguments.eval_fraction:
        refuse(arguments, ("seed",), "needs --shuffle or --eval-fraction: nothing else is drawn")
    arguments.output = _file(arguments.output, "interactions.jsonl")
    tokenize = _tokenizer(arguments) if arguments.show > 0 else None
    report = prepare(
        arguments.sources,
        arguments.output,
        rules=rules,
        config=arguments.subset,
        progress=not arguments.quiet,
        **{name: getattr(arguments, name) for name in PASSED_ON},
        parser=RecordParser(arguments.format, arguments.map, arguments.reader, arguments.branches),
        rating_followups=RatingFollowups(arguments.rating_followup) if arguments.rating_followup else None,
    )
    if not arguments.quiet:
        print(format_report(report))
    if report.interactions == 0:
        known = "" if report.formats else "; it reads JSON, JSON Lines, CSV, TSV and Parquet, in the layouts of --help"
        print(f"fastsdpo prepare: no interaction was kept, and nothing is written{known}", file=sys.stderr)
        return FAILED
    if tokenize is not None:
        print(f"\n{_shown(arguments, tokenize)}")
    return DONE


def _tokenizer(arguments: argparse.Namespace) -> InteractionTokenizer:
    """What --show shows with; an error in it comes before the sources are read."""
    from fastsdpo.modeling import load_tokenizer

    return InteractionTokenizer(load_tokenizer(arguments.tokenizer), arguments.template or SHOWN)


def _shown(arguments: argparse.Namespace, tokenize: InteractionTokenizer) -> str:
    """The first rows as tokens."""
    from fastsdpo.commands.tokens import show_interactions

    shown = show_interactions(tokenize, load_interactions(arguments.output), arguments.show)
    if arguments.template is None:
        shown += f"\n\ntemplate: {SHOWN}. Models below a billion weights are trained with --template note."
    return shown
