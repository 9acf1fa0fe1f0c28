"""Losses from logits: time, processor time and memory of loss and gradient beside what people run today.

    python -m benchmarks.bench_logits --tokens 512 --vocabulary 49152 --dtype float32

Rivals: `fastsdpo.bench` and `benchmarks/losses.py`. Those that allocate tensors of the logits' size spend much of
their time in page faults, because glibc gives such memory back at once. ``--keep-pages`` makes it keep them, as
the allocators do that PyTorch's tuning guide recommends for CPUs: both are recorded. Peaks are then not measured.
"""

from __future__ import annotations

import torch

from benchmarks import harness, losses
from fastsdpo.bench import LogitsCase


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__, rounds=5, seconds=15.0)
    parser.size("tokens", 512, 32)
    parser.size("vocabulary", 49152, 8192)
    losses.add_arguments(parser)
    args = parser.parse_args(argv)
    case = LogitsCase(args.tokens, args.vocabulary, dtype=getattr(torch, args.dtype), device=args.device)
    losses.measure_modes("logits", case, args, "native fused")


if __name__ == "__main__":
    main()
