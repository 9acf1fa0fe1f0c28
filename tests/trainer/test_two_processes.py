"""One process or two (gloo): the same weights, losses and statistics."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

# By world size: the same global batch. 7 interactions in batches of 4: the second process has one
# interaction less in the second step, or (5 interactions) none at all.
RUNS = {
    "sequence": {"conversations": 4, "interactions": 7, "max_steps": 2, "global_batch_size": 4},
    "token": {
        "conversations": 4,
        "interactions": 5,
        "max_steps": 2,
        "normalization": "token",
        "ignore_first_k": 1,
        "teacher": "ema",
    },
    "accumulated": {
        "conversations": 8,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "max_tokens_per_pack": 60,
        "mode": "sampled_token",
        "reference_kl": 0.1,
    },
    "clock": {"conversations": 2, "max_steps": 2, "clock": True},
}


def start(folder, rank, world, port):
    runs = {
        name: {"per_device_train_batch_size": 4 // world, **settings}
        if "global_batch_size" not in settings
        else settings
        for name, settings in RUNS.items()
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    worker = Path(__file__).parent / "two_processes_worker.py"
    return subprocess.Popen(
        [sys.executable, str(worker), str(folder), json.dumps(runs)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(folder, 0, 1, port), *(start(folder, rank, 2, port) for rank in range(2))]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(outputs)
    return {name: [torch.load(folder / f"{name}-{world}.pt", weights_only=False) for world in (1, 2)] for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_statistics(results, lab, name):
    one, two = results[name]
    before = lab.make_model().state_dict()
    before = {key: before[key] for key in one["weights"]}
    assert lab.largest_difference(before, one["weights"]) > 1e-3
    assert lab.largest_difference(one["weights"], two["weights"]) < 1e-6
    assert (one["teacher"] is not None) == (name == "token")
    if one["teacher"] is not None:
        assert lab.largest_difference(one["teacher"], two["teacher"]) < 1e-6
    assert len(one["history"]) == len(two["history"]) == 2
    logs = [*zip(one["history"], two["history"])]
    logs += [(one[key], two[key]) for key in ("before", "evaluation")]
    for left, right in logs:
        assert left.keys() == right.keys()
        for key in left:
            if "per_second" not in key and "time" not in key:
                assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-5), key
