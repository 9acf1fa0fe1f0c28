"""Cost of a training step from shapes alone: FLOPs, bytes, kernel launches, peak memory; and time on a GPU.

The formulas stand in the docstrings below; `benchmarks/predictions.py` prints what follows from them.
`tests/benchmarks/test_costmodel.py` holds them against FLOPs of torch's FlopCounterMode and recorded peaks of
processes, `test_kernels.py` against the loads and stores of the Triton kernels. What they say about a GPU is a
**prediction**: nothing of it has been measured on one.

Conventions: a product of (m, k) and (k, n) is 2 m k n FLOPs. Bytes are what kernels read plus write in device
memory if nothing stays in a cache between two kernels. GB = 10^9 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

# --------------------------------------------------------------------------------- losses from logits

# Passes over a (T, V) logits tensor: (reads in forward, reads in backward, gradient writes).
# Sampled: both logits once, the student's again; KL: both twice; JSD: both three times, since the
# gradient needs KL(p_S || m), which needs both normalizers. Top-k: as sampled, and selecting the
# support reads the student's once more; the support's own K entries are not counted.
PASSES = {
    "log_ratio": (2, 0, 0),
    "sampled": (2, 1, 1),
    "forward_kl": (2, 2, 1),
    "reverse_kl": (2, 2, 1),
    "jsd": (4, 2, 1),
    "topk": (3, 1, 1),
}
# Kernels of forward and backward: two passes and what puts parts of rows together between them; JSD has one
# pass more, top-k's selection (torch.topk) counts as one.
LAUNCHES = {"log_ratio": 2, "sampled": 3, "forward_kl": 3, "reverse_kl": 3, "jsd": 4, "topk": 4}

# Bytes per (token, word) of plain PyTorch, forward + backward, as operators read and write float32:
# the two log-softmaxes (2 reads, 2 writes), the loss's own operators and their backward. Counted from
# `plain_loss` of `fastsdpo.bench`, operator by operator.
EAGER_FLOAT32 = {"sampled": 48, "forward_kl": 80, "reverse_kl": 104, "jsd": 276}
EAGER_LAUNCHES = {"sampled": 14, "forward_kl": 12, "reverse_kl": 14, "jsd": 32}
# The same for bf16 logits as published code spends them, forward + backward, by mode; read from the
# sources: TRL 1.16.0 (its SDPO trainer), Liger-Kernel 0.8.5 (`liger_jsd`).
RIVAL_BYTES_BFLOAT16 = {
    "TRL SDPO, eager": {"sampled": 36, "forward_kl": 52, "reverse_kl": 64, "jsd": 170},
    "Liger JSD from logits": {"forward_kl": 78, "reverse_kl": 78, "jsd": 78},
}
# (T, V) tensors of the logits' dtype alive at once in TRL's losses, both logits and their copies over the
# temperature among them.
TRL_LIVE = {"sampled": 6, "forward_kl": 9, "reverse_kl": 9, "jsd": 18}


class Cost(NamedTuple):
    """Work of one part of a step; parts add up."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other)))

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * value for value in self))


def loss_from_logits(mode: str, tokens: int, vocabulary: int, element: int) -> Cost:
    """`sdpo_loss` on logits of ``element`` bytes, forward and backward."""
    # 8 passes of arithmetic (scale, exp, sum, ...) stand for all modes: never the limit on a GPU.
    cells = tokens * vocabulary
    return Cost(8.0 * cells, sum(PASSES[mode]) * element * cells, LAUNCHES[mode])


def eager_loss_from_logits(mode: str, tokens: int, vocabulary: int) -> Cost:
    """The same in plain PyTorch on float32 logits (the definition in `fastsdpo.bench`)."""
    cells = tokens * vocabulary
    return Cost(20.0 * cells, EAGER_FLOAT32[mode] * cells, EAGER_LAUNCHES[mode])


# -------------------------------------------------------------------------- losses from hidden states

TILE = 4  # bytes of an entry of the logits' tiles: float32


def default_chunk(tokens: int, vocabulary: int, *, budget: int = 2**26, least: int = 1024) -> int:
    """The library's own chunk on a GPU (tested to be), without importing it."""
    chunk = max(least, budget // vocabulary // 64 * 64)
    if tokens <= chunk:
        return max(1, tokens)
    return min(chunk, math.ceil(tokens / math.ceil(tokens / chunk) / 8) * 8)


def gradient_chunks(tokens: int, chunk: int) -> int:
    """Chunks whose gradients wait for one dHidden and one dWeight, as the library's (tested to be)."""
    return max(1, min(math.ceil(tokens / chunk), 4096 // chunk))


class LinearLoss(NamedTuple):
    """A call of `linear_sdpo_loss`: bytes of an operand, and the tokens whose logits it holds at once."""

    tokens: int
    vocabulary: int
    hidden: int
    operand: int = 2
    frozen_head: bool = False
    chunk: int | None = None

    def parts(self, mode: str) -> dict[str, Cost]:
        """By kind of kernel: the GEMMs with what they read and write, and the loss's own.

        Per chunk of n tokens: logits of both (reads 2nD + VD operands, writes 2nV float32) and the
        fused kernel on the tiles; per chunk, or where a trained head's gradient has a tile of its own per 4096
        tokens, dHidden (reads nV + VD operands) and dWeight (reads nV + nD operands, reads and writes VD
        float32). So dWeight moves 8 VD bytes for 2 n V D FLOPs: it takes n of about 1000 on an H100 until
        arithmetic is its limit, whatever V and D are.
        """
        tokens, vocabulary, hidden, operand, frozen_head, _ = self
        chunk = self.chunk or default_chunk(tokens, vocabulary)
        parts = dict.fromkeys(("logits", "loss kernel", "dHidden", "dWeight"), Cost())
        reads, again, _ = PASSES[mode]
        for start in range(0, tokens, chunk):
            n = min(chunk, tokens - start)
            cells, head = n * vocabulary, vocabulary * hidden
            gemm = 2.0 * cells * hidden
            parts["logits"] += Cost(2 * gemm, operand * (2 * n * hidden + head) + 2 * TILE * cells, 1)
            moved = (reads + again) * TILE * cells + operand * cells
            parts["loss kernel"] += Cost(8.0 * cells, moved, LAUNCHES[mode])
        waits = operand != TILE and not frozen_head
        step = chunk * (gradient_chunks(tokens, chunk) if waits else 1)
        for start in range(0, tokens, step):
            n = min(step, tokens - start)
            cells, head = n * vocabulary, vocabulary * hidden
            gemm = 2.0 * cells * hidden
            parts["dHidden"] += Cost(gemm, operand * (cells + head + n * hidden), 1)
            if not frozen_head:
                parts["dWeight"] += Cost(gemm, operand * (cells + n * hidden) + 8 * head, 1)
        return parts

    def peak(self) -> int:
        """Bytes above the inputs at the peak: two tiles, the gradient tile, and the gradients.

        The head's gradient accumulates in float32; backward writes it once more in the dtype of a head of half
        precision, when the tiles are free again.
        """
        tokens, vocabulary, hidden, operand, frozen_head, _ = self
        chunk = min(self.chunk or default_chunk(tokens, vocabulary), tokens)
        total = 2 * chunk * vocabulary * TILE
        waiting = 1 if frozen_head else gradient_chunks(tokens, chunk)
        wide = min(waiting * chunk, tokens)
        total += wide * vocabulary * operand if operand != TILE else 0
        if not frozen_head:
            total = max(total, vocabulary * hidden * operand if operand != 4 else 0)
            total += 4 * vocabulary * hidden
        return total + tokens * hidden * operand


def total(parts: dict[str, Cost]) -> Cost:
    return sum(parts.values(), Cost())


# (T, V) float32 tensors alive at once in `plain_loss` on float32 logits, both logits among them, before
# the backward pass frees any.
EAGER_LIVE = {"sampled": 4, "forward_kl": 7, "reverse_kl": 7, "jsd": 14}


def eager_linear_peak(mode: str, tokens: int, vocabulary: int, hidden: int) -> int:
    """Bytes above the inputs of plain PyTorch in float32: the loss at its peak, or, where the head is
    wide beside the tokens, the gradients with the last two tensors of the logits' size.
    """
    tensor = 4 * tokens * vocabulary
    gradients = 4 * (tokens + vocabulary) * hidden
    return max(EAGER_LIVE[mode] * tensor, 2 * tensor + gradients)


# ------------------------------------------------------------------------------------- transformer


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama family (Llama, Mistral, Qwen2/3, SmolLM2): gated MLP, grouped queries."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qk_norm: bool

    @classmethod
    def from_config(cls, config: Any, name: str = "") -> Model:
        """From a transformers config of the Llama family."""
        head_dim = getattr(config, "head_dim", None)
        return cls(
            name or config.model_type,
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim or config.hidden_size // config.num_attention_heads,
            config.intermediate_size,
            config.vocab_size,
            bool(config.tie_word_embeddings),
            config.model_type.startswith("qwen3"),
        )

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * q + 2 * kv) + 3 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        norms = self.layers * (2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0))
        embeddings = self.head * (1 if self.tied else 2)
        return self.layers * self.layer_weights + embeddings + norms + self.hidden

    def adapter(self, rank: int) -> int:
        """Elements of a LoRA adapter on all linear layers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + q) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * sides

    def kept_per_token(self, element: int, *, lora: bool = False) -> int:
        """Bytes that one layer saves for backward, per token, with fused attention.

        Two norms keep their input, the normalized input and the output (Hugging Face computes them
        in float32: with 2-byte activations 4 + 2 + 2 bytes, else 3 x 4); attention keeps q, k, v
        after rotation and its output; the MLP keeps gate, silu(gate), up and their product.

        With LoRA the frozen layers keep no input and the norms their float32 input alone; peft's
        float32 adapters keep a float32 copy of every layer's input.
        """
        if lora:
            q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
            norms = 4 * (2 * self.hidden + (q + kv if self.qk_norm else 0))
            inputs = 4 * (5 * self.hidden + q + self.intermediate)
            kept = element * (2 * q + 2 * kv + 3 * self.intermediate)
            return norms + inputs + kept + 4 * self.heads
        norm = 3 * element if element >= 4 else 4 + 2 * element
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        kept = 2 * self.hidden * norm
        if self.qk_norm:  # the norms' outputs are rotated, not kept
            kept += (q + kv) * (norm - element)
        kept += element * (2 * q + 2 * kv + 4 * self.intermediate)
        return kept + 4 * self.heads  # the row statistics of attention


QWEN3_8B = Model("Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936, False, True)
SMOLLM2_135M = Model("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, True, False)

# Kernels per layer of Hugging Face's eager modules: 7 products, 2 norms of 6, rotation 14, attention
# 1, MLP 2, residuals 2; qk-norms 12 more.
LAYER_LAUNCHES = 38


def trunk_forward(model: Model, tokens: float, pairs: float, element: int = 2) -> Cost:
    """All layers, without the head; ``pairs`` = visible (query, key) pairs, 4 H d FLOPs each."""
    flops = model.layers * (2.0 * model.layer_weights * tokens + 4.0 * pairs * model.heads * model.head_dim)
    # Weights once; activations: each kept tensor is written once and read about twice.
    moved = model.layers * (element * model.layer_weights + 3 * model.kept_per_token(element) * tokens)
    launches = model.layers * (LAYER_LAUNCHES + (12 if model.qk_norm else 0))
    return Cost(flops, moved, launches)


def trunk_backward(
    model: Model, tokens: float, pairs: float, element: int = 2, *, checkpointing: bool = False
) -> Cost:
    """Two products for every one of forward; attention 2.5 times (it forms its scores again).

    With gradient checkpointing, a forward pass more, up to the last tensor that backward needs: the
    product that ends a layer is not repeated.
    """
    forward = trunk_forward(model, tokens, pairs, element)
    attention = model.layers * 4.0 * pairs * model.heads * model.head_dim
    back = Cost(2 * (forward.flops - attention) + 2.5 * attention, 2 * forward.bytes, 2 * forward.launches)
    last = Cost(model.layers * 2.0 * model.intermediate * model.hidden * tokens)
    return back + forward + last.times(-1) if checkpointing else back


def trunk_flops(model: Model, student: float, teacher: float, student_pairs: float, teacher_pairs: float) -> float:
    """FLOPs of both forward passes and the student's backward pass, without the head."""
    passes = trunk_forward(model, student, student_pairs), trunk_backward(model, student, student_pairs)
    return sum(cost.flops for cost in passes) + trunk_forward(model, teacher, teacher_pairs).flops


def activation_memory(model: Model, tokens: float, element: int = 2, *, checkpointing: bool = False) -> float:
    """Bytes that backward finds: all layers' kept tensors, or one layer's and every layer's input."""
    if checkpointing:
        return tokens * (model.layers * model.hidden * element + model.kept_per_token(element))
    return tokens * model.layers * model.kept_per_token(element)


def adamw(parameters: float, *, weight: int = 4, state: int = 8, grad: int = 4) -> tuple[Cost, float]:
    """The update's cost, and the bytes of weights, gradients and states (bytes per parameter)."""
    moved = parameters * (2 * weight + grad + 2 * state)
    if weight < 4 and state >= 12:  # a float32 master: copies of the gradients, and of the weights no reading
        moved += parameters * (2 * 4 - weight)
    return Cost(12.0 * parameters, moved, 4 * math.ceil(parameters / 2**24)), parameters * (weight + grad + state)


# -------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Tokens:
    """What a step computes: tokens through the trunk, visible pairs, rows of the head."""

    student: float
    teacher: float
    student_pairs: float
    teacher_pairs: float
    response: float
    head_rows: float = 0.0  # rows of the head per policy; 0: the response tokens only

    def scaled(self, factor: float) -> Tokens:
        return Tokens(*(factor * value for value in vars(self).values()))


def step(
    model: Model,
    work: Tokens,
    *,
    mode: str = "sampled",
    loss: str = "fastsdpo",
    element: int = 2,
    checkpointing: bool = True,
    weight: int = 4,
    state: int = 8,
    micro_batches: int = 1,
) -> tuple[dict[str, Cost], dict[str, float]]:
    """Cost of one optimizer step by part, and its memory by part.

    Args:
        loss: "fastsdpo", "eager" (logits of ``head_rows`` rows in float32, plain PyTorch), "TRL" (its
            SDPO trainer's, in the logits' own dtype).
        element: bytes of activations and GEMM operands; ``weight``: of a stored parameter and its
            gradient; ``state``: of the optimizer's states per parameter.
        micro_batches: backward passes that the step is cut into (memory falls, launches rise).
    """
    share = 1 / micro_batches
    student = trunk_forward(model, work.student * share, work.student_pairs * share, element)
    teacher = trunk_forward(model, work.teacher * share, work.teacher_pairs * share, element)
    pairs = work.student_pairs * share
    back = trunk_backward(model, work.student * share, pairs, element, checkpointing=checkpointing)
    rows = math.ceil((work.head_rows or work.response) * share)
    vocabulary, hidden = model.vocabulary, model.hidden
    if loss == "fastsdpo":
        loss_from_hidden = LinearLoss(rows, vocabulary, hidden, element)
        head, head_peak = loss_from_hidden.parts(mode), float(loss_from_hidden.peak())
    elif loss == "TRL":
        cells = rows * vocabulary
        head = {
            "products": Cost(8.0 * rows * model.head, 4 * element * (model.head + cells), 4),
            "logits": Cost(20.0 * cells, RIVAL_BYTES_BFLOAT16["TRL SDPO, eager"][mode] * cells, 20),
        }
        head_peak = TRL_LIVE[mode] * element * cells + model.head * float(element)
    elif loss == "eager":
        gemms = Cost(8.0 * rows * model.head, 4 * element * (model.head + rows * vocabulary), 4)
        upcast = Cost(0, 2 * (2 * element + 8) * rows * vocabulary, 4)  # to float32, and back
        head = {"products": gemms}
        head["logits"] = upcast + eager_loss_from_logits(mode, rows, vocabulary)
        # both logits, both float32 log-softmaxes, a float32 gradient and the gradient of the logits
        head_peak = rows * vocabulary * (2 * element + 3 * 4 + element) + model.head * 4.0
    else:
        raise ValueError(f"step: loss must be 'fastsdpo', 'eager' or 'TRL', got {loss!r}")
    optimizer, states = adamw(model.parameters, weight=weight, state=state, grad=weight)
    costs = {
        "student forward": student.times(micro_batches),
        "teacher forward": teacher.times(micro_batches),
        **{f"loss: {name}": cost.times(micro_batches) for name, cost in head.items()},
        "backward": back.times(micro_batches),
        "optimizer": optimizer,
    }
    memory = {
        "weights, gradients, optimizer": states,
        "activations": activation_memory(model, work.student * share, element, checkpointing=checkpointing),
        "loss": head_peak,
    }
    return costs, memory


# ---------------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class GPU:
    """Data-sheet peaks; `gemm`, `attention`, `bandwidth_share` = assumed achieved shares of them."""

    name: str
    flops: float  # dense bf16, float32 accumulation
    bandwidth: float
    memory: float
    link: float  # bytes/s to other GPUs, one direction
    gemm: float = 0.7
    attention: float = 0.5
    bandwidth_share: float = 0.85
    launch: float = 4e-6


GPUS = (
    GPU("H100 SXM 80 GB", 989e12, 3.35e12, 80e9, 450e9),
    GPU("A100 SXM 80 GB", 312e12, 2.04e12, 80e9, 300e9),
    GPU("RTX 4090 24 GB", 165e12, 1.008e12, 24e9, 25e9),
)


def seconds(cost: Cost, gpu: GPU, share: float | None = None) -> float:
    """The slowest of arithmetic, memory and launches: each part is assumed to hide the others."""
    rate = gpu.flops * (share or gpu.gemm)
    return max(cost.flops / rate, cost.bytes / (gpu.bandwidth * gpu.bandwidth_share), cost.launches * gpu.launch)


def step_seconds(costs: dict[str, Cost], gpu: GPU) -> float:
    return sum(seconds(cost, gpu) for cost in costs.values())
