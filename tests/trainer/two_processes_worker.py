"""Trains two steps and saves weights, loss and metrics; one process or two. See test_two_processes.

Usage: two_processes_worker.py FOLDER SETTINGS_JSON   (RANK, WORLD_SIZE, MASTER_* in the environment)
"""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from tests.trainer import conftest as lab


def set_clock(day):
    import transformers.utils.chat_template_utils

    import fastsdpo.trainer.data

    fastsdpo.trainer.data.datetime = transformers.utils.chat_template_utils.datetime = lab.clock(day)


def conversations():
    """Five held-out interactions; two have a next answer, which is what the measures need."""
    first, last, other, another = lab.make_interactions(2, seed=7)
    pairs = []
    for one, two in ((first, last), (other, another)):
        pairs += [one, replace(two, prompt=[*two.prompt[:-1], {"role": "user", "content": one.followup}])]
    return [*pairs, *(replace(item, id="x", conversation_id="x") for item in lab.make_interactions(1, seed=8)[:1])]


def main(folder: str, runs: dict) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for name, settings in runs.items():
        settings = dict(settings)
        interactions = lab.make_interactions(settings.pop("conversations"))
        interactions = interactions[: settings.pop("interactions", None)]
        if settings.pop("clock", False):  # a template with a clock, and another day in each process
            settings["tokenizer"] = lab.make_clock_tokenizer()
            set_clock(10 + rank)
        # Momentum-free SGD shows the gradients themselves; Adam would hide their size.
        settings |= {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
        settings |= {"interactions": interactions, "eval_dataset": conversations()}
        backend = "gloo" if world > 1 else None
        trainer = lab.make_trainer(f"{folder}/{name}-{world}", ddp_backend=backend, **settings)
        before = trainer.evaluate()  # must not keep the model from being wrapped
        trainer.train()
        evaluation = trainer.evaluate()
        assert trainer.args.world_size == world
        if rank == 0:
            copies = trainer.learner.copies
            found = {"weights": lab.weights_of(trainer), "before": before, "evaluation": evaluation}
            found["teacher"] = copies["ema"].values if "ema" in copies else None
            found["history"] = [row for row in trainer.state.log_history if "loss" in row]
            torch.save(found, f"{folder}/{name}-{world}.pt")
    if world > 1:
        trainer = lab.make_trainer(f"{folder}/unwrapped", max_steps=1, ddp_backend="gloo")
        trainer.model._is_accelerate_prepared = True  # accelerate then returns it as it is
        with pytest.raises(RuntimeError, match="with 2 processes the model must be wrapped by DDP"):
            trainer.train()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
