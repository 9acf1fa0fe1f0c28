"""``fastsdpo bench``: the losses of this installation against what one would use instead, on this machine.

    fastsdpo bench --quick                        # about a minute
    fastsdpo bench --model Qwen3-8B --tokens 256  # vocabulary, width and softcap of a model
    fastsdpo bench --device cuda --output bench   # JSON, a Markdown table and a plot in bench/

Two questions: a loss with its gradient from two logits tensors (``logits``), and from hidden states and
the head (``hidden``). Rivals are plain PyTorch, `torch.compile` of it, and, where they are installed, the
functions of TRL, Liger and Apple's cut-cross-entropy (CCE). A rival is checked against float64 before it is
timed; all run in turns in one process (A B C, A B C, ...), so that a change of the machine's clock or load
meets all alike. The device's own copy bandwidth and matrix-product rate are measured beside them.

With a softcap, plain PyTorch, `torch.compile`, TRL's and Liger's losses from logits get logits that are
capped before, as a Hugging Face model's are; TRL's kernels and CCE cap by themselves; Liger's loss from
hidden states cannot and is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops.backend import describe_backend, usable_device
from fastsdpo.ops.linear import release_tiles

MODES: dict[str, float | None] = {
    "sampled": None,
    "forward_kl": 0.0,
    "reverse_kl": 1.0,
    "jsd": 0.5,
}


class Shape(NamedTuple):
    """Vocabulary, width of the hidden states, softcap of the final logits."""

    vocabulary: int
    hidden: int
    softcap: float | None = None


# From the models' config.json. Gemma-3 has the field for a softcap and leaves it empty; Gemma-2 and
# Gemma-3n set it to 30.
MODELS = {
    "SmolLM2-135M": Shape(49152, 576),
    "SmolLM2-360M": Shape(49152, 960),
    "SmolLM2-1.7B": Shape(49152, 2048),
    "Qwen3-0.6B": Shape(151936, 1024),
    "Qwen3-4B": Shape(151936, 2560),
    "Qwen3-8B": Shape(151936, 4096),
    "Llama-3-8B": Shape(128256, 4096),
    "Gemma-2-2B": Shape(256000, 2304, 30.0),
    "Gemma-3-1B": Shape(262144, 1152),
    "Gemma-3-4B": Shape(262208, 2560),
    "Gemma-3n-E4B": Shape(262400, 2048, 30.0),
}


# ------------------------------------------------------------------------------------ the harness


@dataclass
class Rival:
    """``run`` is timed; ``prepare`` runs before it, untimed (inputs that a run overwrites)."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass
class Timing:
    """Seconds over the rounds, and the peak of memory above the start in bytes.

    ``cpu`` is the median of the processor seconds of all threads: on a machine that does other work
    at the same time it tells more than the wall clock. Memory is the device's allocations on a GPU and
    resident memory on a CPU; None where the system does not say.
    """

    median: float
    fastest: float
    slowest: float
    cpu: float
    peak_bytes: int | None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int | None:
    """How far memory rises above its start during ``run()``."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    release_tiles()  # and what the C library kept, below
    if sys.platform == "linux":
        # What the C library kept from an earlier call goes back, or this one's use of it is not seen.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = _status("VmRSS")
    except OSError:
        run()
        return None
    run()
    return max(0, _status("VmHWM") - before)


def interleave(rivals: list[Rival], rounds: int, device: str = "cpu", least_seconds: float = 0.0) -> dict[str, Timing]:
    """Median and spread of the runs of each rival, between two that measure its memory.

    At least ``rounds`` rounds, and as many more as ``least_seconds`` has not passed for: the median of
    a few runs of milliseconds is a matter of luck. Of the two peaks the lower counts: now and then a
    tensor of the run before is still held by a cycle, or by the allocator.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    cpu: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    peaks: dict[str, list[int | None]] = {rival.name: [] for rival in rivals}

    def measure_peaks() -> None:
        for rival in rivals:
            if rival.prepare:
                rival.prepare()
            peaks[rival.name].append(peak_memory(rival.run, device))

    measure_peaks()
    done, begun = 0, time.perf_counter()
    while done < rounds or time.perf_counter() - begun < least_seconds:
        done += 1
        for rival in rivals:
            if rival.prepare:
                rival.prepare()
            wait()
            start, start_cpu = time.perf_counter(), time.process_time()
            rival.run()
            wait()
            seconds[rival.name].append(time.perf_counter() - start)
            cpu[rival.name].append(time.process_time() - start_cpu)
    measure_peaks()
    return {
        name: Timing(
            statistics.median(times),
            min(times),
            max(times),
            statistics.median(cpu[name]),
            min((peak for peak in peaks[name] if peak is not None), default=None),
        )
        for name, times in seconds.items()
    }


def copy_bandwidth(megabytes: int | None = None, device: str = "cpu") -> float:
    """Bytes read plus written per second by ``Tensor.copy_`` between two warm buffers.

    Of 256 MiB each, on a GPU of 2 GiB: far above its caches, and long beside the launch.
    """
    megabytes = megabytes or (256 if torch.device(device).type == "cpu" else 2048)
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    timing = interleave([Rival("copy", lambda: target.copy_(source))], 7, device)["copy"]
    return 2 * source.numel() * 4 / timing.median


def gemm_flops(size: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square matrix product, of 2048, on a GPU of 8192 (random: zeros take less power)."""
    size = size or (2048 if torch.device(device).type == "cpu" else 8192)
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    timing = interleave([Rival("gemm", lambda: torch.mm(a, b, out=c))], 5, device)["gemm"]
    return 2 * size**3 / timing.median


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device, versions and command of this run."""
    from fastsdpo._native import native_available

    packages = ("fastsdpo", "torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "transformers")
    name = f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; {name}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = os.path.relpath(sys.argv[0])
    if spec is not None:  # python -m ...
        program = "-m " + spec.name.removesuffix(".__main__")
    return {
        "device": name,
        "native": native_available()[1],
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "command": "python " + " ".join([program, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


# ------------------------------------------------------------------------------------- the losses


def plain_loss(
    mode: str, student: Tensor, teacher: Tensor, target_ids: Tensor, softcap: float | None = None
) -> Tensor:
    """The token-mean loss in plain PyTorch with float32 log-softmaxes; what `torch.compile` gets."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    s = torch.log_softmax(capped(student.to(wide), softcap), -1)
    t = torch.log_softmax(capped(teacher.to(wide), softcap), -1)
    alpha = MODES[mode]
    if alpha is None:
        s_y = s.gather(-1, target_ids[:, None]).squeeze(-1)
        t_y = t.gather(-1, target_ids[:, None]).squeeze(-1)
        return (-(t_y - s_y).detach() * s_y).mean()
    if alpha == 0:
        return (t.exp() * (t - s)).sum(-1).mean()
    if alpha == 1:
        return (s.exp() * (s - t)).sum(-1).mean()
    p, q = s.exp(), t.exp()
    m = ((1 - alpha) * p + alpha * q).log()
    return ((1 - alpha) * p * (s - m) + alpha * q * (t - m)).sum(-1).mean()


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def trl_loss(mode: str, student: Tensor, teacher: Tensor, target_ids: Tensor, softcap: float | None = None) -> Tensor:
    from trl.experimental.sdpo import loss_utils

    student, teacher = capped(student, softcap), capped(teacher, softcap)
    if mode == "sampled":
        return loss_utils.compute_sampled_token_self_distillation_loss(
            student[None], teacher[None], target_ids[None], distillation_alpha=1.0
        ).mean()
    return loss_utils.compute_full_logit_self_distillation_loss(
        student, teacher, distillation_alpha=MODES[mode]
    ).mean()


def liger_loss(
    mode: str, student: Tensor, teacher: Tensor, target_ids: Tensor, softcap: float | None = None
) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    student, teacher = capped(student, softcap), capped(teacher, softcap)
    total = LigerFusedLinearJSDFunction.distillation_loss_fn(student, teacher, beta=MODES[mode])
    return total / len(target_ids)


def _options(mode: str, softcap: float | None) -> dict[str, Any]:
    alpha = MODES[mode]
    options = {"mode": "sampled_token"} if alpha is None else {"mode": "full", "alpha": alpha}
    return {**options, "softcap": softcap}


# A call gives the loss and the gradients of the case's leaves.
Call = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]


def _at_first_call(make: Callable[[], Call]) -> Call:
    """A package that cannot be imported costs its own row, where it is first called."""
    made: list[Call] = []

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        if not made:
            made.append(make())
        return made[0]()

    return run


class LogitsCase:
    """Student and teacher logits ``[T, V]``; the student's are restored before each run."""

    def __init__(
        self,
        tokens: int,
        vocabulary: int,
        dtype: torch.dtype,
        device: str,
        softcap: float | None = None,
    ):
        self.sizes = (vocabulary, dtype, device, softcap)
        self.softcap = softcap
        g = torch.Generator(device).manual_seed(0)
        rows = torch.randn(tokens, vocabulary, generator=g, device=device).mul_(2.5)
        noise = torch.randn(tokens, vocabulary, generator=g, device=device).mul_(0.3)
        self.original = rows.to(dtype, copy=True)
        self.teacher = rows.add_(noise).to(dtype)
        self.student = self.original.clone()
        self.target_ids = torch.randint(vocabulary, (tokens,), generator=g, device=device)
        self.label = f"{tokens} x {vocabulary}"
        self.unit = self.student.numel() * self.student.element_size()
        self.gemm = None

    def small(self) -> LogitsCase:
        """A few tokens of the same kind: what rivals are checked on."""
        return LogitsCase(CHECKED_TOKENS, *self.sizes)

    def restore(self) -> None:
        self.student.copy_(self.original)

    def loss_of(self, function: Callable[..., Tensor], mode: str) -> Call:
        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            leaf = self.student.detach().requires_grad_()
            loss = function(mode, leaf, self.teacher, self.target_ids, self.softcap)
            return loss.detach(), torch.autograd.grad(loss, leaf)

        return run

    def ours(self, mode: str) -> Call:
        from fastsdpo.ops.divergence import sdpo_loss

        options = _options(mode, self.softcap)
        return self.loss_of(
            lambda _, s, t, ids, __: sdpo_loss(s, t, ids, inplace_grad=True, **options).loss,
            mode,
        )

    def exact(self, mode: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = self.original.double().requires_grad_()
        loss = plain_loss(mode, leaf, self.teacher.double(), self.target_ids, self.softcap)
        return loss.detach(), torch.autograd.grad(loss, leaf)

    def calls(self, mode: str, compiled: Callable[..., Tensor]) -> dict[str, Call]:
        found = {
            "fastsdpo": self.ours(mode),
            "PyTorch": self.loss_of(plain_loss, mode),
            "torch.compile": self.loss_of(compiled, mode),
        }
        if _version("trl"):
            found["TRL"] = self.loss_of(trl_loss, mode)
        if _version("liger-kernel") and mode != "sampled":  # it has no such loss
            found["Liger"] = self.loss_of(liger_loss, mode)
        return found


class HiddenCase:
    """Hidden states ``[T, D]`` of both and one head ``[V, D]``; gradients of student and head."""

    def __init__(
        self,
        tokens: int,
        vocabulary: int,
        hidden: int,
        dtype: torch.dtype,
        device: str,
        softcap: float | None = None,
    ):
        self.sizes = (vocabulary, min(hidden, CHECKED_HIDDEN), dtype, device, softcap)
        self.softcap = softcap
        g = torch.Generator(device).manual_seed(0)
        student = torch.randn(tokens, hidden, generator=g, device=device)
        noise = torch.randn(tokens, hidden, generator=g, device=device)
        self.student = student.to(dtype)
        self.teacher = (student + 0.2 * noise).to(dtype)
        weight = torch.randn(vocabulary, hidden, generator=g, device=device)
        self.weight = weight.mul_(2.5 / hidden**0.5).to(dtype)
        self.target_ids = torch.randint(vocabulary, (tokens,), generator=g, device=device)
        self.label = f"{tokens} x {vocabulary} x {hidden}"
        self.unit = tokens * vocabulary * self.weight.element_size()
        self.gemm = 2 * tokens * vocabulary * hidden

    def small(self) -> HiddenCase:
        """A few tokens of the same kind: what rivals are checked on."""
        return HiddenCase(CHECKED_TOKENS, *self.sizes)

    def restore(self) -> None:
        pass

    def _leaves(self) -> tuple[Tensor, Tensor]:
        return self.student.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def loss_of(self, function: Callable[..., Tensor], mode: str) -> Call:
        def whole(student: Tensor, weight: Tensor) -> Tensor:
            with torch.no_grad():
                teacher = self.teacher @ weight.T
            return function(mode, student @ weight.T, teacher, self.target_ids, self.softcap)

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            leaves = self._leaves()
            loss = whole(*leaves)
            return loss.detach(), torch.autograd.grad(loss, leaves)

        return run

    def ours(self, mode: str) -> Call:
        from fastsdpo.ops.linear import linear_sdpo_loss

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            student, weight = self._leaves()
            out = linear_sdpo_loss(student, self.teacher, weight, self.target_ids, **_options(mode, self.softcap))
            return out.loss.detach(), torch.autograd.grad(out.loss, (student, weight))

        return run

    def exact(self, mode: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        student, weight = (t.double().requires_grad_() for t in (self.student, self.weight))
        teacher = self.teacher.double() @ weight.detach().T
        loss = plain_loss(mode, student @ weight.T, teacher, self.target_ids, self.softcap)
        return loss.detach(), torch.autograd.grad(loss, (student, weight))

    def bare_gemms(self) -> Call:
        logits = self.weight.new_empty(len(self.student), len(self.weight))

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            torch.mm(self.teacher, self.weight.T, out=logits)
            torch.mm(self.student, self.weight.T, out=logits)
            return logits[0, 0], (logits @ self.weight, logits.T @ self.student)

        return run

    def calls(self, mode: str, compiled: Callable[..., Tensor]) -> dict[str, Call]:
        found = {
            "fastsdpo": self.ours(mode),
            "PyTorch": self.loss_of(plain_loss, mode),
            "torch.compile": self.loss_of(compiled, mode),
        }
        if _version("trl"):
            make = self._trl_sampled if mode == "sampled" else lambda: self._trl(mode)
            found["TRL"] = _at_first_call(make)
        if _version("liger-kernel") and mode != "sampled" and self.softcap is None:
            found["Liger"] = _at_first_call(lambda: self._liger(mode))
        if _version("cut-cross-entropy") and mode == "sampled":
            found["CCE"] = _at_first_call(self._cce)
        return found

    def _sampled(self, logps_of: Callable[[Tensor, Tensor], Tensor]) -> Call:
        """The sampled token's loss from a function that gives the targets' log-probabilities."""

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            student, weight = self._leaves()
            with torch.no_grad():
                teacher_logps = logps_of(self.teacher, self.weight)
            logps = logps_of(student, weight)
            loss = (-(teacher_logps - logps).detach() * logps).mean()
            return loss.detach(), torch.autograd.grad(loss, (student, weight))

        return run

    def _trl_sampled(self) -> Call:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        # 32768 words at a time, as in its divergence; the last argument: log-probabilities only
        return self._sampled(
            lambda hidden, weight: ChunkedLogProbFunction.apply(
                hidden, weight, None, self.target_ids, 1.0, 32768, self.softcap, 1.0, ()
            )[0]
        )

    def _cce(self) -> Call:
        from cut_cross_entropy import linear_cross_entropy

        # Its kernels need a GPU; elsewhere its own torch.compile variant, which keeps the logits.
        impl = "cce" if self.weight.device.type == "cuda" else "torch_compile"
        return self._sampled(
            lambda hidden, weight: (
                -linear_cross_entropy(
                    hidden,
                    weight,
                    self.target_ids,
                    softcap=self.softcap,
                    reduction="none",
                    impl=impl,
                )
            )
        )

    def _trl(self, mode: str) -> Call:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        cap = self.softcap

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            student, weight = self._leaves()
            per_token, _ = ChunkedDivergenceFunction.apply(
                student,
                weight,
                None,
                self.teacher,
                self.weight,
                None,
                MODES[mode],
                1.0,
                1.0,
                cap,
                1.0,
                cap,
            )
            loss = per_token.mean()
            return loss.detach(), torch.autograd.grad(loss, (student, weight))

        return run

    def _liger(self, mode: str) -> Call:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss_module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=MODES[mode], compiled=True
        )

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            student, weight = self._leaves()
            loss = loss_module(student, weight, self.teacher, self.weight, self.target_ids)
            return loss.detach(), torch.autograd.grad(loss, (student, weight))

        return run


# ------------------------------------------------------------------------------------ the command


# What is checked has at most so many cells of (T, V): float64 copies of the whole would not fit where a
# loss just does. Above, a case of so many tokens (and width) of the same vocabulary stands for it.
CHECKED_CELLS, CHECKED_TOKENS, CHECKED_HIDDEN = 2**25, 48, 512


def check(case: Any, mode: str, calls: dict[str, Call]) -> dict[str, str]:
    """Names of rivals that are wrong, and how; ours must not be among them."""
    loss, gradients = case.exact(mode)
    half = case.teacher.dtype in (torch.bfloat16, torch.float16)
    wrong = {}
    for name, call in calls.items():
        case.restore()
        found_loss, found = call()
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, gradients)]
        errors.append(abs(float(found_loss) - float(loss)) / abs(float(loss)))
        # Rivals that round logits or log-probabilities to 16 bits are off by percents, as designed.
        limit = (1e-2 if name == "fastsdpo" else 0.5) if half else 1e-3
        if not max(errors) < limit:
            wrong[name] = f"off by {max(errors):.1e} from float64"
    if "fastsdpo" in wrong:
        raise RuntimeError(f"fastsdpo bench: {case.label} {mode}: fastsdpo {wrong['fastsdpo']}")
    return wrong


def measure(
    case: Any,
    question: str,
    mode: str,
    rounds: int,
    device: str,
    without: Sequence[str] = (),
    least_seconds: float = 0.0,
) -> dict[str, Any]:
    """One row of the results: every rival's timing on one case."""
    torch._dynamo.reset()
    calls = case.calls(mode, torch.compile(plain_loss, dynamic=False))
    calls = {name: call for name, call in calls.items() if name not in without}
    left_out: dict[str, str] = {}
    for name in [n for n in calls if n != "fastsdpo"]:
        try:
            case.restore()
            calls[name]()
        except Exception as error:  # another version, no compiler, out of memory: said in the row
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del calls[name]
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
    checked = case if case.unit // case.teacher.element_size() <= CHECKED_CELLS else case.small()
    wanted = calls
    if checked is not case:
        wanted = checked.calls(mode, torch.compile(plain_loss, dynamic=False))
    for name, reason in check(checked, mode, {name: wanted[name] for name in calls}).items():
        left_out[name] = reason
        del calls[name]
    if isinstance(case, HiddenCase):
        calls["bare GEMMs"] = case.bare_gemms()
    rivals = [Rival(name, call, case.restore) for name, call in calls.items()]
    timings = interleave(rivals, rounds, device, least_seconds)
    return {
        "question": question,
        "shape": case.label,
        "mode": mode,
        "dtype": str(case.teacher.dtype).removeprefix("torch."),
        "rounds": rounds,
        "softcap": case.softcap,
        "tensor_bytes": case.unit,
        "gemm": case.gemm,
        "rivals": {name: asdict(timing) for name, timing in timings.items()},
        "left_out": left_out,
    }


def share_of_ceiling(row: dict[str, Any], seconds: float, ceilings: dict[str, float]) -> float:
    """From logits: the three (T, V) tensors that cannot be avoided (both read, the gradient written) per
    second over the copy bandwidth; from hidden states: four products over the matrix-product rate.
    """
    if row["question"] == "logits":
        return 3 * row["tensor_bytes"] / seconds / ceilings["copy"]
    return 4 * row["gemm"] / seconds / ceilings["gemm"]


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    about, ceilings = results["environment"], results["ceilings"]
    lines = []
    for row in results["rows"]:
        ours = row["rivals"]["fastsdpo"]["median"]
        for name, timing in row["rivals"].items():
            peak = timing["peak_bytes"]
            lines.append(
                [
                    row["question"],
                    row["shape"] + (f", softcap {row['softcap']:g}" if row["softcap"] else ""),
                    row["dtype"],
                    row["mode"],
                    name,
                    f"{timing['median'] * 1e3:.2f}",
                    f"{timing['fastest'] * 1e3:.2f} to {timing['slowest'] * 1e3:.2f}",
                    f"{timing['median'] / ours:.2f}",
                    "" if peak is None else f"{peak / row['tensor_bytes']:.2f}",
                    f"{share_of_ceiling(row, timing['median'], ceilings):.2f}",
                ]
            )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    header = [
        "from",
        "shape",
        "dtype",
        "loss",
        "who",
        "ms",
        "spread",
        "times fastsdpo",
        "peak memory / (T, V) tensor",
        "share of the ceiling",
    ]
    out = [
        "# fastsdpo bench",
        "",
        f"{about['device']}; {about['native']}; Python {about['python']}; {versions}; {about['date']}.",
        "",
        f"Command: `{about['command']}`. Copy {ceilings['copy'] / 1e9:.1f} GB/s, square matrix product "
        f"{ceilings['gemm'] / 1e9:.0f} GFLOP/s. Loss and gradient; medians of the rounds of one "
        "interleaved run. The ceiling of a loss from logits is the time in which the copy would move "
        "the three tensors that cannot be avoided, from hidden states that of four matrix products. "
        "On a CPU, memory that the allocator kept from an earlier call is not seen.",
        "",
        table(header, lines),
    ]
    for row in results["rows"]:
        for name, reason in row["left_out"].items():
            out.append(f"- {row['question']} {row['shape']} {row['mode']}: {name} left out: {reason}")
    return "\n".join(out).rstrip() + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of each rival's time over fastsdpo's, and of everyone's peak memory. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    figure, (time, memory) = pyplot.subplots(2, figsize=(1.4 * len(rows) + 3, 7), sharex=True, layout="constrained")
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places, times, peaks = [], [], []
        for place, row in enumerate(rows):
            if name in row["rivals"]:
                timing = row["rivals"][name]
                places.append(place + (number - (len(names) - 1) / 2) * width)
                times.append(timing["median"] / row["rivals"]["fastsdpo"]["median"])
                peaks.append((timing["peak_bytes"] or 0) / row["tensor_bytes"])
        time.bar(places, times, width, label=name, color=f"C{number}")
        memory.bar(places, peaks, width, color=f"C{number}")
    time.axhline(1.0, color="black", linewidth=1)
    time.set_ylabel("time / fastsdpo's")
    time.legend(fontsize=8)
    memory.set_ylabel("peak memory / (T, V) tensor")
    memory.set_xticks(range(len(rows)), [f"{r['question']}\n{r['mode']}\n{r['shape']}" for r in rows])
    memory.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastsdpo bench", description="The losses against what one would use instead."
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--questions", nargs="+", choices=["logits", "hidden"], default=["logits", "hidden"])
    parser.add_argument(
        "--model", choices=list(MODELS), metavar="NAME", help="vocabulary, width and softcap of " + ", ".join(MODELS)
    )
    parser.add_argument("--softcap", type=float, help="of the logits; default: none, or the model's")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="RIVAL", help="leave out, as in --without torch.compile Liger"
    )
    parser.add_argument("--tokens", type=int, help="T; default: 512, or 8192 on a GPU")
    parser.add_argument("--vocabulary", type=int, help="V; default: 49152, or 151936 on a GPU")
    parser.add_argument("--hidden", type=int, help="D; default: 576, or 4096 on a GPU")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="writes bench.json, bench.md and, with matplotlib, bench.png there",
    )
    args = parser.parse_args(argv)
    for name in ("tokens", "vocabulary", "hidden", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.softcap is not None and not args.softcap > 0:
        parser.error(f"--softcap must be above 0, got {args.softcap:g}")
    if args.model is not None:
        shape = MODELS[args.model]
        for name in ("vocabulary", "hidden", "softcap"):
            if getattr(args, name) is None:
                setattr(args, name, getattr(shape, name))
    try:
        device = usable_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    gpu = device.type == "cuda"
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)  # before any work is done

    defaults = (8192, 151936, 4096, 5) if gpu else (512, 49152, 576, 5)
    if args.quick:
        defaults = (1024, 32000, 1024, 3) if gpu else (128, 16384, 256, 3)
    tokens, vocabulary, hidden, rounds = (
        given if given is not None else default
        for given, default in zip((args.tokens, args.vocabulary, args.hidden, args.rounds), defaults)
    )
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    print(describe_backend(device.type), flush=True)
    results: dict[str, Any] = {
        "environment": environment(args.device),
        "ceilings": {
            "copy": copy_bandwidth(device=args.device),
            "gemm": gemm_flops(device=args.device, dtype=dtype),
        },
        "rows": [],
    }
    for question in args.questions:
        if question == "logits":
            case: Any = LogitsCase(tokens, vocabulary, dtype, args.device, args.softcap)
        else:
            case = HiddenCase(tokens, vocabulary, hidden, dtype, args.device, args.softcap)
        for mode in args.modes:
            row = measure(case, question, mode, rounds, args.device, args.without)
            results["rows"].append(row)
            ours = row["rivals"]["fastsdpo"]["median"]
            text = "  ".join(
                f"{name} {timing['median'] / ours:.2f}x"
                for name, timing in row["rivals"].items()
                if name != "fastsdpo"
            )
            print(f"{question} {case.label} {mode}: fastsdpo {ours * 1e3:.2f} ms; {text}", flush=True)
            for name, reason in row["left_out"].items():
                print(f"  {name} left out: {reason}", flush=True)
            if args.output is not None:  # after every row: what is measured is not lost
                text = json.dumps(results, indent=1) + "\n"
                (args.output / "bench.json").write_text(text, encoding="utf-8")
                (args.output / "bench.md").write_text(markdown(results), encoding="utf-8")
    if args.output is None:
        print("\n" + markdown(results))
        return 0
    try:
        plot(results, args.output / "bench.png")
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
