"""Online training in one process or two (gloo): the same weights, logs and files."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import assert_same_logs

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

# The same batch of 4 prompts, whatever the number of processes.
CLIPPED = {"mode": "sampled_token", "ppo_clip": 0.2, "center_advantages": True}
RUNS = {"full": {}, "clipped": {**CLIPPED, "updates_per_batch": 2, "num_generations": 2}}


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
    assert_same_logs([*zip(one["history"], two["history"]), (one["evaluation"], two["evaluation"])])
    for file, text in (
        ("interactions.jsonl", ("completion", "user_response")),
        ("eval_answers.jsonl", ("response", "satisfied")),
    ):
        said = []
        for world in (1, 2):
            rows = map(json.loads, (folder / f"{name}-{world}" / file).read_text().splitlines())
            said.append(sorted(str([row[key] for key in ("prompt", "step", *text)]) for row in rows))
        assert said[0] == said[1] != []
