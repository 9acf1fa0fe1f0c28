"""The losses at the shapes of real models: vocabulary, width and softcap by name.

    python -m benchmarks.bench_models --record models_cpu

The cases, rivals and checks are `fastsdpo bench`'s (`fastsdpo bench --model NAME` is one row of this);
losses from logits for every model, losses from hidden states for those whose head a CPU gets through in
reasonable time. Few tokens: ratios of losses from logits hardly depend on their number, those from hidden
states favour large numbers (the head's gradient is written once whatever T is).
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from benchmarks._harness import add_output, environment, record, table
from fastsdpo import bench

LOGITS = ["SmolLM2-135M", "Qwen3-8B", "Llama-3-8B", "Gemma-2-2B"]
HIDDEN = ["Qwen3-0.6B"]


def markdown(rows: list[dict[str, Any]]) -> str:
    where = rows[0]["environment"]
    lines = []
    for row in rows:
        ours = row["rivals"]["fastsdpo"]["median"]
        for who, timing in row["rivals"].items():
            peak = timing["peak_bytes"]
            share = bench.share_of_ceiling(row, timing["median"], row["ceilings"])
            lines.append(
                [
                    row["question"],
                    row["model"],
                    row["shape"],
                    f"{row['softcap']:g}" if row["softcap"] else "",
                    row["mode"],
                    who,
                    f"{timing['median'] * 1e3:.0f}",
                    f"{timing['fastest'] * 1e3:.0f} to {timing['slowest'] * 1e3:.0f}",
                    f"{timing['median'] / ours:.2f}",
                    "" if peak is None else f"{peak / row['tensor_bytes']:.2f}",
                    f"{share:.2f}",
                ]
            )
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    commands = sorted({f"{r['environment']['command']} ({r['environment']['commit']})" for r in rows})
    left_out = [
        f"- {row['question']} {row['model']} {row['mode']}: {who} left out: {reason}\n"
        for row in rows
        for who, reason in row["left_out"].items()
    ]
    return (
        "# Losses at the shapes of real models, on a CPU\n\n"
        f"{where['device']}; {where['native']}; Python {where['python']}; {versions}. "
        f"{rows[0]['dtype']}. No GPU was used.\n\nCases and rivals: `benchmarks/bench_models.py`. Shapes "
        "are tokens x vocabulary (x width). Milliseconds are medians of one interleaved run, loss and "
        "gradients. The ceiling is the measured copy of three (T, V) tensors, or four matrix products "
        "at the measured rate. With a softcap (the figure in its column) the rivals from logits get "
        "logits that plain PyTorch caps first.\n\n"
        + table(
            [
                "from",
                "model",
                "shape",
                "softcap",
                "loss",
                "who",
                "ms",
                "spread",
                "times fastsdpo",
                "peak memory / (T, V) tensor",
                "share of the ceiling",
            ],
            lines,
        )
        + ("\n" + "".join(left_out) if left_out else "")
        + "\n## Commands\n\n"
        + "".join(f"- `{command}`\n" for command in commands)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--logits", nargs="*", choices=list(bench.MODELS), default=LOGITS)
    parser.add_argument("--hidden", nargs="*", choices=list(bench.MODELS), default=HIDDEN)
    parser.add_argument("--modes", nargs="+", choices=list(bench.MODES), default=["reverse_kl"])
    parser.add_argument("--hidden-modes", nargs="+", choices=list(bench.MODES), default=["sampled", "reverse_kl"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="more rounds of a case while this has not passed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--without", nargs="+", default=[], metavar="RIVAL")
    parser.add_argument("--record", default="", help="name of the results file; none is written without")
    add_output(parser)
    args = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    dtype = getattr(torch, args.dtype)
    about = environment()
    ceilings = {
        "copy": bench.copy_bandwidth(device=args.device),
        "gemm": bench.gemm_flops(device=args.device, dtype=dtype),
    }
    for question, models, modes in (
        ("logits", args.logits, args.modes),
        ("hidden", args.hidden, args.hidden_modes),
    ):
        for model in models:
            shape = bench.MODELS[model]
            if question == "logits":
                case: Any = bench.LogitsCase(args.tokens, shape.vocabulary, dtype, args.device, shape.softcap)
            else:
                case = bench.HiddenCase(args.tokens, *shape[:2], dtype, args.device, shape.softcap)
            for mode in modes:
                row = bench.measure(case, question, mode, args.rounds, args.device, args.without, args.seconds)
                row |= {"model": model, "ceilings": ceilings, "environment": about}
                ours = row["rivals"]["fastsdpo"]["median"]
                said = "  ".join(f"{who} {timing['median'] / ours:.2f}x" for who, timing in row["rivals"].items())
                print(f"{question} {model} {mode}: {ours * 1e3:.0f} ms; {said}", flush=True)
                for who, reason in row["left_out"].items():
                    print(f"  {who} left out: {reason}", flush=True)
                if args.record:  # after each, so that an interrupted run keeps what it has
                    record(args.record, [row], ("question", "model", "mode", "shape", "dtype"), markdown, args.output)


if __name__ == "__main__":
    main()
