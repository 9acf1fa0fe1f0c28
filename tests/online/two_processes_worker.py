"""Two online steps in one process or two; saves weights, logs and files. See test_two_processes.

Usage: two_processes_worker.py FOLDER SETTINGS_JSON   (RANK, WORLD_SIZE, MASTER_* in the environment)
"""

import json
import os
import sys

import torch

from fastsdpo.online import RuleUser
from tests.online import conftest as lab


def main(folder: str, runs: dict) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, settings in runs.items():
        # So cold that every process draws the likeliest token: its seed then changes nothing.
        fixed = {"sampling_temperature": 1e-4, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
        fixed |= {"max_steps": 2, "ddp_backend": "gloo" if world > 1 else None}
        user = RuleUser(["max_words=6"], wish="w3 w4", praise="w5")
        trainer = lab.make_trainer(f"{folder}/{name}-{world}", user=user, **fixed, **settings)
        trainer.train()
        evaluation = trainer.evaluate()
        assert trainer.args.world_size == world
        if trainer.is_world_process_zero():
            weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
            history = [row for row in trainer.state.log_history if "loss" in row]
            found = {"weights": weights, "history": history, "evaluation": evaluation}
            torch.save(found, f"{folder}/{name}-{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
