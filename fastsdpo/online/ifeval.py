"""IFEval (https://arxiv.org/abs/2311.07911): prompts whose instructions a program checks, without a judge.

The 541 prompts are public (Apache-2.0) and not in this package. The checkers come from the package
`if-verifiable`, which has them as published. An answer is checked strictly (as it is) and loosely: it passes
if it passes as it is, without its first line, its last line or both, or any of these without asterisks.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ADDRESS = (
    "https://raw.githubusercontent.com/google-research/google-research/master/instruction_following_eval/data/"
    "input_data.jsonl"
)


class Task(NamedTuple):
    """A prompt of IFEval, its instructions and their arguments."""

    key: int
    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]


class Share(NamedTuple):
    """A share and its standard error over prompts."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.1%} (se {self.error:.1%})"


class Scores(NamedTuple):
    """The scores of one model's answers.

    Attributes:
        prompts, instructions: how many were checked.
        prompt_strict, prompt_loose: the shares of prompts with all instructions followed.
        instruction_strict, instruction_loose: the shares of instructions that are followed.
    """

    prompts: int
    instructions: int
    prompt_strict: Share
    prompt_loose: Share
    instruction_strict: Share
    instruction_loose: Share

    def __str__(self) -> str:
        return (
            f"prompts strict {self.prompt_strict}, loose {self.prompt_loose}; "
            f"instructions strict {self.instruction_strict}, loose {self.instruction_loose}"
        )


def read_samples(path: str | os.PathLike) -> list[Task]:
    """Reads the published prompts from a JSON Lines file.

    Raises:
        OSError: the file cannot be read. If it does not exist, the text names the address to get it from.
        ValueError: a line is not such a prompt; the text names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; the prompts of IFEval are at {ADDRESS}")
    samples = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            # The hub's copy writes an argument that an instruction does not have as null.
            kwargs = [{k: v for k, v in (given or {}).items() if v is not None} for given in row["kwargs"]]
            sample = Task(row["key"], row["prompt"], list(row["instruction_id_list"]), kwargs)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: no prompt of IFEval ({type(error).__name__}: {error})") from error
        if len(sample.kwargs) != len(sample.instruction_id_list):
            raise ValueError(f"{path}:{number}: {len(sample.instruction_id_list)} instructions, {len(kwargs)} kwargs")
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path} has no prompts")
    return samples


def spread(samples: Sequence[Task], limit: int | None) -> list[Task]:
    """Picks ``limit`` of the samples, evenly spaced; all if ``limit`` is None or not smaller than their number."""
    if limit is None or limit >= len(samples):
        return list(samples)
    return [samples[index * len(samples) // limit] for index in range(limit)]


def checkable(samples: Sequence[Task]) -> tuple[list[Task], list[str]]:
    """Returns the samples that can be checked here, and the instructions that cannot since NLTK's data is missing.

    Raises:
        ImportError: the package if-verifiable is not installed.
    """
    if importlib.util.find_spec("if_verifiable") is None:
        raise ImportError("--benchmark ifeval needs the package if-verifiable: pip install if-verifiable")
    missing: set[str] = set()
    tried: set[str] = set()
    for sample in samples:
        for name, kwargs in zip(sample.instruction_id_list, sample.kwargs):
            if name not in tried:
                tried.add(name)
                try:
                    check(Task(sample.key, sample.prompt, [name], [kwargs]), "One sentence. Another ONE.")
                except LookupError:
                    missing.add(name)
    return [s for s in samples if missing.isdisjoint(s.instruction_id_list)], sorted(missing)


def check(sample: Task, answer: str) -> list[tuple[bool, bool]]:
    """Checks an answer: one pair (followed strictly, followed loosely) for each instruction of the sample.

    Raises:
        LookupError: an instruction needs data of NLTK that is not installed.
        ValueError: the checkers do not know an instruction.
    """
    import langdetect
    from if_verifiable import evaluate_output_for_sample

    langdetect.DetectorFactory.seed = 0  # its answers on short texts are drawn
    try:
        results, _ = evaluate_output_for_sample("ifeval", sample, answer)
    except KeyError as error:
        raise ValueError(f"IFEval's checkers do not know the instruction {error}") from error
    return [(bool(result.strict_pass), bool(result.loose_pass)) for result in results]


def scores(verdicts: Sequence[Sequence[tuple[bool, bool]]]) -> Scores:
    """Computes the benchmark's four scores from the `check` results of all answers."""
    return Scores(
        len(verdicts),
        sum(map(len, verdicts)),
        *(_share([(float(all(v[which] for v in verdict)), 1) for verdict in verdicts]) for which in (0, 1)),
        *(_share([(float(sum(v[which] for v in verdict)), len(verdict)) for verdict in verdicts]) for which in (0, 1)),
    )


def _share(parts: list[tuple[float, int]]) -> Share:
    """sum of parts over sum of sizes, with the standard error of a ratio of means over prompts."""
    count, size = len(parts), sum(size for _, size in parts)
    value = sum(part for part, _ in parts) / size
    spread_ = sum((part - value * size) ** 2 for part, size in parts)
    return Share(value, math.sqrt(spread_ * count / max(1, count - 1)) / size)
