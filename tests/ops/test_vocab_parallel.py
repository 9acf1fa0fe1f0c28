"""A vocabulary-parallel head over two gloo processes equals the whole head in one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastsdpo
from fastsdpo import _native
from tests.forked import free_port

LOSSES = [
    {"mode": "sampled_token"},
    {"mode": "full", "alpha": 0.0},
    {"mode": "full", "alpha": 1.0},
    {"mode": "full", "alpha": 0.3},
    {"mode": "topk", "alpha": 1.0, "topk": 5},
    {"mode": "topk", "alpha": 0.3, "topk": 5, "add_tail": False},
    {"mode": "topk", "alpha": 0.5, "topk": 16},
]


BACKENDS = {"reference": torch.float64}
if _native.native_available()[0]:
    BACKENDS["native"] = torch.float32


def case(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 8, generator=g, dtype=torch.float64)
    teacher = hidden + 0.5 * torch.randn(9, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(24, 8, generator=g, dtype=torch.float64)
    bias = torch.randn(24, generator=g, dtype=torch.float64)
    bias[20] = -torch.inf  # a padded token
    y = torch.randint(0, 20, (9,), generator=g)
    y[4] = -100
    bias[12:] = -torch.inf if dtype == torch.float32 else bias[12:]  # nothing possible in a shard
    y[y >= 12] -= 12 if dtype == torch.float32 else 0
    return *(t.to(dtype) for t in (hidden, teacher, weight, bias)), y


def call(hidden, teacher, weight, bias, y, loss, **kwargs):
    options = {"logit_scale": 0.8, "softcap": 6.0, "temperature": 0.9, "is_clip": 1.5, "chunk_size": 4}
    options |= {"bias": bias, "old_logps": torch.full((9,), -3.0), **loss, **kwargs}
    return fastsdpo.linear_sdpo_loss(hidden, teacher, weight, y, **options)


def worker(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    shard = slice(12 * rank, 12 * (rank + 1))
    out, group = {}, dist.group.WORLD
    for backend, dtype in BACKENDS.items():
        hidden, teacher, weight, bias, y = case(dtype)
        for index, loss in enumerate(LOSSES):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight[shard], bias[shard])]
            got = call(leaves[0], teacher, leaves[1], leaves[2], y, loss, vocab_group=group, backend=backend)
            (2 * got.loss).backward()
            fields = [*(f.detach() for f in got), *(leaf.grad for leaf in leaves)]
            out[backend, index] = fields
    try:
        fastsdpo.linear_sdpo_loss(hidden, teacher, weight[shard], y + 24, vocab_group=dist.group.WORLD)
    except ValueError as error:
        out["error"] = str(error)
    results[rank] = out
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, args=(free_port(), results), nprocs=2)
        return [results[0], results[1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(len(LOSSES)), ids=[str(loss) for loss in LOSSES])
def test_equals_one_process(found, index, backend):
    hidden, teacher, weight, bias, y = (t.double() if t.is_floating_point() else t for t in case(BACKENDS[backend]))
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    want = call(leaves[0], teacher, leaves[1], leaves[2], y, LOSSES[index])
    (2 * want.loss).backward()
    exact = backend == "reference"
    values = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 1e-5, "atol": 1e-6}
    gradients = {"rtol": 1e-11, "atol": 1e-13} if exact else {"rtol": 2e-5, "atol": 1e-6}
    for rank in (0, 1):
        got = [tensor.double() for tensor in found[rank][backend, index]]
        for mine, field in zip(got[:5], want):
            torch.testing.assert_close(mine, field.detach(), **values)
        torch.testing.assert_close(got[5], leaves[0].grad, **gradients)
        shard = slice(12 * rank, 12 * (rank + 1))
        torch.testing.assert_close(got[6], leaves[1].grad[shard], **gradients)
        torch.testing.assert_close(got[7], leaves[2].grad[shard], **gradients)


def test_a_target_outside_the_whole_vocabulary_is_named(found):
    assert "linear_sdpo_loss: target_ids must lie in [0, V) = [0, 24)" in found[0]["error"]
