"""``fastsdpo bench``: a table of the losses on this machine beside plain PyTorch.

    fastsdpo bench --quick                        # about a minute
    fastsdpo bench --model Qwen3-8B --tokens 256  # vocabulary, width and softcap of a model
    fastsdpo bench --device cuda --output bench   # JSON and the table in bench/ too

Each loss is timed with its gradients, from two logits tensors (``logits``) and from hidden states and the head
(``hidden``), in turns with plain PyTorch, `torch.compile` of it and, where it is installed, Liger. A rival is
checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastsdpo.commands.options import add_device_option
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.running import run_command
from fastsdpo.shapes import DIVERGENCES, MODELS, MODES


def make_parser() -> Parser:
    parser = Parser("bench", __doc__)
    parser.add_argument("--quick", action="store_true", help="Small shapes, three rounds.")
    add_device_option(parser)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="The type of the inputs. Default: bfloat16 on a GPU, float32 on a CPU.",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=list(MODES), default=["sampled", *DIVERGENCES], help="The losses to time."
    )
    parser.add_argument(
        "--questions",
        nargs="+",
        choices=["logits", "hidden"],
        default=["logits", "hidden"],
        help="What the losses start from.",
    )
    parser.add_argument(
        "--model",
        choices=list(MODELS),
        metavar="NAME",
        help=f"Take vocabulary, width and softcap of {', '.join(MODELS)}.",
    )
    parser.add_argument("--softcap", type=float, help="The softcap of the logits. Default: none, or the model's.")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="RIVAL", help="Rivals to leave out, such as torch.compile."
    )
    parser.add_argument(
        "--tokens", type=int, help="Rows of the inputs. Default: 512, or 8192 on a GPU; with --quick 128 or 1024."
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        help="Columns of the logits. Default: 49152, or 151936 on a GPU; with --quick 16384 or 32000.",
    )
    parser.add_argument(
        "--hidden",
        type=int,
        help="Width of the hidden states. Default: 576, or 4096 on a GPU; with --quick 256 or 1024.",
    )
    parser.add_argument("--rounds", type=int, help="How often each is timed. Default: 5, with --quick 3.")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="Write bench.json and bench.md into this folder."
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 done, 1 the device or the output cannot be used, 2 wrong options."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    return run_command(parser, start, args)


def check(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the command where a size is none."""
    for name in ("tokens", "vocabulary", "hidden", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.hidden is not None and "hidden" not in args.questions:
        parser.error("--hidden needs --questions hidden")
    if args.softcap is not None and not args.softcap > 0:
        parser.error(f"--softcap must be above 0, got {args.softcap:g}")


def start(args: argparse.Namespace) -> int:
    """Fills in the defaults of the device and the model, and measures."""
    from fastsdpo.commands.bench_run import measure
    from fastsdpo.ops.backend import usable_device

    gpu = usable_device(args.device).type == "cuda"
    args.device = args.device or ("cuda" if gpu else "cpu")
    if args.quick:
        defaults = (1024, 32000, 1024) if gpu else (128, 16384, 256)
    else:
        defaults = (8192, 151936, 4096) if gpu else (512, 49152, 576)
    chosen = dict(zip(("tokens", "vocabulary", "hidden"), defaults))
    chosen |= {"rounds": 3 if args.quick else 5, "dtype": "bfloat16" if gpu else "float32"}
    if args.model is not None:
        chosen |= MODELS[args.model]._asdict()
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
