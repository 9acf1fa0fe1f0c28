"""Rivals of the losses beyond those of `fastsdpo.bench`, and what the benchmarks of losses share.

From logits:

    native fused     the function that forms loss and gradient in one visit of a row, in place; it is what the
                     losses from hidden states call
    TRL              trl.experimental.sdpo.loss_utils, eager

From hidden states:

    bare GEMMs       the 4 products of T x V x D in fastsdpo's own chunks, into buffers that exist already: no
                     loss, no allocation, a bound that no step can beat
    TRL              trl.kernels: its chunked divergence, and twice its chunked log-probabilities (sampled token)
    Liger            its chunked loss, not compiled (compiled, its default: `fastsdpo.bench`)
    CCE              Apple's cut-cross-entropy (sampled token): log-probabilities of the targets, twice; its kernels
                     need a GPU, elsewhere its own torch.compile variant runs
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from fastsdpo.bench import (
    DIVERGENCES,
    FROM_HIDDEN,
    FROM_LOGITS,
    MODES,
    Call,
    Case,
    HiddenCase,
    LogitsCase,
    capped,
    liger_hidden,
    measure,
)
from fastsdpo.ops import rows
from fastsdpo.ops.head import default_chunk_size
from fastsdpo.ops.rows import LossOptions, RowCall, Tokens
from fastsdpo.timing import copy_bandwidth, gemm_flops


@FROM_LOGITS("native fused")
def native_fused(case: LogitsCase, mode: str) -> Call | None:
    if case.device != "cpu" or mode == "topk" or case.softcap is not None:
        return None
    weights = torch.full((case.tokens,), 1 / case.tokens)
    options = LossOptions() if mode == "sampled" else LossOptions(mode="full", alpha=MODES[mode]["alpha"])

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        student, teacher = case.student[None], case.teacher[None]
        call = RowCall(student, teacher, Tokens(case.target_ids, weights), options, "native")
        out = rows.forward(call, grad=student)
        return out.per_token @ out.coef, (case.student,)

    return run


@FROM_LOGITS("TRL", needs="trl")
def trl_logits(case: LogitsCase, mode: str) -> Call | None:
    from trl.experimental.sdpo import loss_utils

    if mode == "topk":
        return None

    def loss(mode: str, student: Tensor, teacher: Tensor, ids: Tensor, softcap: float | None) -> Tensor:
        student, teacher = capped(student, softcap), capped(teacher, softcap)
        if mode == "sampled":
            function = loss_utils.compute_sampled_token_self_distillation_loss
            return function(student[None], teacher[None], ids[None], distillation_alpha=1.0).mean()
        function = loss_utils.compute_full_logit_self_distillation_loss
        return function(student, teacher, distillation_alpha=MODES[mode]["alpha"]).mean()

    return case.loss_of(loss, mode)


@FROM_HIDDEN("bare GEMMs", bound=True)
def bare_gemms(case: HiddenCase, mode: str) -> Call:
    """The products alone: a bound."""
    (tokens, hidden), vocabulary = case.student.shape, case.weight.shape[0]
    chunk = tokens if case.device != "cpu" else default_chunk_size(tokens, vocabulary, case.student.device)
    both = torch.cat([case.student[:chunk], case.teacher[:chunk]])
    tile = both.new_zeros(len(both), vocabulary)
    grad_hidden, grad_weight = both.new_zeros(chunk, hidden), both.new_zeros(vocabulary, hidden)

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        for start in range(0, tokens, chunk):
            n = min(chunk, tokens - start)
            torch.mm(both[: 2 * n], case.weight.t(), out=tile[: 2 * n])
            torch.mm(tile[:n], case.weight, out=grad_hidden[:n])
            torch.addmm(grad_weight, tile[:n].t(), both[:n], out=grad_weight, beta=0)
        return tile[0, 0], ()

    return run


def sampled_loss(case: HiddenCase, logps_of: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """The sampled token's loss from a function that gives the targets' log-probabilities."""

    def loss(student: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logps = logps_of(case.teacher, case.weight)
        logps = logps_of(student, weight)
        return (-(teacher_logps - logps).detach() * logps).mean()

    return case.grad_of(loss)


@FROM_HIDDEN("TRL", needs="trl")
def trl_hidden(case: HiddenCase, mode: str) -> Call | None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    cap = case.softcap
    if mode == "sampled":
        # 32768 words at a time, as in its divergence; the last argument: log-probabilities only
        return sampled_loss(
            case, lambda h, w: ChunkedLogProbFunction.apply(h, w, None, case.target_ids, 1.0, 32768, cap, 1.0, ())[0]
        )
    if mode not in DIVERGENCES:
        return None
    alpha = MODES[mode]["alpha"]

    def loss(student: Tensor, weight: Tensor) -> Tensor:
        arguments = (student, weight, None, case.teacher, weight.detach(), None, alpha, 1.0, 1.0, cap, 1.0, cap)
        return ChunkedDivergenceFunction.apply(*arguments)[0].mean()

    return case.grad_of(loss)


@FROM_HIDDEN("Liger", needs="liger-kernel")
def liger_not_compiled(case: HiddenCase, mode: str) -> Call | None:
    return liger_hidden(case, mode, compiled=False)


@FROM_HIDDEN("CCE", needs="cut-cross-entropy")
def cce(case: HiddenCase, mode: str) -> Call | None:
    from cut_cross_entropy import linear_cross_entropy

    if mode != "sampled":
        return None
    options = {"softcap": case.softcap, "reduction": "none"}
    options["impl"] = "cce" if case.device != "cpu" else "torch_compile"
    return sampled_loss(case, lambda h, w: -linear_cross_entropy(h, w, case.target_ids, **options))


# ------------------------------------------------------------------------- what the scripts share


def keep_pages() -> None:
    """From here on this process's allocator gives no memory back to the system."""
    trim_threshold, mmap_max = -1, -4  # names of <malloc.h>
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(trim_threshold, -1) and mallopt(mmap_max, 0)):
        raise SystemExit("--keep-pages: this allocator has no such setting")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["sampled", *DIVERGENCES])
    parser.add_argument("--rivals", nargs="+", help="these only")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep-pages", action="store_true", help="an allocator that gives no memory back")


def measure_modes(theme: str, case: Case, args: argparse.Namespace, base: str, **about: Any) -> None:
    """Measures a case in the modes of the arguments; every row is written when it is measured.

    ``about`` is added to the case: what tells it from others of the same shape.
    """
    if args.keep_pages:
        keep_pages()
        about["pages_kept"] = True
    ceilings = {"copy": copy_bandwidth(args.device, 16 if args.quick else None)}
    ceilings["gemm"] = gemm_flops(args.device, case.dtype, 256 if args.quick else None)
    run = harness.environment(args.device)
    for mode in args.modes:
        row = measure(
            case,
            mode,
            rounds=args.rounds,
            only=args.rivals,
            without=args.without,
            least_seconds=args.seconds,
            memory=not args.keep_pages,
        )
        row["case"] |= about
        harness.tell(row, base if base in row["rivals"] else "fastsdpo")
        row |= {"tensor_bytes": case.tensor_bytes, "gemm": case.gemm, "ceilings": ceilings}
        harness.record(harness.results_file(theme, args), [row], run)
