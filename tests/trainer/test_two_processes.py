"""One process or two (gloo): the same weights, losses and statistics."""

from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import assert_same_logs

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

# By world size: the same global batch. 7 interactions in batches of 4: the second process has one
# interaction less in the second step, or (5 interactions) none at all.
RUNS = {
    "sequence": {"conversations": 4, "interactions": 7, "max_steps": 2, "global_batch_size": 4},
    "token": {"conversations": 4, "interactions": 5, "max_steps": 2, "normalization": "token"}
    | {"ignore_first_k": 1, "teacher": "ema"},
    "accumulated": {"conversations": 8, "max_steps": 2, "gradient_accumulation_steps": 2}
    | {"max_tokens_per_pack": 60, "mode": "sampled_token", "reference_kl": 0.1},
    "clock": {"conversations": 2, "max_steps": 2, "clock": True},
}


def runs(world):
    """A global batch of four, as the processes share it or as the setting says."""
    shares = {"per_device_train_batch_size": 4 // world}
    return {name: run if "global_batch_size" in run else {**shares, **run} for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_in_one_and_two):
    folder = tmp_path_factory.mktemp("processes")
    run_in_one_and_two(Path(__file__).parent / "two_processes_worker.py", folder, runs)
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
    assert one["evaluation"]["eval_measures/next_answers"] == 2 and "eval_measures/stranger_margin" in one["before"]
    assert_same_logs(logs)
