"""One of two processes: the losses in a plain loop under DDP and FSDP2, then TRL's trainer under DDP.

Usage: distributed_worker.py LOOP_MODEL TRL_MODEL OUTPUT   (RANK, WORLD_SIZE, MASTER_* are set)
"""

import copy
import gc
import importlib.util
import os
import sys
import warnings

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from fastsdpo import linear_sdpo_loss
from fastsdpo.integrations.transformers import fused_logps
from fastsdpo.prefix import head_parameters, run_inside

WORLD = 2


def batch_of(rank):
    """Ragged sequences, different on each process."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(6, 60, (2, 9 + rank), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sampled(model, batch):
    logps, entropy = fused_logps(model, **batch, temperature=0.7, return_entropy=True)
    assert (entropy[batch["labels"] != -100] > 0).all() and not entropy.requires_grad
    return -(logps * torch.arange(logps.numel()).view_as(logps)).mean()


def divergence(model, batch):
    def loss(hidden):
        weight, bias, *_ = head_parameters(model)
        student, teacher = hidden[:, :-1], hidden.detach().roll(1, 0)[:, :-1]
        options = {"bias": bias, "mode": "full", "alpha": 0.5}
        return linear_sdpo_loss(student, teacher, weight, batch["labels"][:, 1:], **options).loss

    return run_inside(model, loss, {**batch, "labels": None, "use_cache": False})


def wrapped(kind, inner):
    if kind.startswith("DDP"):
        return DistributedDataParallel(inner, find_unused_parameters="unused" in kind)
    for layer in inner.model.layers:
        fully_shard(layer)
    return fully_shard(inner, reshard_after_forward="reshard" in kind)


def plain_loop(folder: str) -> None:
    """Gradients of the wrapped models are the average of the processes' own."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for loss_of in (sampled, divergence):
        plain.zero_grad()
        for other in range(WORLD):
            (loss_of(plain, batch_of(other)) / WORLD).backward()
        want = {name: p.grad.clone() for name, p in plain.named_parameters()}
        for kind in ("DDP", "DDP unused", "FSDP2", "FSDP2 reshard"):
            inner = copy.deepcopy(plain)
            inner.zero_grad()
            model = wrapped(kind, inner)  # DDP's hooks end with it
            loss_of(model, batch_of(dist.get_rank())).backward()
            for name, p in inner.named_parameters():
                got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                gap = (got - want[name]).abs().max()
                assert gap < 1e-12 * want[name].abs().max().clamp(min=1), (kind, name, gap)


def trl(folder: str, output: str) -> None:
    """TRL's trainer, patched and not, in the same two processes."""
    from tests.integrations import test_trl_sdpo as lab

    # With gradient checkpointing DDP looks for parameters that the forward pass did not use: the head must be
    # among those that it did.
    mixed = {**lab.MODES["topk-tail-forward"], "distillation_weight": 0.5, "gradient_checkpointing": True}
    for options in (mixed, {**lab.MODES["full-jsd"], "teacher_model_kind": "live", "num_iterations": 2}):
        options |= {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
        trainer = lab.make_trainer(folder, output, **options)
        assert trainer.args.world_size == WORLD
        want = lab.run(trainer)
        trainer = lab.make_trainer(folder, output, kind=lab.FastSDPOTrainer, source="hidden", **options)
        found = lab.run(trainer)
        if dist.get_rank() == 0:
            lab.assert_same_run(found, want)
        for name, weight in found[1].items():
            gathered = [torch.empty_like(weight) for _ in range(WORLD)]
            dist.all_gather(gathered, weight)
            assert torch.equal(*gathered), name


if __name__ == "__main__":
    loop_model, trl_model, output = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    plain_loop(loop_model)
    if importlib.util.find_spec("trl"):
        trl(trl_model, output)
    gc.collect()  # wrappers and their threads end before the process group does
    dist.barrier()
    dist.destroy_process_group()
