"""`fastsdpo train` by `torchrun` and by `accelerate launch`: DDP and FSDP2 train and save what one process does.

Under FSDP2 the code that shards, gathers, saves and loads is accelerate's own (see launched_worker.py).
"""

from __future__ import annotations

import pytest
import torch

from tests.trainer.launching import (
    FSDP2,
    VARIANTS,
    accelerate,
    arguments,
    compare,
    make_place,
    runs,
    torchrun,
    worker,
)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

FOUR = ("untied", "lora")
# With accelerate's files of examples/; the others start by torchrun.
LAUNCHED = ("untied", "lora_frozen")


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    return make_place(tmp_path_factory.mktemp("launched"), lab)


@pytest.fixture(scope="module")
def one(place):
    torchrun(1, *worker("plain"), runs(place, "plain", TORCHRUN))


@pytest.fixture(scope="module")
def two(place):
    torchrun(2, *worker("fsdp2"), runs(place, "fsdp2", TORCHRUN, 2), **FSDP2)


@pytest.fixture(scope="module")
def four(place):
    torchrun(4, *worker("fsdp2"), runs(place, "fsdp2", FOUR, 4), **FSDP2)


# The batches of "accumulated" are those of one process.
TORCHRUN = [name for name in VARIANTS if name != "accumulated"]


def test_ddp_with_held_out_data(place, one, lab):
    """The very command that a user starts; the file beside the data is evaluated before training."""
    run = arguments(place, place / "ddp2-untied", VARIANTS["untied"], 2)
    printed = torchrun(2, "-m", "fastsdpo.train", *run)
    assert "held-out loss before training: " in printed
    compare(place, "ddp2-untied", "untied", lab)


@pytest.mark.parametrize("name", TORCHRUN)
def test_fsdp2(place, one, two, lab, name):
    compare(place, f"fsdp2{2}-{name}", name, lab)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_fsdp2_with_four_processes(place, one, four, lab, name):
    compare(place, f"fsdp2{4}-{name}", name, lab)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_accelerate_launch(place, one, lab, strategy):
    """The files of examples/accelerate, two CPU processes in place of eight GPUs."""
    kind = "plain" if strategy == "ddp" else strategy
    accelerate(strategy, 2, *worker(kind), runs(place, f"{strategy}-launch", LAUNCHED, 2))
    for name in LAUNCHED:
        compare(place, f"{strategy}-launch2-{name}", name, lab)
