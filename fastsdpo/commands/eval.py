"""Win rate of a model against its base on held-out prompts: `fastsdpo eval`.

    fastsdpo eval held_out.txt --model runs/brief/model --base MODEL --rule max_sentences=1
    fastsdpo eval held_out.txt --model runs/brief/model --base MODEL --judge-local JUDGE \
        --persona "You want short answers."

Both models answer every prompt. By rule, the model wins where its answer fulfils all rules and the
base's does not. A judge (a language model behind an OpenAI-compatible endpoint, or local) sees prompt
and both answers twice, in both orders: a win is a win in both, anything else a tie.

    win rate = (wins + ties / 2) / prompts            --ties half, which is the default
    win rate = wins / (wins + losses)                 --ties drop, as in the SDPO paper

Both are printed and reported, each with the 95% interval of Wilson
(https://doi.org/10.1080/01621459.1927.10502953), which is wider than needed where there are ties. A
prompt that the judge did not answer twice is left out and counted. --base-system gives the base alone a
system prompt: with the user's wish in it, the base is the paper's in-context oracle. --checkpoints RUN
in place of --model gives a win rate for each checkpoint of a run.

With --benchmark the prompts are a benchmark's file, and --base may be left out:

    curl -LO https://raw.githubusercontent.com/google-research/google-research/master/instruction_following_eval/data/input_data.jsonl
    fastsdpo eval input_data.jsonl --benchmark ifeval --model runs/brief/model --base MODEL --max-new-tokens 1280
    fastsdpo eval alpaca_eval.json --benchmark alpaca-eval --model runs/brief/model -o answers.json

ifeval checks the answers here (pip install 'fastsdpo[ifeval]'): strict and loose, by prompt and by
instruction, with standard errors. alpaca-eval and arena-hard write the answers to --output, as their own
judges read them.

Exit status: 0 done; 1 an input or model cannot be used; 2 wrong options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsdpo.commands.benchmark import run_benchmark
from fastsdpo.commands.options import DONE, add_device_option, read_text, run_command
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.users import PERSONA_HELP, add_chat_model_options, chat_model
from fastsdpo.modeling import check_name, load_model_and_tokenizer
from fastsdpo.online.benchmarks import BENCHMARKS
from fastsdpo.online.degeneration import degenerate
from fastsdpo.online.personas import read_persona
from fastsdpo.online.prompts import PromptDataset
from fastsdpo.online.rules import Rule, parse_rule
from fastsdpo.online.users import LocalChat
from fastsdpo.online.winrate import JudgeWording, WinRate, compare_by_judge, compare_by_rules
from fastsdpo.trainer.report import write_report


def build_parser() -> Parser:
    parser = Parser("eval", __doc__)
    parser.add_argument(
        "prompts",
        help="held-out prompts: a text file, one per line, or rows with 'prompt' (JSON, JSON Lines, Parquet)",
    )
    parser.add_argument(
        "--system", metavar="TEXT", default=None, help="a system prompt, as in `fastsdpo online`; @FILE reads it"
    )
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file, or an adapter")
    parser.add_argument(
        "--checkpoints", default=None, metavar="RUN", help="instead of --model: each checkpoint of this run's folder"
    )
    parser.add_argument("--base", default=None, help="what it is compared with")
    parser.add_argument(
        "--base-system", default=None, metavar="TEXT", help="a system prompt of the base alone; @FILE reads it"
    )
    parser.add_argument("--benchmark", choices=BENCHMARKS, default=None, help="what PROMPTS is a file of")
    parser.add_argument(
        "--sample", type=int, default=None, metavar="N", help="so many prompts of the benchmark, drawn by --seed"
    )
    parser.add_argument(
        "--generator", default=None, metavar="NAME", help="of the model in answer files (default: --model)"
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as in `fastsdpo online`; several are all to be fulfilled",
    )
    add_chat_model_options(parser, "judge")
    parser.add_argument("--persona", default="", metavar="TEXT", help=PERSONA_HELP)
    parser.add_argument(
        "--judge-prompt",
        default=None,
        metavar="FILE",
        help="the judge's wording: a text with {history}, {first}, {second} and, where it is wanted, {persona}; what "
        "stands before a line of three dashes is the system prompt. The judge answers A, B or C",
    )
    parser.add_argument(
        "--ties", choices=("half", "drop"), default="half", help="what a tie counts in the win rate printed last"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--generation-batch-size", type=int, default=16, metavar="N", help="answers written at once")
    parser.add_argument("--limit", type=int, default=None, help="the first prompts only")
    parser.add_argument("--seed", type=int, default=0, help="of answers that are sampled (--temperature)")
    parser.add_argument("--dtype", default=None, help="of the weights, as in `fastsdpo train`")
    add_device_option(parser)
    parser.add_config_option()
    parser.add_argument(
        "-o", "--output", default=None, metavar="FILE", help="JSON: the outcomes, with both answers to each prompt"
    )
    parser.add_argument("--quiet", action="store_true", help="print the last line only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    return run_command(parser, evaluate, parser.parse_args(argv))


def evaluate(options: argparse.Namespace) -> int:
    """The comparison, or the benchmark, in order."""
    if (options.model is None) == (options.checkpoints is None):
        raise ValueError("name either --model or --checkpoints")
    if options.benchmark is not None:
        return run_benchmark(options, answers_of)
    if options.base is None or options.sample is not None or options.generator is not None:
        raise ValueError("--base must be given without --benchmark, and --sample and --generator go with it")
    judged = options.judge_url is not None or options.judge_local is not None
    if judged == bool(options.rule):
        raise ValueError("name either --rule, or a judge with --judge-url or --judge-local")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    rules = [parse_rule(text) for text in options.rule]
    persona, wording = read_persona(options.persona), JudgeWording.read(options.judge_prompt)
    prompts, base_prompts = read_prompts(options)
    models = [options.model] if options.checkpoints is None else checkpoints_of(options.checkpoints)
    for name in (*models, options.base):  # the base is loaded long after the model
        check_name(name)
    judge = chat_model(options, "judge", max_new_tokens=8, temperature=0.0) if judged else None

    base = answers_of(options.base, base_prompts, options)
    told = not options.quiet
    if told:
        print(f"base   {options.base}: {describe_answers(base, rules)}")
    reports = []
    for name in models:
        mine = answers_of(name, prompts, options)
        if told:
            print(f"model  {name}: {describe_answers(mine, rules)}")
        outcomes: Sequence[float | None] = (
            compare_by_rules(rules, mine, base)
            if judge is None
            else compare_by_judge(judge, prompts, mine, base, persona, wording)
        )
        reports.append(comparison(name, outcomes, prompts, mine, base))
        half, drop = WinRate.of(outcomes), WinRate.of(outcomes, ties="drop")
        chosen, other = (half, drop) if options.ties == "half" else (drop, half)
        if told:
            print(other)
        print(chosen if options.checkpoints is None else f"{Path(name).name}: {chosen}")
    if options.output is not None:
        settings = {
            "base": options.base,
            "base_system": options.base_system,
            "ties": options.ties,
            "rules": options.rule,
            "judge": options.judge_local or options.judge_model,
            "judge_prompt": options.judge_prompt,
            "judge_failures": dict(getattr(judge, "failures", {})),
        }
        found = reports[0] if options.checkpoints is None else {"curve": reports}
        write_report(options.output, {**found, **settings})
    return DONE


def read_prompts(options: argparse.Namespace) -> tuple[list[list[dict]], list[list[dict]]]:
    """The prompts as the model reads them, and as the base does."""
    system = None if options.system is None else read_text(options.system)
    base_system = system if options.base_system is None else read_persona(options.base_system)
    sets = [PromptDataset.from_source(options.prompts, "prompts", text) for text in (system, base_system)]
    prompts, base = (found.prompts[: options.limit] for found in sets)
    return prompts, base


def comparison(
    name: str, outcomes: Sequence[float | None], prompts: list[list[dict]], mine: list[str], base: list[str]
) -> dict[str, Any]:
    """What the report says of one model: both win rates, and the answers."""
    dropped = WinRate.of(outcomes, ties="drop")
    return {
        "model": name,
        **WinRate.of(outcomes)._asdict(),
        "ties_dropped": {"rate": dropped.rate, "low": dropped.low, "high": dropped.high},
        "answers": [
            {"prompt": prompt[-1]["content"], "model": text, "base": other, "outcome": outcome}
            for prompt, text, other, outcome in zip(prompts, mine, base, outcomes)
        ],
    }


def checkpoints_of(run: str) -> list[str]:
    """The folders ``checkpoint-N`` of a run, by N.

    Raises:
        ValueError: there are none.
    """
    found = {int(p.name[11:]): str(p) for p in Path(run).glob("checkpoint-*") if p.name[11:].isdigit()}
    if not found:
        raise ValueError(f"--checkpoints: there are no folders checkpoint-N in {run}")
    return [found[number] for number in sorted(found)]


def answers_of(name: str, prompts: list[list[dict]], options: argparse.Namespace) -> list[str]:
    """One answer per prompt of the model ``name``, which is loaded here and dropped again."""
    model, tokenizer = load_model_and_tokenizer(name, dtype=options.dtype, device=options.device)
    chat = LocalChat(
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        batch_size=options.generation_batch_size,
        seed=options.seed,
    )
    return [text or "" for text in chat.replies(prompts)]


def describe_answers(answers: list[str], rules: list[Rule]) -> str:
    """How many fulfil the rules, their length in words, and how many are degenerate."""
    words = sum(len(text.split()) for text in answers) / len(answers)
    bad = sum(degenerate(text) is not None for text in answers)
    kept = sum(all(rule.holds(text) for rule in rules) for text in answers)
    share = f"{kept / len(answers):.0%} fulfil the rules, " if rules else ""
    return f"{share}{words:.1f} words, {bad} of {len(answers)} degenerate"
