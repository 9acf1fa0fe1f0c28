"""Two processes: DDP and FSDP2 around the losses in a plain loop, DDP around TRL's trainer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def run_two(what, folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = Path(__file__).parent / "distributed_worker.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), what, str(tmp_path / "store"), folder, str(tmp_path)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def test_ddp_and_fsdp2_in_a_plain_loop(qwen2_folder, tmp_path):
    run_two("loop", qwen2_folder, tmp_path)


def test_trl_under_ddp(llama_folder, tmp_path):
    pytest.importorskip("trl")
    run_two("trl", llama_folder, tmp_path)
