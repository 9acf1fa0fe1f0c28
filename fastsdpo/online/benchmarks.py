"""Benchmarks of answers to a file of prompts: IFEval scored here, answer files for AlpacaEval and Arena-Hard.

IFEval (https://arxiv.org/abs/2311.07911) asks for what a program can check ("no commas", "at least 300 words").
The checkers are those of the package `if-verifiable`; the prompts are a file of the user's:

    https://raw.githubusercontent.com/google-research/google-research/master/instruction_following_eval/data/input_data.jsonl
"""

from __future__ import annotations

import json
import math
import random
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

BENCHMARKS = ("ifeval", "alpaca-eval", "arena-hard")
LEVELS = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
PROBE = "One sentence is here. Another one follows it, with more words."


class Task(NamedTuple):
    """A prompt of a benchmark.

    Attributes:
        prompt: the user's message.
        row: the whole row of the file.
    """

    prompt: str
    row: dict[str, Any]


class Score(NamedTuple):
    """A share and its standard error, which is NaN for one prompt."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.1%} +- {self.error:.1%}"


def read_tasks(path: str | Path, benchmark: str) -> list[Task]:
    """The prompts of a benchmark's file, JSON Lines or one JSON list.

    Raises:
        ValueError: a row lacks what the benchmark needs, with file and row.
    """
    text = Path(path).read_text("utf-8-sig")
    try:
        listed = text.lstrip().startswith("[")
        rows = json.loads(text) if listed else [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is neither a JSON list nor JSON Lines: {error}") from None
    field = "instruction" if benchmark == "alpaca-eval" else "prompt"
    needed = {"ifeval": ("key", "instruction_id_list", "kwargs"), "arena-hard": ("uid",)}.get(benchmark, ())
    for number, row in enumerate(rows, 1):
        missing = [name for name in (field, *needed) if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}: row {number}: {benchmark} needs {', '.join(map(repr, missing))}")
    if not rows:
        raise ValueError(f"{path}: there are no prompts")
    return [Task(row[field], row) for row in rows]


def choose(tasks: list[Task], count: int | None, seed: int) -> list[Task]:
    """``count`` of the tasks, drawn by ``seed``, in the order of the file; None: all.

    Raises:
        ValueError: there are not as many.
    """
    if count is None:
        return tasks
    if not 1 <= count <= len(tasks):
        raise ValueError(f"--sample must be between 1 and the {len(tasks)} prompts, got {count}")
    return [tasks[index] for index in sorted(random.Random(seed).sample(range(len(tasks)), count))]


def followed(task: Task, answer: str) -> dict[str, list[bool]]:
    """Which instructions of an IFEval task the answer follows: ``{"strict": [...], "loose": [...]}``.

    An empty answer follows none. Loose also accepts the answer without its first or last line or its asterisks.

    Raises:
        LookupError: a checker needs data of NLTK that is not there.
        ModuleNotFoundError: `if-verifiable` is not installed.
    """
    import langdetect
    from if_verifiable import IFEvalSample, evaluate_output_for_sample
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0  # else the language of a short text is another each time
    names = task.row["instruction_id_list"]
    unknown = [name for name in names if name not in INSTRUCTION_DICT]
    if unknown:
        raise ValueError(f"IFEval prompt {task.row['key']}: unknown instruction {unknown[0]!r}")
    sample = IFEvalSample(task.row["key"], task.prompt, names, task.row["kwargs"])
    results, _ = evaluate_output_for_sample("ifeval", sample, answer)
    if not results:
        return {"strict": [False] * len(names), "loose": [False] * len(names)}
    return {"strict": [r.strict_pass for r in results], "loose": [r.loose_pass for r in results]}


def checkable(tasks: list[Task]) -> tuple[list[Task], list[int]]:
    """The IFEval tasks whose checkers run here, and the keys of those that need missing data of NLTK."""
    kept, left = [], []
    for task in tasks:
        try:
            followed(task, PROBE)
            kept.append(task)
        except LookupError:
            left.append(task.row["key"])
    return kept, left


def scores(results: Sequence[dict[str, list[bool]]]) -> dict[str, Score]:
    """The four accuracies of IFEval over prompts, by the names of `LEVELS`."""
    return {level: share(*_counts(results, level)) for level in LEVELS}


def differences(results: Sequence[dict], base: Sequence[dict]) -> dict[str, Score]:
    """`scores` of a model less those of its base on the same prompts; the error is that of pairs."""
    paired = {}
    for level in LEVELS:
        mine, sizes = _counts(results, level)
        other, _ = _counts(base, level)
        paired[level] = share([a - b for a, b in zip(mine, other)], sizes)
    return paired


def _counts(results: Sequence[dict[str, list[bool]]], level: str) -> tuple[list[int], list[int]]:
    """Per prompt: how many of its parts are followed, and how many it has (one, at the level of prompts)."""
    unit, kind = level.split("_")
    if unit == "prompt":
        return [int(all(result[kind])) for result in results], [1] * len(results)
    return [sum(result[kind]) for result in results], [len(result[kind]) for result in results]


def share(counts: Sequence[int], sizes: Sequence[int]) -> Score:
    """``sum(counts) / sum(sizes)`` with the standard error of a ratio over prompts.

    The prompts are the sample: instructions of one prompt are not independent.
    """
    number, total = len(counts), sum(sizes)
    value = sum(counts) / total
    if number < 2:
        return Score(value, math.nan)
    squares = sum((count - value * size) ** 2 for count, size in zip(counts, sizes))
    return Score(value, math.sqrt(squares * number / (number - 1)) / total)


def answers_file(benchmark: str, tasks: list[Task], answers: list[str], name: str) -> str:
    """The text of an answer file as the benchmark's own judge reads it.

    AlpacaEval: a JSON list with ``instruction``, ``output``, ``generator`` (``dataset`` where the prompts have it).
    Arena-Hard: JSON Lines with ``uid``, ``ans_id``, ``model``, ``messages``, ``tstamp``, ``metadata``.
    """
    if benchmark == "alpaca-eval":
        kept = [{k: task.row[k] for k in ("dataset",) if k in task.row} for task in tasks]
        rows = [
            {**more, "instruction": task.prompt, "output": answer, "generator": name}
            for more, task, answer in zip(kept, tasks, answers)
        ]
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    lines = []
    for task, answer in zip(tasks, answers):
        said = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": {"answer": answer}}]
        row = {"uid": task.row["uid"], "ans_id": uuid.uuid4().hex, "model": name, "messages": said}
        lines.append(json.dumps({**row, "tstamp": time.time(), "metadata": {}}, ensure_ascii=False) + "\n")
    return "".join(lines)
