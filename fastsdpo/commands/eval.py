"""Win rate of a model against its base on held-out prompts: `fastsdpo eval`.

    fastsdpo eval held_out.txt --model runs/brief/model --base MODEL --rule max_sentences=1
    fastsdpo eval held_out.txt --model runs/brief/model --base MODEL --judge-local JUDGE \
        --persona "You want short answers."

Both models answer every prompt. By rule, the model wins where its answer fulfils all rules and the
base's does not. A judge (a language model behind an OpenAI-compatible endpoint, or local) sees prompt
and both answers twice, in both orders: a win is a win in both, anything else a tie.

    win rate = (wins + ties / 2) / prompts

with the 95% interval of Wilson (https://doi.org/10.1080/01621459.1927.10502953), which is wider than
needed where there are ties. A prompt that the judge did not answer twice is left out and counted.

Exit status: 0 done; 1 an input or model cannot be used; 2 wrong options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastsdpo.commands.options import DONE, add_device_option, read_text, run_command
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.users import add_chat_model_options, chat_model
from fastsdpo.modeling import check_name, load_model_and_tokenizer
from fastsdpo.online.degeneration import degenerate
from fastsdpo.online.prompts import PromptDataset
from fastsdpo.online.rules import Rule, parse_rule
from fastsdpo.online.users import LocalChat
from fastsdpo.online.winrate import WinRate, compare_by_judge, compare_by_rules
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
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file, or an adapter")
    parser.add_argument("--base", required=True, help="what it is compared with")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as in `fastsdpo online`; several are all to be fulfilled",
    )
    add_chat_model_options(parser, "judge")
    parser.add_argument("--persona", default="", metavar="TEXT", help="whom the judge judges for; @FILE reads it")
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
    """The comparison, in order."""
    judged = options.judge_url is not None or options.judge_local is not None
    if judged == bool(options.rule):
        raise ValueError("name either --rule, or a judge with --judge-url or --judge-local")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    rules = [parse_rule(text) for text in options.rule]
    persona = read_text(options.persona)
    system = None if options.system is None else read_text(options.system)
    prompts = PromptDataset.from_source(options.prompts, "prompts", system).prompts[: options.limit]
    for name in (options.model, options.base):  # the base is loaded long after the model
        check_name(name)
    judge = chat_model(options, "judge", max_new_tokens=8, temperature=0.0) if judged else None

    answers: dict[str, list[str]] = {}
    for role, name in (("model", options.model), ("base", options.base)):
        answers[role] = answers_of(name, prompts, options)
        if not options.quiet:
            print(f"{role:6} {name}: {describe_answers(answers[role], rules)}")
    mine, base = answers["model"], answers["base"]
    outcomes: Sequence[float | None] = (
        compare_by_rules(rules, mine, base) if judge is None else compare_by_judge(judge, prompts, mine, base, persona)
    )
    result = WinRate.of(outcomes)
    if options.output is not None:
        write_report(
            options.output,
            {
                **result._asdict(),
                "model": options.model,
                "base": options.base,
                "rules": options.rule,
                "judge": options.judge_local or options.judge_model,
                "judge_failures": dict(getattr(judge, "failures", {})),
                "answers": [
                    {"prompt": prompt[-1]["content"], "model": text, "base": other, "outcome": outcome}
                    for prompt, text, other, outcome in zip(prompts, mine, base, outcomes)
                ],
            },
        )
    print(result)
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
