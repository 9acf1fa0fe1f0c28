"""DDP and FSDP2 in two processes, each this file: the wrapped model is called, so its hooks run."""

import copy
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import tiny
from fastsdpo.prefix import check_head, check_sharing, head_parameters, shared_forward
from tests.forked import run_together
from tests.prefix import conftest as lab

WORLD = 2
KINDS = ("qwen3_5_text", "stablelm", "doge", "minimax", "recurrent_gemma")  # recurrent; own masks; whole paths


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("wrapper", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS)])
def test_two_processes(tmp_path, name, wrapper):
    common = [tmp_path / "store", name, wrapper]
    run_together([([__file__, rank, *common], {}) for rank in range(WORLD)])


def main(rank: int, store: str, name: str, wrapper: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    items_of = [lab.conversation(3, think=True, seed=r) for r in range(WORLD)]
    items = items_of[rank]

    # What both wrappers promise: the gradients of the processes, averaged.
    if name == "llama":
        plain, tolerance = lab.tiny_model(name), 1e-12
    else:  # all of whose casts are to float64
        plain, tolerance = tiny.build(name).double(), 1e-10
        casts = tiny.in_float64()
        casts.__enter__()
    for other in items_of:
        (lab.independent_logps(plain, other).sum() / WORLD).backward()
    want = lab.gradients(plain)
    head = head_parameters(plain)
    with torch.no_grad():
        want_teacher = lab.independent_logps(plain, items, teacher=True)

    for checkpointing, sharing in itertools.product((False, True), ("conversation", "off")):
        inner = copy.deepcopy(plain)
        if checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        model = DistributedDataParallel(inner) if wrapper == "ddp" else shard(inner, reshard=checkpointing)
        assert check_head(model) == (True, "") and check_sharing(model) == (True, "")

        def loss_fn(states, model=model):  # after the forward pass a resharded head is gone
            head = head_parameters(model)
            return lab.hidden_logps(states.student_hidden, states.target_ids, head).sum(), states

        if wrapper == "ddp":  # which needs no loss_fn
            loss, states = loss_fn(shared_forward(model, items, sharing=sharing))
        else:
            loss, states = shared_forward(model, items, sharing=sharing, loss_fn=loss_fn)
        loss.backward()
        if wrapper == "fsdp2":
            with pytest.raises(NotImplementedError, match="sharded"):
                head_parameters(model)
        with torch.no_grad():
            teacher = lab.hidden_logps(states.teacher_hidden, states.target_ids, head)
        assert (teacher - want_teacher).abs().max() < tolerance, (checkpointing, sharing)
        for which, parameter in inner.named_parameters():
            got = parameter.grad.full_tensor() if wrapper == "fsdp2" else parameter.grad
            error, scale = (got - want[which]).abs().max(), want[which].abs().max().clamp(min=1)
            assert error < tolerance * scale, (which, checkpointing, sharing)
    dist.barrier()  # neither ends its threads while the other still talks to them
    dist.destroy_process_group()


def shard(model, reshard):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model, **({"reshard_after_forward": True} if reshard else {}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
