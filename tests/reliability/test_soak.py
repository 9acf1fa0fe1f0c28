"""The soak: long runs in flat memory, many interactions in bounded memory, processes beside each other.

`make test` takes a few steps and some thousand interactions; `make soak` trains for FASTSDPO_MINUTES, half of
it offline and half online, and for no fewer steps than two hours of training SmolLM2-135M are on the
machine of the results file `SHARING`, on a model small enough for that. What leaks, leaks by step.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("FASTSDPO_LONG") == "1"
MINUTES = float(os.environ.get("FASTSDPO_MINUTES", "10")) if LONG else 0.0
SHARING = ROOT / "benchmarks" / "results" / "sharing_avx2.json"
WORKER = Path(__file__).parent / "soak_worker.py"

# Most that may be added from the second third of a run to its last, however many steps these have.
LIMITS = {
    "resident": 4 << 20,
    "traced": 64 << 10,
    "objects": 200,
    "tensors": 0,
    "tensor_bytes": 4096,
    "graph": 0,
    "cached": 0,
    "files": 0,
}


def start(part, settings, **environment):
    return subprocess.Popen(
        [sys.executable, str(WORKER), part, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
    )


def answer(process, timeout=None):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def growth(readings):
    """What was added from the second third to the last, by gauge (medians)."""
    third = len(readings) // 3
    assert third >= 2, f"{len(readings)} readings are too few"
    names = [name for name in readings[0] if name != "step"]
    return {
        name: statistics.median(row[name] for row in readings[-third:])
        - statistics.median(row[name] for row in readings[-2 * third : -third])
        for name in names
    }


def over(found, limits):
    return {name: found[name] for name, most in limits.items() if found[name] > most}


def two_hours():
    """Optimizer steps in two hours: the fastest of the measured steps on a CPU."""
    rows = json.loads(SHARING.read_text("utf-8"))["rows"]
    return round(7200 / min(row["rivals"]["conversation"]["median"] for row in rows if row["case"]["what"] == "time"))


@pytest.mark.parametrize("part", ["offline", "online"])
def test_training_takes_no_more_memory_with_every_step(part, results, tmp_path):
    settings = {"folder": str(tmp_path), "period": 4, "steps": 28}
    if LONG:
        settings |= {"period": 20, "steps": two_hours(), "seconds": 30 * MINUTES}
    if part == "offline":  # the gauges do see a leak of one small tensor a step
        settings["leak_steps"] = settings["steps"] if not LONG else 200
    run = answer(start(part, settings))
    added = growth(run["readings"])
    bad = over(added, LIMITS)
    measured = run["readings"][len(run["readings"]) // 3 :]
    steps = measured[-1]["step"] - measured[0]["step"]
    slope = (measured[-1]["resident"] - measured[0]["resident"]) / steps
    results.add(
        f"soak, {part}: optimizer steps",
        tried=run["steps"],
        survived=0 if bad else run["steps"],
        lost=run["steps"] if bad else 0,
        minutes=round(run["seconds"] / 60, 1),
        steps_of_two_hours=two_hours(),
        resident_bytes_per_step=round(slope, 1),
        **{f"{name}_added": value for name, value in added.items()},
    )
    assert not bad, run["readings"]
    if LONG:
        assert run["steps"] >= two_hours()
    if part == "offline":
        leaked = growth(run["leaking"])
        assert {"tensors", "graph"} <= set(over(leaked, LIMITS)), leaked


def test_a_compiled_loss_keeps_no_graph_per_length(results, count):
    run = answer(start("compiled", {"calls": count(60, 4000)}))
    added = growth(run["readings"])
    graphs = run["readings"][-1]["graphs"]
    bad = over(added, {**LIMITS, "graphs": 0})
    lost = run["steps"] if bad else 0
    results.add(
        "soak, compiled loss: calls of drawn lengths",
        tried=run["steps"],
        lost=lost,
        survived=run["steps"] - lost,
        graphs=graphs,
        resident_added=added["resident"],
        cached_added=added["cached"],
    )
    assert not bad
    assert graphs <= 4  # for 59 lengths


# ------------------------------------------------------------------------------------ many interactions

# Bytes in memory for each further interaction, at most. `prepare` keeps numbers of each record; the
# dataset the tokens (4 bytes each), three ends (24) and the ids; the planner whole numbers.
BYTES_EACH = {"prepare": 100, "groups": 200, "pack_conversations": 200, "batches and plans": 100}
IDS, TOKEN = (
    200,
    4.5,
)  # of the dataset: ids with their objects; a growing array has room for an eighth more
SLACK = 8 << 20  # what does not depend on their number: buffers, the allocator's rounding


def test_many_interactions_in_bounded_memory(results, count, tmp_path):
    # The long one in two sizes; else what there is at one size, all of it counted as added.
    sizes = count([1_500], [10_000, 100_000])
    runs = []
    for size in sizes:
        folder = tmp_path / str(size)
        folder.mkdir()
        run = answer(start("scale", {"folder": str(folder), "interactions": size}))
        assert run["interactions"] == size
        assert run["planned"] == run["dataset_interactions"] == json_rows(folder / "interactions.jsonl")
        runs.append(run)
    large = runs[-1]
    nothing = {name: {"peak_bytes": 0} for name in large["stages"]}
    small = runs[0] if len(runs) == 2 else {"stages": nothing, "tokens": 0}
    first = sizes[0] if len(runs) == 2 else 0
    more = sizes[-1] - first
    bad, figures = {}, {}
    for name in large["stages"]:
        left, right = (run["stages"][name] for run in (small, large))
        added = right["peak_bytes"] - left["peak_bytes"]
        most = BYTES_EACH.get(name, 0) * more
        if name == "dataset":
            most = IDS * more + TOKEN * (large["tokens"] - small["tokens"])
        if added > most + SLACK:
            bad[name] = (added, most)
        figures |= {
            f"{name}: peak MiB at {first:,}": round(left["peak_bytes"] / 2**20, 1),
            f"{name}: peak MiB at {sizes[-1]:,}": round(right["peak_bytes"] / 2**20, 1),
            f"{name}: bytes for each more": round(added / more),
            f"{name}: seconds": round(right["seconds"], 1),
        }
    figures |= {
        "tokens_each": round(large["tokens"] / large["dataset_interactions"], 1),
        "text MiB written": round(large["output_bytes"] / 2**20, 1),
    }
    held_out = large["interactions"] - large["dataset_interactions"]
    survived = large["planned"] + held_out
    results.add(
        "interactions through `prepare`, dataset and planner",
        tried=sizes[-1],
        survived=survived,
        lost=sizes[-1] - survived,
        **figures,
    )
    assert not bad


def json_rows(path):
    with open(path, "rb") as file:
        return sum(1 for _ in file)


# ----------------------------------------------------------------------------------------- processes


@pytest.mark.skipif(not LONG, reason="a figure, not a test: make soak")
def test_throughput_of_one_and_two_processes(results, tmp_path):
    """That two processes compute what one does: tests/trainer and tests/online test_two_processes.py (DDP),
    tests/prefix/test_distributed.py (DDP and FSDP2). Here, how fast."""
    settings = {"folder": str(tmp_path), "steps": 40}
    one = answer(start("throughput", settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    two = [start("throughput", settings, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    try:
        two = [answer(process) for process in two]
    finally:
        for process in two:
            if isinstance(process, subprocess.Popen):
                process.kill()
    rates = [run["interactions_per_second"] for run in (one, two[0])]
    loads = [round(run["load_average"], 1) for run in (one, two[0])]
    results.add(
        "training in one and in two processes",
        tried=2,
        survived=2,
        interactions_per_second_1=round(rates[0], 1),
        interactions_per_second_2=round(rates[1], 1),
        ratio=round(rates[1] / rates[0], 2),
        cores=os.cpu_count(),
        load_average_of_the_machine=loads,
    )
    assert min(rates) > 0
