"""Selects prompts for online runs from TL;DR and HelpSteer2, by the filters of the code published with the paper.

The rules are those of https://github.com/lasgroup/user_interactions (2026-02), rebuilt; docs/paper-data.md
says where this differs. All prompts of a run are in memory.
"""

from __future__ import annotations

import json
import random
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from fastsdpo.data.loading import MAX_RECORD_BYTES, parse_entries
from fastsdpo.data.output import atomic_file
from fastsdpo.data.records import LoadReport
from fastsdpo.data.sources import expand_source, name_outputs, read_sources
from fastsdpo.lazy import needed

SUFFIX = "\nTL;DR:\n"  # counts for the length of a post; the model does not see it
MAX_TLDR_CHARS = 1024  # a post with its suffix is shorter
MAX_HELPSTEER2_CHARS = 2048  # of a prompt, and of its answer
# The posts of trl-lib/tldr and CarperAI/openai_summarize_tldr stand in a form, with a suffix.
_FORM = re.compile(r"\s*SUBREDDIT:.*?\n\s*TITLE:.*?\n\s*POST:(.*)", re.DOTALL)
_ASKS = re.compile(r"\s*TL;DR:\s*$")
_TURN = re.compile(r"<extra_id_\d+>", re.IGNORECASE)


class Read(NamedTuple):
    """What is read from a record: a prompt, or the reason why there is none."""

    prompt: str
    reason: str | None = None


def read_tldr(record: Any) -> Read:
    """Reads a Reddit post from ``info`` (openai/summarize_from_feedback), ``post``, or the form in ``prompt``.

    Raises:
        TypeError: the record has none of these keys, or a value is not text.
        ValueError: a text is not valid Unicode.
    """
    info = record.get("info") if isinstance(record, Mapping) else None
    if isinstance(info, Mapping):
        post = _text(info, "post").strip() or _text(info, "article").strip()
    elif isinstance(record, Mapping) and "post" in record:
        post = _text(record, "post").strip()
    else:
        prompt = _ASKS.sub("", _text(_with(record, ("info", "post", "prompt"), "prompt"), "prompt"))
        form = _FORM.fullmatch(prompt)
        post = (form.group(1) if form else prompt).strip()
    if not post:
        return Read(post, "without a post")
    if len(post) + len(SUFFIX) >= MAX_TLDR_CHARS:
        return Read(post, f"of {MAX_TLDR_CHARS:,} characters or more with the suffix")
    return Read(post)


def read_helpsteer2(record: Any) -> Read:
    """Reads a prompt of one turn, if its answer is of moderate length.

    Raises:
        TypeError: ``prompt`` is missing, or a value is not text.
        ValueError: a text is not valid Unicode.
    """
    prompt = _text(_with(record, ("prompt",), "prompt"), "prompt").strip()
    response = _text(record, "response").strip()
    if not prompt or not response:
        return Read(prompt, "without a prompt or an answer")
    if _TURN.search(prompt):
        return Read(prompt, "of several turns (<extra_id_1>)")
    for name, text in (("a prompt", prompt), ("an answer", response)):
        if len(text) > MAX_HELPSTEER2_CHARS:
            return Read(prompt, f"with {name} over {MAX_HELPSTEER2_CHARS:,} characters")
    return Read(prompt)


def _with(record: Any, keys: Sequence[str], key: str) -> Mapping:
    if not isinstance(record, Mapping) or key not in record:
        got = ", ".join(map(reprlib.repr, list(record)[:8])) if isinstance(record, Mapping) else type(record).__name__
        raise TypeError(f"a record must have {' or '.join(keys)}, got {got}")
    return record


def _text(record: Mapping, key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{key} must be text, got {type(value).__name__}")
    text = value or ""
    if not text.isascii():
        text.encode()  # a lone surrogate is a ValueError
    return text


class PromptSet(NamedTuple):
    """How prompts are read from a data set, and by what two prompts count as equal."""

    read: Callable[[Any], Read]
    key: Callable[[str], str]


PROMPT_SETS = {
    "tldr": PromptSet(read_tldr, lambda text: " ".join(text.split()).lower()),
    "helpsteer2": PromptSet(read_helpsteer2, lambda text: text),
}


@dataclass
class PromptReport:
    """What `prepare_prompts` did; it is written as JSON beside the output.

    Attributes:
        output, eval_output: the paths of the files; eval_output is None if nothing is held out.
        prompts, eval_prompts: how many prompts were written to each file.
        records: how many records were read, damaged ones included.
        dropped: how many records gave no prompt, by reason, including those of the held-out source.
        damaged, problems: as in `LoadReport`.
        settings: all settings that decide the result.
    """

    output: str
    eval_output: str | None = None
    prompts: int = 0
    eval_prompts: int = 0
    records: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PromptJob:
    """Says which prompts to select, and how many.

    Attributes:
        data_set: one of `PROMPT_SETS`.
        count_tokens: a function that counts the tokens the model reads for a prompt; None: no counting.
        max_tokens: the most tokens of a prompt.
        max_prompts, max_eval_prompts: how many prompts each file gets, drawn as `datasets` shuffles with
            `seed`; None: all, in the order of the source.
        seed: decides this order, and which prompts are held out.
        limit: read at most this many records of each source.
        strict: stop at the first damaged record.
    """

    data_set: str
    count_tokens: Callable[[str], int] | None = None
    max_tokens: int = 512
    max_prompts: int | None = None
    max_eval_prompts: int | None = None
    seed: int = 42
    limit: int | None = None
    strict: bool = False

    def __post_init__(self):
        if self.data_set not in PROMPT_SETS:
            raise ValueError(f"prepare: prompts must be one of {', '.join(PROMPT_SETS)}, got {self.data_set!r}")
        for name in ("max_tokens", "max_prompts", "max_eval_prompts", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"prepare: {name} must be at least 1, got {value}")

    def read(
        self, sources: Sequence[Path | str], config: str | None, split: str, seen: set[str], report: PromptReport
    ) -> list[str]:
        """Returns the prompts of sources that are not in `seen`; adds them to `seen`, and counts in the report."""
        prompts, loaded, dropped = [], LoadReport(), Counter(report.dropped)
        entries = read_sources(sources, loaded, config, split, MAX_RECORD_BYTES, ("info", "post", "response"))
        read, key = PROMPT_SETS[self.data_set]
        before = frozenset(seen)
        for prompt, reason in parse_entries(entries, lambda record: (read(record),), loaded, strict=self.strict):
            same = key(prompt) if reason is None else ""
            if reason is None and same in seen:
                reason = "that are in the other file" if same in before else "that are there already"
            if reason is None:
                seen.add(same)
                if self.count_tokens is not None and self.count_tokens(prompt) > self.max_tokens:
                    reason = f"over {self.max_tokens:,} tokens"
            if reason is None:
                prompts.append(prompt)
            else:
                dropped[reason] += 1
            if self.limit is not None and loaded.records >= self.limit:
                break
        report.records += loaded.records
        report.dropped = dict(dropped)
        for kind, count in loaded.damaged.items():
            report.damaged[kind] = report.damaged.get(kind, 0) + count
            report.problems.setdefault(kind, []).extend(loaded.problems[kind])
        return prompts

    def draw(self, prompts: list[str], most: int | None, report: PromptReport) -> list[str]:
        """Draws at most `most` of the prompts; None: all."""
        if most is None:
            return prompts
        with needed("numpy", "max_prompts"):
            import numpy
        order = numpy.random.default_rng(self.seed).permutation(len(prompts)).tolist()[:most]
        if len(order) < len(prompts):
            left = report.dropped.get("over the wanted number", 0)
            report.dropped["over the wanted number"] = left + len(prompts) - len(order)
        return [prompts[place] for place in order]


def prepare_prompts(
    job: PromptJob,
    sources: Sequence[str | PathLike],
    output: str | PathLike,
    *,
    eval_sources: Sequence[str | PathLike] = (),
    eval_split: str | None = None,
    eval_fraction: float = 0.0,
    eval_output: str | PathLike | None = None,
    config: str | None = None,
    split: str = "train",
    overwrite: bool = False,
) -> PromptReport:
    """Writes rows with ``prompt``, which `fastsdpo online` and `PromptDataset` read; each file whole or not at all.

    Args:
        job: which prompts to select.
        sources: what `load_conversations` takes.
        output: the JSON Lines file to write; the report goes beside it (``.report.json``).
        eval_sources, eval_split, eval_fraction: where held-out prompts come from: other sources, another split
            of the same datasets, or a share of the prompts. A prompt that is in `output` is not held out.
        eval_output: the file for held-out prompts; None: ``<output>.eval.jsonl``.
        config, split: the configuration and split of a Hugging Face dataset.
        overwrite: replace an output that exists.

    Raises:
        FileExistsError: the output exists and is not to be replaced.
        ValueError: an argument is out of range; no prompt is left for a file.
        DamagedRecord, FileNotFoundError, ImportError: from `load_conversations`.
        OSError: the output cannot be written.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"prepare: eval_fraction must be in [0, 1), got {eval_fraction}")
    if sum((bool(eval_sources), eval_split is not None, eval_fraction > 0)) > 1:
        raise ValueError("prepare: hold out by one of eval_source, eval_split and eval_fraction, got several")
    items = expand_source(sources)
    eval_items = expand_source(eval_sources) if eval_sources else items if eval_split is not None else []
    if eval_split is not None and any(isinstance(item, Path) and item.is_file() for item in items):
        raise ValueError("prepare: eval_split must go with a dataset, got a file; name the other file by eval_source")
    holds_out = bool(eval_items) or eval_fraction > 0
    if not holds_out and (eval_output is not None or job.max_eval_prompts is not None):
        raise ValueError("prepare: nothing is held out; name eval_source, eval_split or eval_fraction")
    output = Path(output)
    outputs = _outputs(output, eval_output, holds_out, overwrite)

    report = PromptReport(str(output), str(outputs[1]) if len(outputs) > 1 else None)
    seen: set[str] = set()
    files = [job.read(items, config, split, seen, report)]
    if eval_items:
        files.append(job.read(eval_items, config, eval_split or split, seen, report))
    elif eval_fraction > 0:
        files = list(_split(files[0], eval_fraction, job.seed))
    files = [job.draw(file, most, report) for file, most in zip(files, (job.max_prompts, job.max_eval_prompts))]
    for path, prompts in zip(outputs, files):
        if not prompts:
            raise ValueError(f"prepare: no prompt was kept for {path}: {_why(report)}")
    for path, prompts in zip(outputs, files):
        with atomic_file(path) as file:
            file.writelines(json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\n" for text in prompts)
    report.prompts, report.eval_prompts = len(files[0]), len(files[1]) if len(files) > 1 else 0
    report.settings = {
        "data_set": job.data_set,
        "sources": [str(item) for item in items],
        "eval_sources": [str(item) for item in eval_items],
        "eval_split": eval_split,
        "eval_fraction": eval_fraction,
        "config": config,
        "split": split,
        "max_tokens": None if job.count_tokens is None else job.max_tokens,
        **{name: getattr(job, name) for name in ("max_prompts", "max_eval_prompts", "seed", "limit")},
    }
    with atomic_file(output.with_name(f"{output.stem}.report.json")) as file:
        file.write(json.dumps(asdict(report), indent=2, ensure_ascii=False).encode() + b"\n")
    return report


def _outputs(output: Path, eval_output: str | PathLike | None, holds_out: bool, overwrite: bool) -> list[Path]:
    outputs = name_outputs(output, eval_output, holds_out)
    for path in outputs:
        if path.exists() and not overwrite:
            raise FileExistsError(f"prepare: {path} exists; pass overwrite=True to replace it")
    return outputs


def _split(prompts: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    wanted = round(fraction * len(prompts))
    held_out = set(random.Random(seed).sample(range(len(prompts)), wanted))
    kept = [text for place, text in enumerate(prompts) if place not in held_out]
    return kept, [prompts[place] for place in sorted(held_out)]


def _why(report: PromptReport) -> str:
    counts = {**report.dropped, **report.damaged}
    reasons = [f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])]
    first = next((texts[0] for texts in report.problems.values() if texts), None)
    return f"of {report.records:,} records, " + ", ".join(reasons or ["none"]) + (f"; {first}" if first else "")
