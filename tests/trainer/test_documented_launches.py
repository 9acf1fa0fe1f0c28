"""Each command of docs/distributed.md as it stands there, with two CPU processes in place of the GPUs.

Replaced are the model, the files, the number of processes and the nodes' address; a second node is a second launcher
on this machine. accelerate starts one process of DeepSpeed on a CPU, without --bf16, and FSDP2 by launched_worker.py.
"""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

from tests.forked import free_port
from tests.trainer.launching import ROOT, documented, make_place, slurm, worker

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}
STARTS = {"torchrun", "accelerate", "fastsdpo"}
RUN = ["data.jsonl", "--model", "MODEL", "-o", "runs/first"]
SMALL = "--max-steps 2 --logging-steps 1 --batch-size 2 --warmup 0 --token-cache none --set save_strategy=no"


def test_the_page_has_commands():
    lines = documented()
    for text in ("torchrun --nproc", "ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml", "--nnodes 2", "sbatch"):
        assert any(text in line for line in lines), text
    for line in lines:
        assert line.split()[0] in STARTS or line.startswith("CONFIG="), line


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    return make_place(tmp_path_factory.mktemp("documented"), lab)


def small(words, place, output):
    """The arguments of `fastsdpo train` for a tiny model and two steps."""
    found = [*(RUN if words == ["..."] else words), *SMALL.split(), "--template", " note {o}"]
    names = {"data.jsonl": place / "data.jsonl", "MODEL": place / "untied", "runs/first": output, "runs/long": output}
    sizes = {"--global-batch-size": "4", "--ulysses": "2"}
    return [sizes.get(before, str(names.get(word, word))) for before, word in zip(["", *found], found)]


def commands(line, place, output):
    """What to start, a list for each node, and how many processes train together."""
    words = shlex.split(line)
    if words[0] == "fastsdpo":
        return [[sys.executable, "-m", "fastsdpo", words[1], *small(words[2:], place, output), "--cpu"]], 1
    if words[1] == "sbatch":
        script = str(ROOT / words[2])
        return [["sbatch", script, *small(words[3:], place, output), "--cpu"]], 2
    nodes = 2 if "--nnodes" in words or "--num_machines" in words else 1
    deepspeed, fsdp2 = "deepspeed" in line, "fsdp2" in line
    processes = 1 if deepspeed else 2
    module = words.index("-m")
    launch, given = words[1:module], small(words[module + 2 :], place, output)
    # transformers has --bf16 on GPUs, or with --cpu, which DeepSpeed refuses.
    given = [word for word in given if word != "--bf16"] if deepspeed else [*given, "--cpu"]
    port = str(free_port()) if nodes == 2 else "0"
    values = {"--nproc-per-node": str(processes // nodes), "--rdzv-endpoint": f"localhost:{port}"}
    values["--main_process_ip"] = "127.0.0.1"
    if words[0] == "accelerate":
        place_of = {"--config_file": str(ROOT / launch[launch.index("--config_file") + 1])}
        values |= {**place_of, "--num_processes": str(processes), "--main_process_port": port}
        launch += [
            word for name in ("--num_processes", "--main_process_port") if name not in launch for word in (name, "")
        ]
    launch = [values.get(before, word) for before, word in zip(["", *launch], launch)]
    if nodes == 1 and words[0] == "torchrun":
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    body = [*worker("fsdp2"), json.dumps([given])] if fsdp2 else ["-m", words[module + 1], *given]
    found = []
    for node in range(nodes):
        ranked = [str(node) if before == "--machine_rank" else word for before, word in zip(["", *launch], launch)]
        found.append([sys.executable, "-m", LAUNCHERS[words[0]], *ranked, *body])
    return found, processes


@pytest.mark.slow
@pytest.mark.parametrize("line", documented())
def test_command(line, place, tmp_path):
    for text, package in (("deepspeed", "deepspeed"), ("--quantize", "bitsandbytes")):
        if text in line:
            pytest.importorskip(package)
    output = tmp_path / "run"
    started, processes = commands(line, place, output)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **slurm(tmp_path)}
    nodes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in started
    ]
    printed = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(printed)
    together = "".join(printed)
    assert ("over 2 processes" in together) == (processes == 2), together
    report = json.loads((output / "report.json").read_text())
    assert len([row for row in report["history"] if "loss" in row]) == 2
    assert list((output / "model").glob("*.safetensors"))
