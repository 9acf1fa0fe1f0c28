"""Losses at the shapes of real models: vocabulary, width and softcap by name.

    python -m benchmarks.bench_models

From logits for every model, from hidden states for those whose head a CPU gets through in reasonable time. Few
tokens: ratios of losses from logits hardly depend on their number; those from hidden states favour many tokens,
since the head's gradient is written once however many there are.
"""

from __future__ import annotations

import torch

from benchmarks import harness, losses
from fastsdpo.bench import MODELS, HiddenCase, LogitsCase


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__, seconds=6.0)
    parser.size("tokens", 128, 4)
    logits = ["SmolLM2-135M", "Qwen3-8B", "Llama-3-8B", "Gemma-2-2B"]
    parser.size("logits", logits, logits[-1:], str, nargs="*", choices=list(MODELS))
    parser.size("hidden", ["Qwen3-0.6B"], [], str, nargs="*", choices=list(MODELS))
    losses.add_arguments(parser)
    parser.set_defaults(modes=["reverse_kl"])
    args = parser.parse_args(argv)
    for kind, models in ((LogitsCase, args.logits), (HiddenCase, args.hidden)):
        for model in models:
            shape = MODELS[model]
            width = shape.hidden if kind is HiddenCase else 0
            dtype = getattr(torch, args.dtype)
            case = kind(args.tokens, shape.vocabulary, width, dtype, args.device, shape.softcap)
            losses.measure_modes("models", case, args, "fastsdpo", model=model)


if __name__ == "__main__":
    main()
