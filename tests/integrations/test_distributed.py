"""Two processes: DDP and FSDP2 around the losses in a plain loop, DDP around TRL's trainer."""

import socket
from pathlib import Path

import pytest
import torch.distributed

from tests.forked import run_together


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes(qwen2_folder, llama_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [Path(__file__).with_name("distributed_worker.py"), qwen2_folder, llama_folder, tmp_path]
    run_together([(command, {**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)], timeout=480)
