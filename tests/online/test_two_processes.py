"""Online training in one process or two (gloo): the same weights, logs and files."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

# The same batch of 4 prompts, whatever the number of processes.
RUNS = {
    "full": {},
    "clipped": {
        "mode": "sampled_token",
        "ppo_clip": 0.2,
        "center_advantages": True,
        "updates_per_batch": 2,
        "num_generations": 2,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_in_one_and_two):
    folder = tmp_path_factory.mktemp("processes")
    run_in_one_and_two(
        Path(__file__).parent / "two_processes_worker.py",
        folder,
        lambda world: {name: {**run, "per_device_train_batch_size": 4 // world} for name, run in RUNS.items()},
    )
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_weights_logs_and_files(name, folder, lab):
    one, two = (torch.load(folder / f"{name}-{world}.pt", weights_only=False) for world in (1, 2))
    before = lab.model().state_dict()
    assert max(float((before[key] - one["weights"][key]).abs().max()) for key in before) > 1e-3
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, rtol=0, atol=2e-6)
    for left, right in [*zip(one["history"], two["history"]), (one["evaluation"], two["evaluation"])]:
        assert right.pop("sdpo/imbalance", right.pop("eval_sdpo/imbalance", 1)) >= 1  # of several processes alone
        assert left.keys() == right.keys()
        for key in left:
            if not any(word in key for word in ("per_second", "runtime", "data_wait", "peak_memory")):
                assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-5), key
    for file, text in (
        ("interactions.jsonl", ("completion", "user_response")),
        ("eval_answers.jsonl", ("response", "satisfied")),
    ):
        lines = [(folder / f"{name}-{world}" / file).read_text().splitlines() for world in (1, 2)]
        said = [
            sorted(str([row["prompt"], row["step"], *(row[key] for key in text)]) for row in map(json.loads, found))
            for found in lines
        ]
        assert said[0] == said[1]
        assert said[0]
