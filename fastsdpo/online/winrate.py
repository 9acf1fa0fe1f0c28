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
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastsdpo.commands.train import run_command

JUDGE_SYSTEM = (
    "You compare two answers to a user's message. {persona}Say which answer this user would prefer. "
    "Reply with one character: A or B, or C if neither is better."
)
JUDGE_TURN = "{history}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich is better, A, B or C?"


class WinRate(NamedTuple):
    """Outcomes of a comparison.

    Attributes:
        wins, ties, losses: of the model, in prompts.
        left_out: prompts without a verdict.
        rate: ``(wins + ties / 2) / (wins + ties + losses)``; NaN without any.
        low, high: its 95% interval.
    """

    wins: int
    ties: int
    losses: int
    left_out: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[float | None]) -> WinRate:
        """From one outcome per prompt: 1 a win, 0.5 a tie, 0 a loss, None without a verdict."""
        known = [outcome for outcome in outcomes if outcome is not None]
        count = len(known)
        rate = sum(known) / count if count else math.nan
        low, high = wilson(rate, count)
        return cls(known.count(1), known.count(0.5), known.count(0), len(outcomes) - count, rate, low, high)

    def __str__(self) -> str:
        left = f", {self.left_out} left out" if self.left_out else ""
        return (
            f"win rate {self.rate:.1%} (95% interval {self.low:.1%} to {self.high:.1%}): "
            f"{self.wins} wins, {self.ties} ties, {self.losses} losses{left}"
        )


def wilson(rate: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of Wilson for a rate out of ``count``; (0, 1) without any."""
    if count == 0:
        return 0.0, 1.0
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    spread = rate * (1 - rate) / count + z * z / (4 * count * count)
    half = z * math.sqrt(spread) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare_by_rules(rules: Sequence[Any], answers: list[str], base: list[str]) -> list[float]:
    """1, 0.5 or 0 per prompt: whether the answer fulfils all rules, against the base's."""

    def good(text: str) -> bool:
        return all(rule.holds(text) for rule in rules)

    return [(1 + good(mine) - good(other)) / 2 for mine, other in zip(answers, base)]


def compare_by_judge(
    judge: Any, prompts: list[list[dict]], answers: list[str], base: list[str], persona: str = ""
) -> list[float | None]:
    """1, 0.5, 0 or None per prompt, from two verdicts in both orders.

    Args:
        judge: `ChatEndpoint` or `LocalChat`.
        persona: who the user is and what they want.
    """
    system = JUDGE_SYSTEM.replace("{persona}", f"The user: {persona} " if persona else "")

    def question(prompt: list[dict], first: str, second: str) -> list[dict]:
        history = "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        turn = JUDGE_TURN
        for name, text in (("history", history), ("first", first), ("second", second)):
            head, _, tail = turn.partition("{" + name + "}")
            turn = head + text.replace("{", "(").replace("}", ")") + tail
        return [{"role": "system", "content": system}, {"role": "user", "content": turn}]

    asked = [question(p, mine, other) for p, mine, other in zip(prompts, answers, base)]
    asked += [question(p, other, mine) for p, mine, other in zip(prompts, answers, base)]
    verdicts = [read_verdict(reply) for reply in judge.replies(asked)]
    outcomes: list[float | None] = []
    for forward, backward in zip(verdicts[: len(prompts)], verdicts[len(prompts) :]):
        if forward is None or backward is None:
            outcomes.append(None)
        elif (forward, backward) == ("A", "B"):
            outcomes.append(1.0)
        elif (forward, backward) == ("B", "A"):
            outcomes.append(0.0)
        else:
            outcomes.append(0.5)
    return outcomes


def read_verdict(reply: str | None) -> str | None:
    """A, B or C: the first that stands alone in the reply; None where there is none."""
    found = re.search(r"(?<![A-Za-z])([ABC])(?![A-Za-z])", reply or "")
    return found.group(1) if found else None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsdpo eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompts",
        help="held-out prompts: a text file, one per line, or rows with 'prompt' (JSON, JSON Lines, Parquet)",
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
    parser.add_argument("--judge-url", default=None, metavar="URL", help="http://host:8000/v1")
    parser.add_argument("--judge-model", default=None, metavar="NAME", help="its name there")
    parser.add_argument("--judge-local", default=None, metavar="MODEL", help="folder, hub id or GGUF file")
    parser.add_argument("--judge-timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--judge-concurrency", type=int, default=8, metavar="REQUESTS")
    parser.add_argument("--persona", default="", metavar="TEXT", help="whom the judge judges for; @FILE reads it")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--batch-size", type=int, default=16, help="answers written at once")
    parser.add_argument("--limit", type=int, default=None, help="the first prompts only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None, help="of the weights, as in `fastsdpo train`")
    parser.add_argument(
        "-o", "--output", default=None, metavar="FILE", help="JSON: the outcomes, with both answers to each prompt"
    )
    parser.add_argument("--quiet", action="store_true", help="print the last line only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    return run_command("eval", evaluate, build_parser().parse_args(argv))


def evaluate(options: argparse.Namespace) -> int:
    """The comparison, in order."""
    from fastsdpo.commands.online import chat_model, read_text
    from fastsdpo.modeling import check_name, load_model_and_tokenizer
    from fastsdpo.online.degeneration import degenerate
    from fastsdpo.online.prompts import PromptDataset
    from fastsdpo.online.rules import parse_rule
    from fastsdpo.online.users import LocalChat
    from fastsdpo.trainer.report import write_report

    judged = options.judge_url is not None or options.judge_local is not None
    if judged == bool(options.rule):
        raise ValueError("name either --rule, or a judge with --judge-url or --judge-local")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    rules = [parse_rule(text) for text in options.rule]
    persona = read_text(options.persona)
    prompts = PromptDataset.from_source(options.prompts, "prompts").prompts[: options.limit]
    for name in (options.model, options.base):  # the base is loaded long after the model
        check_name(name)
    judge = chat_model(options, "judge", max_new_tokens=8, temperature=0.0) if judged else None

    answers: dict[str, list[str]] = {}
    for role, name in (("model", options.model), ("base", options.base)):
        model, tokenizer = load_model_and_tokenizer(name, dtype=options.dtype)
        chat = LocalChat(
            model,
            tokenizer,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        answers[role] = [text or "" for text in chat.replies(prompts)]
        del model, chat
        if not options.quiet:
            found = answers[role]
            words = sum(len(text.split()) for text in found) / len(found)
            bad = sum(degenerate(text) is not None for text in found)
            kept = [all(rule.holds(text) for rule in rules) for text in found] if rules else []
            share = f"{sum(kept) / len(kept):.0%} fulfil the rules, " if rules else ""
            print(f"{role:6} {name}: {share}{words:.1f} words, {bad} of {len(found)} degenerate")
    outcomes: Sequence[float | None] = (
        compare_by_rules(rules, answers["model"], answers["base"])
        if judge is None
        else compare_by_judge(judge, prompts, answers["model"], answers["base"], persona)
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
                    {"prompt": prompt[-1]["content"], "model": mine, "base": other, "outcome": outcome}
                    for prompt, mine, other, outcome in zip(prompts, answers["model"], answers["base"], outcomes)
                ],
            },
        )
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
