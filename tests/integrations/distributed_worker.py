"""One of two processes: the losses in a plain loop under DDP and FSDP2, and TRL's trainer under DDP.

Usage: distributed_worker.py WHAT STORE_FILE MODEL_FOLDER OUTPUT   (RANK, WORLD_SIZE, MASTER_* are set)
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import warnings
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

WORLD = 2


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch_of(rank):
    """Ragged sequences, different on each process."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(6, 60, (2, 9 + rank), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loop(folder: str) -> None:
    """Gradients of the wrapped models are the average of the processes' own."""
    from transformers import AutoModelForCausalLM

    from fastsdpo import linear_sdpo_loss
    from fastsdpo.integrations.transformers import fused_logps
    from fastsdpo.prefix import head_parameters, run_inside

    rank = dist.get_rank()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def sampled(model, batch):
        logps, entropy = fused_logps(model, **batch, temperature=0.7, return_entropy=True)
        assert (entropy[batch["labels"] != -100] > 0).all() and not entropy.requires_grad
        return -(logps * torch.arange(logps.numel()).view_as(logps)).mean()

    def divergence(model, batch):
        def body(hidden):
            head = head_parameters(model)
            teacher = hidden.detach().roll(1, 0)
            return linear_sdpo_loss(
                hidden[:, :-1],
                teacher[:, :-1],
                head.weight,
                batch["labels"][:, 1:],
                bias=head.bias,
                mode="full",
                alpha=0.5,
            ).loss

        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return run_inside(model, body, {**given, "use_cache": False})

    for loss_of in (sampled, divergence):
        plain.zero_grad()
        for other in range(WORLD):
            (loss_of(plain, batch_of(other)) / WORLD).backward()
        want = {name: p.grad.clone() for name, p in plain.named_parameters()}
        for wrapper in ("DDP", "DDP unused", "FSDP2", "FSDP2 reshard"):
            inner = copy.deepcopy(plain)
            inner.zero_grad()
            if wrapper.startswith("DDP"):
                model = DistributedDataParallel(inner, find_unused_parameters="unused" in wrapper)
            else:
                model = inner
                for layer in model.model.layers:
                    fully_shard(layer)
                fully_shard(model, reshard_after_forward="reshard" in wrapper)
            loss_of(model, batch_of(rank)).backward()
            for name, p in inner.named_parameters():
                got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                gap = (got - want[name]).abs().max()
                assert gap < 1e-12 * want[name].abs().max().clamp(min=1), (wrapper, name, gap)


def trl(folder: str, output: str) -> None:
    """TRL's trainer, patched and not, in the same two processes."""
    lab = load("test_trl_sdpo")
    cases = {
        "jsd": lab.MODES["full-jsd"],
        # DDP then looks for parameters that the forward pass did not use: the head must be among
        # those that it did.
        "tail and policy, checkpointed": {
            **lab.MODES["topk-tail-forward"],
            "distillation_weight": 0.5,
            "gradient_checkpointing": True,
        },
        "live": {"teacher_model_kind": "live", "num_iterations": 2},
    }
    for name, options in cases.items():
        options = {"steps": 3, "per_device_train_batch_size": 2, "ddp_backend": "gloo", **options}
        trainer = lab.make_trainer(folder, output, **options)
        assert trainer.args.world_size == WORLD
        want = lab.run(trainer)
        trainer = lab.make_trainer(folder, output, kind=lab.FastSDPOTrainer, source="hidden", **options)
        found = lab.run(trainer)
        if dist.get_rank() == 0:
            lab.assert_same_run(found, want)
        for weight in found[1].values():
            gathered = [torch.empty_like(weight) for _ in range(WORLD)]
            dist.all_gather(gathered, weight)
            assert torch.equal(*gathered), name


def main(what: str, store: str, folder: str, output: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if what == "loop":
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
        plain_loop(folder)
    else:
        trl(folder, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
