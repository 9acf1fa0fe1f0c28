r"""Win rate of a model against its base on held-out prompts: `fastsdpo eval`.

    fastsdpo eval held_out.txt --model runs/brief/model --base MODEL --rule max_sentences=1
    fastsdpo eval held_out.txt --model runs/brief/model --base MODEL --judge-local JUDGE \
        --persona "You want short answers."

Both models answer every prompt. By rule, the model wins where its answer fulfils all rules and the
base's does not. A judge (a language model behind an OpenAI-compatible endpoint, or local) sees prompt
and both answers twice, in both orders: a win is a win in both, anything else a tie.

    win rate = (wins + ties / 2) / prompts

with the 95% interval of Wilson (https://doi.org/10.1080/01621459.1927.10502953), which is wider than
needed where there are ties, and beside it the paper's, wins / (wins + losses). A prompt that the judge did
not answer twice is left out and counted. --checkpoints RUN compares every checkpoint of a run: a curve.

    fastsdpo eval input_data.jsonl --benchmark ifeval --model runs/brief/model --base MODEL --limit 100
    fastsdpo eval questions.jsonl --write arena_hard --model runs/brief/model -o brief.jsonl

IFEval needs no judge: programs check its instructions (pip install if-verifiable; its prompts are at
https://github.com/google-research/google-research/tree/master/instruction_following_eval/data). --write leaves
answers in the formats of AlpacaEval and Arena-Hard, whose own programs judge them.

Exit status: 0 done; 1 an input or model cannot be used; 2 wrong options.
"""

from __future__ import annotations

import argparse

from fastsdpo.commands.options import add_device_option, refuse
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.paths import check_file
from fastsdpo.commands.running import run_command
from fastsdpo.commands.users import add_chat_model_options

# The key of a question in the benchmark's own file.
QUESTIONS = {"alpaca_eval": "instruction", "arena_hard": "prompt"}
# What only a judge reads.
JUDGED = ("judge-model", "judge-timeout", "judge-concurrency", "judge-prompt", "persona")


def build_parser() -> Parser:
    parser = Parser("eval", __doc__)
    parser.add_argument(
        "prompts",
        help="Held-out prompts: a text file with one in each line, or rows with 'prompt' (JSON, JSON Lines, CSV, "
        "Parquet).",
    )
    parser.add_config_option()
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="Write the outcomes, with both answers to each prompt, as JSON."
    )
    parser.add_argument("--quiet", action="store_true", help="Print the last line only.")
    _add_models(parser.add_argument_group("models"))
    _add_judges(parser.add_argument_group("rule, judge or benchmark"))
    _add_answers(parser.add_argument_group("answers"))
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--system", metavar="TEXT", help="A system prompt for both models. @FILE reads it from a file.")
    group.add_argument("--model", help="The model: a folder, a hub id or a GGUF file; or the folder of an adapter.")
    group.add_argument("--base", help="The model that it is compared with, such as the one before training.")
    group.add_argument(
        "--base-system",
        metavar="TEXT",
        help="A system prompt for the base alone, such as the wish: what it can do when told. @FILE reads it from "
        "a file.",
    )
    group.add_argument(
        "--checkpoints", metavar="RUN", help="Compare every checkpoint in this run's folder, instead of --model."
    )
    group.add_argument(
        "--dtype",
        help="The type of the weights: float32, bfloat16, float16, or auto: the checkpoint's. Default: float32 on "
        "a CPU, else the checkpoint's.",
    )
    add_device_option(group)


def _add_judges(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="A rule, as in `fastsdpo online`. Of several, an answer has to fulfil all.",
    )
    add_chat_model_options(group, "judge")
    group.add_argument(
        "--judge-prompt",
        metavar="FILE",
        help="A file with the judge's wording, with {persona}, {history}, {first} and {second}. It must ask for A, "
        "B or C. Default: our own text.",
    )
    group.add_argument(
        "--persona",
        default="",
        metavar="TEXT",
        help="Whom the judge judges for, and what this person wants. @FILE reads it from a file. Default: nobody "
        "in particular.",
    )
    group.add_argument(
        "--benchmark",
        choices=["ifeval"],
        help="Measure this benchmark, instead of a rule or a judge. PROMPTS is the benchmark's file.",
    )
    group.add_argument(
        "--write",
        choices=list(QUESTIONS),
        help="Write answers for this benchmark to --output. PROMPTS is the benchmark's file of questions.",
    )
    group.add_argument(
        "--generator", metavar="NAME", help="The model's name in the file of --write. Default: its folder's name."
    )


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=int, default=256, help="The most tokens of an answer.")
    group.add_argument(
        "--temperature", type=float, default=0.0, help="How freely answers are sampled. 0: always the likeliest token."
    )
    group.add_argument(
        "--generation-batch-size", type=int, default=16, metavar="N", help="How many answers are written at once."
    )
    group.add_argument(
        "--limit",
        type=int,
        help="Use the first N prompts only; with --benchmark N of them, evenly spaced. Default: all.",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="Decides the answers that are sampled. Needs --temperature."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    return run_command(parser, evaluate, parser.parse_args(argv))


def evaluate(options: argparse.Namespace) -> int:
    """Checks the options, which needs no torch, and runs what they ask for."""
    check_file(options.output, options.prompts)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    if (options.model is None) == (options.checkpoints is None):
        raise ValueError("name either --model or --checkpoints")
    if options.write is None:
        refuse(options, ("generator",), "needs --write")
    if options.judge_url is None and options.judge_local is None:
        refuse(options, JUDGED, "needs a judge (--judge-url or --judge-local)")
    if options.temperature == 0:
        refuse(options, ("seed",), "needs answers that are sampled (--temperature)")
    if options.benchmark is None and options.write is None:
        if options.base is None:
            raise ValueError("name --base, the model to compare with")
        judged = options.judge_url is not None or options.judge_local is not None
        if judged == bool(options.rule):
            raise ValueError("name either --rule, or a judge with --judge-url or --judge-local")
        from fastsdpo.commands.eval_run import compare

        return compare(options)
    mode, more = ("benchmark", "write") if options.benchmark else ("write", "base")
    refuse(
        options, ("rule", "judge-url", "judge-local", "checkpoints", "base-system", more), f"does not go with --{mode}"
    )
    if options.write and not options.output:
        raise ValueError("--write needs --output")
    from fastsdpo.commands.eval_run import benchmark

    return benchmark(options)
