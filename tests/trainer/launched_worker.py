"""Runs `fastsdpo train` or `online` several times in one process of a launcher, where asked for under FSDP2.

Usage: torchrun --nproc-per-node N launched_worker.py plain|fsdp2|deepspeed RUNS_JSON

RUNS_JSON is a list of lists of arguments, of `online` after that word.

accelerate turns FSDP on for accelerators only. All that stands in the way on a CPU is the choice of
the kind of process group, so this sets the kind; everything that shards, gathers, saves and loads is
accelerate's own.
"""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from fastsdpo.commands import online
from fastsdpo.train import build_parser, held_out, main, read_config
from fastsdpo.trainer import SDPOTrainer


def let_cpu_processes_use_fsdp() -> None:
    start = AcceleratorState.__init__

    def initialize(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize


def evaluate_before_training(arguments: list[str], engine: str) -> None:
    """From Python: FSDP2 and DeepSpeed take a model only together with its optimizer."""
    options = build_parser().parse_args(arguments)
    (options.data,) = options.data
    trainer = SDPOTrainer(options.model, read_config(options), eval_dataset=held_out(options))
    with pytest.raises(NotImplementedError, match=f"under {engine}; set eval_on_start=True"):
        trainer.evaluate()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fsdp2":
        let_cpu_processes_use_fsdp()
    runs = json.loads(sys.argv[2])
    if sys.argv[1] != "plain" and runs[0][0] != "online":
        evaluate_before_training(runs[0], {"fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}[sys.argv[1]])
    for arguments in runs:
        status = online.main(arguments[1:]) if arguments[0] == "online" else main(arguments)
        if status:
            sys.exit(status)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
