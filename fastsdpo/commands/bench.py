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
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastsdpo import bench, timing
from fastsdpo.commands.options import DONE, add_device_option, run_command
from fastsdpo.commands.parser import Parser
from fastsdpo.ops.backend import describe_backend, usable_device

HEADER = ["from", "shape", "dtype", "loss", "who", "ms", "spread", "times fastsdpo", "peak MiB"]


def make_parser() -> Parser:
    parser = Parser("bench", __doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds")
    add_device_option(parser, "cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the inputs (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=list(bench.MODES),
        default=["sampled", *bench.DIVERGENCES],
        help="the losses to time",
    )
    parser.add_argument(
        "--questions",
        nargs="+",
        choices=["logits", "hidden"],
        default=["logits", "hidden"],
        help="what the losses start from",
    )
    parser.add_argument(
        "--model",
        choices=list(bench.MODELS),
        metavar="NAME",
        help="vocabulary, width and softcap of " + ", ".join(bench.MODELS),
    )
    parser.add_argument("--softcap", type=float, help="of the logits (default: none, or the model's)")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="RIVAL", help="leave out, as in --without torch.compile"
    )
    parser.add_argument("--tokens", type=int, help="rows of the inputs (default: 512, or 8192 on a GPU)")
    parser.add_argument("--vocabulary", type=int, help="columns of the logits (default: 49152, or 151936 on a GPU)")
    parser.add_argument("--hidden", type=int, help="width of the hidden states (default: 576, or 4096 on a GPU)")
    parser.add_argument("--rounds", type=int, help="how often each is timed (default: 5, with --quick 3)")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="writes bench.json and bench.md there")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with the defaults of the device and the model filled in."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("tokens", "vocabulary", "hidden", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.softcap is not None and not args.softcap > 0:
        parser.error(f"--softcap must be above 0, got {args.softcap:g}")
    try:
        gpu = usable_device(args.device).type == "cuda"
    except ValueError as error:
        parser.error(f"--{error}")
    if args.quick:
        defaults = (1024, 32000, 1024) if gpu else (128, 16384, 256)
    else:
        defaults = (8192, 151936, 4096) if gpu else (512, 49152, 576)
    chosen = dict(zip(("tokens", "vocabulary", "hidden"), defaults))
    chosen |= {"rounds": 3 if args.quick else 5, "dtype": "bfloat16" if gpu else "float32"}
    if args.model is not None:
        chosen |= bench.MODELS[args.model]._asdict()
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def lines_of(row: dict[str, Any]) -> list[list[str]]:
    """A line of the table for each rival."""
    case, ours = row["case"], row["rivals"]["fastsdpo"]["median"]
    shape = " x ".join(str(case[size]) for size in ("tokens", "vocabulary", "hidden") if size in case)
    shape += f", softcap {case['softcap']:g}" if "softcap" in case else ""
    return [
        [
            case["question"],
            shape,
            case["dtype"],
            case["mode"],
            who,
            f"{found['median'] * 1e3:.2f}",
            f"{found['fastest'] * 1e3:.2f} to {found['slowest'] * 1e3:.2f}",
            f"{found['median'] / ours:.2f}",
            "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:.0f}",
        ]
        for who, found in row["rivals"].items()
    ]


def page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = (
        f"# fastsdpo bench\n\n{about['device']}; {about['native']}; Python {about['python']}; {versions}; "
        f"{about['date']}.\n\nCommand: `{about['command']}`. Loss and gradients; medians of one interleaved run. "
        "Peaks are above the inputs, gradients included.\n\n"
    )
    text += timing.markdown_table(HEADER, [line for row in rows for line in lines_of(row)])
    left_out = [
        f"- {row['case']['question']} {row['case']['mode']}: {who} left out: {reason}\n"
        for row in rows
        for who, reason in row["left_out"].items()
    ]
    return text + ("\n" + "".join(left_out) if left_out else "")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 done, 1 the device or the output cannot be used, 2 wrong options."""
    return run_command(make_parser(), measure, parse(argv))


def measure(args: argparse.Namespace) -> int:
    """Times everything, prints a line for each loss and the table at the end."""
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)  # before any work is done
    print(describe_backend(torch.device(args.device).type), flush=True)
    about, rows = timing.environment(args.device), []
    for question in args.questions:
        kind = bench.LogitsCase if question == "logits" else bench.HiddenCase
        hidden = args.hidden if question == "hidden" else 0
        case = kind(args.tokens, args.vocabulary, hidden, getattr(torch, args.dtype), args.device, args.softcap)
        for mode in args.modes:
            rows.append(bench.measure(case, mode, rounds=args.rounds, without=args.without))
            ratios = "  ".join(f"{line[4]} {line[7]}x" for line in lines_of(rows[-1])[1:])
            ours = rows[-1]["rivals"]["fastsdpo"]["median"]
            print(f"{question} {case.label} {mode}: fastsdpo {ours * 1e3:.2f} ms; {ratios}", flush=True)
            if args.output is not None:  # after every row: an interrupted run keeps what it has
                text = json.dumps({"environment": about, "rows": rows}, indent=1) + "\n"
                (args.output / "bench.json").write_text(text, encoding="utf-8")
                (args.output / "bench.md").write_text(page(about, rows), encoding="utf-8")
    print("\n" + page(about, rows) if args.output is None else f"written to {args.output}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
