"""Bytes that the kernels move, counted element by element in Triton's interpreter.

    python -m benchmarks.traffic                       # -> results/traffic.json
    python -m benchmarks.traffic --vocabulary 50257    # print one vocabulary's
    python -m benchmarks.traffic --linear              # the fused kernels of the losses from hidden states

A kernel's loads and stores are counted where they are not masked off, at the size of their element;
"unique" counts each address once for reading and once for writing (a perfect cache). A PyTorch
operation counts its operands once and its results once, views nothing: a lower bound. Figures are per
token and vocabulary element. Liger's kernel runs interpreted like ours.

Nothing here has run on a GPU: this is what the programs ask for, not what a memory bus carried.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

import fastsdpo
from fastsdpo.testing import make_rows, round_interpreted_bfloat16

RESULTS = Path(__file__).parent / "results"
VOCABULARIES = (151936, 50257, 32001)
ROWS, TOPK = 2, 20
# Most bytes per element that our kernels may move in bfloat16, forward and backward, and launches.
BUDGETS = {
    "log-ratio": (4.0, 2),
    "sampled token": (8.1, 3),
    "forward KL": (10.1, 3),
    "reverse KL": (10.1, 3),
    "JSD": (14.1, 4),
    "top-k": (8.5, 3),
}
# Operations that move no bytes, and those that read none.
VIEWS = re.compile(
    "(_unsafe_)?view|expand|transpose|t|permute|slice|select|(un)?squeeze|detach|alias|as_strided|"
    "(new_)?empty(_like|_strided)?|unbind|split"
)
WRITES_ONLY = re.compile("(new_)?zeros(_like)?|fill_|zero_|full(_like)?|ones_like")


class Meter(TorchDispatchMode):
    """Counts interpreted kernels and PyTorch operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel_bytes = self.launches = 0
        self.addresses: dict[str, list[np.ndarray]] = {"read": [], "write": []}
        self.size = 2
        self.torch_bytes: collections.Counter[str] = collections.Counter()

    def access(self, pointer: Any, mask: Any, kind: str) -> None:
        at = np.asarray(pointer.data)
        if mask is not None:
            at = at[np.broadcast_to(np.asarray(mask.data, bool), at.shape)]
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        self.kernel_bytes += at.size * size
        self.addresses[kind].append(at.ravel().astype(np.int64) * 16 + size)

    def unique_bytes(self) -> int:
        found = 0
        for kind in self.addresses.values():
            if kind:
                found += int((np.unique(np.concatenate(kind)) % 16).sum())
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if VIEWS.fullmatch(name) or func.namespace == "fastsdpo":
            return out

        def tensors(tree: Any) -> dict[int, int]:
            leaves = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
            own = lambda t: t.untyped_storage().nbytes() if 0 in t.stride() else t.nbytes  # noqa: E731
            return {id(t): own(t) for t in leaves}

        read = {} if WRITES_ONLY.fullmatch(name) else tensors((args, kwargs or {}))
        if name == "gather":  # reads what it picks
            read = {"picked": 2 * sum(tensors(out).values())}
        self.torch_bytes[name] += sum(read.values()) + sum(tensors(out).values())
        return out

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        builder = interpreter.interpreter_builder
        plain = {
            name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
        }
        launch = interpreter.GridExecutor.__call__

        def load(pointer, mask, *rest):
            self.access(pointer, mask, "read")
            return plain["create_masked_load"](pointer, mask, *rest)

        def store(pointer, value, mask, *rest):
            self.access(pointer, mask, "write")
            return plain["create_masked_store"](pointer, value, mask, *rest)

        def atomic(op, pointer, value, mask, *rest):
            self.access(pointer, mask, "read")
            self.access(pointer, mask, "write")
            return plain["create_atomic_rmw"](op, pointer, value, mask, *rest)

        def counted(executor, *args, **kwargs):
            self.launches += 1
            with _disable_current_modes():  # the interpreter's own copies are not traffic
                return launch(executor, *args, **kwargs)

        builder.create_masked_load = load
        builder.create_masked_store = store
        builder.create_atomic_rmw = atomic
        interpreter.GridExecutor.__call__ = counted
        try:
            yield
        finally:
            for name in plain:
                delattr(builder, name)
            interpreter.GridExecutor.__call__ = launch


def measure(step: Callable[[], Any], elements: int) -> dict[str, Any]:
    """Bytes per element of one forward and backward."""
    meter = Meter()
    with meter.kernels(), meter:
        step()
    most = {n: round(b / elements, 2) for n, b in meter.torch_bytes.most_common(4) if b > elements}
    return {
        "kernels": meter.kernel_bytes / elements,
        "unique": meter.unique_bytes() / elements,
        "torch": sum(meter.torch_bytes.values()) / elements,
        "launches": meter.launches,
        "operations": most,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "sampled token": {},
    "forward KL": {"mode": "full", "alpha": 0.0},
    "reverse KL": {"mode": "full", "alpha": 1.0},
    "JSD": {"mode": "full", "alpha": 0.5},
    "top-k": {"mode": "topk", "alpha": 0.5, "topk": TOPK},
}


def ours(mode: str, rows: Any) -> Callable[[], Any]:
    def step() -> None:
        if mode == "log-ratio":
            fastsdpo.token_log_ratio(rows.student, rows.teacher, rows.target_ids, backend="triton")
            return
        fastsdpo.sdpo_loss(
            rows.student.requires_grad_(),
            rows.teacher,
            rows.target_ids,
            backend="triton",
            weights=rows.weights,
            **OPTIONS[mode],
        ).loss.backward()

    return step


def linear(mode: str, vocabulary: int) -> Callable[[], Any]:
    """`linear_sdpo_loss` on ``ROWS`` tokens of width 16, float32; its kernel runs on tiles of logits."""
    student, teacher = torch.randn(2, ROWS, 16).unbind()
    weight = torch.randn(vocabulary, 16).requires_grad_()
    target_ids = torch.randint(vocabulary, (ROWS,))

    def step() -> None:
        fastsdpo.linear_sdpo_loss(
            student.requires_grad_(), teacher, weight, target_ids, backend="triton", **OPTIONS[mode]
        ).loss.backward()

    return step


def rivals(rows: Any) -> dict[tuple[str, str], Callable[[], Any]]:
    """What a user runs today from the same logits: TRL's eager losses, Liger's JSD kernel after two
    log-softmaxes. (TRL's chunked divergence starts at hidden states and takes its kernels on CUDA only:
    on a CPU it would be its eager path that is counted.)"""
    from liger_kernel.ops.jsd import LigerJSDFunction
    from trl.experimental.sdpo import loss_utils

    found: dict[tuple[str, str], Callable[[], Any]] = {}

    def leaf() -> Tensor:
        return rows.student.detach().requires_grad_()

    def sampled() -> None:
        loss = loss_utils.compute_sampled_token_self_distillation_loss(
            leaf(), rows.teacher, rows.target_ids, distillation_alpha=1.0
        )
        (loss * rows.weights).sum().backward()

    found["sampled token", "TRL SDPO, eager"] = sampled
    for mode, alpha in (("forward KL", 0.0), ("reverse KL", 1.0), ("JSD", 0.5)):

        def eager(alpha: float = alpha) -> None:
            loss = loss_utils.compute_full_logit_self_distillation_loss(leaf(), rows.teacher, distillation_alpha=alpha)
            (loss * rows.weights).sum().backward()

        def liger(alpha: float = alpha) -> None:
            student = torch.log_softmax(leaf().float(), -1)
            with torch.no_grad():
                teacher = torch.log_softmax(rows.teacher.float(), -1)
            LigerJSDFunction.apply(student, teacher, None, alpha, -100).backward()

        found[mode, "TRL SDPO, eager"] = eager
        found[mode, "Liger JSD kernel"] = liger
    return found


def run(vocabulary: int, others: bool) -> list[dict[str, Any]]:
    elements = ROWS * vocabulary

    def draw() -> Any:
        return make_rows((ROWS,), vocabulary, dtype=torch.bfloat16, ignored=0.0)

    found = []
    for mode in BUDGETS:
        cell = measure(ours(mode, draw()), elements)
        found.append({"V": vocabulary, "loss": mode, "by": "fastsdpo", **cell})
    if others:
        for (mode, name), step in rivals(draw()).items():
            try:
                cell = measure(step, elements)
            except Exception as error:  # a rival that the interpreter cannot run is said, not skipped
                cell = {"error": f"{type(error).__name__}: {str(error)[:80]}"}
            found.append({"V": vocabulary, "loss": mode, "by": name, **cell})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--ours", action="store_true", help="without the rivals")
    parser.add_argument("--linear", action="store_true", help="losses from hidden states, ours only")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    round_interpreted_bfloat16()
    np.seterr(all="ignore")  # lanes that the kernels discard
    torch.manual_seed(0)
    sizes = VOCABULARIES if args.vocabulary is None else (args.vocabulary,)
    if args.linear:
        cells = [
            {"V": size, "loss": mode, "by": "fastsdpo, from hidden states", **measure(linear(mode, size), ROWS * size)}
            for size in sizes
            for mode in OPTIONS
        ]
    else:
        cells = [cell for size in sizes for cell in run(size, not args.ours)]
    print(json.dumps(cells))
    if args.vocabulary is None and not args.ours and not args.linear:
        args.output.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(cell) for cell in cells)
        about = json.dumps({"rows": ROWS, "dtype": "bfloat16", "topk": TOPK, "date": str(datetime.date.today())})
        (args.output / "traffic.json").write_text(about[:-1] + ', "cells": [\n' + lines + "\n]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
