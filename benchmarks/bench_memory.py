"""Peak memory of a loss from hidden states against tokens, vocabulary and width.

    python -m benchmarks.bench_memory --record memory_cpu

One process per point, so that no allocator's cache hides a peak: what is recorded is the rise of the
process's peak resident memory over one loss with its gradients (reverse KL, float32), after a small one
has loaded every library. Of it, the gradients of hidden states and head are the caller's to keep.

    fastsdpo        linear_sdpo_loss
    PyTorch         logits of all tokens, then the loss in plain PyTorch
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks._harness import add_output, environment, record, table
from benchmarks.costmodel import default_chunk, linear_loss_peak
from fastsdpo import bench

BASE = (512, 49152, 576)
POINTS = [
    BASE,
    (1024, 49152, 576),
    (2048, 49152, 576),
    (512, 98304, 576),
    (512, 151936, 576),
    (512, 49152, 1152),
    (512, 49152, 2304),
]


def one(tokens: int, vocabulary: int, hidden: int, who: str) -> dict[str, Any]:
    """The rise of peak resident memory in this process, bytes."""
    small = bench.HiddenCase(8, 128, 16, torch.float32, "cpu")
    small.calls("reverse_kl", bench.plain_loss)[who]()
    case = bench.HiddenCase(tokens, vocabulary, hidden, torch.float32, "cpu")
    call = case.calls("reverse_kl", bench.plain_loss)[who]
    return {"peak_bytes": bench.peak_memory(call)}


def markdown(rows: list[dict[str, Any]]) -> str:
    where = rows[0]["environment"]
    found = {(r["tokens"], r["vocabulary"], r["hidden"], r["who"]): r for r in rows}
    lines = []
    for row in rows:
        shape = row["tokens"], row["vocabulary"], row["hidden"]
        plain = found[(*shape, "PyTorch")]["peak_bytes"]
        predicted = row.get("predicted_bytes")
        lines.append(
            [
                *map(str, shape),
                row["who"],
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['gradient_bytes'] / 2**20:.0f}",
                f"{row['peak_bytes'] / plain:.2f}",
                "" if not predicted else f"{predicted / row['peak_bytes']:.2f}",
            ]
        )
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    commands = sorted({f"{r['environment']['command']} ({r['environment']['commit']})" for r in rows})
    return (
        "# Peak memory of a loss from hidden states, on a CPU\n\n"
        f"{where['device']}; {where['native']}; Python {where['python']}; {versions}. float32, reverse "
        "KL with the gradients of hidden states and head. No GPU was used.\n\nWhat is measured: "
        "`benchmarks/bench_memory.py`. Predicted: `benchmarks/costmodel.py`.\n\n"
        + table(
            [
                "tokens",
                "vocabulary",
                "width",
                "who",
                "peak MiB",
                "of it gradients MiB",
                "peak / PyTorch",
                "predicted / measured",
            ],
            lines,
        )
        + "\n## Commands\n\n"
        + "".join(f"- `{command}`\n" for command in commands)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--point", nargs=4, default=None, help="T V D who: this point alone, as JSON")
    parser.add_argument("--record", default="", help="name of the results file; none is written without")
    parser.add_argument("--points", type=int, default=len(POINTS), help="the first so many only")
    add_output(parser)
    args = parser.parse_args()
    if args.point is not None:
        print(json.dumps(one(*map(int, args.point[:3]), args.point[3])))
        return
    rows = []
    for tokens, vocabulary, hidden in POINTS[: args.points]:
        for who in ("fastsdpo", "PyTorch"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.bench_memory",
                "--point",
                str(tokens),
                str(vocabulary),
                str(hidden),
                who,
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {
                "tokens": tokens,
                "vocabulary": vocabulary,
                "hidden": hidden,
                "who": who,
                "gradient_bytes": 4 * (tokens + vocabulary) * hidden,
                "environment": environment(),
                **json.loads(result.stdout.splitlines()[-1]),
            }
            if who == "fastsdpo":
                chunk = default_chunk(tokens, vocabulary, budget=2**24, least=256)  # of a CPU
                row["predicted_bytes"] = linear_loss_peak(tokens, vocabulary, hidden, operand=4, chunk=chunk)
            rows.append(row)
            print(
                f"{tokens} x {vocabulary} x {hidden} {who}: {row['peak_bytes'] >> 20} MiB",
                flush=True,
            )
    if args.record:
        record(args.record, rows, ("tokens", "vocabulary", "hidden", "who"), markdown, args.output)


if __name__ == "__main__":
    main()
