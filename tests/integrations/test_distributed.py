"""Two processes: DDP and FSDP2 around the losses in a plain loop, DDP around TRL's trainer."""

from pathlib import Path

import pytest
import torch.distributed

from tests.forked import free_port, run_together


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes(qwen2_folder, llama_folder, tmp_path):
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [Path(__file__).with_name("distributed_worker.py"), qwen2_folder, llama_folder, tmp_path]
    run_together([(command, {**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)], timeout=480)
