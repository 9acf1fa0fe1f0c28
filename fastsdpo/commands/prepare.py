"""``fastsdpo prepare SOURCE... -o interactions.jsonl``: conversations of any layout -> interactions."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from typing import Any

from fastsdpo.data.filters import PRESETS, ConversationFilter
from fastsdpo.data.prepare import PrepareReport, prepare
from fastsdpo.data.schema import ROW_SCHEMA


def format_report(report: PrepareReport) -> str:
    """The table that the command prints."""
    lines = [f"read      {report.records:>9,} records"]

    def kept(title: str, conversations: int, interactions: int, path: str | None) -> None:
        lines.append(f"{title:<9} {conversations:>9,} conversations, {interactions:,} interactions -> {path}")

    kept("kept", report.conversations, report.interactions, report.output)
    if report.eval_output is not None:
        kept("held out", report.eval_conversations, report.eval_interactions, report.eval_output)
    if report.merged_records:
        lines.append(f"merged    {report.merged_records:>9,} records into their conversations")
    if report.duplicate_interactions:
        lines.append(f"dropped   {report.duplicate_interactions:>9,} interactions that are there already")
    for reason, count in sorted(report.left_out.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"left out  {count:>9,} follow-ups {reason}")
    for reason, count in sorted(report.dropped.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"dropped   {count:>9,} {reason}")
    for kind, count in sorted(report.damaged.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"damaged   {count:>9,} {kind}, for example:")
        lines += [f"                    {problem}" for problem in report.problems[kind][:2]]
    if report.lost_bytes:
        lines.append(f"lost      {report.lost_bytes:>9,} bytes of damaged text")
    return "\n".join(lines)


class _PrintSchema(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        print(json.dumps(ROW_SCHEMA, indent=2))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsdpo prepare", description="Conversations in any known layout -> a file of interactions."
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="file (JSON, JSON Lines, Parquet; .gz, .zst), folder, glob or dataset name",
    )
    parser.add_argument("--schema", action=_PrintSchema, nargs=0, help="print a JSON Schema of the rows, and exit")
    parser.add_argument("-o", "--output", required=True, help="the JSON Lines file to write")
    parser.add_argument("--strict", action="store_true", help="stop at the first damaged record")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="do nothing where a run of the same command has finished, and replace what one that was "
        "killed has written (default: yes)",
    )
    parser.add_argument(
        "--redact",
        metavar="MODULE:FUNCTION",
        help="a function of yours, text -> text, that is applied to all text before anything else",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read (default: one for each core, at most 8)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")

    group = parser.add_argument_group("sources")
    group.add_argument("--limit", type=int, help="read at most so many records")
    group.add_argument("--config", help="configuration of a Hugging Face dataset")
    group.add_argument("--split", default="train", help="its split (default: train)")

    group = parser.add_argument_group("which conversations", "a preset, and changes to it")
    group.add_argument("--preset", default="default", choices=list(PRESETS))
    group.add_argument("--languages", nargs="*", metavar="NAME", help="as the records name them; none: any")
    for option in fields(ConversationFilter):
        flag = "--" + option.name.replace("_", "-")
        if option.name == "shuffle":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif option.name != "languages":
            group.add_argument(flag, type=_number_or_none, metavar="N", help="N, or none")

    group = parser.add_argument_group("order and held-out part")
    group.add_argument("--seed", type=int, default=42)
    group.add_argument("--eval-fraction", type=float, default=0.0, metavar="SHARE")
    group.add_argument("--eval-output", help="default: <output>.eval.jsonl")
    return parser


def _number_or_none(text: str) -> int | str:
    return "none" if text == "none" else int(text)


def _rules(arguments: argparse.Namespace) -> ConversationFilter:
    changes: dict[str, Any] = {}
    for option in fields(ConversationFilter):
        value = getattr(arguments, option.name)
        if value is not None:
            changes[option.name] = option.default if value == "none" else value
    if "languages" in changes:
        changes["languages"] = tuple(changes["languages"]) or None
    return replace(PRESETS[arguments.preset], **changes)


def main(argv: list[str]) -> int:
    """Runs the command; 0 done, 1 failed (with the reason on stderr), 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        report = prepare(
            arguments.sources,
            arguments.output,
            rules=_rules(arguments),
            seed=arguments.seed,
            eval_fraction=arguments.eval_fraction,
            eval_output=arguments.eval_output,
            limit=arguments.limit,
            config=arguments.config,
            split=arguments.split,
            strict=arguments.strict,
            redact=arguments.redact,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            progress=not arguments.quiet,
        )
    except KeyboardInterrupt:
        print("fastsdpo prepare: interrupted; the same command starts again", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"fastsdpo prepare: {error}", file=sys.stderr)
        return 1
    if not arguments.quiet:
        print(format_report(report))
    if report.interactions == 0:
        print("fastsdpo prepare: no interaction was kept", file=sys.stderr)
        return 1
    return 0
