"""Bytes that a step holds in one of eight processes of FSDP2, or alone, beside the forecast, as JSON. See test_memory.

FSDP2 is torch's own, its units those of accelerate; the other seven processes are not there (torch's "fake" group).
Counted are the storages that are alive on the CPU.
"""

import contextlib
import gc
import json
import sys
import weakref

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastsdpo.data import TokenizedInteraction
from fastsdpo.ops.linear import release_tiles
from fastsdpo.trainer import SDPOConfig
from fastsdpo.trainer.learner import Learner
from fastsdpo.trainer.memory_walk import ModelShape, Processes, walk_step
from fastsdpo.trainer.optim import AdamWBF16
from fastsdpo.trainer.sharing import PrefixSharing
from fastsdpo.trainer.ulysses import make_ulysses

PROCESSES = 8
ITEMS = [TokenizedInteraction([3 + n] * 75, [3 + n] * 75 + [50 + n] * 30, [80 + n] * 100) for n in range(6)]


class Storages(TorchDispatchMode):
    """What is alive on the CPU; FSDP2 frees weights by resizing their storages to nothing."""

    def __init__(self):
        super().__init__()
        self.known, self.total, self.peak = {}, 0, 0
        self.resize = torch.UntypedStorage.resize_

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        before = self.known.get(key)
        self.total += size - (0 if before is None else before[1])
        reference = weakref.ref(storage, lambda _: self.forget(key)) if before is None else before[0]
        self.known[key] = reference, size
        self.peak = max(self.peak, self.total)

    def forget(self, key):
        self.total -= self.known.pop(key)[1]

    def see(self, tensor):
        tensor = getattr(tensor, "_local_tensor", tensor)
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            self.count(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.see(value)
        return out

    def __enter__(self):
        def resize(storage, size):
            found = self.resize(storage, size)
            self.count(storage)
            return found

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)


def shard(model, tied, policy):
    """As accelerate does: each layer, the embedding, final norm with the head."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    how = {"mesh": mesh, "mp_policy": policy}
    inner = model.model
    for layer in inner.layers:
        fully_shard(layer, reshard_after_forward=True, **how)
    if not tied:
        fully_shard(inner.embed_tokens, reshard_after_forward=True, **how)
    last = [inner.norm, inner.embed_tokens, model.lm_head] if tied else [inner.norm, model.lm_head]
    fully_shard(last, reshard_after_forward=False, **how)
    fully_shard(model, **how)


def model_of(dtype, **changes):
    """A model of six layers, and its configuration."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False}
    torch.manual_seed(0)
    config = Qwen3Config(**{**shape, **changes})
    return Qwen3ForCausalLM(config).to(getattr(torch, dtype)).train(), config


def measured(
    *, processes=PROCESSES, tied=False, checkpointed=True, dtype="float32", mixed=False, passes=1, ulysses=1, **sizes
):
    gc.collect()
    release_tiles()
    model, config = model_of(dtype, tie_word_embeddings=tied, **sizes)
    options = {"optim": "adamw_torch", "gradient_checkpointing": checkpointed, "bf16": mixed}
    args = SDPOConfig(output_dir="unused", use_cpu=True, **options)
    args.ulysses = ulysses  # divides the processes, which are not there
    sharing = PrefixSharing(model, args, None, (), one_pass=False)
    divided = {"sharded": processes > 1, "ulysses": make_ulysses(args)}
    learner = Learner(model, args, sharing, unwrapped=lambda: model, **divided)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lower = torch.bfloat16
    if processes > 1:
        shard(model, tied, MixedPrecisionPolicy(lower, lower, lower) if mixed else MixedPrecisionPolicy())
    storages = Storages()
    for tensor in (*model.parameters(), *model.buffers()):
        storages.see(tensor)
    optimizer = AdamWBF16(model.parameters())
    with storages:
        for _ in range(2):
            for number in range(passes):
                if processes > 1:
                    model.set_requires_gradient_sync(number == passes - 1)
                with torch.autocast("cpu", lower) if mixed else contextlib.nullcontext():
                    loss, statistics = learner.run_pass(model, ITEMS, len(ITEMS), divided=True)
                loss.backward()
                del loss, statistics
            optimizer.step()
            model.zero_grad()
    shape, divided = ModelShape(config, getattr(torch, dtype)), Processes(processes, "fsdp")
    options = {"kind": "cpu", "processes": divided, "accumulated": passes > 1}
    forecast = walk_step(shape, args, [ITEMS] * passes, **options)
    return forecast.peak, storages.peak, forecast.parts


def main(measured):
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())
    for name, settings in json.loads(sys.argv[1]).items():
        print(json.dumps([name, *measured(**settings)]), flush=True)


if __name__ == "__main__":
    main(measured)
