"""The soak: long runs in flat memory, many interactions in bounded memory.

`make test` takes a few steps offline and some hundred interactions. `make soak` trains a small model for
FASTSDPO_MINUTES, half of them offline and half online, and for `TWO_HOURS` steps at least: a leak grows with steps,
not with hours.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

LONG = os.environ.get("FASTSDPO_LONG") == "1"
MINUTES = float(os.environ.get("FASTSDPO_MINUTES", "10")) if LONG else 0.0
TWO_HOURS = 677  # optimizer steps of SmolLM2-135M in two hours on two cores with AVX2, by the benchmark of sharing
WORKER = Path(__file__).parent / "soak_worker.py"

# Most that may be added from the second third of a run to its last, however many steps these have.
LIMITS = {"resident": 4 << 20, "traced": 64 << 10, "objects": 200, "tensors": 0, "tensor_bytes": 4096}
LIMITS |= {"graph": 0, "cached": 0, "files": 0}


def run_part(part, settings):
    """The answer of soak_worker.py."""
    command = [sys.executable, str(WORKER), part, json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


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


@pytest.mark.slow
@pytest.mark.parametrize("part", ["offline", "online"])
def test_training_takes_no_more_memory_with_every_step(part, results, tmp_path):
    settings = {"folder": str(tmp_path), "period": 2, "steps": 18}
    if LONG:
        settings |= {"period": 20, "steps": TWO_HOURS, "seconds": 30 * MINUTES}
    if part == "offline":  # the gauges do see a leak of one small tensor a step
        settings["leak_steps"] = settings["steps"] if not LONG else 200
    run = run_part(part, settings)
    added = growth(run["readings"])
    bad = over(added, LIMITS)
    measured = run["readings"][len(run["readings"]) // 3 :]
    steps = measured[-1]["step"] - measured[0]["step"]
    slope = (measured[-1]["resident"] - measured[0]["resident"]) / steps
    figures = {"minutes": round(run["seconds"] / 60, 1), "steps_of_two_hours": TWO_HOURS}
    figures |= {"resident_bytes_per_step": round(slope, 1), **{f"{name}_added": n for name, n in added.items()}}
    lost = run["steps"] if bad else 0
    results.add(f"soak, {part}: optimizer steps", tried=run["steps"], lost=lost, **figures)
    assert not bad, run["readings"]
    if LONG:
        assert run["steps"] >= TWO_HOURS
    if part == "offline":
        leaked = growth(run["leaking"])
        assert {"tensors", "graph"} <= set(over(leaked, LIMITS)), leaked


@pytest.mark.slow
def test_a_compiled_loss_keeps_no_graph_per_length(results, count):
    run = run_part("compiled", {"calls": count(40, 4000)})
    added = growth(run["readings"])
    graphs = run["readings"][-1]["graphs"]
    bad = over(added, {**LIMITS, "graphs": 0})
    figures = {"graphs": graphs, "resident_added": added["resident"], "cached_added": added["cached"]}
    lost = run["steps"] if bad else 0
    results.add("soak, compiled loss: calls of drawn lengths", tried=run["steps"], lost=lost, **figures)
    assert not bad
    assert graphs <= 4  # for 59 lengths


# Bytes in memory for each further interaction, at most. `prepare` keeps numbers of each record; the
# dataset the tokens (4 bytes each), three ends (24) and the ids; the planner whole numbers.
BYTES_EACH = {"prepare": 100, "groups": 200, "pack_conversations": 200, "batches and plans": 100}
IDS, TOKEN = 200, 4.5  # of the dataset: ids with their objects; a growing array has room for an eighth more
SLACK = 8 << 20  # what does not depend on their number: buffers, the allocator's rounding


def test_many_interactions_in_bounded_memory(results, count, tmp_path):
    # The long one in two sizes; else what there is at one size, all of it counted as added.
    sizes = count([600], [10_000, 100_000])
    runs = []
    for size in sizes:
        folder = tmp_path / str(size)
        folder.mkdir()
        run = run_part("scale", {"folder": str(folder), "interactions": size})
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
    lost = sizes[-1] - large["planned"] - held_out
    results.add("interactions through `prepare`, dataset and planner", tried=sizes[-1], lost=lost, **figures)
    assert not bad


def json_rows(path):
    with open(path, "rb") as file:
        return sum(1 for _ in file)
