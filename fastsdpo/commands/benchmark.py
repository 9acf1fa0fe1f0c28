"""`fastsdpo eval --benchmark`: answers to a benchmark's prompts, checked here (IFEval) or written for its judge."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsdpo.commands.options import DONE, read_text
from fastsdpo.modeling import check_name
from fastsdpo.online.benchmarks import (
    Task,
    answers_file,
    checkable,
    choose,
    differences,
    followed,
    read_tasks,
    scores,
)
from fastsdpo.online.personas import read_persona
from fastsdpo.trainer.report import write_report

Answer = Callable[[str, list[list[dict]], argparse.Namespace], list[str]]


def run_benchmark(options: argparse.Namespace, answer: Answer) -> int:
    """Answers the prompts and scores or writes them; ``answer`` is `fastsdpo.commands.eval.answers_of`."""
    check(options)
    tasks = read_tasks(options.prompts, options.benchmark)
    left: list[int] = []
    if options.benchmark == "ifeval":
        tasks, left = checkable(tasks)
        if left:
            print(
                f"{len(left)} of {len(tasks) + len(left)} prompts are left out: their checkers need NLTK's sentence "
                "data (python -m nltk.downloader punkt punkt_tab, then run this again)",
                file=sys.stderr,
            )
        if not tasks:
            raise ValueError(f"{options.prompts}: no prompt can be checked without NLTK's data")
    tasks = choose(tasks, options.sample, options.seed)[: options.limit]
    if options.benchmark != "ifeval":
        answers = answer(options.model, conversations(tasks, options.system), options)
        text = answers_file(options.benchmark, tasks, answers, options.generator or options.model)
        Path(options.output).write_text(text, encoding="utf-8")
        print(f"{len(answers)} answers in {options.output}")
        return DONE
    return ifeval(options, answer, tasks, left)


def check(options: argparse.Namespace) -> None:
    """Refuses what does not go with a benchmark, before a model is loaded."""
    if options.checkpoints is not None:
        raise ValueError("--checkpoints does not go with --benchmark; name one checkpoint with --model")
    if options.rule or options.judge_url or options.judge_local:
        raise ValueError("--rule and --judge-* do not go with --benchmark")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    if options.benchmark == "ifeval":
        if options.base is None and options.base_system is not None:
            raise ValueError("--base-system needs --base")
    elif options.output is None or options.base is not None:
        raise ValueError(f"--benchmark {options.benchmark} writes answers of --model to --output, without --base")
    for name in (options.model, options.base):
        if name is not None:
            check_name(name)


def conversations(tasks: list[Task], system: str | None) -> list[list[dict]]:
    """Messages of the tasks, with a system prompt where there is one."""
    start = [] if system is None else [{"role": "system", "content": read_text(system)}]
    return [[*start, {"role": "user", "content": task.prompt}] for task in tasks]


def ifeval(options: argparse.Namespace, answer: Answer, tasks: list[Task], left: list[int]) -> int:
    """Scores of the model, of the base where there is one, and their difference."""
    report: dict[str, Any] = {"benchmark": "ifeval", "prompts": len(tasks), "left_out": left}
    report |= {
        name: getattr(options, name) for name in ("sample", "limit", "seed", "max_new_tokens", "temperature", "system")
    }
    found, rows = {}, [{"key": task.row["key"], "instructions": task.row["instruction_id_list"]} for task in tasks]
    base_system = options.system if options.base_system is None else read_persona(options.base_system)
    for role, name, system in (("model", options.model, options.system), ("base", options.base, base_system)):
        if name is None:
            continue
        texts = answer(name, conversations(tasks, system), options)
        found[role] = [followed(task, text) for task, text in zip(tasks, texts)]
        rows = [{**row, role: {"answer": a, **r}} for row, a, r in zip(rows, texts, found[role])]
        result = scores(found[role])
        report[role] = {"name": name, **{level: score._asdict() for level, score in result.items()}}
        print(f"{role:10} {describe(result)}")
    if "base" in found:
        result = differences(found["model"], found["base"])
        report["difference"] = {level: score._asdict() for level, score in result.items()}
        print(f"difference {describe(result)}")
    print(f"{len(tasks)} prompts; +- is one standard error")
    if options.output is not None:
        write_report(options.output, {**report, "answers": rows})
    return DONE


def describe(result: dict) -> str:
    return "  ".join(f"{level.replace('_', ' ')} {score}" for level, score in result.items())
