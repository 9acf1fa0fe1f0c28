"""What the Triton kernels share: tiles, loads, row statistics; and on the host, layouts and launches.

A row. One program owns one row. Elements of a row lie at ``ptr + offset + v``; the kernel walks over
the part between the first and the last 16-byte boundary inside the row in tiles of LANES x VEC
elements, 16 bytes per access whatever V and the strides are, and takes the at most 2 (A - 1)
elements outside it (A = 8 elements) in one narrow access, the "edge". The pointers that come in are
16-byte aligned; what is lost to that is in the row's ``shift``.

Two rows at once. One leads: its boundaries are the tiles'. A row that starts at another place of a
16-byte piece is read in pairs of aligned accesses and moved into place in registers (`load_shifted`);
the edge is then 2 A wider, so that no access reaches beyond the row. Every element still comes from
memory once (the second access of a pair hits the L1 cache), but is loaded twice.

Statistics. Each thread keeps its own running maximum and sums of the one to four accesses that it has
in a tile; threads are reduced once per segment, so the loops hold no barrier and no shuffle. A row has
a fixed number of segments (a function of V alone), added up in order. For few rows a segment is a
program of its own and a second launch adds them up in the same order: the same bits.

So a row's results are the same bits whatever the number and order of rows and wherever it lies, as long
as it starts at the same place of a 16-byte piece (V and strides that are multiples of 8 elements: always
so). At another place the tiles begin elsewhere and sums differ in their last bits. To have the same bits
there too, every row that is off a boundary would be read in shifted accesses: twice the loads and 2 more
instructions per element for 7 of 8 rows of an odd vocabulary.

Everything is float32 and in units of log2: a weight is 2^((c - max) k), k = log2(e) / temperature. Maxima
start at the lowest finite float32: c - max is then -inf for a masked token, and never NaN. The loops
spend one fused multiply-add on the exponent, c k - shift, where the shift is the largest c k as rounded.
At the end of a segment a thread divides its sums by its own maximum's weight, so a certain token's
probability is 1 to the last bit. The shift's rounding is harmless as long as it is far below 1: a segment
whose maximum is beyond 2^19 / k is summed again with (c - max) k. (A softcap's tanh drowns what this
saves: with it, (c - max) k at once.)
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
# the arithmetic needs the registers: two tensors at once, a softcap, top-k with its gradient or in
# float32, shifted accesses of float32. Within 64 registers (4 programs of 8 warps per processor) that
# compiles without spills, but for JSD's fused kernel on shifted float32 rows for sm_100.
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
THREADS = tl.constexpr(32 * NUM_WARPS)
FAR = tl.constexpr(524288.0)  # 2^19: a shift up to it is rounded by at most 2^-6

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
def widen(z, FAST: tl.constexpr, SINGLY: tl.constexpr = False):
    """A loaded tile in float32. SINGLY keeps the compiler from converting pairs of float16 and working on
    in pairs of registers, which saves instructions but takes registers that not every loop has."""
    if FAST and z.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [z], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    elif FAST and (SINGLY and z.dtype == tl.float16):
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=f,=f,r", [z], dtype=tl.float32, is_pure=True, pack=2,
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
def load_tile(
    ptr, mask, cap, HAS_CAP: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
    SINGLY: tl.constexpr = False,
):  # fmt: skip
    """Capped logits of a tile; without MASKED all of it is inside the row."""
    if MASKED:
        z = tl.load(ptr, mask=mask, other=NEG_INF)
    else:
        z = tl.load(ptr)
    return capped(widen(z, FAST, SINGLY), cap, HAS_CAP)


@triton.jit
def words_of(tile):
    """The four columns of a tile [accesses, threads, 4]."""
    pairs = tl.reshape(tile, [tile.shape[0], tile.shape[1], 2, 2])
    even, odd = tl.split(pairs)
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def bit_mask(bit):
    """All ones for 1, zeros for 0."""
    return (0 - bit).to(tl.uint32, bitcast=True)


@triton.jit
def either(mask, a, b):
    """a where the mask is ones, b where it is zeros: one instruction, where a selection takes two."""
    return b ^ ((a ^ b) & mask)


@triton.jit
def shifted_word(w, w_next, bits):
    """32 bits from bit ``bits`` (0 or 16) on."""
    return (((w_next.to(tl.uint64) << 32) | w.to(tl.uint64)) >> bits).to(tl.uint32)


@triton.jit
def load_shifted(
    ptr, o, n, by, cap,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Capped logits of the tile at o, of a row whose tiles start ``by`` elements behind the boundary
    ``ptr``: two 16-byte accesses side by side, moved into place within the thread's registers. (The
    second one is the next thread's first: it comes from the L1 cache.)"""
    kind: tl.constexpr = ptr.dtype.element_ty
    PER_WORD: tl.constexpr = VEC // 4
    words = ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    at = o // VEC * 4 + tile_positions(LANES, 4)
    if MASKED:  # -inf in all elements of a word
        nothing: tl.constexpr = (
            0xFF80FF80 if kind == tl.bfloat16 else 0xFC00FC00 if kind == tl.float16 else 0xFF800000
        )
        mask = at < n // VEC * 4
        here = tl.load(words + at, mask=mask, other=nothing)
        beyond = tl.load(words + at + 4, mask=mask, other=nothing)
    else:
        here = tl.load(words + at)
        beyond = tl.load(words + at + 4)
    w0, w1, w2, w3 = words_of(here)
    w4, w5, w6, w7 = words_of(beyond)
    two = bit_mask(by // PER_WORD // 2 % 2)
    w0, w1, w2 = either(two, w2, w0), either(two, w3, w1), either(two, w4, w2)
    w3, w4, w5 = either(two, w5, w3), either(two, w6, w4), either(two, w7, w5)
    one = bit_mask(by // PER_WORD % 2)
    w0, w1, w2 = either(one, w1, w0), either(one, w2, w1), either(one, w3, w2)
    w3, w4 = either(one, w4, w3), either(one, w5, w4)
    if PER_WORD == 2:
        bits = (by % 2 * 16).to(tl.uint64)
        w0, w1, w2, w3 = (
            shifted_word(w0, w1, bits), shifted_word(w1, w2, bits), shifted_word(w2, w3, bits),
            shifted_word(w3, w4, bits),
        )  # fmt: skip
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if kind == tl.bfloat16:
        x = tl.join(
            (word << 16).to(tl.float32, bitcast=True),
            (word & 0xFFFF0000).to(tl.float32, bitcast=True),
        )
    elif kind == tl.float16:
        x = tl.join(
            (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
            (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
        )
    else:
        x = word.to(tl.float32, bitcast=True)
    return capped(tl.reshape(x, [here.shape[0], here.shape[1], VEC]), cap, HAS_CAP)


@triton.jit
def load_beside(
    start, o, at, n, by, cap,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, SINGLY: tl.constexpr = False,
):  # fmt: skip
    """Capped logits at o of the row that `beside` gave."""
    if BESIDE == 1:
        return load_shifted(start, o, n, by, cap, HAS_CAP, MASKED, LANES, VEC)
    else:
        return load_tile(start + o + at, o + at < n, cap, HAS_CAP, MASKED, FAST, SINGLY)


@triton.jit
def row_offset(row, n_l, shift, stride_b, stride_l):
    """First element of a row; 64-bit, rows over two axes."""
    return (row // n_l) * stride_b + (row % n_l) * stride_l + shift


@triton.jit
def aligned_part(offset, vocabulary, BESIDE: tl.constexpr, A: tl.constexpr):
    """(start, stop) of the whole 16-byte pieces inside the row, from the aligned pointer. One less at
    either end where another row is read in shifted accesses beside it: they then stay inside that row."""
    stop = offset + vocabulary
    first = (offset + (A - 1)) // A * A
    last = stop // A * A
    if BESIDE == 1:
        first += A
        last -= A
    first = tl.minimum(first, stop)
    return first, tl.maximum(last, first)


@triton.jit
def whole_pieces(n, A: tl.constexpr):
    """n, a multiple of A, written so that the compiler sees it. (`tl.multiple_of` is an attribute of
    the operation that made n, and is lost when that is rewritten.)"""
    return n // A * A


@triton.jit
def edge_positions(offset, first, last, vocabulary, BESIDE: tl.constexpr, A: tl.constexpr):
    """(v, mask) of the elements of the row outside its aligned part, in 2 A lanes (4 A)."""
    SIDE: tl.constexpr = 2 * A if BESIDE == 1 else A
    j = tl.arange(0, 2 * SIDE)
    head = j < SIDE
    at = tl.where(head, offset + j, last + j - SIDE)
    mask = tl.where(head, at < first, at < offset + vocabulary)
    return (at - offset).to(tl.int32), mask


@triton.jit
def tile_positions(LANES: tl.constexpr, VEC: tl.constexpr):
    """[accesses of a thread, threads, VEC], in the order of memory."""
    WIDTH: tl.constexpr = LANES if LANES < THREADS else THREADS
    access = tl.arange(0, LANES // WIDTH)[:, None, None]
    thread = tl.arange(0, WIDTH)[None, :, None]
    return (access * WIDTH + thread) * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def beside(ptr, offset, lead, BESIDE: tl.constexpr, A: tl.constexpr, VEC: tl.constexpr):
    """(start, by) of the tiles in a row that is read beside the leading one, ``lead`` elements after its
    start: the start of an access, and how many elements behind it the tiles begin."""
    at = offset + lead
    if BESIDE == 0:
        return ptr + whole_pieces(at, A), 0
    elif BESIDE == 1:
        return ptr + at // VEC * VEC, (at % VEC).to(tl.int32)
    else:
        return ptr + at, 0


@triton.jit
def per_thread(value, LANES: tl.constexpr):
    """A running value of each thread."""
    WIDTH: tl.constexpr = LANES if LANES < THREADS else THREADS
    return tl.full([WIDTH], value, tl.float32)


@triton.jit
def thread_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def thread_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


# ------------------------------------------------------------------------- device: statistics of a row


@triton.jit
def merge(m, z, e, m2, z2, e2, k):
    """Two partial (max, sum of weights, sum of weights x their log2) as one."""
    top = tl.maximum(m, m2)
    u = (m - top) * k
    v = (m2 - top) * k
    a = tl.exp2(u)
    b = tl.exp2(v)
    e = times(a, e + times(z, u)) + times(b, e2 + times(z2, v))
    return top, z * a + z2 * b, e


@triton.jit
def exponents(x, top, m, shift, k, EXACT: tl.constexpr):
    """For a tile with the threads' maxima ``top``: (log2 of its weights, the new maxima and shifts, log2 of
    the factor of what was summed before)."""
    new_m = tl.maximum(m, top)
    if EXACT:
        return (x - new_m[None, :, None]) * k, new_m, shift, (m - new_m) * k
    else:
        new_shift = tl.maximum(shift, top * k)
        return tl.fma(x, k, -new_shift[None, :, None]), new_m, new_shift, shift - new_shift


@triton.jit
def absorb(x, m, shift, z, e, k, ENTROPY: tl.constexpr, EXACT: tl.constexpr):
    """A tile [accesses, threads, VEC] into the threads' (max, shift, sum, sum of weights x their log2)."""
    t, m, shift, change = exponents(x, thread_max(x), m, shift, k, EXACT)
    a = tl.exp2(change)
    w = tl.exp2(t)
    if ENTROPY:  # t is -inf only where w is 0
        e = times(a, e + times(z, change)) + thread_sum(w * tl.maximum(t, LOWEST))
    return m, shift, z * a + thread_sum(w), e


@triton.jit
def own_weight(m, shift, k):
    """(log2 of the weight that a thread's maximum has in its sums, what divides them by that weight)."""
    t = tl.fma(m, k, -shift)
    w = tl.exp2(t)
    return t, tl.where(w == 0.0, 1.0, w)  # 0: the thread has summed zeros only


@triton.jit
def skipped_accesses(
    ids, skip_ptr, begin, end, lead, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """[accesses, threads]: bit t set where the access holds an id of the support in tile t of elements
    [begin, end)."""
    WIDTH: tl.constexpr = LANES if LANES < THREADS else THREADS
    access = tl.arange(0, LANES // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    bits = tl.zeros([LANES // WIDTH, WIDTH], tl.int32)
    from_id = tl.sum((ids < lead + begin).to(tl.int32), 0)
    to_id = tl.sum((ids < lead + end).to(tl.int32), 0)
    for j in range(from_id, to_id):
        at = (tl.load(skip_ptr + j) - lead - begin).to(tl.int32)
        bit = tl.full([], 1, tl.int32) << (at // (LANES * VEC))
        bits = bits | tl.where(access == at % (LANES * VEC) // VEC, bit, 0)
    return bits


@triton.jit
def row_segment(
    start, begin, end, n, ids, lead, k, cap, skip_ptr,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SKIP: tl.constexpr, EXACT: tl.constexpr,
    FAST: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(max, sum, sum of weights x their log2) of each thread over elements [begin, end)."""
    at = tile_positions(LANES, VEC)
    m = per_thread(LOWEST, LANES)
    shift = per_thread(-2.0 * FAR, LANES)
    z = per_thread(0.0, LANES)
    e = per_thread(0.0, LANES)
    if SKIP:
        skip = skipped_accesses(ids, skip_ptr, begin, end, lead, LANES, VEC)
        for o in range(begin, end, LANES * VEC):
            keep = ((skip & 1) == 0)[:, :, None] & (o + at < n)
            x = load_tile(start + o + at, keep, cap, HAS_CAP, True, FAST)
            m, shift, z, e = absorb(x, m, shift, z, e, k, False, EXACT)
            skip = skip >> 1
    else:
        whole = begin
        if not EXACT:
            whole = begin + tl.maximum(end - begin, 0) // (LANES * VEC) * (LANES * VEC)
            for o in range(begin, whole, LANES * VEC):
                x = load_tile(start + o + at, None, cap, HAS_CAP, False, FAST)
                m, shift, z, e = absorb(x, m, shift, z, e, k, ENTROPY, EXACT)
        for o in range(whole, end, LANES * VEC):
            x = load_tile(start + o + at, o + at < n, cap, HAS_CAP, True, FAST)
            m, shift, z, e = absorb(x, m, shift, z, e, k, ENTROPY, EXACT)
    if not EXACT:
        t, w = own_weight(m, shift, k)
        if ENTROPY:
            e = (e - times(z, t)) / w
        z = z / w
    return m, z, e


@triton.jit
def row_partial(
    ptr, offset, vocabulary, first_segment, last_segment, tiles_per_segment, k, cap,
    skip_ptr, topk,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SKIP: tl.constexpr, KP: tl.constexpr,
    FAST: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    EXACT: tl.constexpr = False,
):  # fmt: skip
    """(max, sum, sum of weights x their log2) over segments [first, last) of a row; the edge counts as
    segment 0's.

    SKIP leaves out the ``topk`` sorted ids at ``skip_ptr``: in the edge each by itself, in the tiles
    with the whole access, whose other elements `skipped_rest` adds.
    """
    first, last = aligned_part(offset, vocabulary, 0, A)
    n = whole_pieces((last - first).to(tl.int32), A)
    start = ptr + whole_pieces(first, A)
    lead = (first - offset).to(tl.int32)
    ids = tl.full([KP], -1, tl.int32)
    if SKIP:
        slot = tl.arange(0, KP)
        ids = tl.load(skip_ptr + slot, mask=slot < topk, other=2**31 - 1).to(tl.int32)
    m = tl.full([], LOWEST, tl.float32)
    z = tl.full([], 0.0, tl.float32)
    e = tl.full([], 0.0, tl.float32)
    if first_segment == 0:
        v, edge = edge_positions(offset, first, last, vocabulary, 0, A)
        if SKIP:
            hit = tl.sum((ids[:, None] == v[None, :]).to(tl.int32), 0)
            edge = edge & (hit == 0)
        x = load_c(ptr + offset + v, edge, cap, HAS_CAP)
        m = tl.maximum(tl.max(x, 0), LOWEST)
        t = (x - m) * k
        w = tl.exp2(t)
        z = tl.sum(w, 0)
        if ENTROPY:
            e = tl.sum(w * tl.maximum(t, LOWEST), 0)
    for segment in range(first_segment, last_segment):
        begin = segment * tiles_per_segment * (LANES * VEC)
        end = tl.minimum(begin + tiles_per_segment * (LANES * VEC), n)
        lm, lz, le = row_segment(
            start, begin, end, n, ids, lead, k, cap, skip_ptr, HAS_CAP, ENTROPY, SKIP,
            HAS_CAP or EXACT, FAST, LANES, VEC,
        )  # fmt: skip
        top = tl.max(lm, 0)
        if not (HAS_CAP or EXACT):  # noqa: SIM102 (known when compiling; the next is not)
            if (tl.abs(top) * k >= FAR) & (begin < end):
                lm, lz, le = row_segment(
                    start, begin, end, n, ids, lead, k, cap, skip_ptr, HAS_CAP, ENTROPY, SKIP,
                    True, FAST, LANES, VEC,
                )  # fmt: skip
        u = (lm - top) * k
        a = tl.exp2(u)
        if ENTROPY:
            le = times(a, le + times(lz, u))
        m, z, e = merge(m, z, e, top, tl.sum(lz * a, 0), tl.sum(le, 0), k)
    return m, z, e


@triton.jit
def skipped_rest(
    ptr, offset, vocabulary, m, z, k, cap, skip_ptr, topk,
    HAS_CAP: tl.constexpr, A: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(max, sum) with the elements outside the support of the accesses that `row_partial` skipped."""
    first, last = aligned_part(offset, vocabulary, 0, A)
    lead = first - offset
    n = last - first
    for begin in range(0, topk, 32):
        j = begin + tl.arange(0, 32)
        id = tl.load(skip_ptr + j, mask=j < topk, other=-1) - lead
        before = tl.load(skip_ptr + j - 1, mask=(j > 0) & (j < topk), other=-1) - lead
        # An access counts once, for the first of its ids. (Division rounds towards 0.)
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


SAME_PHASE, SHIFTED_BESIDE, ELEMENTS_BESIDE = 0, 1, 2


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


def beside_of(*rows: Rows) -> int:
    """How rows are read beside one another: at the same place of a 16-byte piece whatever the row (0); in
    shifted accesses (1); element by element, where memory or dtypes rule that out (2)."""
    if not all(r.aligned for r in rows):
        return ELEMENTS_BESIDE
    if len({r.phase() for r in rows}) == 1:
        return SAME_PHASE
    one_size = len({r.pointer.element_size() for r in rows}) == 1
    return SHIFTED_BESIDE if one_size else ELEMENTS_BESIDE


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


def launch(*element_sizes: int, heavy: bool = False, beside: int = SAME_PHASE) -> dict[str, Any]:
    """Tile shape and warps for tensors of these element sizes; ``heavy`` halves the tile, and so do
    shifted accesses of float32."""
    vec = 16 // min(element_sizes)  # a lane is one 16-byte access of the narrowest
    heavy = heavy or (beside == SHIFTED_BESIDE and vec == 4)
    elements = ELEMENTS // 2 if heavy else ELEMENTS
    lanes = elements * 32 * NUM_WARPS // vec
    warps = NUM_WARPS // 2 if torch.version.hip else NUM_WARPS  # 64 threads each: as many in all
    options = {"LANES": lanes, "VEC": vec, "A": ALIGNMENT, "FAST": FAST, "num_warps": warps}
    # The compiler's own choice is now and then 32 registers and a spill.
    return {**options, "maxnreg": MAX_REGISTERS} if FAST else options


def tile_of(options: dict[str, Any]) -> int:
    return options["LANES"] * options["VEC"]
