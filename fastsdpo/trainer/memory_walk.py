"""The peak memory of a training step: the step itself, operator by operator, on tensors without memory.

Model, passes, loss, backward pass and optimizer are those of a run, on the device ``meta``, where a tensor has a
shape and no values. A `Meter` counts the storages that are alive. It needs neither weights nor a GPU.

What differs from a run: kernels (attention, losses) are replaced by functions that allocate what they do, optimizers
with kernels of their own by their sizes, the traffic between processes by its buffers. What is left out: the CUDA
context, libraries and their workspaces, and gaps between tensors that an allocator cannot use.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastsdpo.data import TokenizedInteraction
from fastsdpo.ops.linear import meta_stands_for
from fastsdpo.prefix import Ulysses, causal_lm
from fastsdpo.prefix.attention import meta_autocast
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.learner import Learner
from fastsdpo.trainer.memory_meter import FusedOperators, Meter
from fastsdpo.trainer.memory_optim import make_shape_optimizer
from fastsdpo.trainer.memory_shards import Shards
from fastsdpo.trainer.memory_zero import ZeroMemory, ZeroSettings, ZeroShards
from fastsdpo.trainer.noise import without_dropout
from fastsdpo.trainer.sharing import PrefixSharing

GPU_GRANULE, CPU_GRANULE = 512, 64  # bytes in which the allocators count
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
PURPOSES = ("weights", "gradients", "optimizer", "teacher", "gathered", "buckets", "activations", "loss", "step")


@dataclass(frozen=True)
class ModelShape:
    """A model by its configuration.

    Attributes:
        config: of transformers.
        dtype: of the weights.
        adapter: `peft.LoraConfig` of the adapter that is trained; None: all weights are.
        attention: ``attn_implementation`` of transformers; None: its default.
    """

    config: Any
    dtype: torch.dtype
    adapter: Any = None
    attention: str | None = None

    def make(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model on the device ``meta``, in training mode, without dropout."""
        options = {} if self.attention is None else {"attn_implementation": self.attention}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype or self.dtype, **options)
            if self.adapter is not None:
                from peft import get_peft_model

                model = get_peft_model(model, copy.deepcopy(self.adapter))
        without_dropout(model)
        return model.train()


class Processes(NamedTuple):
    """How many train together, and how.

    Attributes:
        strategy: "ddp" (each holds all), "fsdp" (each holds a share), "zero2" or "zero3" (DeepSpeed). Another has no
            forecast.
        settings: of DeepSpeed.
    """

    count: int = 1
    strategy: str = "ddp"
    settings: ZeroSettings = ZeroSettings()

    @property
    def sharded(self) -> bool:
        return self.count > 1 and self.strategy == "fsdp"

    @property
    def zero(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0: it is not used."""
        return {"zero2": 2, "zero3": 3}.get(self.strategy, 0)


class ShapeUlysses(Ulysses):
    """The first of a group of processes that are not there: it receives what it sends, in tensors without values."""

    def __init__(self, size: int):
        self.group, self.size, self.rank = None, size, 0

    def own_rows(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """As many as there can be: which process has how many depends on the answers' places."""
        most = min(len(rows), length)
        return rows[:most], rows[:most]

    def exchange(self, sent: Tensor) -> Tensor:
        return torch.empty_like(sent.contiguous())

    def add(self, values: Tensor) -> None:
        pass

    def gather(self, parts: list[Tensor], own: Tensor) -> None:
        pass


class Forecast(NamedTuple):
    """Bytes in one process: the peak, and what is alive then by purpose (`PURPOSES`)."""

    peak: int
    parts: dict[str, int]


def walk_step(
    shape: ModelShape,
    args: SDPOConfig,
    packs: Sequence[Sequence[TokenizedInteraction]],
    *,
    kind: str = "cuda",
    processes: Processes | None = None,
    accumulated: bool = True,
) -> Forecast:
    """The forecast of one optimizer step's peak memory in each process.

    Args:
        packs: one pass each, in order: the largest ones of the data.
        kind: the type of the device that it is for.
        accumulated: a step has several passes, so that gradients are there during one.

    Raises:
        NotImplementedError: an optimizer of unknown size, or what training would refuse too.
        ValueError: as `choose_update`.
    """
    return _Walk(shape, args, kind, processes or Processes()).step(packs, accumulated)


class _Walk:
    """One walk; see `walk_step`."""

    def __init__(self, shape: ModelShape, args: SDPOConfig, kind: str, processes: Processes):
        if processes.strategy not in STRATEGIES:
            raise NotImplementedError(f"{processes.strategy} has none")
        self.kind, self.processes = kind, processes
        self.args = args = copy.copy(args)
        args.attention = _attention(args.attention, kind)
        args.backend = "reference" if args.backend == "reference" else "auto"
        lower = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        # FSDP2 keeps trained weights in float32 and gathers them in the lower dtype. DeepSpeed has them in the lower.
        wide = processes.sharded and lower is not None
        self.model = model = shape.make(lower if wide or processes.zero else None)
        if processes.zero:
            lower = None  # instead of autocast
        causal: Any = causal_lm(model)
        self.meter = Meter(CPU_GRANULE if kind == "cpu" else GPU_GRANULE, causal.config.get_text_config().vocab_size)
        self.lower = lower
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.operators = FusedOperators(self.lower)
        if layers_run_again(args):
            enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
            # Tensor.backward turns the operators off; the layers that run again in it need them.
            enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), self.operators)})
        self.shards, self.zero = self._hold_weights(wide)
        sharing = PrefixSharing(model, args, None, (), one_pass=processes.zero > 0)
        ulysses = None if args.ulysses == 1 else ShapeUlysses(args.ulysses)
        # The passes are those of whole weights; what they hold of the teacher's in shards is counted below.
        metered = nullcontext() if processes.sharded else self.meter
        with metered, self.meter.allocating("teacher"):
            held: Any = "zero3" if processes.zero == 3 else None
            self.learner = Learner(model, args, sharing, unwrapped=lambda: model, sharded=held, ulysses=ulysses)
        if processes.sharded:
            self._count_teacher()
        self.stepped = self._weights_to_step(wide)
        embedding = causal.get_input_embeddings().weight
        embeddings = frozenset(own for own, p in zip(self.stepped, self.trained) if p is embedding)
        dtypes = {p.dtype for p in (self.trained if self.zero else self.stepped)}
        self.optimizer = make_shape_optimizer(args, self.stepped, kind, embeddings, dtypes)

    def _hold_weights(self, wide: bool) -> tuple[Shards | None, ZeroMemory | None]:
        """Counts the weights, and what the processes' traffic needs beside them."""
        meter, model, processes = self.meter, self.model, self.processes
        shards, zero = None, None
        if processes.sharded:
            shards = Shards(meter, model, processes.count, wide=wide)
        elif processes.zero == 3:
            shards = ZeroShards(meter, model, processes.count, processes.settings)
        else:
            for tensor in (*model.parameters(), *model.buffers()):
                meter.see(tensor, "weights")
        if processes.zero:
            zero = ZeroMemory(meter, self.trained, processes.count, processes.zero, processes.settings)
        elif not processes.sharded:
            for parameter in self.trained:
                parameter.register_post_accumulate_grad_hook(self._is_gradient)
            if processes.count > 1:
                meter.add("buckets", sum(p.nbytes for p in self.trained))
        return shards, zero

    def _count_teacher(self) -> None:
        """The teachers' shards; the student's own, which are aside during a teacher's pass; a gathered head."""
        assert self.shards is not None
        head: Any = causal_lm(self.model).get_output_embeddings()
        for weights in self.learner.copies.values():
            for value in weights.values.values():
                self.meter.see(value, "teacher", share=1 / self.processes.count)
            self.meter.add("teacher", sum(map(self.shards.shard, self.trained)))
            if any(p is head.weight for p in self.trained):
                self.meter.add("gathered", head.weight.nbytes)

    def _is_gradient(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self.meter.see(parameter.grad, "gradients")

    def _weights_to_step(self, wide: bool) -> list[nn.Parameter]:
        """What the optimizer is given: the trained weights, or this process's parts of them."""
        if self.zero is not None:
            return [self.zero.master]
        if not self.processes.sharded:
            return self.trained
        count = self.processes.count
        parts = []
        for p in self.trained:
            size, dtype = -(-p.numel() // count), torch.float32 if wide else p.dtype
            parts.append(nn.Parameter(torch.empty(size, dtype=dtype, device="meta")))
            parts[-1].grad = torch.empty_like(parts[-1])
        for tensor in (*parts, *(p.grad for p in parts)):
            self.meter.see(tensor, "weights", share=0)  # counted by `Shards`
        return parts

    def step(self, packs: Sequence[Sequence[TokenizedInteraction]], accumulated: bool) -> Forecast:
        with ExitStack() as around:
            around.enter_context(meta_stands_for(self.kind, self.lower))
            around.enter_context(meta_autocast(self.lower))
            around.enter_context(self.meter)
            # The optimizer's states are there from the second step on.
            self._make_states()
            for number, pack in enumerate(packs):
                if not accumulated or number == 0:
                    self._drop_gradients()
                last = number == len(packs) - 1
                if self.shards is not None:
                    self.shards.sync = last or not accumulated or self.args.sync_each_pass
                self._pass(pack)
            self._update()
        return Forecast(self.meter.peak, {name: self.meter.at_peak.get(name, 0) for name in PURPOSES})

    def _make_states(self) -> None:
        if self.zero is None and self.shards is None:
            for p in self.stepped:
                p.grad = torch.empty_like(p)
                self.meter.see(p.grad, "gradients")
        sizes = 0 if self.zero is not None or self.shards is None else sum(map(self.shards.shard, self.trained))
        self.meter.add("gradients", sizes)
        self._update()
        self.meter.remove("gradients", sizes)

    def _pass(self, pack: Sequence[TokenizedInteraction]) -> None:
        with self.operators:
            self.operators.forward_begins()
            loss, _statistics = self.learner.run_pass(
                self.model, pack, self.learner.count(pack), divided=True, is_clip=self.args.is_clip
            )
            self.operators.forward_ends()
            if self.zero is not None:
                self.zero.backward_begins()
            loss.backward()
        if self.zero is not None:
            self.zero.backward_ends()
        if self.shards is not None:
            self.shards.pass_ends()

    def _update(self) -> None:
        with self.meter.allocating("step"):
            if self.zero is not None:
                self.zero.step_begins()
            self.optimizer.step()
            self.learner.after_step()
        if self.zero is not None:
            self.zero.step_ends()
        for states in self.optimizer.state.values():
            for state in states.values():
                if isinstance(state, Tensor):
                    self.meter.see(state, "optimizer")

    def _drop_gradients(self) -> None:
        if self.shards is not None:
            self.shards.drop_gradients()
        if self.zero is not None:
            self.zero.drop_gradients()
        for p in self.trained:
            p.grad = None


def layers_run_again(args: SDPOConfig) -> bool:
    """In the backward pass: gradient checkpointing."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def _attention(name: str, kind: str) -> str:
    """The backend that stands for one by name, which may ask for a device."""
    if name in ("auto", "flash"):
        return "segments" if kind == "cpu" else "flex"
    return name
