"""The losses of ms-swift and axolotl as installed, beside ours in their place: time and peak memory.

    PYTHONPATH=build/peers/swift python -m benchmarks.bench_peers --peer swift
    PYTHONPATH=build/peers/axolotl python -m benchmarks.bench_peers --peer axolotl

`make peers` makes these folders. Forward and backward from hidden states, the products with the head in it. ``swift``:
its `gkd_loss` over the logits of both models at the tokens that count. ``axolotl``: its chunked top-k loss (its code,
not compiled) over all tokens, of which those that count are half; with the head trained, and frozen as under LoRA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from fastsdpo.integrations.axolotl import KDSettings, kd_loss
from fastsdpo.integrations.swift import GKDSettings, HeadLogits, divergence
from fastsdpo.prefix import HeadParameters

Runs = dict[str, Callable[[], Tensor]]


def step(loss_of: Callable[..., Tensor], *leaves: tuple[Tensor, bool]) -> Callable[[], Tensor]:
    """One forward and backward pass; returns the gradient of the first leaf."""

    def run() -> Tensor:
        given = [leaf.detach().requires_grad_(trained) for leaf, trained in leaves]
        loss_of(*given).backward()
        grad = given[0].grad
        assert grad is not None
        return grad

    return run


def swift_runs(args: argparse.Namespace, beta: float, topk: int | None) -> Runs:
    from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

    hidden = torch.randn(1, args.tokens, args.hidden)
    states = hidden + 0.3 * torch.randn_like(hidden)
    weight = torch.randn(args.vocabulary, args.hidden) * 2.5 / args.hidden**0.5
    labels = torch.zeros(1, args.tokens, dtype=torch.long)

    def theirs(h: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = TeacherOutput(full_logits=states @ w.T, labels=labels)
        teacher = teacher if topk is None else teacher.to_topk(topk)
        total, number = gkd_loss(h @ w.T, teacher, labels, beta, 1.0)
        return total / number

    def ours(h: Tensor, w: Tensor) -> Tensor:
        teacher = HeadLogits(states[0], HeadParameters(w.detach(), None, None, 1.0))
        support = None if topk is None else teacher.topk_logits(topk)
        student = HeadLogits(h[0], HeadParameters(w, None, None, 1.0))
        return divergence(student, teacher, support, GKDSettings(beta, 1.0))[0]

    leaves = (hidden, True), (weight, True)
    return {"ms-swift": step(theirs, *leaves), "ours": step(ours, *leaves)}


def axolotl_runs(args: argparse.Namespace, frozen: bool, normalize: bool) -> Runs:
    from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss

    half = args.tokens // 2
    hidden = torch.randn(1, args.tokens, args.hidden)
    weight = torch.randn(args.vocabulary, args.hidden) * 2.5 / args.hidden**0.5
    labels = torch.randint(args.vocabulary, (1, args.tokens))
    labels[:, :half] = -100
    ids = torch.stack([torch.randperm(args.vocabulary)[: args.topk] for _ in range(args.tokens)])[None]
    logprobs = torch.randn(1, args.tokens, args.topk).log_softmax(-1)
    mask = (labels != -100)[..., None].expand(ids.shape).int()
    settings = KDSettings(0.9, 0.1, 1.0, 0.0, normalize)
    loss = LigerFusedLinearKLTopKLogprobLoss(0.1, 0.9, 1.0, 0.0, compiled=False, normalize_topk=normalize)

    def theirs(h: Tensor, w: Tensor) -> Tensor:
        return loss(w, h, ids, logprobs, mask, true_labels=labels) / half

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return kd_loss(h, HeadParameters(w, None, None, 1.0), labels, ids, logprobs, mask, settings) / half

    leaves = (hidden, True), (weight, not frozen)
    return {"axolotl": step(theirs, *leaves), "ours": step(ours, *leaves)}


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__, rounds=3)
    parser.add_argument("--peer", choices=("swift", "axolotl"), required=True)
    parser.size("tokens", 256, 16)
    parser.size("vocabulary", 49152, 512)
    parser.size("hidden", 576, 32)
    parser.size("topk", 20, 4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    size: dict[str, Any] = {"tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden}
    cases: dict[str, Runs] = {}
    if args.peer == "swift":
        for name, beta, topk in (("forward", 0.0, None), ("jsd", 0.5, None), ("reverse", 1.0, None)):
            cases[name] = swift_runs(args, beta, topk)
        cases["top-k, forward"] = swift_runs(args, 0.0, args.topk)
    else:
        for frozen in (False, True):
            for normalize in (True, False):
                name = f"{'normalized' if normalize else 'as it is'}, head {'frozen' if frozen else 'trained'}"
                cases[name] = axolotl_runs(args, frozen, normalize)
    rows = [harness.compare({"peer": args.peer, "loss": name, **size}, runs, args) for name, runs in cases.items()]
    harness.record(harness.results_file("peers", args), rows)


if __name__ == "__main__":
    main()
