"""Losses from logits on the CPU: the native kernels against what people run today.

    python benchmarks/bench_logits.py --tokens 512 --vocabulary 49152 --dtype float32

Every rival computes a token-mean loss and its gradient with respect to the student's logits:

    native fused     fastsdpo's backend function that forms loss and gradient in one visit of a row,
                     in place (what the losses from hidden states call)
    native           fastsdpo.sdpo_loss(backend="native", inplace_grad=True) and backward
    reference        fastsdpo.sdpo_loss(backend="reference", inplace_grad=True) and backward
    torch.compile    the plain PyTorch loss (float32 log-softmaxes) compiled with Inductor
    TRL              the functions of trl.experimental.sdpo.loss_utils, eager
    Liger            LigerFusedLinearJSDFunction.distillation_loss_fn on the logits (divergences only)

Bytes: "streamed" counts every pass over a logits tensor (`STREAMED`; the fused form keeps a row's
exponentials beside it, in a scratch that stays in the cache and is not counted); "compulsory" counts both
inputs and the gradient once (3). Both are set against a measured copy (read plus write).

Rivals allocate tensors of the logits' size, and glibc gives such memory back at once: much of their time is
page faults. `--keep-pages` has it keep them, as the allocators do that PyTorch's tuning guide recommends for
CPUs. It asks more of us, so both are recorded; peaks are then not measured, as no memory is given back.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastsdpo
from benchmarks._harness import (
    Rival,
    add_output,
    copy_bandwidth,
    environment,
    gemm_flops,
    interleave,
    record,
    table,
)
from fastsdpo.bench import MODES, liger_loss, plain_loss, trl_loss
from fastsdpo.ops import rows
from fastsdpo.ops.rows import LossOptions, Tokens

STREAMED = {
    "native": {"sampled": 4, "forward_kl": 5, "reverse_kl": 5, "jsd": 5},
    "native fused": {"sampled": 3, "forward_kl": 3, "reverse_kl": 5, "jsd": 3},
}
# (T, V) tensors of the student's dtype that a rival holds at its peak beyond its inputs, rounded up;
# used only to leave out what would not fit.
TEMPORARIES = {"sampled": 6, "forward_kl": 8, "reverse_kl": 8, "jsd": 18}


class Case:
    """The tensors of one measurement; `student` is restored from `original` before each run."""

    def __init__(self, tokens: int, vocabulary: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)
        self.teacher = torch.empty(tokens, vocabulary, dtype=dtype)
        self.original = torch.empty_like(self.teacher)
        for i in range(tokens):  # row by row: no float32 copy of the whole
            row = 2.5 * torch.randn(vocabulary, generator=g)
            self.original[i] = row
            self.teacher[i] = row + 0.3 * torch.randn(vocabulary, generator=g)
        self.student = self.original.clone()
        self.target_ids = torch.randint(vocabulary, (tokens,), generator=g)
        self.weights = torch.full((tokens,), 1 / tokens)

    def restore(self) -> None:
        self.student.copy_(self.original)


def rivals(case: Case, mode: str, names: list[str]) -> dict[str, Callable[[], tuple[Any, Tensor]]]:
    """Each rival's call, which returns ``(loss, gradient)``."""
    student, teacher, ids = case.student, case.teacher, case.target_ids

    def autograd(loss_function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            leaf = student.detach().requires_grad_()
            loss = loss_function(mode, leaf, teacher, ids)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        return run

    def public(backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
        options = {"mode": "sampled_token"}
        if mode != "sampled":
            options = {"mode": "full", "alpha": MODES[mode]}

        def run() -> tuple[Tensor, Tensor]:
            leaf = student.detach().requires_grad_()
            out = fastsdpo.sdpo_loss(leaf, teacher, ids, backend=backend, inplace_grad=True, **options)
            return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

        return run

    def fused() -> tuple[Tensor, Tensor]:
        s, t = student[None], teacher[None]
        options = LossOptions()
        if mode != "sampled":
            options = LossOptions(mode="full", alpha=MODES[mode])
        out = rows.forward(s, t, Tokens(ids, case.weights), options, "native", grad=s)
        return out.per_token @ out.coef, student

    compiled = torch.compile(plain_loss, dynamic=False)
    everyone = {
        "native fused": fused,
        "native": public("native"),
        "reference": public("reference"),
        "torch.compile": autograd(compiled),
        "TRL": autograd(trl_loss),
        "Liger": autograd(liger_loss),
    }
    if mode == "sampled":
        del everyone["Liger"]  # it has no such loss
    return {name: run for name, run in everyone.items() if name in names}


def check(case: Case, mode: str, calls: dict[str, Callable[[], tuple[Any, Tensor]]]) -> None:
    """Every rival against float64 on the case's own first rows, within what its dtype allows."""
    leaf = case.original.double().requires_grad_()
    teacher = case.teacher.double()
    s, t = torch.log_softmax(leaf, -1), torch.log_softmax(teacher, -1)
    if mode == "sampled":
        pick = case.target_ids[:, None]
        loss = (-(t.gather(1, pick) - s.gather(1, pick)).detach() * s.gather(1, pick)).mean()
    else:
        alpha = MODES[mode]
        p, q = s.exp(), t.exp()
        m = ((1 - alpha) * p + alpha * q).log()
        terms = {0.0: q * (t - s), 1.0: p * (s - t)}.get(alpha, (1 - alpha) * p * (s - m) + alpha * q * (t - m))
        loss = terms.sum(-1).mean()
    (grad,) = torch.autograd.grad(loss, leaf)
    # Rounded once: small gradients lie among float16's subnormal numbers.
    rounded = grad.to(case.student.dtype).double()
    exact = loss.item()
    for name, call in calls.items():
        case.restore()
        got_loss, got_grad = call()
        # TRL and Liger take log-softmaxes in the logits' own dtype.
        loose = case.student.dtype != torch.float32 and name in ("TRL", "Liger")
        loss_error = abs(float(got_loss) - exact) / abs(exact)
        grad_error = float((got_grad.double() - rounded).norm() / grad.norm())
        limit = {torch.float32: 1e-4}.get(case.student.dtype, 5e-3)
        if not loose and (loss_error > limit or grad_error > limit):
            raise SystemExit(f"{mode}: {name} is wrong: loss {loss_error:.1e}, gradient {grad_error:.1e}")
        print(f"  {name:14s} loss off {loss_error:.1e}, gradient off {grad_error:.1e} of its norm")


def markdown(rows: list[dict[str, Any]]) -> str:
    lines, commands = [], []
    for row in rows:
        base = row["rivals"].get("native fused", row["rivals"].get("native"))
        for name, timing in row["rivals"].items():
            cells = [
                row["dtype"],
                f"{row['tokens']} x {row['vocabulary']}",
                row["mode"],
                name,
                f"{timing['median'] * 1e3:.0f}",
                f"{timing['fastest'] * 1e3:.0f} to {timing['slowest'] * 1e3:.0f}",
                f"{timing['median'] / base['median']:.2f}",
                f"{timing['cpu'] / base['cpu']:.2f}",
            ]
            peak = timing["peak_bytes"]
            cells.append("" if peak is None else f"{peak / row['tensor_bytes']:.2f}")
            copied = row["tensor_bytes"] / timing["median"] / row["copy_bandwidth"]
            ours = STREAMED.get(name)
            cells += [f"{passes * copied:.2f}" for passes in (ours[row["mode"]], 3)] if ours else ["", ""]
            lines.append(cells)
        commands += [
            f"- {row['dtype']} {row['tokens']} x {row['vocabulary']} {row['mode']}: "
            f"`{row['environment']['command']}` at {row['environment']['commit']}; "
            f"copy {row['copy_bandwidth'] / 1e9:.1f} GB/s, GEMM {row['gemm_flops'] / 1e9:.0f} GFLOP/s"
            + (f"; not run: {row['left_out']}" if row["left_out"] else "")
        ]
    first = rows[0]["environment"]
    kept = ", memory kept by the allocator" if rows[0].get("pages_kept") else ""
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    header = [
        "dtype",
        "T x V",
        "loss",
        "who",
        "ms",
        "spread",
        "times native fused",
        "the same in CPU time",
        "peak memory / (T x V)",
        "streamed / copy",
        "compulsory / copy",
    ]
    return (
        f"# Losses from logits, forward and backward, on a CPU{kept}\n\n"
        f"{first['device']}; {first['native']}; Python {first['python']}; {versions}. "
        "No GPU was used.\n\n"
        "Rivals, byte counts and method: `benchmarks/bench_logits.py`. Milliseconds are the median "
        "of the rounds of one interleaved run, all rivals in one process.\n\n"
        + table(header, lines)
        + "\n## Commands\n\n"
        + "\n".join(commands)
        + "\n"
    )


def keep_pages() -> None:
    """From here on this process's allocator gives no memory back."""
    trim_threshold, mmap_max = -1, -4  # names of <malloc.h>
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(trim_threshold, -1) and mallopt(mmap_max, 0)):
        raise SystemExit("--keep-pages: this allocator has no such setting")


def available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--rivals", nargs="+", default=None, help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="more rounds of a loss while this has not passed")
    parser.add_argument("--keep-pages", action="store_true", help="an allocator that gives no memory back")
    parser.add_argument("--results", help="name of the results files; none are written without it")
    add_output(parser)
    args = parser.parse_args()

    if args.keep_pages:
        keep_pages()
    dtype = getattr(torch, args.dtype)
    names = args.rivals or ["native fused", "native", "reference", "torch.compile", "TRL", "Liger"]
    bandwidth, flops = copy_bandwidth(), gemm_flops()
    print(f"copy {bandwidth / 1e9:.1f} GB/s, GEMM {flops / 1e9:.0f} GFLOP/s")
    rows = []
    for mode in args.modes:
        small = Case(16, args.vocabulary, dtype)
        print(f"{mode}: correctness on 16 rows")
        check(small, mode, rivals(small, mode, names))
        case = Case(args.tokens, args.vocabulary, dtype)
        tensor_bytes = case.student.numel() * case.student.element_size()
        calls = rivals(case, mode, names)
        left_out = []
        wanted = TEMPORARIES[mode] * case.student.numel() * 4
        if wanted > 0.8 * available_memory():
            heavy = [name for name in calls if not name.startswith("native")]
            left_out = [name for name in heavy if name != "torch.compile"]
            for name in left_out:
                del calls[name]
        timings = interleave(
            [Rival(name, call, case.restore) for name, call in calls.items()],
            args.rounds,
            least_seconds=args.seconds,
        )
        if args.keep_pages:
            timings = {who: replace(timing, peak_bytes=None) for who, timing in timings.items()}
        for name, timing in timings.items():
            print(
                f"  {name:14s} {timing.median * 1e3:9.1f} ms "
                f"({timing.fastest * 1e3:.1f} to {timing.slowest * 1e3:.1f}), "
                f"{timing.median / next(iter(timings.values())).median:.2f}x, CPU time "
                f"{timing.cpu / next(iter(timings.values())).cpu:.2f}x, peak "
                f"{(timing.peak_bytes or 0) / tensor_bytes:.2f} (T, V) tensors",
                flush=True,
            )
        reason = f"{', '.join(left_out)} (need about {wanted / 2**30:.0f} GiB)" if left_out else ""
        rows.append(
            {
                "dtype": args.dtype,
                "tokens": args.tokens,
                "vocabulary": args.vocabulary,
                "mode": mode,
                "tensor_bytes": tensor_bytes,
                "copy_bandwidth": bandwidth,
                "gemm_flops": flops,
                "left_out": reason,
                "pages_kept": args.keep_pages,
                "rivals": {name: vars(timing) for name, timing in timings.items()},
                "environment": environment(),
            }
        )
        if args.results:  # after each mode, so that an interrupted run keeps what it has
            record(args.results, rows, ("dtype", "tokens", "vocabulary", "mode"), markdown, args.output)


if __name__ == "__main__":
    main()
