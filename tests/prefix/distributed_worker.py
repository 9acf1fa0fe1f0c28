"""One of two processes: DDP or FSDP2 around a model, shared passes inside. Run by test_distributed.

Usage: distributed_worker.py RANK STORE_FILE ddp|fsdp2
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastsdpo.prefix import check_head, check_sharing, head_parameters, shared_forward

WORLD = 2


def load_lab():
    path = Path(__file__).parent / "conftest.py"
    spec = importlib.util.spec_from_file_location("prefix_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(rank: int, store: str, wrapper: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    lab = load_lab()
    items_of = [lab.conversation(3, think=True, seed=r) for r in range(WORLD)]
    items = items_of[rank]

    def logps(model, states):
        return lab.hidden_logps(states.student_hidden, states.target_ids, head_parameters(model))

    def check(model):
        sharing, head = check_sharing(model), check_head(model)
        assert sharing == (True, "") and head == (True, ""), (sharing, head)

    # What both wrappers promise: the gradients of the processes, averaged.
    plain = lab.tiny_model("llama")
    for other in items_of:
        (lab.independent_logps(plain, other).sum() / WORLD).backward()
    want = lab.gradients(plain)
    plain.eval()
    with torch.no_grad():
        want_teacher = lab.independent_logps(plain, items, teacher=True)
    plain.train()

    def compare(name, model, states):
        head = head_parameters(plain)
        with torch.no_grad():
            teacher = lab.hidden_logps(states.teacher_hidden, states.target_ids, head)
        assert (teacher - want_teacher).abs().max() < 1e-12, name
        found = {n: p.grad for n, p in model.named_parameters()}
        for key, wanted in want.items():
            got = found[key]
            got = got.full_tensor() if hasattr(got, "full_tensor") else got
            assert (got - wanted).abs().max() < 1e-12 * wanted.abs().max().clamp(min=1), (name, key)

    def run_ddp():
        for checkpointing in (False, True):
            inner = copy.deepcopy(plain)
            if checkpointing:
                inner.gradient_checkpointing_enable({"use_reentrant": False})
            model = DistributedDataParallel(inner)
            check(model)
            for sharing in ("conversation", "off"):
                states = shared_forward(model, items, sharing=sharing)
                logps(model, states).sum().backward()
                compare(f"DDP {sharing} {checkpointing}", inner, states)
                model.zero_grad()

    def run_fsdp2():
        # With reshard the root's parameters are gone after its forward pass: hence loss_fn.
        for checkpointing, options in ((False, {}), (True, {"reshard_after_forward": True})):
            model = copy.deepcopy(plain)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model, **options)
            check(model)
            for sharing in ("conversation", "off"):
                loss, states = shared_forward(
                    model,
                    items,
                    sharing=sharing,
                    loss_fn=lambda states, model=model: (logps(model, states).sum(), states),
                )
                loss.backward()
                compare(f"FSDP2 {sharing} {checkpointing} {options}", model, states)
                model.zero_grad()
            with pytest.raises(NotImplementedError, match="sharded"):
                head_parameters(model)

    {"ddp": run_ddp, "fsdp2": run_fsdp2}[wrapper]()
    dist.barrier()  # neither ends its threads while the other still talks to them
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
