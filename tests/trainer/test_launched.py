"""`fastsdpo train` by `torchrun` and by `accelerate launch`: DDP and FSDP2 train and save what one process does.

Under FSDP2 the code that shards, gathers, saves and loads is accelerate's own (see launched_worker.py).
"""

import json
import os
import subprocess

import pytest
import torch

from fastsdpo.trainer.checksums import damage_of
from tests.forked import free_port, run_together
from tests.trainer.launching import (
    CONFIGURATIONS,
    FSDP2,
    ONLY_FSDP2,
    VARIANTS,
    accelerate,
    arguments,
    compare,
    documented,
    make_place,
    names,
    runs,
    slurm,
    torchrun,
    worker,
)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

# Every option of a variant that comes later is in one of these too.
SOONER = ("tied", "resumed_stream", "resumed_ema", "reference", "trust_region", "lora_frozen")
SOONER += ("stochastic", "master", "accumulated")
TORCHRUN = names()
LATER = [name for name in TORCHRUN if name not in SOONER]
FOUR = ("untied", "lora", "resumed_ema", "trust_region")
# Packs divided among two processes: all that takes more than one kind of pass.
TO_DIVIDE = ("resumed_ema", "resumed_stream", "reference", "trust_region", "checkpointing", "lora_frozen")
TO_DIVIDE += ("accumulated", "master")
DIVIDED = {
    name: VARIANTS[name]._replace(arguments=[*VARIANTS[name].arguments, "--ulysses", "2"]) for name in TO_DIVIDE
}
# With accelerate's files of examples/; the others start by torchrun.
LAUNCHED = ("untied", "lora_frozen")


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    return make_place(tmp_path_factory.mktemp("launched"), lab)


@pytest.fixture(scope="module")
def one(place):
    run_together([([*worker("plain"), runs(place, "plain", SOONER)], {})])


@pytest.fixture(scope="module")
def one_later(place, one):
    run_together([([*worker("plain"), runs(place, "plain", LATER)], {})], timeout=600)


@pytest.fixture(scope="module")
def replicas(place):
    torchrun(2, *worker("plain"), runs(place, "replicas", TORCHRUN, 2))


@pytest.fixture(scope="module")
def two(place):
    """In two forks, with what `torchrun` puts into their environment."""
    command = [*worker("fsdp2"), runs(place, "fsdp2", [*SOONER, *ONLY_FSDP2], 2)]
    common = {**FSDP2, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    run_together([(command, {**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)])


@pytest.fixture(scope="module")
def two_later(place):
    torchrun(2, *worker("fsdp2"), runs(place, "fsdp2", LATER, 2), **FSDP2)


@pytest.fixture(scope="module")
def four(place):
    torchrun(4, *worker("fsdp2"), runs(place, "fsdp2", FOUR, 4), **FSDP2)


def test_ddp_with_held_out_data(place, one, lab):
    """The first command of the page; the file beside the data is evaluated before training."""
    line = (
        "torchrun --nproc-per-node 8 -m fastsdpo.train data.jsonl --model MODEL -o runs/first --global-batch-size 32"
    )
    assert documented()[0] == line
    run = arguments(place, place / "ddp2-tied", VARIANTS["tied"], 2)
    printed = torchrun(2, "-m", "fastsdpo.train", *run, "--global-batch-size", "4")
    assert "held-out loss before training: " in printed
    compare(place, "ddp2-tied", "tied", lab)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHRUN)
def test_ddp(place, one_later, replicas, lab, name):
    compare(place, f"replicas2-{name}", name, lab)


@pytest.mark.parametrize("name", [*SOONER, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)])
def test_fsdp2(place, request, lab, name):
    for runs_of in ("one", "two") if name in SOONER else ("one_later", "two_later"):
        request.getfixturevalue(runs_of)
    compare(place, f"fsdp2{2}-{name}", name, lab)


def test_checkpoints_written_beside_training(place, one, two, lab):
    """Whole ones: the run went on from the second step's, and their sums hold."""
    compare(place, "fsdp22-resumed_async", "resumed_ema", lab)
    for step in (2, 4):
        checkpoint = place / "fsdp22-resumed_async" / f"checkpoint-{step}"
        assert len(list(checkpoint.glob("*_0/__*_0.distcp"))) == 4 and damage_of(checkpoint) is None


def test_gradients_summed_in_each_pass(place, one, two, lab):
    compare(place, "fsdp22-each_pass", "accumulated", lab)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_fsdp2_with_four_processes(place, one_later, four, lab, name):
    compare(place, f"fsdp2{4}-{name}", name, lab)


@pytest.fixture(scope="module")
def divided(place):
    """Two processes with one pack, and four with two."""
    torchrun(2, *worker("plain"), runs(place, "ulysses", DIVIDED, 2, variants=DIVIDED))
    torchrun(4, *worker("fsdp2"), runs(place, "ulysses", DIVIDED, 4, variants=DIVIDED), **FSDP2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", DIVIDED)
def test_ulysses(place, one_later, divided, lab, name, processes):
    compare(place, f"ulysses{processes}-{name}", name, lab)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_accelerate_launch(place, one_later, lab, strategy):
    """The files of examples/accelerate, two CPU processes in place of eight GPUs."""
    kind = "plain" if strategy == "ddp" else strategy
    accelerate(strategy, 2, *worker(kind), runs(place, f"{strategy}-launch", LAUNCHED, 2))
    for name in LAUNCHED:
        compare(place, f"{strategy}-launch2-{name}", name, lab)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_resumed_by_another_number_of_processes(place, one_later, lab, kind):
    """Two steps of two processes, then four go on; the last batch of the epoch is uneven."""
    output, (mode, environment) = place / f"{kind}-more", {"ddp": ("plain", {}), "fsdp2": ("fsdp2", FSDP2)}[kind]
    for processes, more in ((2, ["--max-steps", "2"]), (4, ["--resume"])):
        run = [*arguments(place, output, VARIANTS["resumed"], processes), *more]
        torchrun(processes, *worker(mode), json.dumps([run]), **environment)
    compare(place, output.name, "resumed", lab)


@pytest.mark.slow
def test_a_piped_stream_ends_for_all(place):
    """The first process alone reads standard input; all stop where it ends, and where it is damaged."""
    run = arguments(place, place / "piped", VARIANTS["resumed_stream"], 2)[1:]
    run[run.index("--max-steps") + 1] = "9"
    rows = (place / "data.jsonl").read_text().splitlines(keepends=True)
    printed = torchrun(2, "-m", "fastsdpo.train", "-", *run, stdin="".join(rows))
    assert "train_dataset ended after step 4 of 9 (15 interactions, 0 left out)" in printed
    report = json.loads((place / "piped" / "report.json").read_text())
    assert (report["steps"], report["interactions"]) == (4, 15)
    damaged = "".join([*rows * 5, "{\n", *rows])
    more = ("--overwrite", "--max-steps", "90", "--set", "tokenizer_workers=1")
    printed = torchrun(2, "-m", "fastsdpo.train", "-", *run, *more, stdin=damaged, fails=True)
    assert printed.count("fastsdpo train: /dev/stdin:76: ") == 2, printed


@pytest.mark.slow
def test_slurm(place, one_later, lab, tmp_path):
    """The script, with Slurm's two commands stood in for: two nodes on this machine, one process each."""
    run = arguments(place, place / "slurm2-untied", VARIANTS["untied"], 2)
    script = ["bash", str(CONFIGURATIONS / "slurm.sh"), *run]
    environment = {**os.environ, **slurm(tmp_path)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    compare(place, "slurm2-untied", "untied", lab)
