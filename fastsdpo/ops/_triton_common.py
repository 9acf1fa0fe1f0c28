"""What the Triton kernels share: tiles, loads, row statistics; and on the host, layouts and launches.

A row. One program owns one row. Elements of a row lie at ``ptr + offset + v``; the kernel walks over
the part between the first and the last 16-byte boundary inside the row in tiles of LANES x VEC
elements, 16 bytes per access whatever V and the strides are, and takes the at most 2 (A - 1)
elements outside it (A = 8 elements) in one narrow access, the "edge". The pointers that come in are
16-byte aligned; what is lost to that is in the row's ``shift``.

Statistics. A lane is the VEC elements of one 16-byte access and lives in one thread. Each lane keeps
its own running maximum and sums; lanes are reduced once per segment, so the loops hold no barrier
and no shuffle. A row has a fixed number of segments (a function of V alone), added up in order. For
few rows a segment is a program of its own and a second launch adds them up in the same order: the
same bits.

Everything is float32 and in units of log2: a weight is 2^((c - max) k), k = log2(e) / temperature.
Maxima start at the lowest finite float32: c - max is then -inf for a masked token, and never NaN.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch parameters, the same on every machine. 8 warps, and per thread and tile 16 elements; 8 where
# the arithmetic needs the registers: two tensors at once, a softcap, top-k with its gradient. Within
# 64 registers (4 programs of 8 warps per processor) that is what compiles with the fewest spills.
NUM_WARPS = int(os.environ.get("FASTSDPO_TRITON_WARPS", "8"))
ELEMENTS = int(os.environ.get("FASTSDPO_TRITON_ELEMENTS", "16"))
MAX_REGISTERS = 64
ALIGNMENT = 8  # elements; 16 bytes of a 2-byte dtype, 32 bytes of float32
SEGMENTS, TILES_PER_SEGMENT = 8, 4
MAX_TILES_PER_SEGMENT = (
    32  # one bit each, where top-k marks the tiles that hold a token of the support
)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# What only NVIDIA's compiler takes, as inline assembly: an approximate log2 (2^-22 relative; tl.log2
# expands to about 30 instructions for subnormals and rounding), and two bfloat16 widened by two
# instructions instead of three.
FAST = not INTERPRETED and torch.version.hip is None

NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)
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
def times(weight, value):
    """weight * value with 0 * anything = 0; NaN in the weight stays."""
    return weight * tl.where(weight == 0.0, 0.0, value)


@triton.jit
def log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def widen(z, FAST: tl.constexpr):
    """A loaded tile in float32."""
    if FAST and z.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [z], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return z.to(tl.float32)


@triton.jit
def capped(z, cap, HAS_CAP: tl.constexpr):
    """c = cap * tanh(z / cap); -inf stays -inf. tanh by exp2, near 0 by its series."""
    if HAS_CAP:
        x = z * (1.0 / cap)
        # 2^large is inf and 2^-large is 0: the ends are 1 and -1 without a clamp.
        far = 1.0 - 2.0 * (1.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E))))
        s = x * x
        near = x + x * (s * (-0.3333333333 + s * (0.1333333333 + s * -0.0539682540)))
        t = tl.where(s < 0.04, near, far)
        return tl.where(z == NEG_INF, z, cap * t)
    else:
        return z


@triton.jit
def slope(c, cap, HAS_CAP: tl.constexpr):
    """dc/dz, 0 for a masked token."""
    if HAS_CAP:
        t = c * (1.0 / cap)
        return tl.where(c == NEG_INF, 0.0, 1.0 - t * t)
    else:
        return 1.0


@triton.jit
def load_c(ptr, mask, cap, HAS_CAP: tl.constexpr):
    """Capped logits, -inf outside the mask: single ones, and edges."""
    return capped(tl.load(ptr, mask=mask, other=NEG_INF).to(tl.float32), cap, HAS_CAP)


@triton.jit
def load_tile(ptr, mask, cap, HAS_CAP: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr):
    """Capped logits of a tile; without MASKED all of it is inside the row."""
    if MASKED:
        z = tl.load(ptr, mask=mask, other=NEG_INF)
    else:
        z = tl.load(ptr)
    return capped(widen(z, FAST), cap, HAS_CAP)


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
    a = tl.exp2((m - top) * k)
    b = tl.exp2((m2 - top) * k)
    e = times(a, e + times(z, m - top)) + times(b, e2 + times(z2, m2 - top))
    return top, z * a + z2 * b, e


@triton.jit
def absorb(x, m, z, e, k, ENTROPY: tl.constexpr):
    """A tile [LANES, VEC] into the lanes' (max, sum, sum x (c - max))."""
    top = tl.maximum(m, tl.max(x, 1))
    a = tl.exp2((m - top) * k)
    d = x - top[:, None]
    w = tl.exp2(d * k)
    if ENTROPY:  # d is at most 0, and -inf only where w is 0
        e = times(a, e + times(z, m - top)) + tl.sum(w * tl.maximum(d, LOWEST), 1)
    return top, z * a + tl.sum(w, 1), e


@triton.jit
def skipped_lanes(
    ids, skip_ptr, begin, end, lead, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Per lane, bit t set where it holds an id of the support in tile t of elements [begin, end)."""
    lane = tl.arange(0, LANES)
    lanes = tl.zeros([LANES], tl.int32)
    from_id = tl.sum((ids < lead + begin).to(tl.int32), 0)
    to_id = tl.sum((ids < lead + end).to(tl.int32), 0)
    for j in range(from_id, to_id):
        at = (tl.load(skip_ptr + j) - lead - begin).to(tl.int32)
        bit = tl.full([], 1, tl.int32) << (at // (LANES * VEC))
        lanes = lanes | tl.where(lane == at % (LANES * VEC) // VEC, bit, 0)
    return lanes


@triton.jit
def row_partial(
    ptr, offset, vocabulary, first_segment, last_segment, tiles_per_segment, k, cap,
    skip_ptr, topk,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SKIP: tl.constexpr, KP: tl.constexpr,
    FAST: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(max, sum, sum x (c - max)) over segments [first, last) of a row; the edge counts as segment 0's.

    SKIP leaves out the ``topk`` sorted ids at ``skip_ptr``: in the edge each by itself, in the tiles
    with their whole lanes, whose other elements `skipped_rest` adds.
    """
    first, last = aligned_part(offset, vocabulary, A)
    n = whole_pieces((last - first).to(tl.int32), A)
    start = ptr + whole_pieces(first, A)
    lead = (first - offset).to(tl.int32)
    at = tile_positions(LANES, VEC)
    ids = tl.full([KP], -1, tl.int32)
    if SKIP:
        slot = tl.arange(0, KP)
        ids = tl.load(skip_ptr + slot, mask=slot < topk, other=2**31 - 1).to(tl.int32)
    m = tl.full([], LOWEST, tl.float32)
    z = tl.full([], 0.0, tl.float32)
    e = tl.full([], 0.0, tl.float32)
    if first_segment == 0:
        v, edge = edge_positions(offset, first, last, vocabulary, A)
        if SKIP:
            hit = tl.sum((ids[:, None] == v[None, :]).to(tl.int32), 0)
            edge = edge & (hit == 0)
        x = load_c(ptr + offset + v, edge, cap, HAS_CAP)
        m = tl.maximum(tl.max(x, 0), LOWEST)
        d = x - m
        w = tl.exp2(d * k)
        z = tl.sum(w, 0)
        if ENTROPY:
            e = tl.sum(w * tl.maximum(d, LOWEST), 0)
    for segment in range(first_segment, last_segment):
        lm = tl.full([LANES], LOWEST, tl.float32)
        lz = tl.zeros([LANES], tl.float32)
        le = tl.zeros([LANES], tl.float32)
        begin = segment * tiles_per_segment * (LANES * VEC)
        end = tl.minimum(begin + tiles_per_segment * (LANES * VEC), n)
        if SKIP:
            skip = skipped_lanes(ids, skip_ptr, begin, end, lead, LANES, VEC)
            for o in range(begin, end, LANES * VEC):
                keep = ((skip & 1) == 0)[:, None] & (o + at < n)
                x = load_tile(start + o + at, keep, cap, HAS_CAP, True, FAST)
                lm, lz, le = absorb(x, lm, lz, le, k, False)
                skip = skip >> 1
        else:
            whole = begin + tl.maximum(end - begin, 0) // (LANES * VEC) * (LANES * VEC)
            for o in range(begin, whole, LANES * VEC):
                x = load_tile(start + o + at, None, cap, HAS_CAP, False, FAST)
                lm, lz, le = absorb(x, lm, lz, le, k, ENTROPY)
            if whole < end:
                x = load_tile(start + whole + at, whole + at < n, cap, HAS_CAP, True, FAST)
                lm, lz, le = absorb(x, lm, lz, le, k, ENTROPY)
        top = tl.max(lm, 0)
        a = tl.exp2((lm - top) * k)
        if ENTROPY:
            le = times(a, le + times(lz, lm - top))
        m, z, e = merge(m, z, e, top, tl.sum(lz * a, 0), tl.sum(le, 0), k)
    return m, z, e


@triton.jit
def skipped_rest(
    ptr, offset, vocabulary, m, z, k, cap, skip_ptr, topk,
    HAS_CAP: tl.constexpr, A: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(max, sum) with the elements outside the support of the lanes that `row_partial` skipped."""
    first, last = aligned_part(offset, vocabulary, A)
    lead = first - offset
    n = last - first
    for begin in range(0, topk, 32):
        j = begin + tl.arange(0, 32)
        id = tl.load(skip_ptr + j, mask=j < topk, other=-1) - lead
        before = tl.load(skip_ptr + j - 1, mask=(j > 0) & (j < topk), other=-1) - lead
        # A lane counts once, for the first of its ids. (Division rounds towards 0.)
        keep = (j < topk) & (id >= 0) & (id < n) & ((before < 0) | (before // VEC != id // VEC))
        at = (id // VEC * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        inside = at < 0
        for further in tl.static_range(VEC):
            other = tl.load(skip_ptr + j + further, mask=j + further < topk, other=-1) - lead
            inside = inside | (at == other[:, None])
        x = load_c(ptr + first + at, keep[:, None] & (inside == 0), cap, HAS_CAP)
        top = tl.maximum(m, tl.max(tl.max(x, 1), 0))
        z = z * tl.exp2((m - top) * k) + tl.sum(tl.sum(tl.exp2((x - top) * k), 1), 0)
        m = top
    return m, z


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


def segments_of(vocabulary: int, tile: int) -> tuple[int, int]:
    """(number of segments, tiles per segment) of a row: by V alone, so that sums never differ."""
    tiles = -(-vocabulary // tile)
    segments = max(1, min(SEGMENTS, tiles // TILES_PER_SEGMENT))
    tiles_per_segment = min(-(-tiles // segments), MAX_TILES_PER_SEGMENT)
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


def launch(*element_sizes: int, heavy: bool = False) -> dict[str, Any]:
    """Tile shape and warps for tensors of these element sizes; ``heavy`` halves the tile."""
    vec = 16 // min(element_sizes)  # a lane is one 16-byte access of the narrowest
    elements = ELEMENTS // 2 if heavy else ELEMENTS
    lanes = elements * 32 * NUM_WARPS // vec
    warps = NUM_WARPS // 2 if torch.version.hip else NUM_WARPS  # 64 threads each: as many in all
    options = {"LANES": lanes, "VEC": vec, "A": ALIGNMENT, "FAST": FAST, "num_warps": warps}
    # The compiler's own choice is now and then 32 registers and a spill.
    return {**options, "maxnreg": MAX_REGISTERS} if FAST else options


def tile_of(options: dict[str, Any]) -> int:
    return options["LANES"] * options["VEC"]
