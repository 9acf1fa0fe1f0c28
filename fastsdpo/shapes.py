"""What the benchmarks measure: losses and the shapes of models. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

from typing import Any, NamedTuple

MODES: dict[str, dict[str, Any]] = {
    "sampled": {"mode": "sampled_token"},
    "forward_kl": {"mode": "full", "alpha": 0.0},
    "reverse_kl": {"mode": "full", "alpha": 1.0},
    "jsd": {"mode": "full", "alpha": 0.5},
    "topk": {"mode": "topk", "alpha": 1.0, "topk": 100},
}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Shape(NamedTuple):
    """Vocabulary, width of the hidden states, softcap of the final logits."""

    vocabulary: int
    hidden: int
    softcap: float | None = None


# From the models' config.json. Gemma-3 has the field for a softcap and leaves it empty.
MODELS = {
    "SmolLM2-135M": Shape(49152, 576),
    "SmolLM2-360M": Shape(49152, 960),
    "SmolLM2-1.7B": Shape(49152, 2048),
    "Qwen3-0.6B": Shape(151936, 1024),
    "Qwen3-4B": Shape(151936, 2560),
    "Qwen3-8B": Shape(151936, 4096),
    "Llama-3-8B": Shape(128256, 4096),
    "Gemma-2-2B": Shape(256000, 2304, 30.0),
    "Gemma-3-1B": Shape(262144, 1152),
    "Gemma-3-4B": Shape(262208, 2560),
    "Gemma-3n-E4B": Shape(262400, 2048, 30.0),
}
