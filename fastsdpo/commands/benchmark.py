"""What `fastsdpo eval` does without a comparison by rule or judge: IFEval, and files of answers for other judges."""

from __future__ import annotations

import argparse
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsdpo.commands.eval import QUESTIONS
from fastsdpo.commands.running import DONE
from fastsdpo.data.output import atomic_file
from fastsdpo.online import ifeval
from fastsdpo.trainer.report import write_report

Answers = Callable[[str, list[list[dict]]], list[str]]


def run_ifeval(options: argparse.Namespace, answers_of: Answers) -> int:
    """IFEval of ``--model``, and of ``--base`` where it is given, with the difference."""
    known, missing = ifeval.checkable(ifeval.read_samples(options.prompts))
    samples = ifeval.spread(known, options.limit)
    if missing:
        total = len(ifeval.read_samples(options.prompts))
        print(
            f"{total - len(known)} of {total} prompts are left out: {', '.join(missing)} need data of NLTK "
            "(python -m nltk.downloader punkt punkt_tab)",
            flush=True,
        )
    prompts = [[{"role": "user", "content": sample.prompt}] for sample in samples]
    names = {"model": options.model, **({"base": options.base} if options.base else {})}
    found: dict[str, Any] = {"benchmark": "ifeval", "left_out": missing, "max_new_tokens": options.max_new_tokens}
    verdicts = {}
    for role, name in names.items():
        texts = answers_of(name, prompts)
        verdicts[role] = [ifeval.check(sample, text) for sample, text in zip(samples, texts)]
        result = ifeval.scores(verdicts[role])
        print(f"{role:6} {name}: {result.prompts} prompts, {result.instructions} instructions: {result}", flush=True)
        found[role] = {"name": name, **result._asdict(), "answers": texts}
    if options.base:
        found["difference"] = difference(verdicts["model"], verdicts["base"])
        value, error = found["difference"]
        print(f"prompts loose, model - base: {value:+.1%} (se {error:.1%}, paired)")
    if options.output is not None:
        write_report(options.output, {**found, "keys": [sample.key for sample in samples]})
    return DONE


def difference(mine: list, base: list) -> ifeval.Share:
    """Of the share of prompts that are followed loosely, with its standard error over pairs of answers."""
    pairs = [all(v[1] for v in a) - all(v[1] for v in b) for a, b in zip(mine, base)]
    mean = sum(pairs) / len(pairs)
    spread = sum((pair - mean) ** 2 for pair in pairs) / max(1, len(pairs) - 1)
    return ifeval.Share(mean, (spread / len(pairs)) ** 0.5)


def write_answers(options: argparse.Namespace, answers_of: Answers) -> int:
    """The model's answers as AlpacaEval (a JSON array) or Arena-Hard (JSON Lines) reads them."""
    rows = read_questions(options.prompts, options.write)[: options.limit]
    key, name = QUESTIONS[options.write], options.generator or Path(options.model).name
    texts = answers_of(options.model, [[{"role": "user", "content": row[key]}] for row in rows])
    if options.write == "alpaca_eval":
        written = [
            {
                **({"dataset": row["dataset"]} if "dataset" in row else {}),
                key: row[key],
                "output": text,
                "generator": name,
            }
            for row, text in zip(rows, texts)
        ]
        write_report(options.output, written)
    else:
        with atomic_file(Path(options.output)) as file:
            for row, text in zip(rows, texts):
                file.write(json.dumps(arena_row(row, text, name), ensure_ascii=False).encode() + b"\n")
    print(f"{len(rows)} answers of {name} in {options.output}")
    return DONE


def arena_row(row: dict[str, Any], text: str, name: str) -> dict[str, Any]:
    """An answer of Arena-Hard 2; its own utils/add_markdown_info.py adds what style control needs."""
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": {"answer": text}}]
    return {
        "uid": row["uid"],
        "ans_id": uuid.uuid4().hex,
        "model": name,
        "messages": messages,
        "tstamp": time.time(),
        "metadata": {},
    }


def read_questions(path: str, kind: str) -> list[dict[str, Any]]:
    """The benchmark's own questions: a JSON array or JSON Lines.

    Raises:
        OSError, ValueError: not readable, or a row lacks what the benchmark's rows have.
    """
    text = Path(path).read_text("utf-8")
    needed = [QUESTIONS[kind], *(["uid"] if kind == "arena_hard" else [])]
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line]
        )
    except ValueError as error:
        raise ValueError(f"{path}: neither a JSON array nor JSON Lines: {error}") from error
    for number, row in enumerate(rows, 1):
        for key in needed:
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise ValueError(f"{path}: question {number} must have {key!r} for --write {kind}")
    if not rows:
        raise ValueError(f"{path} has no questions")
    return rows
