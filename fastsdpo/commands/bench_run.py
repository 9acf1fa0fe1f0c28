"""`fastsdpo bench`, in order: each loss beside its rivals, and the table."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from fastsdpo import bench, timing
from fastsdpo.commands.running import DONE
from fastsdpo.ops.backend import describe_backend

HEADER = ["from", "shape", "dtype", "loss", "who", "ms", "spread", "times fastsdpo", "peak MiB"]


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


def measure(args: argparse.Namespace) -> int:
    """Times everything, prints a line for each loss and the table at the end."""
    rivals = [name for name in {**bench.FROM_LOGITS, **bench.FROM_HIDDEN} if name != "fastsdpo"]
    for name in set(args.without) - set(rivals):
        raise ValueError(f"--without must be of {', '.join(rivals)}, got {name!r}")
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
