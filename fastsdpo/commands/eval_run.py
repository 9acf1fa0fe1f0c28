"""`fastsdpo eval`, in order: answers of the model and its base, and who wins; or a benchmark's answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastsdpo.commands.benchmark import run_ifeval, write_answers
from fastsdpo.commands.options import read_text
from fastsdpo.commands.running import DONE
from fastsdpo.commands.users import chat_model
from fastsdpo.modeling import check_chat_model, load_model_and_tokenizer
from fastsdpo.online.degeneration import degenerate
from fastsdpo.online.personas import read_persona
from fastsdpo.online.prompts import PromptDataset
from fastsdpo.online.rules import Rule, parse_rule
from fastsdpo.online.users import LocalChat
from fastsdpo.online.winrate import WinRate, check_wording, compare_by_judge, compare_by_rules
from fastsdpo.trainer.report import write_report


def benchmark(options: argparse.Namespace) -> int:
    """IFEval, or a file of answers for another benchmark's own program."""
    for name in filter(None, (options.model, options.base)):
        check_chat_model(name)
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
    judged = options.judge_url is not None or options.judge_local is not None
    rules = [parse_rule(text) for text in options.rule]
    persona = read_persona(options.persona)
    system = None if options.system is None else read_text(options.system)
    prompts = PromptDataset.from_source(options.prompts, "prompts", system).prompts[: options.limit]
    models = [options.model] if options.checkpoints is None else checkpoints(options.checkpoints)
    for name in (*models, options.base):  # loaded one after the other, with minutes of answers between
        check_chat_model(name)
    wording = None if options.judge_prompt is None else check_wording(Path(options.judge_prompt).read_text("utf-8"))
    judge = chat_model(options, "judge", max_new_tokens=8, temperature=0.0) if judged else None

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
        if options.output is not None:  # after each checkpoint: what is stopped leaves those before
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
