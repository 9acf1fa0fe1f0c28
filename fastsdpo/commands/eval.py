"""Win rate of a model against its base on held-out prompts: `fastsdpo eval`.

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
from collections.abc import Sequence
from pathlib import Path

from fastsdpo.commands.benchmark import QUESTIONS, run_ifeval, write_answers
from fastsdpo.commands.options import DONE, add_device_option, read_text, refuse, run_command
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.users import add_chat_model_options, chat_model
from fastsdpo.modeling import check_name, load_model_and_tokenizer
from fastsdpo.online.degeneration import degenerate
from fastsdpo.online.personas import read_persona
from fastsdpo.online.prompts import PromptDataset
from fastsdpo.online.rules import Rule, parse_rule
from fastsdpo.online.users import LocalChat
from fastsdpo.online.winrate import WinRate, compare_by_judge, compare_by_rules
from fastsdpo.trainer.report import write_report

# What only a judge reads.
JUDGED = ("judge-model", "judge-timeout", "judge-concurrency", "judge-prompt", "persona")


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
    parser.add_argument("--base", default=None, help="what it is compared with")
    parser.add_argument(
        "--base-system",
        metavar="TEXT",
        default=None,
        help="a system prompt for the base alone, such as the wish: what it can do when told; @FILE reads it",
    )
    parser.add_argument(
        "--checkpoints", metavar="RUN", default=None, help="instead of --model: every checkpoint of this run's folder"
    )
    parser.add_argument(
        "--benchmark", choices=["ifeval"], default=None, help="instead of a rule or a judge; PROMPTS is its file"
    )
    parser.add_argument(
        "--write",
        choices=list(QUESTIONS),
        default=None,
        help="write answers for this benchmark to --output; PROMPTS is its file of questions",
    )
    parser.add_argument("--generator", metavar="NAME", default=None, help="with --write: the model's name there")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as in `fastsdpo online`; several are all to be fulfilled",
    )
    add_chat_model_options(parser, "judge")
    parser.add_argument(
        "--judge-prompt",
        metavar="FILE",
        default=None,
        help="the judge's wording, with {persona}, {history}, {first} and {second}; it must ask for A, B or C",
    )
    parser.add_argument("--persona", default="", metavar="TEXT", help="whom the judge judges for; @FILE reads it")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--generation-batch-size", type=int, default=16, metavar="N", help="answers written at once")
    parser.add_argument(
        "--limit", type=int, default=None, help="the first prompts only; with --benchmark as many, evenly spaced"
    )
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
    """A benchmark, a file of answers, or a comparison with the base."""
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
        return compare(options)
    unused = [
        name for name in ("rule", "judge_url", "judge_local", "checkpoints", "base_system") if vars(options)[name]
    ]
    if options.benchmark and options.write:
        unused.append("write")
    if unused:
        flag = "--" + unused[0].replace("_", "-")
        raise ValueError(f"{flag} does not go with --{'benchmark' if options.benchmark else 'write'}")
    if options.write and not options.output:
        raise ValueError("--write needs --output")
    for name in filter(None, (options.model, options.base)):
        check_name(name)
    run = run_ifeval if options.benchmark else write_answers
    return run(options, lambda name, prompts: answers_of(name, with_system(prompts, options.system), options))


def with_system(prompts: list[list[dict]], system: str | None) -> list[list[dict]]:
    """The prompts behind a system prompt, in the place of one that they have."""
    if system is None:
        return prompts
    first = {"role": "system", "content": read_persona(system)}
    return [[first, *(m for m in prompt if m["role"] != "system")] for prompt in prompts]


def checkpoints(run: str) -> list[str]:
    """The folders of a run's checkpoints, in order of their steps, and the model at its end.

    Raises:
        ValueError: there are none.
    """
    numbered = [path for path in Path(run).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    found = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    final = Path(run, "model")
    if not found:
        raise ValueError(f"--checkpoints {run}: no checkpoint there; run with --save-steps N and --save-total-limit M")
    return [*map(str, found), *([str(final)] if final.is_dir() else [])]


def compare(options: argparse.Namespace) -> int:
    """The comparison, in order."""
    if options.base is None:
        raise ValueError("name --base, what the model is compared with")
    judged = options.judge_url is not None or options.judge_local is not None
    if judged == bool(options.rule):
        raise ValueError("name either --rule, or a judge with --judge-url or --judge-local")
    rules = [parse_rule(text) for text in options.rule]
    persona = read_persona(options.persona)
    system = None if options.system is None else read_text(options.system)
    prompts = PromptDataset.from_source(options.prompts, "prompts", system).prompts[: options.limit]
    models = [options.model] if options.checkpoints is None else checkpoints(options.checkpoints)
    for name in (*models, options.base):  # the base is loaded long after the model
        check_name(name)
    judge = chat_model(options, "judge", max_new_tokens=8, temperature=0.0) if judged else None
    wording = None if options.judge_prompt is None else Path(options.judge_prompt).read_text("utf-8")

    def answered(role: str, name: str) -> list[str]:
        texts = answers_of(name, with_system(prompts, options.base_system) if role == "base" else prompts, options)
        if not options.quiet:
            print(f"{role:6} {name}: {describe_answers(texts, rules)}", flush=True)
        return texts

    base, reports = answered("base", options.base), []
    for name in models:
        mine = answered("model", name)
        outcomes: Sequence[float | None] = (
            compare_by_rules(rules, mine, base)
            if judge is None
            else compare_by_judge(judge, prompts, mine, base, persona, wording)
        )
        result = WinRate.of(outcomes)
        reports.append(
            {
                **result._asdict(),
                "model": name,
                "base": options.base,
                "rules": options.rule,
                "judge": options.judge_local or options.judge_model,
                "judge_failures": dict(getattr(judge, "failures", {})),
                "answers": [
                    {"prompt": prompt[-1]["content"], "model": text, "base": other, "outcome": outcome}
                    for prompt, text, other, outcome in zip(prompts, mine, base, outcomes)
                ],
            }
        )
        print(f"{Path(name).name}: {result}" if options.checkpoints else result, flush=True)
    if options.output is not None:
        write_report(options.output, reports if options.checkpoints else reports[0])
    return DONE


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
