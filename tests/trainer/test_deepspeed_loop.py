"""DeepSpeed's own engine around `shared_forward` and `linear_sdpo_loss` in a plain loop, two processes on a CPU."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastsdpo import linear_sdpo_loss
from fastsdpo.prefix import head_parameters, is_partitioned, shared_forward
from tests.prefix import conftest as lab

WORLD, STEPS, RATE = 2, 3, 0.2
CASES = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    # Nothing is small enough to stay whole, and nothing is gathered ahead.
    "zero3-parts": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes(tmp_path, case):
    pytest.importorskip("deepspeed")
    launching = importlib.import_module("tests.trainer.launching")
    command = [__file__, str(tmp_path), case]
    launching.torchrun(WORLD, *command, DS_ACCELERATOR="cpu", PYTHONPATH=str(launching.ROOT))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["losses"] == pytest.approx(found["wanted"], rel=1e-5)
    assert found["moved"] > 1e-3 and found["difference"] < 1e-5


def step_loss(model, items):
    def loss_fn(states):
        head = head_parameters(model)
        return linear_sdpo_loss(states.student_hidden, states.teacher_hidden, head.weight, states.target_ids).loss

    return shared_forward(model, items, loss_fn=loss_fn)


def plain_run(model, batches):
    """The losses of a plain loop over the batches of all processes, averaged as the engine averages."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        found = [step_loss(model, items) / WORLD for items in batches]
        sum(found).backward()
        losses.append(float(sum(found)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main(folder: str, case: str) -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    # Uneven: the second process has fewer interactions and other lengths.
    batches = [lab.conversation(3 - r, think=False, seed=r) for r in range(WORLD)]
    plain = lab.tiny_model("llama").float()
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    inner = copy.deepcopy(plain)
    wanted = plain_run(plain, batches)
    optimizer = torch.optim.SGD(inner.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(
        model=inner,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": CASES[case],
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # 1 where nothing is said
        },
    )
    assert is_partitioned(inner) == case.startswith("zero3")
    losses = []
    for _ in range(STEPS):
        loss = step_loss(engine, batches[rank])
        engine.backward(loss)
        engine.step()
        total = loss.detach() / WORLD
        dist.all_reduce(total)
        losses.append(float(total))
    differences, moved = [], []
    with deepspeed.zero.GatheredParameters(list(inner.parameters())):
        for (name, got), want in zip(inner.named_parameters(), plain.parameters()):
            differences.append(float((got - want).abs().max()))
            moved.append(float((want - start[name]).abs().max()))
    if rank == 0:
        found = {"losses": losses, "wanted": wanted, "difference": max(differences), "moved": max(moved)}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
