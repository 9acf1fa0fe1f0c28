"""A forecast of a training step's peak memory from shapes, and which settings would lower it."""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

import torch
from torch import nn

from fastsdpo.ops.head import default_chunk_size, gradient_chunks
from fastsdpo.prefix import causal_lm
from fastsdpo.trainer.adapters import is_peft
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.optim import ADAMW, TORCHAO, choose_update

HALF = (torch.bfloat16, torch.float16)


class MemoryEstimate(NamedTuple):
    """Bytes in one process, by what they are for.

    ``weights`` to ``teacher`` are there all the time. A pass adds ``activations`` and the most of
    ``loss`` (logit tiles, gradients of head and hidden states) or what else comes on top of them; the
    optimizer's step adds ``step``, when those are gone.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    loss: int
    step: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self[:4]) + max(self.activations + self.loss, self.step)


def estimate_memory(
    model: nn.Module,
    args: SDPOConfig,
    tokens_per_pass: int,
    response_tokens: int,
    *,
    device: torch.device | None = None,
) -> MemoryEstimate:
    """A forecast of one process's peak memory in an optimizer step, from shapes alone.

    Within 25% of the peaks that were walked operator by operator (Qwen3-8B) or measured (small models
    on a CPU); for decoders of the Llama kind. What it leaves out: fragmentation, the CUDA context,
    libraries, buffers of communication.

    Args:
        model: with the weights that are trained marked so, on any device (``meta`` too).
        tokens_per_pass: the student's tokens in the largest pack, shared prefixes once.
        response_tokens: the answers' tokens in that pack.
        device: where it will train; None: ``args.device``.
    """
    place: Any = args.device if device is None else device
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes(model.parameters())
    gradients = _bytes(trained)
    optimizer, step = _optimizer(args, trained, place)
    teacher = 0
    if args.teacher == "ema":
        half = sum(p.numel() * p.element_size() for p in trained if p.dtype in HALF)
        teacher = 4 * sum(p.numel() for p in trained) + half  # swapped in, in the weights' dtype
    if (args.teacher in ("frozen", "trust_region") or args.needs_reference) and not is_peft(model):
        teacher += gradients

    layer = _Layer(model, args)
    shards = _shards(args)
    if shards > 1:
        # The unit that is used and the next are gathered: head and embedding, or two layers.
        whole = layer.compute * (2 * layer.head.numel() + 2 * layer.parameters)
        weights, gradients = weights // shards + whole, gradients // shards
        optimizer, step = optimizer // shards, step // shards
    elif args.world_size > 1:
        gradients *= 2  # DDP's buckets

    every = tokens_per_pass * layer.kept
    activations = every * layer.count
    if layer.autocast:  # its copies of the weights, kept for the backward pass
        activations += layer.compute * sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    loss, tiles = _loss(args, layer, response_tokens, place)
    if _checkpointing(args):
        activations -= every * layer.count
        activations += tokens_per_pass * layer.count * layer.hidden * layer.stream
        shared = args.sharing != "off" and args.teacher in ("live", "trust_region")
        keys_values = 2 * layer.keys * layer.compute * layer.count * tokens_per_pass * shared
        # The backward pass of one layer, computed anew; a CPU keeps the loss's tiles for the next.
        back = every + tokens_per_pass * layer.backward + layer.head_gradient
        loss = max(loss, keys_values, back + (tiles if place.type == "cpu" else 0))
    return MemoryEstimate(weights, gradients, optimizer, teacher, activations, loss, step)


class _Layer:
    """Sizes of the model: of a decoder layer, of what it keeps for backward, and of the head."""

    def __init__(self, model: nn.Module, args: SDPOConfig):
        causal = causal_lm(model)
        config = causal.config.get_text_config()
        self.count, self.hidden = config.num_hidden_layers, config.hidden_size
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or self.hidden // heads
        queries = heads * size
        self.keys = (getattr(config, "num_key_value_heads", None) or heads) * size
        inner = getattr(config, "intermediate_size", None) or 4 * self.hidden
        experts = getattr(config, "num_experts_per_tok", None)
        if experts:
            inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
        self.head = causal.get_output_embeddings().weight
        self.stream = self.head.element_size()
        self.autocast = bool(args.bf16 or args.fp16) and self.stream == 4
        self.compute = 2 if args.bf16 or args.fp16 else self.stream

        layers = next(
            (m for m in causal.modules() if isinstance(m, nn.ModuleList) and len(m) == self.count),
            [nn.Module()],
        )
        modules = list(layers[0].modules())
        self.parameters = sum(p.numel() for p in layers[0].parameters())
        plain = [m for m in modules if type(m) is nn.Linear]
        frozen = bool(plain) and not plain[0].weight.requires_grad

        # Bytes per token. Attention: queries, keys, values and output; the gated MLP: gate, its
        # activation, up, and their product where a trained layer reads it.
        kept = self.compute * (2 * queries + 2 * self.keys + (3 if frozen else 4) * inner)
        kept += self._norms(layers[0], frozen, size, queries)
        adapters = [m for m in modules if getattr(m, "lora_A", None)]
        for adapter in adapters:  # peft copies every input to the adapter's dtype
            dtype = next(adapter.lora_A.parameters()).element_size()
            copied = self.compute if self.autocast or dtype == self.compute else dtype
            kept += copied * adapter.in_features
        self.kept = kept + 4 * heads  # the row statistics of attention
        self.backward = self.compute * (3 * inner + 2 * self.hidden)  # gradients of a layer's MLP

        trains = self.head.requires_grad
        self.head_gradient = self.head.numel() * self.stream * trains

    def _norms(self, layer: nn.Module, frozen: bool, size: int, queries: int) -> int:
        """Bytes per token that the norms keep.

        Those of transformers keep input and normalized input in float32, or the latter in the
        activations' dtype, and the trained layer after them their output; torch's fused ones input
        and output.
        """
        wide = self.stream
        total = 0
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if "norm" not in type(module).__name__.lower() or weight is None or weight.dim() != 1:
                continue
            width, inside = weight.numel(), weight.numel() == size != self.hidden
            if inside:  # over heads; their output is rotated, not kept
                width = queries if name.rsplit(".", 1)[-1].startswith("q") else self.keys
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                total += width * wide
            else:
                total += width * (4 + (0 if frozen else wide))
            total += width * wide * (not frozen and not inside)
        return total or 2 * self.hidden * (4 + (0 if frozen else 2 * wide))


def _loss(args: SDPOConfig, layer: _Layer, tokens: int, device: torch.device) -> tuple[int, int]:
    """Bytes of the loss from hidden states above the activations, and of its tiles; see `ops.linear`."""
    vocabulary, hidden = layer.head.shape
    chunk = min(args.chunk_size or default_chunk_size(tokens, vocabulary, device), tokens)
    operand = 4 if device.type == "cpu" else layer.compute
    tiles = 2 * 4 * chunk * vocabulary
    total = tiles + 3 * tokens * hidden * layer.stream
    trained = layer.head.requires_grad
    if operand != 4:  # the gradient's tile
        waiting = gradient_chunks(tokens, chunk) if trained else 1
        total += operand * min(waiting * chunk, tokens) * vocabulary
    if trained:  # in float32, then in the head's dtype when the tiles are free again
        total = max(total, vocabulary * hidden * (layer.stream if layer.stream != 4 else 0))
        total += 4 * vocabulary * hidden
    if layer.autocast and device.type != "cpu":
        total += operand * vocabulary * hidden
    if args.reference_kl:  # the first loss's gradients wait for the second's
        total += 4 * vocabulary * hidden * trained + tokens * hidden * layer.stream
    if args.teacher == "trust_region":  # two heads side by side
        total += 2 * vocabulary * hidden * layer.stream
    return total, tiles


def _optimizer(args: SDPOConfig, trained: list[nn.Parameter], device: torch.device) -> tuple[int, int]:
    """Bytes of the optimizer's states, and of what its step needs for a moment."""
    optim = str(getattr(args.optim, "value", args.optim))
    try:
        update = choose_update(args.weight_update, optim, {p.dtype for p in trained})
    except ValueError:  # create_optimizer says so
        update = "plain"
    count = sum(p.numel() for p in trained)
    largest = max((p.numel() for p in trained), default=0)
    if optim in ADAMW and update != "plain":  # AdamWBF16
        half = sum(p.numel() for p in trained if p.dtype in HALF)
        master = update == "float32_master"
        return 8 * count + 4 * half * master, (8 if master else 12) * largest
    if optim in ADAMW:
        size = _bytes(trained)
        foreach = optim == "adamw_torch" and device.type != "cpu"
        one = largest * max((p.element_size() for p in trained), default=0)
        return 2 * size, size if foreach else 2 * one * (optim == "adamw_torch")
    bits = 8 if "8bit" in optim else 4 if "4bit" in optim else 32
    states = 1 if any(name in optim for name in ("lion", "rmsprop", "adagrad")) else 2
    if optim == "sgd" or "adafactor" in optim:
        states = 0  # rows and columns alone
    return states * bits * count // 8, (12 if optim in TORCHAO else 0) * largest


def _checkpointing(args: SDPOConfig) -> bool:
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def _shards(args: SDPOConfig) -> int:
    """Over how many processes weights, gradients and states are spread (FSDP, ZeRO-3)."""
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    sharded = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    sharded |= deepspeed is not None and deepspeed.is_zero3()
    return args.world_size if sharded else 1


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def memory_text(model: nn.Module, args: SDPOConfig, tokens_per_pass: int, response_tokens: int) -> str:
    """The estimate in words: per process, beside what the device has, and what would lower it."""
    pass_ = tokens_per_pass, response_tokens
    estimate = estimate_memory(model, args, *pass_)
    parts = ", ".join(f"{k} {gigabytes(v)}" for k, v in estimate._asdict().items() if v)
    lines = [f"memory per process, an estimate: {gigabytes(estimate.total)} at the peak ({parts})"]
    if args.device.type == "cuda":
        room = torch.cuda.mem_get_info(args.device)[1]
        if estimate.total > room:
            lines.append(f"WARNING: the device has {gigabytes(room)}")
    found = []
    for flag, changes, share in (
        ("--gradient-checkpointing", {"gradient_checkpointing": True, "activation_checkpointing": True}, 1),
        ("half of --max-tokens-per-pack", {}, 2),
        ("--set weight_update=stochastic_rounding", {"weight_update": "stochastic_rounding"}, 1),
        ("--set optim=adamw_torch_8bit", {"optim": "adamw_torch_8bit", "weight_update": "auto"}, 1),
    ):
        other = copy.copy(args)
        for name, value in changes.items():
            setattr(other, name, value)
        total = estimate_memory(model, other, *(size // share for size in pass_)).total
        if total < 0.95 * estimate.total:
            found.append(f"{flag} {gigabytes(total)}")
    if not is_peft(model):
        found.append("--lora RANK (no gradients and states of the model's own weights)")
    lines.append(f"smaller with: {'; '.join(found)}")
    return "\n".join(lines)
