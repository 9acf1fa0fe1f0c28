"""Losses from hidden states: time, memory and error of loss and gradients beside bare GEMMs and rivals.

    python -m benchmarks.bench_linear --tokens 512 --vocabulary 49152 --hidden 576

Rivals: `fastsdpo.bench` and `benchmarks/losses.py`. ``--bf16-products`` lets oneDNN round the operands of float32
products to bfloat16 (``torch.backends.mkldnn.matmul.fp32_precision = "bf16"``): much faster on a CPU with matrix
units. Where the operands are bfloat16 already, it changes nothing in fastsdpo's logits. ``--keep-pages``: see
`benchmarks/bench_logits.py`.
"""

from __future__ import annotations

import torch

from benchmarks import harness, losses
from fastsdpo.bench import MODES, HiddenCase


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__)
    parser.size("tokens", 512, 64)
    parser.size("vocabulary", 49152, 8192)
    parser.size("hidden", 576, 128)
    losses.add_arguments(parser)
    parser.set_defaults(modes=list(MODES))
    parser.add_argument("--bf16-products", action="store_true", help="float32 products may round their operands")
    args = parser.parse_args(argv)
    if args.bf16_products:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    case = HiddenCase(args.tokens, args.vocabulary, args.hidden, getattr(torch, args.dtype), args.device)
    about = {"bf16_products": True} if args.bf16_products else {}
    losses.measure_modes("linear", case, args, "fastsdpo", **about)


if __name__ == "__main__":
    main()
