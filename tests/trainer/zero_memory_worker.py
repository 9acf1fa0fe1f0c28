"""Bytes that a step holds in one of eight processes of DeepSpeed, beside the forecast, as JSON. See test_memory.

The engine is DeepSpeed's own; the other seven processes are not there (torch's "fake" group). Counted are the storages
that are alive on the CPU.
"""

import gc
import importlib
import os

import torch

from fastsdpo.trainer import SDPOConfig
from fastsdpo.trainer.learner import Learner
from fastsdpo.trainer.memory_walk import ModelShape, Processes, walk_step
from fastsdpo.trainer.memory_zero import ZeroSettings
from fastsdpo.trainer.optim import AdamWBF16
from fastsdpo.trainer.sharing import PrefixSharing
from tests.trainer.sharded_memory_worker import ITEMS, PROCESSES, Storages, main, model_of

# So small that the model is large beside them.
ZERO = {
    "reduce_bucket_size": 200_000,
    "stage3_max_reuse_distance": 3_000_000,
    "stage3_max_live_parameters": 3_000_000,  # not kept by DeepSpeed
    "stage3_prefetch_bucket_size": 100_000,
    "stage3_param_persistence_threshold": 1000,
}


def measured(stage, *, dtype="bfloat16", passes=1, **sizes):
    import deepspeed

    # It compiles for minutes what the fake group does not use. As an attribute of its package this module is torch.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    args = SDPOConfig(output_dir="unused", use_cpu=True, optim="adamw_torch", gradient_checkpointing=True)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it, and accelerate would look for the others
    model, config = model_of(dtype, **sizes)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=AdamWBF16(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": passes,
            "zero_optimization": {"stage": stage, **ZERO},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": dtype == "bfloat16"},
        },
    )
    sharing = PrefixSharing(model, args, None, (), one_pass=True)
    held = "zero3" if stage == 3 else None
    learner = Learner(model, args, sharing, unwrapped=lambda: model, sharded=held)
    gc.collect()
    storages = Storages()
    for value in gc.get_objects():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            storages.see(value)
    with storages:
        for _ in range(2):
            for _ in range(passes):
                loss, statistics = learner.run_pass(engine, ITEMS, len(ITEMS))
                engine.backward(loss)
                del loss, statistics
                engine.step()
    settings = ZeroSettings.read(ZERO)
    args.bf16 = dtype == "bfloat16"
    processes = Processes(PROCESSES, f"zero{stage}", settings)
    options = {"kind": "cpu", "processes": processes, "accumulated": passes > 1}
    forecast = walk_step(ModelShape(config, getattr(torch, dtype)), args, [ITEMS] * passes, **options)
    return forecast.peak, storages.peak, forecast.parts


if __name__ == "__main__":
    main(measured)
