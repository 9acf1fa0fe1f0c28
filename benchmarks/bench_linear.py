"""Losses from hidden states on the CPU: `linear_sdpo_loss` against its bare GEMMs and against rivals.

    python benchmarks/bench_linear.py --tokens 512 --vocabulary 49152 --hidden 576

Every rival computes a token-mean loss (hidden states and head in float32, or ``--dtype bfloat16``) and,
for a "step", its gradients with respect to the student's hidden states and the head that student and
teacher share:

    fastsdpo         fastsdpo.linear_sdpo_loss and backward
    bare GEMMs       the 4 products of T x V x D (2 without gradients) in fastsdpo's own chunks, into
                     buffers that exist already: no loss, no allocation; what the step cannot beat
    TRL              trl.kernels: ChunkedDivergenceFunction (KL, JSD), ChunkedLogProbFunction twice
                     (sampled token); their CPU path
    CCE              cut_cross_entropy, where installed (sampled token): log-probabilities of the targets,
                     twice; its kernels need a GPU, so this is its own torch.compile variant
    Liger            LigerFusedLinearJSDLoss, soft loss only, eager (KL, JSD)
    Liger compiled   the same with compiled=True, its default
    eager            logits of all tokens, then the plain PyTorch loss (float32 log-softmaxes)
    torch.compile    the same function, compiled with Inductor

A "score" is the loss alone, under no_grad (Liger forms its gradients in forward, so it has none).
GFLOP/s are 2 T V D for each of the 4 (or 2) products a step needs, over the time: products that a
rival computes twice do not count for it.

The C library gives back what is freed and takes it anew, page by page; of fastsdpo's memory the tiles
stay, the head's gradient does not. ``--keep-pages`` keeps everybody's, as the allocators do that
PyTorch's tuning guide recommends for CPUs; peaks are then not measured.

``--bf16-products`` lets oneDNN round the operands of float32 products to bfloat16
(``torch.backends.mkldnn.matmul.fp32_precision = "bf16"``): on a CPU with matrix units much faster. Where
the operands are bfloat16 already it changes nothing in fastsdpo's logits. The errors are those against
float64 on the same (rounded) inputs, of 24 tokens with D = 64, where the teacher is near the student.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastsdpo
from benchmarks._harness import (
    Rival,
    add_output,
    environment,
    gemm_flops,
    interleave,
    record,
    table,
)
from benchmarks.bench_logits import keep_pages, plain_loss
from fastsdpo.ops.head import default_chunk_size
from fastsdpo.testing import oracle_sdpo_loss

MODES = {"sampled": None, "forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5, "topk": 1.0}
TOPK = 100
RIVALS = ["fastsdpo", "bare GEMMs", "TRL", "CCE", "Liger", "Liger compiled", "eager", "torch.compile"]


def options(mode: str) -> dict[str, Any]:
    """The keyword arguments of `linear_sdpo_loss` for one of `MODES`."""
    if mode == "sampled":
        return {"mode": "sampled_token"}
    if mode == "topk":
        return {"mode": "topk", "alpha": 1.0, "topk": TOPK}
    return {"mode": "full", "alpha": MODES[mode]}


def plain_topk_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Reverse KL over the student's top k tokens and one bucket for the rest."""
    s, t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    ids = student.detach().topk(TOPK, -1).indices

    def classes(log_probs: Tensor) -> Tensor:
        chosen = log_probs.gather(-1, ids)
        rest = (-chosen.exp().sum(-1, keepdim=True)).clamp(min=-1 + 1e-7).log1p()
        return torch.cat([chosen, rest], -1)

    s, t = classes(s), classes(t)
    return (s.exp() * (s - t)).sum(-1).mean()


class Case:
    """Hidden states of a student and of a teacher near it, and a head with logits of unit scale."""

    def __init__(self, tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)
        student = torch.randn(tokens, hidden, generator=g)
        self.teacher = (student + 0.1 * torch.randn(tokens, hidden, generator=g)).to(dtype)
        self.student = student.to(dtype)
        weight = torch.randn(vocabulary, hidden, generator=g).mul_(2.5 / math.sqrt(hidden))
        self.weight = weight.to(dtype)
        self.target_ids = torch.randint(vocabulary, (tokens,), generator=g)
        self.gemm = 2 * tokens * vocabulary * hidden  # FLOPs of one product


def bare_gemms(case: Case, with_gradients: bool) -> Callable[[], None]:
    (tokens, hidden), vocabulary = case.student.shape, case.weight.shape[0]
    chunk = default_chunk_size(tokens, vocabulary, case.student.device)
    both = torch.cat([case.student[:chunk], case.teacher[:chunk]])
    tile = both.new_zeros(len(both), vocabulary)
    grad_hidden, grad_weight = both.new_zeros(chunk, hidden), both.new_zeros(vocabulary, hidden)

    def run() -> None:
        for start in range(0, tokens, chunk):
            n = min(chunk, tokens - start)
            torch.mm(both[: 2 * n], case.weight.t(), out=tile[: 2 * n])
            if with_gradients:
                torch.mm(tile[:n], case.weight, out=grad_hidden[:n])
                torch.addmm(grad_weight, tile[:n].t(), both[:n], out=grad_weight, beta=0)

    return run


def losses(case: Case, mode: str, names: list[str]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each rival's ``loss(student_hidden, weight)``."""
    teacher, ids = case.teacher, case.target_ids
    alpha = MODES[mode]

    def ours(student: Tensor, weight: Tensor) -> Tensor:
        return fastsdpo.linear_sdpo_loss(student, teacher, weight, ids, **options(mode)).loss

    def eager(student: Tensor, weight: Tensor) -> Tensor:
        student_logits = student @ weight.t()
        with torch.no_grad():
            teacher_logits = teacher @ weight.t()
        if mode == "topk":
            return plain_topk_loss(student_logits, teacher_logits)
        return plain_loss(mode, student_logits, teacher_logits, ids)

    def trl(student: Tensor, weight: Tensor) -> Tensor:
        if mode == "sampled":
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction

            def logps(hidden: Tensor) -> Tensor:
                # 32768 words at a time, as its divergence; the last argument: log-probabilities only
                return ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, ())[0]

            with torch.no_grad():
                teacher_logps = logps(teacher)
            student_logps = logps(student)
            return (-(teacher_logps - student_logps).detach() * student_logps).mean()
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight.detach(), None, alpha)[0].mean()

    def cce(student: Tensor, weight: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        def logps(hidden: Tensor) -> Tensor:
            return -linear_cross_entropy(hidden, weight, ids, reduction="none", impl="torch_compile")

        with torch.no_grad():
            teacher_logps = logps(teacher)
        student_logps = logps(student)
        return (-(teacher_logps - student_logps).detach() * student_logps).mean()

    def liger(compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # Its default chunk of 1024 tokens was its fastest of 128, 256 and 1024 here.
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=alpha, compiled=compiled)
        return lambda student, weight: loss(student, weight, teacher, weight.detach(), ids)

    everyone: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"fastsdpo": ours}
    if mode != "topk":
        everyone["TRL"] = trl
    if mode == "sampled" and importlib.util.find_spec("cut_cross_entropy"):
        everyone["CCE"] = cce
    if mode in ("forward_kl", "reverse_kl", "jsd"):
        everyone["Liger"] = liger(False)
        everyone["Liger compiled"] = liger(True)
    everyone["eager"] = eager
    everyone["torch.compile"] = torch.compile(eager, dynamic=False)
    return {name: loss for name, loss in everyone.items() if name in names}


def step(case: Case, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    student = case.student.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_()
    value = loss(student, weight)
    return value.detach(), *torch.autograd.grad(value, (student, weight))


def check(mode: str, vocabulary: int, dtype: torch.dtype, limit: float, names: list[str]) -> dict[str, list[float]]:
    """Errors of loss and both gradients of every rival against float64, on 24 tokens and D = 64."""
    case = Case(24, vocabulary, 64, dtype)
    student, weight = case.student.double(), case.weight.double()
    z, z_teacher = student @ weight.t(), case.teacher.double() @ weight.t()
    arguments = options(mode)
    if mode == "topk":
        arguments["topk_ids"] = z.topk(TOPK, -1).indices
    want = oracle_sdpo_loss(z, z_teacher, case.target_ids, **arguments)
    gradients = (want.grad @ weight, want.grad.t() @ student)
    found = {}
    for name, loss in losses(case, mode, names).items():
        value, *got = step(case, loss)
        errors = [abs(float(value) / float(want.loss) - 1)]
        errors += [float((g - w).norm() / w.norm()) for g, w in zip(got, gradients)]
        found[name] = errors
        if not max(errors) < limit:
            raise SystemExit(f"bench_linear: {mode}: {name} is wrong: {errors}")
        text = ", ".join(f"{error:.0e}" for error in errors)
        print(f"  {name:15s} off by {text} (loss, hidden gradient, head gradient)", flush=True)
    return found


def calls(case: Case, mode: str, what: str, names: list[str]) -> list[Rival]:
    found = []
    if "bare GEMMs" in names:
        found.append(Rival("bare GEMMs", bare_gemms(case, what == "step")))
    for name, loss in losses(case, mode, names).items():
        if what == "step":
            found.append(Rival(name, lambda loss=loss: step(case, loss)))
        elif not name.startswith("Liger"):

            def score(loss=loss) -> None:
                with torch.no_grad():
                    loss(case.student, case.weight)

            found.append(Rival(name, score))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    lines, commands = [], []
    ratios: dict[str, list[float]] = {}
    for row in rows:
        bare, ours = row["rivals"]["bare GEMMs"]["median"], row["rivals"]["fastsdpo"]["median"]
        shape = f"{row['tokens']} x {row['vocabulary']} x {row['hidden']}"
        if row.get("dtype", "float32") != "float32":
            shape = f"{row['dtype']} {shape}"
        if row.get("bf16_products"):
            shape += ", bf16 products"
        if row.get("pages_kept"):
            shape += ", pages kept"
        for name, timing in row["rivals"].items():
            gemms = 4 if row["what"] == "step" else 2
            peak, seconds = timing["peak_bytes"], timing["median"]
            lines.append(
                [
                    shape,
                    row["what"],
                    row["mode"],
                    name,
                    f"{seconds:.2f}",
                    f"{timing['fastest']:.2f}",
                    f"{timing['slowest']:.2f}",
                    f"{seconds / bare:.2f}",
                    f"{seconds / ours:.2f}",
                    f"{gemms * row['gemm'] / seconds / 1e9:.0f}",
                    "" if peak is None else f"{peak / 2**20:.0f}",
                    " ".join(f"{error:.0e}" for error in row.get("errors", {}).get(name, [])),
                ]
            )
            if row["what"] == "step" and name != "fastsdpo":
                ratios.setdefault(name, []).append(seconds / ours)
        commands.append(
            f"- {shape} {row['what']} {row['mode']}: "
            f"`{row['environment']['command']}` at {row['environment']['commit']}, "
            f"{row['rounds']} rounds; square GEMM {row['gemm_flops'] / 1e9:.0f} GFLOP/s"
        )
    summary = [
        [name, str(len(values)), f"{min(values):.2f}", f"{statistics.median(values):.2f}", f"{max(values):.2f}"]
        for name, values in ratios.items()
    ]
    first = rows[0]["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    header = [
        "T x V x D",
        "what",
        "loss",
        "who",
        "s",
        "fastest",
        "slowest",
        "times bare GEMMs",
        "times fastsdpo",
        "useful GFLOP/s",
        "peak MiB above start",
        "error of loss, both gradients",
    ]
    return (
        "# Losses from hidden states on a CPU\n\n"
        f"{first['device']}; {first['native']}; Python {first['python']}; {versions}. float32 where "
        "nothing else is said. "
        "No GPU was used.\n\n"
        "Rivals and method: `benchmarks/bench_linear.py`. One interleaved run per case, all rivals "
        "in one process. Seconds and ratios are medians of the rounds.\n\n"
        "## Steps: time of a rival over fastsdpo's\n\n"
        + table(["who", "cases", "least", "median", "most"], summary)
        + "\n## All\n\n"
        + table(header, lines)
        + "\n## Commands\n\n"
        + "\n".join(commands)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--what", nargs="+", choices=["step", "score"], default=["step"])
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--bf16-products", action="store_true", help="float32 products may round their operands to bfloat16"
    )
    parser.add_argument("--keep-pages", action="store_true", help="an allocator that gives no memory back")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", help="name of the results files; none are written without it")
    add_output(parser)
    args = parser.parse_args()

    if args.keep_pages:
        keep_pages()
    if args.bf16_products:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    dtype = getattr(torch, args.dtype)
    flops = gemm_flops()
    print(f"square GEMM {flops / 1e9:.0f} GFLOP/s")
    for mode in args.modes:
        print(f"{mode}: correctness")
        rounded = args.bf16_products or dtype == torch.bfloat16
        limit = 0.5 if rounded else 1e-3  # how far off they are then is a result
        errors = check(mode, args.vocabulary, dtype, limit, args.rivals)
        case = Case(args.tokens, args.vocabulary, args.hidden, dtype)
        for what in args.what:
            timings = interleave(calls(case, mode, what, args.rivals), args.rounds)
            if args.keep_pages:
                timings = {who: replace(timing, peak_bytes=None) for who, timing in timings.items()}
            for name, timing in timings.items():
                print(
                    f"  {what} {name:15s} {timing.median:7.2f} s ({timing.fastest:.2f} to "
                    f"{timing.slowest:.2f}), {timing.median / timings['bare GEMMs'].median:.2f}x "
                    f"bare, peak {(timing.peak_bytes or 0) / 2**20:.0f} MiB",
                    flush=True,
                )
            row = {
                "tokens": args.tokens,
                "vocabulary": args.vocabulary,
                "hidden": args.hidden,
                "what": what,
                "mode": mode,
                "dtype": args.dtype,
                "bf16_products": args.bf16_products,
                "pages_kept": args.keep_pages,
                "errors": errors,
                "rounds": args.rounds,
                "gemm": case.gemm,
                "gemm_flops": flops,
                "rivals": {name: vars(timing) for name, timing in timings.items()},
                "environment": environment(),
            }
            if args.results:
                keys = ("tokens", "vocabulary", "hidden", "what", "mode", "dtype", "bf16_products", "pages_kept")
                record(args.results, [row], keys, markdown, args.output)


if __name__ == "__main__":
    main()
