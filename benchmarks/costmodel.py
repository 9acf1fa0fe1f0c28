"""Cost of a training step from shapes alone: FLOPs, bytes, kernel launches, peak memory; and time on a GPU.

    python benchmarks/costmodel.py                 # predictions for Qwen3-8B, as Markdown on stdout
    python benchmarks/costmodel.py --results costmodel_predictions_2026-11-28

The formulas stand in the docstrings below. `tests/benchmarks/test_costmodel.py` holds them against what
can be counted or measured without a GPU: FLOPs of torch's FlopCounterMode, bytes of every operator of the
eager losses and of TRL's and Liger's, tensors that autograd saves, and the recorded peaks of processes
(bench_memory, bench_sharing); `test_traffic.py` holds them against the loads and stores of the Triton
kernels. What they say about a GPU is a **prediction**: nothing of it has been measured on one.

Conventions: a product of (m, k) and (k, n) is 2 m k n FLOPs. Bytes are what kernels read plus write in
device memory if nothing stays in a cache between two kernels. GB = 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent

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
LAUNCHES = {
    "log_ratio": 2,
    "sampled": 3,
    "forward_kl": 3,
    "reverse_kl": 3,
    "jsd": 4,
    "topk": 4,
}

# Bytes per (token, word) of plain PyTorch, forward + backward, as operators read and write float32:
# the two log-softmaxes (2 reads, 2 writes), the loss's own operators and their backward. Counted from
# `plain_loss` of bench_logits.py, operator by operator.
EAGER_FLOAT32 = {"sampled": 48, "forward_kl": 80, "reverse_kl": 104, "jsd": 276}
EAGER_LAUNCHES = {"sampled": 14, "forward_kl": 12, "reverse_kl": 14, "jsd": 32}


# The same for bf16 logits as published code spends them, forward + backward, by mode; read from the
# sources: TRL 1.16.0 (its SDPO trainer), Liger-Kernel 0.8.5 (`liger_jsd`), Fast-LLM's entropy loss.
RIVAL_BYTES_BFLOAT16 = {
    "TRL SDPO, eager": {"sampled": 36, "forward_kl": 52, "reverse_kl": 64, "jsd": 170},
    "Liger JSD from logits": {"forward_kl": 78, "reverse_kl": 78, "jsd": 78},
    "Fast-LLM": {"forward_kl": 10, "reverse_kl": 10},
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
    """The same in plain PyTorch on float32 logits (the definition in bench_logits.py)."""
    cells = tokens * vocabulary
    return Cost(20.0 * cells, EAGER_FLOAT32[mode] * cells, EAGER_LAUNCHES[mode])


# -------------------------------------------------------------------------- losses from hidden states


@dataclass(frozen=True)
class LinearRival:
    """How an implementation spends one loss from hidden states.

    By mode: ``gemms`` of T x V x D; ``bytes_per_cell``, moved per (token, word) between the GEMMs;
    ``tile_bytes_per_cell``, held at the peak per cell of a tile of ``chunk`` tokens (and
    ``vocabulary_chunk`` words). ``weight_copies`` of V x D float32 gradients are held at once.
    """

    name: str
    gemms: dict[str, int]
    bytes_per_cell: dict[str, float]
    chunk: int | None
    tile_bytes_per_cell: dict[str, float]
    weight_copies: float
    vocabulary_chunk: int | None = None


def default_chunk(tokens: int, vocabulary: int, *, budget: int = 2**26, least: int = 1024) -> int:
    """The library's own chunk on a GPU (tested to be), without importing it."""
    chunk = max(least, budget // vocabulary // 64 * 64)
    if tokens <= chunk:
        return max(1, tokens)
    return min(chunk, math.ceil(tokens / math.ceil(tokens / chunk) / 8) * 8)


def gradient_chunks(tokens: int, chunk: int) -> int:
    """Chunks whose gradients wait for one dHidden and one dWeight, as the library's (tested to be)."""
    return max(1, min(math.ceil(tokens / chunk), 4096 // chunk))


def linear_gemms(*, gradients: bool = True, frozen_head: bool = False) -> int:
    """Products of T x V x D: student, teacher, dHidden, dWeight."""
    return 2 + (gradients) + (gradients and not frozen_head)


def linear_loss(
    mode: str,
    tokens: int,
    vocabulary: int,
    hidden: int,
    *,
    operand: int = 2,
    tile: int = 4,
    gradients: bool = True,
    frozen_head: bool = False,
    chunk: int | None = None,
) -> dict[str, Cost]:
    """`linear_sdpo_loss` by kind of kernel: the GEMMs with what they read and write, and the loss's own.

    Per chunk of n tokens: logits of both (reads 2nD + VD operands, writes 2nV of ``tile`` bytes) and the
    fused kernel on the tiles; per chunk, or where a trained head's gradient has a tile of its own per 4096
    tokens, dHidden (reads nV + VD operands) and dWeight (reads nV + nD operands, reads and writes VD
    float32). So dWeight moves 8 VD bytes for 2 n V D FLOPs: it takes n of about 1000 on an H100 until
    arithmetic is its limit, whatever V and D are.
    """
    chunk = chunk or default_chunk(tokens, vocabulary)
    parts = dict.fromkeys(("logits", "loss kernel", "dHidden", "dWeight"), Cost())
    reads, again, _ = PASSES[mode]
    for start in range(0, tokens, chunk):
        n = min(chunk, tokens - start)
        cells, head = n * vocabulary, vocabulary * hidden
        gemm = 2.0 * cells * hidden
        made = {
            "logits": Cost(2 * gemm, operand * (2 * n * hidden + head) + 2 * tile * cells, 1),
            "loss kernel": Cost(4.0 * cells, reads * tile * cells, LAUNCHES[mode] - 1),
        }
        if gradients:
            written = operand * cells
            moved = (reads + again) * tile * cells + written
            made["loss kernel"] = Cost(8.0 * cells, moved, LAUNCHES[mode])
        for name, cost in made.items():
            parts[name] = parts[name] + cost
    if gradients:
        waits = operand != tile and not frozen_head
        step = chunk * (gradient_chunks(tokens, chunk) if waits else 1)
        for start in range(0, tokens, step):
            n = min(step, tokens - start)
            cells, head = n * vocabulary, vocabulary * hidden
            gemm = 2.0 * cells * hidden
            parts["dHidden"] += Cost(gemm, operand * (cells + head + n * hidden), 1)
            if not frozen_head:
                parts["dWeight"] += Cost(gemm, operand * (cells + n * hidden) + 8 * head, 1)
    return parts


def total(parts: dict[str, Cost]) -> Cost:
    return sum(parts.values(), Cost())


def linear_loss_peak(
    tokens: int,
    vocabulary: int,
    hidden: int,
    *,
    operand: int = 2,
    tile: int = 4,
    gradients: bool = True,
    frozen_head: bool = False,
    chunk: int | None = None,
) -> int:
    """Bytes above the inputs at the peak: two tiles, the gradient tile, and the gradients.

    The head's gradient accumulates in float32; backward writes it once more in the dtype of a head of half
    precision, when the tiles are free again.
    """
    chunk = min(chunk or default_chunk(tokens, vocabulary), tokens)
    total = 2 * chunk * vocabulary * tile
    if gradients:
        waiting = 1 if frozen_head else gradient_chunks(tokens, chunk)
        wide = min(waiting * chunk, tokens)
        total += wide * vocabulary * operand if operand != tile else 0
        if not frozen_head:
            total = max(total, vocabulary * hidden * operand if operand != 4 else 0)
            total += 4 * vocabulary * hidden
        total += tokens * hidden * operand
    return total


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


KL = ("forward_kl", "reverse_kl", "jsd")
# Per cell in bf16, from hidden states. Liger-Kernel 0.8.5: counted and held alive as its operators run
# one by one (its default compiles them, which spares some). TRL 1.16.0: its kernels for CUDA and their
# buffers, read from the source; only its products can be counted here.
RIVALS = (
    LinearRival(
        "TRL chunked divergence",
        {"forward_kl": 6, "reverse_kl": 6, "jsd": 8},
        {"forward_kl": 46, "reverse_kl": 46, "jsd": 62},
        4096,
        dict.fromkeys(KL, 2 * 4 + 2),
        1.0,
        32768,
    ),
    LinearRival(
        "Liger chunked JSD",
        dict.fromkeys(KL, 4),
        {"forward_kl": 57, "reverse_kl": 69, "jsd": 179},
        1024,
        {"forward_kl": 16, "reverse_kl": 18, "jsd": 36},
        2.0,
    ),
)


def rival_linear_loss(
    rival: LinearRival, mode: str, tokens: int, vocabulary: int, hidden: int, operand: int = 2
) -> tuple[dict[str, Cost], int]:
    """A rival's cost by kind of kernel, and peak bytes above its inputs, with a trainable head."""
    cells, head = tokens * vocabulary, vocabulary * hidden
    gemms = rival.gemms[mode]
    chunks = math.ceil(tokens / (rival.chunk or tokens))
    product = 2.0 * cells * hidden
    parts = {
        "products but dWeight": Cost(product * (gemms - 1), chunks * head * operand * (gemms - 1)),
        "dWeight": Cost(product, chunks * 8 * head, chunks),
        "loss kernels": Cost(20.0 * cells, rival.bytes_per_cell[mode] * cells, 20 * chunks),
    }
    tile = min(rival.chunk or tokens, tokens) * min(rival.vocabulary_chunk or vocabulary, vocabulary)
    peak = tile * rival.tile_bytes_per_cell[mode] + head * (4 * rival.weight_copies + operand)
    return parts, int(peak + tokens * hidden * 4)


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
QWEN3_4B = Model("Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151936, True, True)
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


def activation_memory(model: Model, tokens: float, element: int = 2, *, checkpointing: bool = False) -> float:
    """Bytes that backward finds: all layers' kept tensors, or one layer's and every layer's input."""
    if checkpointing:
        return tokens * (model.layers * model.hidden * element + model.kept_per_token(element))
    return tokens * model.layers * model.kept_per_token(element)


def adamw(parameters: float, *, weight: int = 4, state: int = 8, grad: int = 4) -> tuple[Cost, float]:
    """The update's cost, and the bytes of weights, gradients and states (bytes per parameter)."""
    moved = parameters * (2 * weight + grad + 2 * state)
    return Cost(12.0 * parameters, moved, 10), parameters * (weight + grad + state)


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
            SDPO trainer's, in the logits' own dtype) or a name in `RIVALS`.
        element: bytes of activations and GEMM operands; ``weight``: of a stored parameter and its
            gradient; ``state``: of the optimizer's states per parameter.
        micro_batches: backward passes that the step is cut into (memory falls, launches rise).
    """
    share = 1 / micro_batches
    student = trunk_forward(model, work.student * share, work.student_pairs * share, element)
    teacher = trunk_forward(model, work.teacher * share, work.teacher_pairs * share, element)
    back = trunk_backward(
        model,
        work.student * share,
        work.student_pairs * share,
        element,
        checkpointing=checkpointing,
    )
    rows = math.ceil((work.head_rows or work.response) * share)
    vocabulary, hidden = model.vocabulary, model.hidden
    if loss == "fastsdpo":
        head = linear_loss(mode, rows, vocabulary, hidden, operand=element)
        head_peak = float(linear_loss_peak(rows, vocabulary, hidden, operand=element))
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
        rival = next(r for r in RIVALS if r.name == loss)
        head, peak = rival_linear_loss(rival, mode, rows, vocabulary, hidden, element)
        head_peak = float(peak)
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


# ------------------------------------------------------------------------- memory of a process on a CPU

# Python, torch, transformers and the tokenizer before anything is allocated: an assumption, the one
# figure here that is neither a shape nor a count.
LIBRARIES = 0.45 * 2**30


def process_peak(model: Model, variant: str, sizes: dict[str, Any]) -> tuple[float, float]:
    """Resident bytes of bench_sharing's process (float32) before its step, and what the step adds.

    ``sizes`` are those that bench_sharing records of the step's interactions. Before: weights, gradients
    and Adam's two states. Padded steps: the batch that needs most; its activations, with keys and
    values repeated to the query heads, and a float32 mask of all pairs that every layer's attention
    keeps; the logits of every position (TRL: of the response), their gradient, and the log-softmax
    of the response's and its gradient.
    """
    element = 4
    before = 16.0 * model.parameters + LIBRARIES
    vocabulary, hidden = model.vocabulary, model.hidden

    def padded(batch: list[int]) -> float:
        count, prompt, _, response = batch
        length = prompt + response
        repeated = 2 * (model.heads - model.kv_heads) * model.head_dim * element
        kept = activation_memory(model, count * length, element)
        kept += model.layers * (count * length * repeated + count * length**2 * element)
        rows = count * response * vocabulary * element
        if variant.startswith("trl"):  # logits, their copy over the temperature, log-softmax, gradient
            return kept + 4 * rows
        return kept + count * length * vocabulary * element + 2 * rows

    if variant in ("official", "trl-sdpo", "trl-sdft"):
        return before, max(map(padded, sizes["batches"]))
    student, _, response = sizes["longest"]
    if variant in ("unpadded", "response-logits"):  # one interaction at a time
        rows = student if variant == "unpadded" else response
        logits = (rows + 2 * response) * vocabulary * element
        return before, activation_memory(model, student, element) + logits
    tokens, rows = (student, response)
    if variant in ("conversation", "checkpointed"):
        tokens, rows = sizes["student"], sizes["response"]
    kept = activation_memory(model, tokens, element, checkpointing=variant == "checkpointed")
    cached = 2 * model.layers * model.kv_heads * model.head_dim * element
    chunk = default_chunk(rows, vocabulary, budget=2**24, least=256)
    loss = linear_loss_peak(rows, vocabulary, hidden, operand=element, chunk=chunk)
    return before, kept + cached * (tokens + sizes["teacher"]) + loss


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
    return max(
        cost.flops / rate,
        cost.bytes / (gpu.bandwidth * gpu.bandwidth_share),
        cost.launches * gpu.launch,
    )


def step_seconds(costs: dict[str, Cost], gpu: GPU) -> float:
    return sum(seconds(cost, gpu) for cost in costs.values())


LINK_SHARE = 0.7  # of a link's bandwidth
HIDDEN_SHARE = 0.5  # of the computation, behind which an exchange can hide


def fsdp_seconds(
    model: Model, costs: dict[str, Cost], gpu: GPU, processes: int, micro_batches: int, element: int
) -> float:
    """A step over ``processes`` with the weights sharded (FSDP2); each process has the given work.

    Every micro-batch gathers the weights for forward and for backward; the gradients are scattered
    after the last: (2 micro_batches + 1) P (n - 1) / n elements a process.
    """
    compute = step_seconds(costs, gpu)
    moved = (2 * micro_batches + 1) * model.parameters * element * (processes - 1) / processes
    exchange = moved / (gpu.link * LINK_SHARE)
    return compute + max(0.0, exchange - HIDDEN_SHARE * compute)


# ----------------------------------------------------------------------------------------- prediction


def recorded_tokens(template: str, interactions: float) -> dict[str, Tokens]:
    """A step over that many average interactions of benchmarks/lengths.json, by sharing."""
    counts = json.loads((HERE / "lengths.json").read_text())["templates"][template]
    share = interactions / counts["interactions"]
    response = counts["response_tokens"]
    found = {}
    for level, c in counts["sharing"].items():
        found[level] = Tokens(
            c["student_tokens"],
            c["teacher_tokens"],
            c["student_pairs"],
            c["teacher_pairs"],
            response,
        ).scaled(share)
    off = counts["sharing"]["off"]
    waste = counts["padded_tokens_batch_4"] / (off["student_tokens"] + off["teacher_tokens"])
    padded = Tokens(
        off["student_tokens"] * waste,
        off["teacher_tokens"] * waste,
        off["student_pairs"] * waste**2,
        off["teacher_pairs"] * waste**2,
        response,
        off["student_tokens"] * waste,
    )
    histogram = counts["histograms"]["completion"]
    longest = expected_longest(histogram, json.loads((HERE / "lengths.json").read_text())["bin"], 4)
    trl = replace(padded, head_rows=longest * counts["interactions"])
    return {"padded": padded.scaled(share), "TRL": trl.scaled(share), **found}


def expected_longest(histogram: dict[str, int], width: int, draws: int) -> float:
    """Expected largest of ``draws`` values of a histogram, each taken in the middle of its bin."""
    every, below, expected = sum(histogram.values()), 0, 0.0
    for edge, count in histogram.items():
        share = ((below + count) / every) ** draws - (below / every) ** draws
        expected += share * (int(edge) + width / 2)
        below += count
    return expected


def markdown(model: Model = QWEN3_8B, interactions: int = 32) -> str:
    """The predictions, with every assumption they rest on."""
    from benchmarks._harness import table

    out = [
        "# Predicted cost of a step on GPUs\n",
        "**Predictions, not measurements: nothing of this has run on a GPU.** Made by "
        "`python benchmarks/costmodel.py` from the shapes of the models and the lengths in "
        "`benchmarks/lengths.json`; what of it is checked against counts and measurements on a CPU "
        "stands in `tests/benchmarks/test_costmodel.py`.\n",
        "Assumptions: products run at 0.70 of the data sheet's dense bf16 peak, kernels that move "
        "memory at 0.85 of its bandwidth, a launch costs 4 us, and of arithmetic, memory and launches "
        "of one part the slowest counts; batches of "
        f"{interactions} interactions with the average lengths of the recorded conversations in 8 "
        "backward passes, with the bf16 weights and gradients, 8-bit optimizer states and gradient "
        f"checkpointing of `fastsdpo train ... {COMMAND}` (not of the defaults: see the table of "
        "set-ups); bf16 activations; padded steps in batches of 4, TRL's responses padded to the "
        "expected longest of 4. Peaks assumed: "
        + "; ".join(
            f"{g.name} {g.flops / 1e12:.0f} TFLOP/s, {g.bandwidth / 1e12:.2f} TB/s, "
            f"{g.link / 1e9:.0f} GB/s to its neighbours"
            for g in GPUS
        )
        + ".\n",
    ]
    out += _prediction_setups(model, table)
    out += _prediction_whole_step(model, interactions, table)
    out += _prediction_losses(table)
    out += _prediction_scaling(model, interactions, table)
    return "\n".join(out)


# bf16 weights and gradients, two 8-bit states: the last but two of SETUPS.
SETUP: dict[str, Any] = {"weight": 2, "state": 2, "micro_batches": 8}
COMMAND = "--gradient-checkpointing --set optim=adamw_torch_8bit"


class Setup(NamedTuple):
    """What options of `fastsdpo train` on a GPU make of a bf16 checkpoint."""

    options: str
    bytes_per_weight: int  # weights, gradients, states
    checkpointing: bool
    rank: int = 0


SETUPS = (
    Setup("(defaults: float32 master)", 16, False),
    Setup("--gradient-checkpointing", 16, True),
    Setup("--gradient-checkpointing --set weight_update=stochastic_rounding", 12, True),
    Setup(COMMAND, 6, True),
    Setup("--lora 16", 2, False, 16),
    Setup("--lora 16 --gradient-checkpointing", 2, True, 16),
)


def setup_peak(model: Model, setup: Setup, student: float, responses: int, processes: int = 1) -> float:
    """Peak bytes of a process: what is always there, activations, and the most that comes on top.

    Args:
        student: the student's tokens in the pass; ``responses``: the answers'.
        processes: over which FSDP2 shards weights, gradients and states.
    """
    lora = setup.rank > 0
    states = model.parameters * setup.bytes_per_weight + 16.0 * model.adapter(setup.rank)
    states /= processes
    if processes > 1:  # the embedding, the head and two layers are whole while they are used
        states += 2.0 * (2 * model.head + 2 * model.layer_weights)
    kept = student * model.kept_per_token(2, lora=lora)
    loss = linear_loss_peak(responses, model.vocabulary, model.hidden, frozen_head=lora)
    if not setup.checkpointing:
        return states + model.layers * kept + loss
    inputs = student * model.layers * model.hidden * 2
    keys_values = student * model.layers * 4 * model.kv_heads * model.head_dim
    gradients = 2 * student * (3 * model.intermediate + 2 * model.hidden)
    layer = kept + gradients + (0 if lora else 2 * model.head)
    return states + inputs + max(loss, keys_values, layer)


SCALED = (
    "TRL's SDPO: padded, logits at response positions",
    "sharing per conversation",
)


def variants(template: str, interactions: float) -> dict[str, tuple[Tokens, str]]:
    work = recorded_tokens(template, interactions)
    alone = work["off"]
    every = replace(alone, head_rows=alone.student)
    return {
        "published step: padded, logits everywhere": (work["padded"], "eager"),
        "TRL's SDPO: padded, logits at response positions": (work["TRL"], "TRL"),
        "unpadded": (every, "eager"),
        "logits at response tokens": (alone, "eager"),
        "fused loss": (alone, "fastsdpo"),
        "sharing per interaction": (work["interaction"], "fastsdpo"),
        "sharing per conversation": (work["conversation"], "fastsdpo"),
    }


PACK = 16384  # SDPOConfig.max_tokens_per_pack


def _prediction_setups(model: Model, table: Any) -> list[str]:
    work = recorded_tokens("think", 32)["conversation"]
    share = PACK / (work.student + work.teacher)
    student, responses = work.student * share, round(work.response * share)
    lines = []
    for setup in SETUPS:
        line = [f"`{setup.options}`" if setup.options[0] == "-" else setup.options]
        line.append(f"{setup.bytes_per_weight}")
        for processes in (1, 2, 4, 8):
            peak = setup_peak(model, setup, student, responses, processes)
            line.append(f"{peak / 1e9:.1f}" + (" (80 GB: yes)" if peak < 0.95 * 80e9 else ""))
        lines.append(line)
    return [
        f"## {model.name}, memory by options of `fastsdpo train`\n",
        f"Predicted peak GB of each process while it trains on a full pack of {PACK} tokens (the "
        f"default limit; {student:.0f} of the student, {responses} of them answers), alone or with the "
        'weights sharded (FSDP2); "80 GB: yes" where 5% are left. `fastsdpo train --dry-run` prints '
        "the same for a model and its data. `adamw_torch_8bit` is torchao's, with stochastic "
        "rounding.\n",
        table(
            ["options", "bytes per weight", *(f"GB, {n} process{'es'[: 2 * (n > 1)]}" for n in (1, 2, 4, 8))],
            lines,
        ),
    ]


def _prediction_whole_step(model: Model, interactions: int, table: Any) -> list[str]:
    out = []
    for template in ("smollm2", "think"):
        lines = []
        for name, (work, loss) in variants(template, interactions).items():
            costs, memory = step(model, work, loss=loss, **SETUP)
            flops = sum(c.flops for c in costs.values())
            peak = sum(memory.values())
            line = [name, f"{flops / 1e15:.2f}", f"{peak / 1e9:.1f}"]
            for gpu in GPUS:
                fits = "" if peak < 0.95 * gpu.memory else " (does not fit)"
                line.append(f"{step_seconds(costs, gpu):.2f}{fits}")
            lines.append(line)
        out += [
            f"## {model.name}, whole step, sampled-token loss, template {template}\n",
            f"With `{COMMAND}`, a batch of {interactions} in 8 passes.\n",
            table(["what is computed", "PFLOP", "peak GB", *(f"s on {g.name}" for g in GPUS)], lines),
        ]
    return out


def _prediction_losses(table: Any) -> list[str]:
    tokens, vocabulary, hidden = 8192, 151936, 4096
    logits = []
    cells = tokens * vocabulary
    for mode in EAGER_LAUNCHES | {"topk": 0}:
        everyone = {"fastsdpo": loss_from_logits(mode, tokens, vocabulary, 2)}
        for name, by_mode in RIVAL_BYTES_BFLOAT16.items():
            if mode in by_mode:
                everyone[name] = Cost(20.0 * cells, by_mode[mode] * cells, 20)
        for name, cost in everyone.items():
            line = [mode, name, f"{cost.bytes / cells:.0f}", f"{cost.bytes / 1e9:.0f}"]
            logits.append(line + [f"{seconds(cost, g) * 1e3:.1f}" for g in GPUS])
    linear = []
    for mode in ("sampled", *KL, "topk"):
        parts = linear_loss(mode, tokens, vocabulary, hidden)
        rows = [("fastsdpo", parts, linear_loss_peak(tokens, vocabulary, hidden))]
        for rival in RIVALS:
            if mode in rival.gemms:
                rows.append((rival.name, *rival_linear_loss(rival, mode, tokens, vocabulary, hidden)))
        for name, parts, peak in rows:
            # Every kind of kernel waits for the one before it; inside one, arithmetic hides memory.
            times = [step_seconds(parts, gpu) for gpu in GPUS]
            linear.append(
                [mode, name, f"{total(parts).flops / 1e12:.0f}", f"{total(parts).bytes / 1e9:.0f}"]
                + [f"{peak / 1e9:.2f}"]
                + [f"{time * 1e3:.0f}" for time in times]
            )
    names = [f"ms on {g.name}" for g in GPUS]
    size = f"T = {tokens}, V = {vocabulary}"
    return [
        f"## Losses from bf16 logits, forward and backward, {size}\n",
        table(["loss", "who", "bytes per token and word", "GB", *names], logits),
        f"## Losses from hidden states with a trainable head, {size}, D = {hidden}\n",
        "GEMMs and the kernels between them one after the other; rivals in their default chunks, Liger's "
        "operators one by one (compiled, its default, they move less). "
        "Peak: above the inputs, gradients included (the head's gradient alone is 2.5 GB in float32). "
        "The four bare products alone would take "
        + ", ".join(f"{8 * tokens * vocabulary * hidden / g.flops / g.gemm * 1e3:.0f}" for g in GPUS)
        + " ms.\n",
        table(["loss", "who", "TFLOP", "GB", "peak GB", *names], linear),
    ]


def _prediction_scaling(model: Model, interactions: int, table: Any) -> list[str]:
    # The embedding, the head and two layers are whole on every process while they are used.
    gathered = 2 * (2 * model.head + 2 * model.layer_weights)
    lines = []
    everyone = variants("think", interactions)
    for name in SCALED:
        work, loss = everyone[name]
        costs, memory = step(model, work, loss=loss, **SETUP)
        for gpu in GPUS:
            alone = step_seconds(costs, gpu)
            for processes in (1, 2, 4, 8):
                time = fsdp_seconds(model, costs, gpu, processes, SETUP["micro_batches"], 2)
                peak = memory["weights, gradients, optimizer"] / processes
                peak += memory["activations"] + memory["loss"] + (gathered if processes > 1 else 0)
                fits = "yes" if peak < 0.95 * gpu.memory else "no"
                lines.append(
                    [
                        name,
                        gpu.name,
                        str(processes),
                        f"{processes * interactions / time:.1f}",
                        f"{alone / time:.2f}",
                        f"{peak / 1e9:.1f}",
                        fits,
                    ]
                )
    return [
        f"## {model.name}, sharded over processes (FSDP2), {interactions} interactions a process\n",
        f"Template think, options `{COMMAND}`. Every one of the 8 backward passes gathers the "
        f"weights twice, gradients are scattered once; {LINK_SHARE} of the link's bandwidth, hidden "
        f"behind {HIDDEN_SHARE} of the computation. Processes are assumed to have equal work.\n",
        table(["what is computed", "GPU", "processes", "interactions/s", "efficiency", "peak GB each", "fits"], lines),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", help="name of the results file; stdout without it")
    parser.add_argument("--output", type=Path, default=HERE / "results", metavar="FOLDER")
    args = parser.parse_args()
    text = markdown()
    if args.results:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{args.results}.md").write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
