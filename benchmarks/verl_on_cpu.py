"""verl's own FSDP engine on a CPU, for tests and benchmarks; verl must be installed."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def use_cpu() -> None:
    """Makes the CPU the device of all of verl that is imported afterwards; its platforms are accelerators."""
    from verl.models.transformers import monkey_patch
    from verl.plugin.platform import platform_base, platform_manager

    module = SimpleNamespace(**dict.fromkeys(("empty_cache", "synchronize", "set_device"), lambda *_: None))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *_: 0)
    module.mem_get_info, module.is_available = lambda *_: (0, 0), lambda: True
    values = {"device_name": "cpu", "device_module": module, "current_device": "cpu", "is_available": True}
    values |= {"communication_backend_name": "gloo", "nvtx_range": contextlib.nullcontext()}
    values |= {"visible_devices_envvar": "CUDA_VISIBLE_DEVICES"}

    def member(name: str) -> Any:
        def value(self: Any, *args: Any, **kwargs: Any) -> Any:
            return values.get(name)

        return property(value) if name in ("device_name", "device_module", "vendor_name") else value

    names = {*platform_base.PlatformBase.__abstractmethods__, *values}
    cpu = type("CPU", (platform_base.PlatformBase,), {name: member(name) for name in names})
    platform_manager.set_platform(cpu())
    monkey_patch.is_trl_available = lambda: False  # verl 0.9.1 patches a class that TRL 1.16 has no more


def make_engine(folder: str, **model_settings: Any) -> Any:
    """An engine of the model in ``folder``, in float32; the process group must exist."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    model = HFModelConfig(path=folder, override_config={"attn_implementation": "sdpa"}, **model_settings)
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine = {"strategy": "fsdp2", "mixed_precision": precision, "use_torch_compile": False}
    optimizer = FSDPOptimizerConfig(lr=1e-2, total_training_steps=10)
    found = FSDPEngineWithLMHead(model, FSDPEngineConfig(**engine), optimizer, CheckpointConfig())
    found.initialize()
    return found


def nested(rows: Any) -> Tensor:
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


def run(engine: Any, data: Any, loss: Any) -> tuple[float, dict[str, Tensor], dict[str, Any]]:
    """``(loss, gradients, metrics)`` of the engine's own loop over micro-batches."""
    with engine.train_mode():
        engine.optimizer_zero_grad()
        out = engine.forward_backward_batch(data, loss)
        parameters = [(name, p) for name, p in engine.module.named_parameters() if p.grad is not None]
        grads = {name: p.grad.full_tensor().clone() for name, p in parameters}
    return sum(out["loss"]), grads, out["metrics"]


def actor_loss(**settings: Any) -> Any:
    """What verl's worker gives its engine where ``distillation.enabled`` is false; ``settings`` of the actor."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    return functools.partial(ppo_loss, config=FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings))
