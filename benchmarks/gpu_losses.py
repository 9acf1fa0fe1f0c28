"""The parts of `benchmarks.run_gpu` that need no model: the losses' values, bandwidth, time and peers.

Sizes: T tokens, V words of the vocabulary, D width of the hidden states.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastsdpo
from benchmarks import costmodel, losses
from benchmarks.gpu_machine import LeftOut, Machine, Row, cell, peaks
from fastsdpo import bench
from fastsdpo.bench import MODES
from fastsdpo.timing import peak_memory

# ------------------------------------------------------------------------------ kernels against float64


def kernels(machine: Machine) -> Iterator[Row]:
    """Compiled kernels against float64 (a rehearsal: interpreted ones), on the cases that tests/ptx executes.

    Several processes: most of the time goes into compiling.
    """
    cases = executed_cases()
    sizes = [(33, 36), (1000, 9), (1, 9), (2, 9), (32001, 9), (151936, 3)]  # V, rows
    chosen = [(name, dtype, "packed") for dtype in ("bf16", "fp32", "fp16") for name in cases.LOSSES]
    chosen += [(name, "bf16", where) for where in cases.LAYOUTS for name in cases.LOSSES]
    if machine.rehearsal:
        from fastsdpo.testing import round_interpreted_bfloat16

        round_interpreted_bfloat16()
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton|numpy")
        sizes, chosen = [(33, 9)], [("sampled", "bf16", "packed"), ("reverse KL", "bf16", "packed")]
    workers = 1 if machine.rehearsal else min(8, os.cpu_count() or 1)
    # Forked: nothing is imported again. This process has not touched the GPU.
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        found = [
            pool.submit(
                cell,
                {"loss": name, "dtype": dtype, "layout": where},
                compared,
                name,
                dtype,
                where,
                sizes,
                machine.device,
            )
            for name, dtype, where in dict.fromkeys(chosen)
        ]
        for future in concurrent.futures.as_completed(found):
            yield future.result()


def executed_cases() -> Any:
    """The difficult rows and the losses that tests/ptx executes; see `compared` for what is used of it."""
    from tests.ptx import cases

    return cases


def compared(name: str, dtype: str, layout: str, sizes: list[tuple[int, int]], device: str) -> Row:
    """A case's largest errors over ``sizes`` (V, rows); it fails where one is beyond the case's limit."""
    cases = executed_cases()
    loss, worst, wrong = cases.LOSSES[name], {}, []
    for vocabulary, count in sizes:
        values = [v.to(device) for v in cases.rows(vocabulary, cases.DTYPES[dtype], count)]
        with torch.device(device):  # where a case makes its weights
            want = cases.results(loss, *values, "reference", layout)
            got = cases.results(loss, *values, "triton", layout)
        got, want = ({k: v.detach().cpu() for k, v in r.items()} for r in (got, want))
        wrong += [f"V = {vocabulary}, {count} rows: {text}" for text in cases.wrong(loss, got, want)]
        for key, error in cases.errors(loss, got, want).items():
            worst[f"{key}_error"] = max(worst.get(f"{key}_error", 0.0), error.size)
    if wrong:
        raise AssertionError("\n".join(wrong))
    return worst


# --------------------------------------------------------------------------------- losses from logits


def bandwidth(machine: Machine) -> Iterator[Row]:
    """Losses from logits: bytes per second by the cost model's count, as a share of a copy's."""
    copy = machine.copy_rate()
    yield {"loss": "copy", "gb_per_s": copy / 1e9}
    vocabularies, token_counts = ([151936, 32000], [8192, 1024, 64])
    if machine.rehearsal:
        vocabularies, token_counts = [4000], [64]
    for vocabulary in vocabularies:
        for wanted in token_counts:
            # Both logits, the gradient, and as much again for what selecting a support takes.
            tokens = machine.tokens_that_fit(wanted, 6 * machine.element * vocabulary)
            logits = machine.randn(tokens, vocabulary), machine.randn(tokens, vocabulary)
            targets = machine.targets(tokens, vocabulary)
            for mode in MODES:
                for backward in (False, True):
                    reads = costmodel.PASSES[mode][0]
                    moved = float(reads * machine.element * tokens * vocabulary)
                    if backward:
                        moved = costmodel.loss_from_logits(mode, tokens, vocabulary, machine.element).bytes

                    row = {
                        "loss": mode,
                        "pass": "forward + backward" if backward else "forward",
                        "tokens": tokens,
                        "vocabulary": vocabulary,
                    }
                    call = loss_call(mode, *logits, targets, backward)
                    yield cell(row, rate, machine, call, moved, copy)
            del logits, call


def rate(machine: Machine, call: Callable[[], object], moved: float, copy: float) -> Row:
    found = machine.time(call)
    achieved = moved / found["ms"] * 1e3
    return {**found, "gb_per_s": achieved / 1e9, "share_of_copy": achieved / copy}


def loss_call(
    mode: str, student: Tensor, teacher: Tensor, targets: Tensor, backward: bool = True
) -> Callable[[], object]:
    """`sdpo_loss` on logits [T, V], with or without the gradient of the student's."""

    def call() -> object:
        if not backward:
            return fastsdpo.sdpo_loss(student, teacher, targets, **MODES[mode]).loss
        leaf = student.detach().requires_grad_()
        loss = fastsdpo.sdpo_loss(leaf, teacher, targets, **MODES[mode]).loss
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    return call


def host(machine: Machine) -> Iterator[Row]:
    """Host, GPU and wall time of `sdpo_loss` with its gradient on 64 tokens, and of its CUDA graph.

    ``host_ms``: until the call returns, the GPU behind; on a CPU it holds the computation. ``wall_ms``: a
    call in a row of them.
    """
    tokens, vocabulary = 64, 4000 if machine.rehearsal else 151936
    student, teacher = machine.randn(tokens, vocabulary), machine.randn(tokens, vocabulary)
    targets = machine.targets(tokens, vocabulary)
    wait = torch.cuda.synchronize if machine.gpu else lambda: None
    calls = 10 if machine.rehearsal else 50

    def measure(mode: str) -> Row:
        call = loss_call(mode, student, teacher, targets)
        for _ in range(3):
            call()
        wait()
        taken, begun = [], time.perf_counter()
        for _ in range(calls):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        wait()
        wall = (time.perf_counter() - begun) / calls
        found = {"host_ms": 1e3 * statistics.median(taken), "wall_ms": 1e3 * wall}
        if machine.gpu:
            found["gpu_ms"] = machine.time(call)["ms"]
            found["graph_ms"] = machine.time(captured(call).replay)["ms"]
        return found

    for mode in MODES:
        row = {"loss": mode, "tokens": tokens, "vocabulary": vocabulary}
        yield cell(row, measure, mode)


def captured(call: Callable[[], object]) -> Any:
    """A CUDA graph of ``call()``, which has run before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


# -------------------------------------------------------------------------- losses from hidden states


def linear(machine: Machine) -> Iterator[Row]:
    """`linear_sdpo_loss` beside its four matrix products alone; time and peak against the cost model.

    TFLOP/s count the four products. The cost model's time is from this device's measured rates. Peaks are
    above the inputs.
    """
    tokens, vocabulary, hidden = (64, 4096, 64) if machine.rehearsal else (8192, 151936, 4096)
    element, ceilings = machine.element, machine.ceilings()
    tokens = machine.tokens_that_fit(tokens, 3 * element * vocabulary)
    case = bench.HiddenCase(tokens, vocabulary, hidden, machine.dtype, machine.device)
    size = {"tokens": tokens, "vocabulary": vocabulary, "hidden": hidden}
    products = 8.0 * tokens * vocabulary * hidden
    bare = machine.time(losses.bare_gemms(case, "sampled"), repeats=5)
    yield {"loss": "four products alone", **size, **bare, "tflops": products / bare["ms"] / 1e9, "times_products": 1.0}
    chunk = tokens if machine.rehearsal else None  # the cost model's default is a GPU's

    def measure(mode: str) -> Row:
        def loss(student: Tensor, weight: Tensor) -> Tensor:
            options = {"chunk_size": chunk, **MODES[mode]}
            return fastsdpo.linear_sdpo_loss(student, case.teacher, weight, case.target_ids, **options).loss

        call = case.grad_of(loss)
        found = machine.time(call, repeats=5)
        cost = costmodel.LinearLoss(tokens, vocabulary, hidden, operand=element, chunk=chunk)
        return {
            **found,
            "tflops": products / found["ms"] / 1e9,
            "times_products": found["ms"] / bare["ms"],
            "model_ms": 1e3 * costmodel.step_seconds(cost.parts(mode), ceilings),
            **peaks(peak_memory(call, machine.device), cost.peak()),
        }

    for mode in MODES:
        yield cell({"loss": mode, **size}, measure, mode)


# ---------------------------------------------------------------------------------------------- peers


PEERS = {"TRL": "trl", "Liger": "liger_kernel", "CCE": "cut_cross_entropy"}


def peers(machine: Machine) -> Iterator[Row]:
    """The same losses by plain PyTorch, `torch.compile` and the peers that can be imported."""
    missing = {name for name, package in PEERS.items() if importlib.util.find_spec(package) is None}
    for name in sorted(missing):
        yield {"who": name, "left_out": f"{PEERS[name]} is not importable"}
    tokens, vocabulary, hidden = (32, 2048, 64) if machine.rehearsal else (2048, 151936, 4096)
    for kind, width in ((bench.LogitsCase, 0), (bench.HiddenCase, hidden)):
        case = kind(tokens, vocabulary, width, machine.dtype, machine.device)
        for mode in ["reverse_kl"] if machine.rehearsal else ["reverse_kl", "jsd"]:
            for name, make in bench.rivals_of(case).items():
                if name.removesuffix(" compiled") in missing:
                    continue
                if machine.rehearsal and name in ("torch.compile", "Liger compiled"):  # minutes of a C++ compiler
                    continue
                row = {"from": case.question, "shape": case.label, "loss": mode, "who": name}
                yield cell(row, peer, machine, case, mode, name, make)


def peer(machine: Machine, case: Any, mode: str, name: str, make: bench.Maker) -> Row:
    """A rival's time and peak. What fails of ours is a problem; a rival that fails or is wrong is left out."""
    torch._dynamo.reset()
    reason, _ = bench.why_not(case, mode, name, make)
    if reason:
        raise LeftOut(reason)
    try:
        call = make(case, mode)
        if call is None:
            raise LeftOut("it has no such loss")
        found = machine.time(call, repeats=5, prepare=case.restore)
        case.restore()
        peak = peak_memory(call, machine.device)
    except Exception as error:
        if name == "fastsdpo" or isinstance(error, LeftOut):
            raise
        raise LeftOut(f"{type(error).__name__}: {error}"[:300]) from error
    return found if peak is None else {**found, "peak_mb": peak / 1e6}
