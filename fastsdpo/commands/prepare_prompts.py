"""``fastsdpo prepare --prompts DATA_SET SOURCE... -o prompts.jsonl``: prompts for `fastsdpo online`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fastsdpo.data.prompt_sets import PROMPT_SETS, PromptJob, PromptReport, prepare_prompts

# The options of `fastsdpo prepare` that have a meaning here.
SHARED = {"sources", "output", "strict", "overwrite", "quiet", "limit", "subset", "config", "split", "seed"}
SHARED |= {"eval_fraction", "eval_output"}


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """The options that only `--prompts` reads."""
    group = parser.add_argument_group(
        "prompts for `fastsdpo online`",
        "They are written instead of interactions. These other options go with them: sources, --limit, --subset, "
        "--split, --seed, --eval-fraction, --eval-output, --strict, --overwrite, --quiet.",
    )
    group.add_argument(
        "--prompts",
        choices=list(PROMPT_SETS),
        help="Write the prompts of this data set, by the filters published with the paper (docs/paper-data.md).",
    )
    group.add_argument(
        "--eval-source", nargs="+", default=[], metavar="SOURCE", help="Take held-out prompts from these other files."
    )
    group.add_argument("--eval-split", metavar="NAME", help="Take held-out prompts from another split of the dataset.")
    group.add_argument("--max-prompts", type=int, metavar="N", help="Draw N of the prompts, by --seed. Default: all.")
    group.add_argument(
        "--max-eval-prompts", type=int, metavar="N", help="Draw N of the held-out prompts. Default: all."
    )
    group.add_argument(
        "--tokenizer", metavar="NAME", help="The model's folder, hub id or GGUF file. Its tokenizer counts tokens."
    )
    group.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="Leave out prompts with more tokens. Needs --tokenizer.",
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="A system prompt, to be counted with the tokens. It is not written: give it to `fastsdpo online` as "
        "well.",
    )


def check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raises ValueError where an option is given that has no meaning with, or without, `--prompts`."""
    own = {"prompts", "eval_source", "eval_split", "max_prompts", "max_eval_prompts", "max_prompt_tokens", "system"}
    if arguments.prompts is not None or not arguments.show:  # else it shows rows
        own.add("tokenizer")
    elif arguments.tokenizer is None:
        raise ValueError("--show needs --tokenizer, the model's folder, hub id or GGUF file")
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)} - {"given"}
    wrong = given - own - SHARED if arguments.prompts is not None else given & own
    if wrong:
        flag = "--" + min(wrong).replace("_", "-")
        raise ValueError(f"{flag} has no meaning {'with' if arguments.prompts is not None else 'without'} --prompts")
    if arguments.tokenizer is None and given & {"max_prompt_tokens", "system"}:
        flag = "--system" if "system" in given else "--max-prompt-tokens"
        raise ValueError(f"{flag} counts tokens, and needs --tokenizer")


def write_prompts(arguments: argparse.Namespace) -> PromptReport:
    """The work of the command."""
    name = arguments.tokenizer
    job = PromptJob(
        arguments.prompts,
        None if name is None else token_counter(name, arguments.system),
        arguments.max_prompt_tokens,
        arguments.max_prompts,
        arguments.max_eval_prompts,
        arguments.seed,
        arguments.limit,
        arguments.strict,
    )
    return prepare_prompts(
        job,
        arguments.sources,
        arguments.output,
        eval_sources=arguments.eval_source,
        config=arguments.subset,
        **{
            name: getattr(arguments, name)
            for name in ("eval_split", "eval_fraction", "eval_output", "split", "overwrite")
        },
    )


def token_counter(name: str, system: str | None) -> Callable[[str], int]:
    """How many tokens the model reads for a prompt: those of the chat template, without thinking, counted in."""
    from fastsdpo.commands.options import read_text
    from fastsdpo.data import InteractionTokenizer
    from fastsdpo.modeling import load_tokenizer

    options = {"max_prompt_length": None, "chat_template_kwargs": {"enable_thinking": False}}
    tokenize = InteractionTokenizer(load_tokenizer(name), "note", **options)
    before = [] if system is None else [{"role": "system", "content": read_text(system)}]
    return lambda text: len(tokenize.generation_prompt([*before, {"role": "user", "content": text}]))


def format_report(report: PromptReport) -> str:
    """The table that the command prints."""
    lines = [f"read      {report.records:>9,} records", f"kept      {report.prompts:>9,} prompts -> {report.output}"]
    if report.eval_output is not None:
        lines.append(f"held out  {report.eval_prompts:>9,} prompts -> {report.eval_output}")
    return "\n".join([*lines, *lines_of_losses(report)])


def lines_of_losses(report: Any) -> list[str]:
    """What was dropped, and what was damaged with two examples of each kind."""
    lines = [f"dropped   {count:>9,} {reason}" for reason, count in by_count(report.dropped)]
    for kind, count in by_count(report.damaged):
        lines.append(f"damaged   {count:>9,} {kind}, for example:")
        lines += [f"                    {problem}" for problem in report.problems[kind][:2]]
    return lines


def by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
