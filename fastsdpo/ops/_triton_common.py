"""What the Triton kernels share: tiles, loads, row statistics; and on the host, layouts and launches.

A row. One program owns one row. Elements of a row lie at ``ptr + offset + v``; the kernel walks over
the part between the first and the last 16-byte boundary inside the row in tiles of LANES x VEC
elements, 16 bytes per access whatever V and the strides are, and takes the at most 2 (A - 1)
elements outside it (A = elements per 16 bytes, or 8) in one narrow access, the "edge". The pointers
that come in are 16-byte aligned; what is lost to that is in the row's ``shift``.

Statistics. Each of the LANES x num_warps threads keeps its own running maximum and sums; lanes are
reduced once per segment, so the loops hold no barrier and no shuffle. A row has a fixed number of
segments (a function of V alone), added up in order. For few rows a segment is a program of its own
and a second launch adds them up in the same order: the same bits.

Everything is float32 and in units of log2: a weight is 2^((c - max) k), k = log2(e) / temperature.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# 4096 elements a tile over 8 warps: 16 elements per thread, 32 to 64 registers, no spills on any
# target of the compile matrix; per-thread loads of 8 elements are one (bf16) or two (float32)
# 16-byte accesses. Overridable for experiments.
LANES = int(os.environ.get("FASTSDPO_TRITON_LANES", "512"))
VEC = 8
NUM_WARPS = int(os.environ.get("FASTSDPO_TRITON_WARPS", "8"))
TILE = LANES * VEC
MAX_SEGMENTS = 8
TILES_PER_SEGMENT = 4
ALIGNMENT = 8  # elements; 16 bytes of a 2-byte dtype, 32 bytes of float32

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# tl.log2 expands to about 30 instructions for subnormals and rounding; the hardware's approximation
# is 2^-22 relative. It is inline assembly: not in the interpreter, not on AMD.
FAST_LOG2 = not INTERPRETED and torch.version.hip is None

NEG_INF = tl.constexpr(float("-inf"))
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

# Arguments whose values never compile another variant.
RUNTIME = (
    "n_l", "vocabulary", "segments", "tiles_per_segment", "s_shift", "s_b", "s_l", "t_shift", "t_b",
    "t_l", "g_shift", "g_b", "g_l", "k", "cap", "inv_temperature", "alpha", "is_clip",
    "ignore_index", "topk", "tiles_per_program",
)  # fmt: skip


# ------------------------------------------------------------------------------------ device: basics


@triton.jit
def finite(m):
    """A maximum of -inf (nothing seen yet) as 0, so that c - max is -inf and never NaN."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def times(weight, value):
    """weight * value with 0 * anything = 0; NaN in the weight stays."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def capped(z, cap, HAS_CAP: tl.constexpr):
    """c = cap * tanh(z / cap); -inf stays -inf. tanh by exp2, near 0 by its series."""
    if HAS_CAP:
        x = z / cap
        y = tl.minimum(tl.maximum(x, -20.0), 20.0)
        e = tl.exp2(y * (2.0 * LOG2E))
        far = 1.0 - 2.0 / (1.0 + e)
        s = y * y
        near = y * (1.0 + s * (-0.3333333333 + s * (0.1333333333 + s * -0.0539682540)))
        # min and max drop NaN on some targets: put it back.
        t = tl.where(x != x, x, tl.where(s < 0.04, near, far))
        return tl.where(z == NEG_INF, z, cap * t)
    else:
        return z


@triton.jit
def slope(c, cap, HAS_CAP: tl.constexpr):
    """dc/dz, 0 for a masked token."""
    if HAS_CAP:
        t = c / cap
        return tl.where(c == NEG_INF, 0.0, 1.0 - t * t)
    else:
        return 1.0


@triton.jit
def load_c(ptr, mask, cap, HAS_CAP: tl.constexpr):
    z = tl.load(ptr, mask=mask, other=NEG_INF).to(tl.float32)
    return capped(z, cap, HAS_CAP)


@triton.jit
def row_offset(row, n_l, shift, stride_b, stride_l):
    """First element of a row; 64-bit, rows over two axes."""
    return (row // n_l) * stride_b + (row % n_l) * stride_l + shift


@triton.jit
def aligned_part(offset, vocabulary, A: tl.constexpr):
    """(start, stop) of the whole 16-byte pieces inside the row, from the aligned pointer."""
    stop = offset + vocabulary
    first = tl.minimum((offset + (A - 1)) // A * A, stop)
    last = tl.maximum(stop // A * A, first)
    return first, last


@triton.jit
def whole_pieces(n, A: tl.constexpr):
    """n, a multiple of A, written so that the compiler sees it. (`tl.multiple_of` is an attribute of
    the operation that made n, and is lost when that is rewritten.)"""
    return n // A * A


@triton.jit
def edge_positions(offset, first, last, vocabulary, A: tl.constexpr):
    """(v, mask) of the elements of the row outside its aligned part, in 2 A lanes."""
    j = tl.arange(0, 2 * A)
    head = j < A
    at = tl.where(head, offset + j, last + j - A)
    mask = tl.where(head, at < first, at < offset + vocabulary)
    return (at - offset).to(tl.int32), mask


@triton.jit
def tile_positions(LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


# ------------------------------------------------------------------------- device: statistics of a row


@triton.jit
def merge(m, z, e, m2, z2, e2, k):
    """Two partial (max, sum of weights, sum of weights x (c - max)) as one."""
    top = tl.maximum(m, m2)
    f = finite(top)
    a = tl.exp2((m - f) * k)
    b = tl.exp2((m2 - f) * k)
    e = times(a, e + times(z, m - f)) + times(b, e2 + times(z2, m2 - f))
    return top, z * a + z2 * b, e


@triton.jit
def row_partial(
    ptr, offset, vocabulary, first_segment, last_segment, tiles_per_segment, k, cap,
    skip_ptr, topk,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SKIP: tl.constexpr, KP: tl.constexpr,
    A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(max, sum, sum x (c - max)) over segments [first, last) of a row; the edge counts as segment 0's.

    SKIP leaves out the ``topk`` ids at ``skip_ptr``, which are sorted.
    """
    first, last = aligned_part(offset, vocabulary, A)
    m = tl.full([], float("-inf"), tl.float32)
    z = tl.full([], 0.0, tl.float32)
    e = tl.full([], 0.0, tl.float32)
    if first_segment == 0:
        v, edge = edge_positions(offset, first, last, vocabulary, A)
        if SKIP:
            j = tl.arange(0, KP)
            ids = tl.load(skip_ptr + j, mask=j < topk, other=-1)
            hit = tl.sum((ids[:, None] == v[None, :]).to(tl.int32), 0) > 0
            edge = edge & (hit == 0)
        x = load_c(ptr + offset + v, edge, cap, HAS_CAP)
        m = tl.max(x, 0)
        w = tl.exp2((x - finite(m)) * k)
        z = tl.sum(w, 0)
        if ENTROPY:
            e = tl.sum(times(w, x - finite(m)), 0)
    n = whole_pieces((last - first).to(tl.int32), A)
    start = ptr + whole_pieces(first, A)
    lead = (first - offset).to(tl.int32)
    at = tile_positions(LANES, VEC)
    for segment in range(first_segment, last_segment):
        lm = tl.full([LANES], float("-inf"), tl.float32)
        lz = tl.zeros([LANES], tl.float32)
        le = tl.zeros([LANES], tl.float32)
        begin = segment * tiles_per_segment * (LANES * VEC)
        end = tl.minimum(begin + tiles_per_segment * (LANES * VEC), n)
        following = 0
        if SKIP:
            while (following < topk) & (
                tl.load(skip_ptr + following, mask=following < topk, other=0) < lead + begin
            ):
                following += 1
        for o in range(begin, end, LANES * VEC):
            c = o + at
            mask = c < n
            if SKIP:
                keep = mask
                while (following < topk) & (
                    tl.load(skip_ptr + following, mask=following < topk, other=0)
                    < lead + o + LANES * VEC
                ):
                    keep = keep & (c + lead != tl.load(skip_ptr + following))
                    following += 1
                x = load_c(start + c, mask, cap, HAS_CAP)
                x = tl.where(keep, x, NEG_INF)
            else:
                x = load_c(start + c, mask, cap, HAS_CAP)
            top = tl.maximum(lm, tl.max(x, 1))
            f = finite(top)
            a = tl.exp2((lm - f) * k)
            w = tl.exp2((x - f[:, None]) * k)
            if ENTROPY:
                le = times(a, le + times(lz, lm - f)) + tl.sum(times(w, x - f[:, None]), 1)
            lz = lz * a + tl.sum(w, 1)
            lm = top
        top = tl.max(lm, 0)
        f = finite(top)
        a = tl.exp2((lm - f) * k)
        if ENTROPY:
            le = times(a, le + times(lz, lm - f))
        m, z, e = merge(m, z, e, top, tl.sum(lz * a, 0), tl.sum(le, 0), k)
    return m, z, e


@triton.jit
def log_prob(c, row_max, row_log2sum, k):
    """Of one token, in nats."""
    return ((c - row_max) * k - row_log2sum) * LN2


@triton.jit
def log_ratio(student, teacher):
    """teacher - student; 0 where both are -inf."""
    return tl.where((student == NEG_INF) & (teacher == NEG_INF), 0.0, teacher - student)


@triton.jit
def coefficient(weight, student_logp, old_ptr, row, is_clip, HAS_OLD: tl.constexpr):
    """weight x clipped importance ratio."""
    if HAS_OLD:
        d = student_logp - tl.load(old_ptr + row)
        d = tl.minimum(tl.maximum(d, -20.0), 20.0)
        weight = weight * tl.minimum(tl.exp2(d * LOG2E), is_clip)
    return weight


# ---------------------------------------------------------------------------------------------- host


class Rows(NamedTuple):
    """A tensor [B, L, V] as the kernels take it: a 16-byte aligned pointer and where rows start."""

    pointer: Tensor
    shift: int
    stride_b: int
    stride_l: int
    aligned: bool

    def phase(self) -> tuple[int, int, int]:
        return tuple(n % ALIGNMENT for n in (self.shift, self.stride_b, self.stride_l))


def rows_of(tensor: Tensor) -> Rows:
    size = tensor.element_size()
    unit = ALIGNMENT * size
    if tensor.numel() == 0:
        return Rows(tensor, 0, 0, 0, True)
    shift = (tensor.data_ptr() % unit) // size
    aligned = tensor.storage_offset() >= shift and tensor.data_ptr() % size == 0
    if not aligned:  # memory of another library that does not start on a boundary
        return Rows(tensor, 0, tensor.stride(0), tensor.stride(1), False)
    pointer = tensor.detach().as_strided((1,), (1,), tensor.storage_offset() - shift)
    return Rows(pointer, shift, tensor.stride(0), tensor.stride(1), True)


def same_phase(*rows: Rows) -> bool:
    """Whether the rows start at the same place of a 16-byte piece in all tensors, whatever the row."""
    return all(r.aligned for r in rows) and len({r.phase() for r in rows}) == 1


def segments_of(vocabulary: int) -> tuple[int, int]:
    """(number of segments, tiles per segment) of a row: by V alone, so that sums never differ."""
    tiles = -(-vocabulary // TILE)
    segments = max(1, min(MAX_SEGMENTS, tiles // TILES_PER_SEGMENT))
    tiles_per_segment = -(-tiles // segments)
    return -(-tiles // tiles_per_segment), tiles_per_segment


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_rows(rows: int, segments: int, device: torch.device) -> bool:
    """Few rows leave processors idle: one program per segment then."""
    forced = os.environ.get("FASTSDPO_TRITON_SPLIT")
    if forced is not None:
        return forced == "1" and segments > 1
    return segments > 1 and rows < processors(device)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return nullcontext()


def scale_of(temperature: float) -> float:
    """k = log2(e) / temperature."""
    return LOG2E.value / temperature


LAUNCH = {"LANES": LANES, "VEC": VEC, "A": ALIGNMENT, "num_warps": NUM_WARPS}
