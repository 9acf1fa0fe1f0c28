"""Peak memory of a loss from hidden states against tokens, vocabulary and width.

    python -m benchmarks.bench_memory

One process per point and rival, so that no allocator's cache hides a peak: recorded is the rise of the process's
peak resident memory over one loss with its gradients (reverse KL, float32), after a small one has loaded every
library. The gradients of hidden states and head, which the caller keeps, are in it.
"""

from __future__ import annotations

import json

from benchmarks import costmodel, harness
from fastsdpo.bench import FROM_HIDDEN, HiddenCase
from fastsdpo.timing import peak_memory

POINTS = [
    (512, 49152, 576),
    (1024, 49152, 576),
    (2048, 49152, 576),
    (512, 98304, 576),
    (512, 151936, 576),
    (512, 49152, 1152),
    (512, 49152, 2304),
]
RIVALS = ("fastsdpo", "PyTorch")


def one(tokens: int, vocabulary: int, hidden: int, who: str) -> int | None:
    """The rise of peak resident memory in this process, bytes."""
    for shape in ((8, 128, 16), (tokens, vocabulary, hidden)):
        call = FROM_HIDDEN[who](HiddenCase(*shape), "reverse_kl")
        assert call is not None
        peak = peak_memory(call)
    return peak


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__)
    parser.add_argument("--point", nargs=4, metavar=("T", "V", "D", "WHO"), help="this point alone, as JSON")
    parser.size("points", len(POINTS), 1, help="the first so many only")
    args = parser.parse_args(argv)
    if args.point is not None:
        print(json.dumps(one(*map(int, args.point[:3]), args.point[3])))
        return
    points = [(64, 8192, 64)] if args.quick else POINTS[: args.points]
    for tokens, vocabulary, hidden in points:
        case = {"tokens": tokens, "vocabulary": vocabulary, "hidden": hidden}
        found = {}
        for who in RIVALS:
            point = [*map(str, case.values()), who]
            found[who] = {"peak_bytes": harness.in_child("bench_memory", "--point", *point)}
            print(f"{' '.join(point)}: {found[who]['peak_bytes'] >> 20} MiB", flush=True)
        chunk = costmodel.default_chunk(tokens, vocabulary, budget=2**24, least=256)  # of a CPU
        predicted = costmodel.LinearLoss(tokens, vocabulary, hidden, operand=4, chunk=chunk).peak()
        row = {"case": case, "rivals": found, "predicted_bytes": predicted}
        row["gradient_bytes"] = 4 * (tokens + vocabulary) * hidden
        harness.record(harness.results_file("memory", args), [row])


if __name__ == "__main__":
    main()
