"""The Triton backend of `fastsdpo.ops.rows`: launches the kernels of `ops._triton_kernels`.

Launches, and bytes moved per element of bfloat16 logits, forward and backward together:

    log-probs         statistics, finish; gradient               2 + 4 = 6
    sampled token     statistics, finish; gradient               4 + 4 = 8
    forward, reverse  statistics, finish; gradient               4 + 6 = 10
    Jensen-Shannon    statistics, jsd, finish; gradient          8 + 6 = 14
    top-k             statistics, topk_finish; gradient          4 + 4 = 8, and the search for the support

No launch waits for the GPU or depends on values, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.ops import _triton_kernels
from fastsdpo.ops.rows import STATISTICS, LossOptions, RowResults, TokenResults, Tokens

kernels: Any = _triton_kernels  # to a type checker they are functions, not launched as kernel[grid](...)

# Launch parameters, the same on every machine; nothing is chosen by timing.
NUM_WARPS = 8
PART = 32768  # elements of a program
FINISH_ROWS = 32  # rows of a program that puts parts together, a thread each
PIECE = 8  # elements; 16 bytes of a 2-byte dtype, 32 bytes of float32
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
FAST = not INTERPRETED and torch.version.hip is None  # what only NVIDIA's compiler takes


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


class Call(NamedTuple):
    """What all launches of a call share; ``mode`` is one of `ops._triton_kernels`."""

    student: Tensor
    teacher: Tensor | None
    tokens: Tokens
    options: LossOptions
    mode: str

    @property
    def rows(self) -> int:
        return self.tokens.target_ids.shape[0]

    @property
    def parts(self) -> int:
        """Programs of a row, which may begin up to PIECE - 1 elements behind its first tile."""
        return ceil_div(self.student.shape[-1] + PIECE - 1, PART)

    def new(self, *shape: int) -> Tensor:
        return self.student.new_empty(shape, dtype=torch.float32)

    def arguments(self) -> dict[str, Any]:
        """Of every kernel that reads logits."""
        options = self.options
        return {
            **row_arguments("s", self.student),
            **row_arguments("t", self.teacher),
            "n_l": self.student.shape[1],
            "target_ptr": self.tokens.target_ids,
            "k": kernels.LOG2E.value / options.temperature,
            "cap": options.softcap,
            "ignore_index": options.ignore_index,
            "HAS_CAP": options.softcap != 0.0,
            "FAST": FAST,
        }

    def on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        device = self.student.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            return torch.cuda.device(device)
        return nullcontext()


def row_arguments(name: str, logits: Tensor | None) -> dict[str, Any]:
    """Of logits ``[B, L, V]``: pointer, strides of B and L."""
    if logits is None:
        return {f"{name}_ptr": None, f"{name}_b": 0, f"{name}_l": 0}
    return {f"{name}_ptr": logits, f"{name}_b": logits.stride(0), f"{name}_l": logits.stride(1)}


def same_phase(*tensors: Tensor) -> bool:
    """Whether every row ``[b, l]`` starts at the same place of a 16-byte piece in all tensors."""
    axes = [axis for axis in (0, 1) if tensors[0].shape[axis] > 1]
    phases = {tuple(t.stride(axis) % PIECE for axis in axes) for t in tensors}
    return len(phases) == 1 and all(t.data_ptr() % 16 == 0 for t in tensors)


def num_warps(count: int) -> int:
    """``count`` times 32 threads, in the device's warps: AMD's have 64."""
    return max(1, count // 2) if torch.version.hip else count


def tile_of(*tensors: Tensor | None, heavy: bool = False, warps: int = NUM_WARPS) -> dict[str, Any]:
    """Constexprs of a pass over logits. In a tile a thread makes one access of each tensor, two where there
    is one tensor and no ``heavy`` arithmetic."""
    present = [t for t in tensors if t is not None]
    accesses = 2 if len(present) == 1 and not heavy else 1
    aligned, elements = same_phase(*present), 16 // min(t.element_size() for t in present)
    if not aligned and warps != NUM_WARPS:  # as many as of aligned rows would take too many registers
        elements //= 2
    return {
        "ALIGNED": aligned,
        "N": 32 * warps * accesses,
        "VEC": elements,
        "PART": PART,
        "num_warps": num_warps(warps),
    }


def support_block(topk: int) -> dict[str, int]:
    """The support's classes and the tail in one block of a power of two."""
    block = power_of_2(topk + 1)
    return {"KP": block, "num_warps": num_warps(ceil_div(block, 128) if block < 1024 else 8)}


def divergence_of(options: LossOptions) -> str:
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(options.alpha, "jsd")


# ---- launches ------------------------------------------------------------------------------------


def statistics(call: Call, sorted_ids: Tensor | None = None) -> Tensor:
    """``[N, parts, 6]``; of top-k, of the tokens outside ``sorted_ids [N, K]``."""
    found = call.new(call.rows, call.parts, kernels.PART_COLUMNS.value)
    topk = 0 if sorted_ids is None else sorted_ids.shape[1]
    heavy = call.mode in ("entropy", "topk") or call.options.softcap != 0.0
    kernels.statistics_kernel[(call.rows, call.parts)](
        **call.arguments(), sorted_ptr=sorted_ids, part_ptr=found, topk=topk,
        vocabulary=call.student.shape[-1], MODE=call.mode, KP=power_of_2(topk + 1),
        **tile_of(call.student, call.teacher, heavy=heavy),
    )  # fmt: skip
    return found


def jsd(call: Call, parts: Tensor) -> Tensor:
    """``[N, parts, 2]``: the two KLs, from `statistics`."""
    found = call.new(call.rows, call.parts, 2)
    kernels.jsd_kernel[(call.rows, call.parts)](
        **call.arguments(), part_ptr=parts, jsd_ptr=found, vocabulary=call.student.shape[-1],
        alpha=call.options.alpha, **tile_of(call.student, call.teacher),
    )  # fmt: skip
    return found


RESULTS = ("student_ptr", "teacher_ptr", "entropy_ptr", "per_token_ptr", "coef_ptr", "stats_ptr", "class_ptr")


def finish(call: Call, parts: Tensor, jsd: Tensor | None = None, **results: Tensor | None) -> None:
    """Puts ``parts`` together into those of RESULTS that there are."""
    kernels.finish_kernel[(ceil_div(call.rows, FINISH_ROWS),)](
        **call.arguments(), given_ptr=call.tokens.teacher_logps, weight_ptr=call.tokens.weights,
        old_ptr=call.tokens.old_logps, part_ptr=parts, jsd_ptr=jsd,
        **{name: results.get(name) for name in RESULTS}, rows=call.rows, parts=call.parts,
        alpha=call.options.alpha, is_clip=call.options.is_clip, MODE=call.mode,
        COLUMNS=2 if call.tokens.weights is None else STATISTICS, BLOCK=FINISH_ROWS, num_warps=1,
    )  # fmt: skip


def topk_finish(call: Call, parts: Tensor, found: RowResults) -> None:
    """All of ``found`` from ``parts`` and the support's logits."""
    topk, options, tokens = found.class_grads.shape[1], call.options, call.tokens
    kernels.topk_finish_kernel[(call.rows,)](
        **call.arguments(), id_ptr=tokens.topk_ids, given_ptr=tokens.topk_logps,
        weight_ptr=tokens.weights, old_ptr=tokens.old_logps, part_ptr=parts,
        student_ptr=found.student_logps, teacher_ptr=found.teacher_logps,
        per_token_ptr=found.per_token, coef_ptr=found.coef, stats_ptr=found.stats,
        class_ptr=found.class_grads, parts=call.parts, topk=topk, alpha=options.alpha,
        is_clip=options.is_clip, MODE=divergence_of(options), TAIL=options.add_tail,
        **support_block(topk),
    )  # fmt: skip


def subtracted(call: Call, found: RowResults) -> Tensor:
    """``[N, 2]`` of a divergence, as `finish` leaves it; else from statistics that another caller put together."""
    if len(found.class_grads):
        return found.class_grads
    _, log_sum, origin, of_teacher, kl = found.stats.unbind(1)
    mean = kl * kernels.LOG2E.value
    if call.mode == "reverse_kl":
        mean = (mean + log_sum - of_teacher) * (call.options.temperature / kernels.LOG2E.value)
    return torch.stack([origin, mean], 1)


def gradient(call: Call, upstream: Tensor | None, found: RowResults, grad: Tensor) -> None:
    """``grad`` as a whole. Log-probs have found their ``stats`` alone."""
    ids = call.tokens.topk_ids
    topk = 0 if ids is None else ids.shape[1]
    classes = found.class_grads if topk else None
    if call.mode in ("reverse_kl", "jsd"):
        classes = subtracted(call, found)
    # For a softcap in 8 warps a compiler ran out of registers (float16, sm_100).
    warps = 4 if call.options.softcap else NUM_WARPS
    kernels.gradient_kernel[(call.rows, call.parts)](
        **call.arguments(), **row_arguments("g", grad), upstream_ptr=upstream, coef_ptr=found.coef,
        student_ptr=found.student_logps, teacher_ptr=found.teacher_logps, stats_ptr=found.stats,
        id_ptr=ids, class_ptr=classes, vocabulary=grad.shape[-1], topk=topk,
        inv_temperature=1.0 / call.options.temperature, alpha=call.options.alpha, MODE=call.mode,
        KP=power_of_2(topk + 1), COLUMNS=found.stats.shape[1],
        **tile_of(call.student, call.teacher, grad, warps=warps),
    )  # fmt: skip


# ---- the backend ---------------------------------------------------------------------------------


def forward(
    student: Tensor,
    teacher: Tensor | None,
    tokens: Tokens,
    options: LossOptions,
    grad: Tensor | None = None,
) -> RowResults:
    mode = divergence_of(options) if options.mode == "full" else options.mode
    call = Call(student, teacher, tokens, options, mode)
    classes = {"topk": (call.rows, options.topk), "full": (call.rows, 2)}.get(options.mode, (0,))
    per_token, coef, student_logps, teacher_logps = call.new(4, call.rows).unbind()
    stats, class_grads = call.new(call.rows, STATISTICS), call.new(*classes)
    found = RowResults(per_token, coef, student_logps, teacher_logps, stats, class_grads)
    if call.rows == 0:
        return found
    with call.on_device():
        if mode == "topk":
            assert tokens.topk_ids is not None
            topk_finish(call, statistics(call, tokens.topk_ids.sort(-1).values), found)
        else:
            parts = statistics(call)
            finish(
                call, parts, jsd(call, parts) if mode == "jsd" else None,
                student_ptr=found.student_logps, teacher_ptr=found.teacher_logps,
                per_token_ptr=found.per_token, coef_ptr=found.coef, stats_ptr=found.stats,
                class_ptr=found.class_grads if options.mode == "full" else None,
            )  # fmt: skip
    if grad is not None:
        backward(None, found, student, teacher, tokens, options, grad)
    return found


def backward(
    upstream: Tensor | None,
    found: RowResults,
    student: Tensor,
    teacher: Tensor | None,
    tokens: Tokens,
    options: LossOptions,
    grad: Tensor,
) -> None:
    """``upstream`` None stands for 1."""
    full = options.mode == "full"
    mode = divergence_of(options) if full else options.mode
    if mode == "topk" and not options.add_tail:
        mode = "support"
    call = Call(student, teacher if full else None, tokens, options, mode)
    if call.rows:
        with call.on_device():
            gradient(call, upstream, found, grad)


def _log_probs(logits: Tensor, teacher: Tensor | None, ids: Tensor, *rest: Any) -> Call:
    return Call(logits, teacher, Tokens(ids, None), *rest)  # type: ignore[arg-type]


def token_forward(logits: Tensor, target_ids: Tensor, options: LossOptions, entropy: bool = False) -> TokenResults:
    call = _log_probs(logits, None, target_ids, options, "entropy" if entropy else "token")
    n = call.rows
    found = TokenResults(call.new(n), call.new(n if entropy else 0), call.new(n, 2))
    if n:
        with call.on_device():
            finish(
                call, statistics(call), student_ptr=found.logps, stats_ptr=found.stats,
                entropy_ptr=found.entropy if entropy else None,
            )  # fmt: skip
    return found


def token_backward(
    upstream: Tensor,
    stats: Tensor,
    logits: Tensor,
    target_ids: Tensor,
    options: LossOptions,
    grad: Tensor,
) -> None:
    call = _log_probs(logits, None, target_ids, options, "token")
    if call.rows:
        with call.on_device():
            gradient(call, upstream, RowResults(None, None, None, None, stats, None), grad)  # type: ignore[arg-type]


def log_ratio(student: Tensor, teacher: Tensor, target_ids: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    call = _log_probs(student, teacher, target_ids, options, "log_ratio")
    own, others = call.new(call.rows), call.new(call.rows)
    if call.rows:
        with call.on_device():
            finish(call, statistics(call), student_ptr=own, teacher_ptr=others)
    return own, others


def support(logits: Tensor, target_ids: Tensor, k: int, ignore_index: int) -> Tensor:
    return torch.topk(logits, k, dim=-1).indices.reshape(-1, k)
