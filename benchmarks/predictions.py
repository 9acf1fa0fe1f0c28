"""Predictions for GPUs by `benchmarks/costmodel.py`: arithmetic, not measurements. Nothing has run on a GPU.

    python -m benchmarks.predictions

Assumed: products run at 0.70 of the data sheet's dense bf16 peak, kernels that move memory at 0.85 of its
bandwidth, a launch costs 4 us, and of arithmetic, memory and launches of one part the slowest counts. A step has 32
interactions with the average lengths of the recorded conversations (`benchmarks/lengths.json`) in 8 backward passes,
bf16 weights, gradients and activations, 8-bit optimizer states and gradient checkpointing; padded steps have batches
of 4, and TRL's responses are padded to the expected longest of 4.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.costmodel import (
    GPUS,
    QWEN3_8B,
    LinearLoss,
    Model,
    Tokens,
    activation_memory,
    default_chunk,
    step,
    step_seconds,
)
from benchmarks.lengths import LENGTHS
from fastsdpo.timing import markdown_table

# ------------------------------------------------------------------------- memory of a process on a CPU

# Python, torch, transformers and the tokenizer before anything is allocated: an assumption, the one
# figure here that is neither a shape nor a count.
LIBRARIES = 0.45 * 2**30


def process_peak(model: Model, variant: str, sizes: dict[str, Any]) -> tuple[float, float]:
    """Resident bytes of a process of `benchmarks.bench_sharing` (float32) before its step, and what the step adds.

    ``sizes`` are those that it records of the step's interactions. Before: weights, gradients
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
    loss = LinearLoss(rows, vocabulary, hidden, operand=element, chunk=chunk).peak()
    return before, kept + cached * (tokens + sizes["teacher"]) + loss


# ----------------------------------------------------------------------------------------- prediction


def recorded_tokens(template: str, interactions: float) -> dict[str, Tokens]:
    """A step over that many average interactions of benchmarks/lengths.json, by sharing."""
    counts = json.loads(LENGTHS.read_text())["templates"][template]
    share = interactions / counts["interactions"]
    response = counts["response_tokens"]
    found = {}
    for level, c in counts["sharing"].items():
        found[level] = Tokens(
            c["student_tokens"], c["teacher_tokens"], c["student_pairs"], c["teacher_pairs"], response
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
    longest = expected_longest(histogram, json.loads(LENGTHS.read_text())["bin"], 4)
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
    loss = LinearLoss(responses, model.vocabulary, model.hidden, frozen_head=lora).peak()
    if not setup.checkpointing:
        return states + model.layers * kept + loss
    inputs = student * model.layers * model.hidden * 2
    keys_values = student * model.layers * 4 * model.kv_heads * model.head_dim
    gradients = 2 * student * (3 * model.intermediate + 2 * model.hidden)
    layer = kept + gradients + (0 if lora else 2 * model.head)
    return states + inputs + max(loss, keys_values, layer)


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
INTERACTIONS = 32


def setups_table() -> str:
    """Peak GB of each process that trains on a full pack, by options and processes (FSDP2)."""
    work = recorded_tokens("think", INTERACTIONS)["conversation"]
    share = PACK / (work.student + work.teacher)
    student, responses = work.student * share, round(work.response * share)
    lines = []
    for setup in SETUPS:
        line = [f"`{setup.options}`" if setup.options[0] == "-" else setup.options, f"{setup.bytes_per_weight}"]
        for processes in (1, 2, 4, 8):
            peak = setup_peak(QWEN3_8B, setup, student, responses, processes)
            line.append(f"{peak / 1e9:.1f}" + (" (fits 80)" if peak < 0.95 * 80e9 else ""))
        lines.append(line)
    header = ["options", "bytes per weight", "GB, 1 process", "GB, 2", "GB, 4", "GB, 8"]
    return markdown_table(header, lines)


def steps_table(template: str) -> str:
    """Arithmetic, peak memory and seconds of a whole step with the sampled-token loss."""
    lines = []
    for name, (work, loss) in variants(template, INTERACTIONS).items():
        costs, memory = step(QWEN3_8B, work, loss=loss, **SETUP)
        peak = sum(memory.values())
        line = [name, f"{sum(c.flops for c in costs.values()) / 1e15:.2f}", f"{peak / 1e9:.1f}"]
        for gpu in GPUS:
            line.append(f"{step_seconds(costs, gpu):.2f}" + ("" if peak < 0.95 * gpu.memory else " (does not fit)"))
        lines.append(line)
    return markdown_table(["what is computed", "PFLOP", "peak GB", *(f"s on {gpu.name}" for gpu in GPUS)], lines)


def main() -> None:
    print(f"{(__doc__ or '').strip()}\n\n{QWEN3_8B.name}, memory by options of `fastsdpo train`:\n")
    print(setups_table())
    for template in ("smollm2", "think"):
        print(f"A step of {QWEN3_8B.name}, sampled-token loss, template {template}:\n\n{steps_table(template)}")


if __name__ == "__main__":
    main()
