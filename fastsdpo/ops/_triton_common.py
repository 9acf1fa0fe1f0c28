"""What the Triton kernels share: tiles, loads, row statistics; and on the host, layouts and launches.

A row. One program owns one row. Elements of a row lie at ``ptr + offset + v``; the pointers that come in
are 16-byte aligned, and what is lost to that is in the row's ``shift``. The kernel walks over the row in
tiles of LANES x VEC elements, 16 bytes per access whatever V and the strides are.

Statistics. A row has a fixed number of segments, a function of V alone. A segment's tiles begin at the
16-byte boundary at or before it, ``phase`` elements early; what its first and last piece hold of others is
read and left out. Every place of a tile, a "slot", has its own running sum, so that an element v is added
to the sum of v modulo the tile, in order, wherever the row lies: another phase only turns the slots round.
At the segment's end all slots are added in integers (`sum_slots`), where order changes nothing. The loops
hold no barrier and no shuffle. Segments' sums go through a few numbers of memory per row and are added up in
order; for few rows a segment is a program of its own and a second launch adds up: the same bits.

So a row's results are the same bits whatever the number and order of rows, their strides and their
alignment. (Not of other launch parameters: a softcap, or entropy asked for, has other tiles.)

Two rows at once. One leads: its boundaries are the tiles'. A row that starts at another place of a
16-byte piece is read in pairs of aligned accesses and moved into place in registers (`load_shifted`).
Every element still comes from memory once (the second access of a pair hits the L1 cache), but is loaded
twice. For gradients, whose stores must not touch a neighbour, the row's elements outside its whole pieces
(2 A more, A = 8, beside a shifted row) are taken in one narrow access, the "edge".

Reads whose value does not count. A row's first and last 16-byte pieces are read whole. So up to 14 bytes of
bfloat16 (12 of float32) beyond the end of the logits' storage are read: PyTorch's allocator rounds storages
up to 512 bytes, but compute-sanitizer reports it where it allocates each tensor by itself. Where gradients
overwrite the logits, such a read can meet another program's store to the neighbouring row; every warp reads
the edge, which one warp stores; and where the teacher's row needs shifted accesses, the student's is read in
pairs as well, of which the second is not used but can meet the next warp's store. These are races by the
letter. What is read there is replaced by -inf or not used, or its result is not stored, so no value depends
on it.

Weights. Everything is float32 and in units of log2: a weight is 2^((c - r) k), k = log2(e) / temperature,
beside a reference logit r known before the row is read: the larger of the target's and the first 64
tokens'; for top-k, the lowest of the support instead of the target's.
With it the loops keep no maximum and rescale nothing: per element they widen, subtract, multiply, take an
exponential, add. Of logits near the reference c - r is exact, whatever constant a row has on all of them; r
itself has weight 1, so a certain token's probability is 1 to the last bit. Exponents are exact enough while
the row's maximum is at most 2^16 times as likely as the reference, twice if it has nearly all of the
probability: a segment that sums to more in one slot is marked and then summed again beside its maximum (two
more passes over a segment, from a cache, where the target has less than e^-11 of the best token's
probability, or less than half of a token's that is all but certain).
What leaves a row's statistics is the logit of probability 1 (`normalizer`): beside it the exponents of likely
tokens are small again. Masked tokens have weight 0; a NaN makes all of its row's results NaN.
"""

from __future__ import annotations

import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch parameters, the same on every machine. 8 warps, and per thread and tile 16 elements; 8 where the
# arithmetic or the slots need the registers: a softcap, entropy, top-k with its gradient or in float32,
# shifted accesses of float32, gradients of two tensors; one access of each tensor for joint statistics.
# Within 64 registers (4 programs of 8 warps per processor) all of that compiles without spills
# (benchmarks/compile_matrix.py).
NUM_WARPS = int(os.environ.get("FASTSDPO_TRITON_WARPS", "8"))
ELEMENTS = int(os.environ.get("FASTSDPO_TRITON_ELEMENTS", "16"))
MAX_REGISTERS = 64
ALIGNMENT = 8  # elements; 16 bytes of a 2-byte dtype, 32 bytes of float32
SEGMENTS, TILES_PER_SEGMENT = 8, 4
MAX_TILES_PER_SEGMENT = 32  # what `sum_slots` has room for

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# What only NVIDIA's compiler takes, as inline assembly: an approximate log2 (2^-22 relative; tl.log2
# expands to about 30 instructions for subnormals and rounding), and two bfloat16 widened by two
# instructions instead of three.
FAST = not INTERPRETED and torch.version.hip is None

# Loops over segments keep what they need from being computed before them and held in registers, where
# the version of Triton can be told so (3.2 cannot; it also spills where a row is read in shifted accesses).
STAYS = tl.constexpr("disable_licm" in inspect.signature(tl.range.__init__).parameters)

NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
THREADS = tl.constexpr(32 * NUM_WARPS)
INFINITY_BITS = tl.constexpr(0x7F800000)  # of a float32
AGAIN = tl.constexpr(float("inf"))  # in the place of a segment's reference
# A slot's sum of weights that calls for a better reference: exponents up to 16 are rounded by 2^-21. What
# has all but 2^-6 of its segment's sum does so from 2 on: of certain tokens the last bits count. (For
# float32 2^4 and 2^-2 halve the error that is left, but likely targets too then cost up to two more passes.)
TOO_LARGE, NEARLY_ALL = tl.constexpr(2.0**16), tl.constexpr(1.0 - 2.0**-6)
TOO_SMALL = tl.constexpr(2.0**-60)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)

# Arguments whose values never compile another variant.
RUNTIME = (
    "n_l", "vocabulary", "segments", "pieces", "s_shift", "s_b", "s_l", "t_shift", "t_b",
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
    """log2 of x >= SMALLEST_NORMAL. FAST takes what is smaller for 0 and gives -inf."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x for x >= 1, to 2^-23: one instruction, where a division expands to six."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def plus(a, b, FAST: tl.constexpr):
    """a + b, kept from being paired with another addition: pairs of registers, which sm_100 adds at once, do
    not fit into 64."""
    if FAST:
        return tl.inline_asm_elementwise(
            "add.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a + b


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
def capped(z, cap, HAS_CAP: tl.constexpr, FAST: tl.constexpr):
    """c = cap * tanh(z / cap); -inf stays -inf. By exp2, near 0 by a polynomial beside z itself."""
    if HAS_CAP:
        x = z * (1.0 / cap)
        # 2^large is inf and 2^-large is 0: the ends are cap and -cap without a clamp.
        far = tl.fma(reciprocal(1.0 + tl.exp2(x * (2.0 * LOG2E)), FAST), -2.0 * cap, cap)
        s = x * x
        # (tanh(x) / x - 1) / s, of least relative error for |x| < 0.7: 2^-26 of tanh(x).
        near = 0.02011166 + s * -0.00515511
        near = 0.13329243 + s * (-0.05356699 + s * near)
        near = tl.fma(z * s, -0.33333197 + s * near, z)
        return tl.where(z == NEG_INF, z, tl.where(s < 0.49, near, far))
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
def load_c(ptr, mask, cap, HAS_CAP: tl.constexpr, FAST: tl.constexpr):
    """Capped logits, -inf outside the mask: single ones, and edges."""
    return capped(tl.load(ptr, mask=mask, other=NEG_INF).to(tl.float32), cap, HAS_CAP, FAST)


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
    return capped(widen(z, FAST, SINGLY), cap, HAS_CAP, FAST)


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
    ptr, o, low, high, by, cap,
    HAS_CAP: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Capped logits of the tile at o, of a row whose tiles start ``by`` elements behind the boundary
    ``ptr``: two 16-byte accesses side by side, moved into place within the thread's registers. (The
    second one is the next thread's first: it comes from the L1 cache.) MASKED reads no access from ``high``
    on, 2 none before ``low`` either: elements counted from ``ptr``."""
    kind: tl.constexpr = ptr.dtype.element_ty
    PER_WORD: tl.constexpr = VEC // 4
    words = ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    at = o // VEC * 4 + tile_positions(LANES, 4)
    if MASKED:  # -inf in all elements of a word
        nothing: tl.constexpr = (
            0xFF80FF80 if kind == tl.bfloat16 else 0xFC00FC00 if kind == tl.float16 else 0xFF800000
        )
        last = high // VEC * 4
        next_last = last
        if MASKED == 2:  # only what holds an element of the row
            last = (high + (VEC - 1)) // VEC * 4
            next_last = last - 4
        mask = at < last
        next_mask = at < next_last
        if MASKED == 2:
            mask = mask & (at >= low // VEC * 4)
            next_mask = next_mask & (at >= low // VEC * 4 - 4)
        here = tl.load(words + at, mask=mask, other=nothing)
        beyond = tl.load(words + at + 4, mask=next_mask, other=nothing)
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
    elif FAST and kind == tl.float16:
        even, odd = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        x = tl.join(even, odd)
    elif kind == tl.float16:
        x = tl.join(
            (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
            (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
        )
    else:
        x = word.to(tl.float32, bitcast=True)
    return capped(tl.reshape(x, [here.shape[0], here.shape[1], VEC]), cap, HAS_CAP, FAST)


@triton.jit
def load_beside(
    start, o, at, n, by, cap,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, SINGLY: tl.constexpr = False,
):  # fmt: skip
    """Capped logits at o of the row that `beside` gave."""
    if BESIDE == 1:
        return load_shifted(start, o, 0, n, by, cap, HAS_CAP, FAST, MASKED, LANES, VEC)
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
def per_slot(value, LANES: tl.constexpr, VEC: tl.constexpr):
    """A running value of each place in a tile."""
    WIDTH: tl.constexpr = LANES if LANES < THREADS else THREADS
    return tl.full([LANES // WIDTH, WIDTH, VEC], value, tl.float32)


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
def opaque(x, FAST: tl.constexpr):
    """x, an integer, of which the compiler knows no more. What it knows of segments, it keeps sums of in
    registers all along."""
    if FAST:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return x


@triton.jit
def segment_bounds(segment, pieces, phase, vocabulary, A: tl.constexpr, FAST: tl.constexpr):
    """(begin, low, high): elements [low, high) of a segment and where its tiles begin, counted from the
    16-byte boundary at or before the row's start, ``phase`` elements before it. Nothing: begin = high."""
    begin = segment * pieces * A
    low = begin + phase
    high = tl.minimum(begin + pieces * A, vocabulary) + phase
    return begin, low, tl.where(low < high, high, begin)


@triton.jit
def whole_tiles(first, high, BESIDE: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Where the tiles from ``first`` on end that are all inside the segment, and with them the second
    access of a shifted pair."""
    TILE: tl.constexpr = LANES * VEC
    end = high
    if BESIDE == 1:
        end = high - VEC
    return first + tl.maximum(end - first, 0) // TILE * TILE


@triton.jit
def power_of_two(n):
    """2^n for an integer n of -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def whole_number(x):
    """x, |x| < 2^22, rounded: (as float32, as int32). Adding 1.5 x 2^23 leaves no place for a fraction."""
    y = x + 12582912.0
    return y - 12582912.0, y.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def largest_bits(x):
    """Of each thread, the bits of its largest |x|; more than an infinity's where one is NaN."""
    return thread_max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def bits_of(x):
    return tl.full([], x, tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def in_parts(x, largest):
    """(power, high, low) of each thread, the sum of whose x is 2^-power (high + 2^-18 low): integers, so
    that the order in which all threads' are added changes no bit. ``largest``: the bits of the largest |x|,
    to 2^-37 of which each x is exact. A tile has at most 2^13 places."""
    up = tl.minimum(tl.maximum(144 - (largest >> 23), -126), 100)
    x = x * power_of_two(up)
    whole, high = whole_number(x)
    _, low = whole_number((x - whole) * 262144.0)
    return up, thread_sum(high), thread_sum(low)


@triton.jit
def from_parts(up, high, low, largest):
    """The sum of which all threads' parts have been added up; inf or NaN where the largest is."""
    total = high.to(tl.float32) * power_of_two(-up) + low.to(tl.float32) * power_of_two(-up - 18)
    return tl.where(largest < INFINITY_BITS, total, largest.to(tl.float32, bitcast=True))


@triton.jit
def total_2(a, b):
    """Both summed over the threads; jointly, as every reduction takes a register all through the loop around
    it: it is compiled to a load that only some threads do."""
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def joined_4(a, b, c, d):
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def split_4(abcd):
    ab, cd = tl.split(abcd)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def total_4(a, b, c, d):
    return split_4(tl.sum(joined_4(a, b, c, d), 0))


@triton.jit
def largest_2(a, b):
    """The largest of both over the threads."""
    return tl.split(tl.max(tl.join(a, b), 0))


@triton.jit
def largest_4(a, b, c, d):
    return split_4(tl.max(joined_4(a, b, c, d), 0))


@triton.jit
def sum_slots(x):
    """(sum of all of x, the bits of the largest |x|)."""
    largest = tl.max(largest_bits(x), 0)
    up, high, low = in_parts(x, largest)
    high, low = total_2(high, low)
    return from_parts(up, high, low, largest), largest


@triton.jit
def sum_slots_2(x, y):
    """((sum, bits of the largest) of x, of y)."""
    x_largest, y_largest = largest_2(largest_bits(x), largest_bits(y))
    x_up, x_high, x_low = in_parts(x, x_largest)
    y_up, y_high, y_low = in_parts(y, y_largest)
    x_high, x_low, y_high, y_low = total_4(x_high, x_low, y_high, y_low)
    return (
        from_parts(x_up, x_high, x_low, x_largest), x_largest,
        from_parts(y_up, y_high, y_low, y_largest), y_largest,
    )  # fmt: skip


@triton.jit
def first_max(ptr, width, cap, HAS_CAP: tl.constexpr, FAST: tl.constexpr):
    v = tl.arange(0, 64)
    return tl.max(load_c(ptr + v, v < width, cap, HAS_CAP, FAST), 0)


@triton.jit
def reference_of(ptr, target, width, live, cap, HAS_CAP: tl.constexpr, FAST: tl.constexpr):
    """A logit of the row that is likely to be near its maximum: the largest of the target's and the first
    tokens'."""
    first = first_max(ptr, width, cap, HAS_CAP, FAST)
    return tl.maximum(load_c(ptr + target, live, cap, HAS_CAP, FAST), first)


@triton.jit
def well_placed(largest, total):
    """Whether weights that add up to ``total`` are exact enough: ``largest`` are the bits of a slot's sum."""
    slot = largest.to(tl.float32, bitcast=True)
    return (slot < TOO_LARGE) & (slot < tl.maximum(total * NEARLY_ALL, 2.0))


@triton.jit
def has_bit(bits, VEC: tl.constexpr):
    """[accesses, threads, VEC] of bits 0 to VEC - 1 of [accesses, threads]."""
    element = tl.arange(0, VEC)[None, None, :].to(tl.uint32)
    return ((bits[:, :, None] >> element) & 1) != 0


@triton.jit
def inside_part(o, low, high, LANES: tl.constexpr, VEC: tl.constexpr):
    """Which elements of the tile at o are in [low, high): comparisons of constants with a number per access,
    where the elements' positions would each take a register."""
    WIDTH: tl.constexpr = LANES if LANES < THREADS else THREADS
    access = (
        tl.arange(0, LANES // WIDTH)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, :, None]
    )
    element = tl.arange(0, VEC)[None, None, :]
    at = o + access * VEC
    return (element >= low - at) & (element < high - at)


@triton.jit
def load_part(
    start, o, at, low, high, cap,
    HAS_CAP: tl.constexpr, ALIGNED: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, SINGLY: tl.constexpr = False,
):  # fmt: skip
    """Capped logits of a tile, -inf outside [low, high). Of a 16-byte piece that lies half in the row all
    is read: such a piece never reaches beyond the memory that the tensor's allocation has."""
    v = o + at
    inside = inside_part(o, low, high, LANES, VEC)
    if ALIGNED:
        z = tl.load(start + v, mask=v < (high + (VEC - 1)) // VEC * VEC, other=NEG_INF)
    else:
        z = tl.load(start + v, mask=inside, other=NEG_INF)
    return tl.where(inside, capped(widen(z, FAST, SINGLY), cap, HAS_CAP, FAST), NEG_INF)


@triton.jit
def beside_row(ptr, offset, phase, BESIDE: tl.constexpr, A: tl.constexpr, VEC: tl.constexpr):
    """(start, by) of the tiles in a row that is read beside one which starts ``phase`` elements behind a
    boundary: as `beside`, for statistics."""
    at = offset - phase + A
    if BESIDE == 0:
        return ptr + (whole_pieces(at, A) - A), 0
    elif BESIDE == 1:
        return ptr + (at // VEC * VEC - A), (at % VEC).to(tl.int32)
    else:
        return ptr + (at - A), 0


@triton.jit
def load_part_beside(
    start, o, at, low, high, by, cap,
    HAS_CAP: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, SINGLY: tl.constexpr = False,
):  # fmt: skip
    """`load_part` of the row that `beside_row` gave."""
    if BESIDE == 1:
        x = load_shifted(start, o, low + by, high + by, by, cap, HAS_CAP, FAST, 2, LANES, VEC)
        return tl.where(inside_part(o, low, high, LANES, VEC), x, NEG_INF)
    else:
        return load_part(
            start, o, at, low, high, cap, HAS_CAP, BESIDE == 0, FAST, LANES, VEC, SINGLY
        )


@triton.jit
def absorb(
    x, m, z, e, reference, k, ENTROPY: tl.constexpr, WHAT: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """A tile [accesses, threads, VEC] into the slots' sums, or (WHAT = 2) the threads' maxima."""
    if WHAT == 2:
        return tl.maximum(m, thread_max(x)), z, e
    else:
        t = (x - reference) * k
        w = tl.exp2(t)
        if ENTROPY:  # t is -inf only where w is 0
            e += w * tl.maximum(t, LOWEST)
        return m, plus(z, w, FAST), e


@triton.jit
def support_bits(
    ids, skip_ptr, begin, low, high, phase, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """[accesses, threads]: VEC bits for each of the 32 / VEC tiles from ``begin`` on, set for ids of the
    support and for what is outside [low, high)."""
    TILE: tl.constexpr = LANES * VEC
    WIDTH: tl.constexpr = LANES if LANES < THREADS else THREADS
    access = tl.arange(0, LANES // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    one = tl.full([], 1, tl.uint32)
    bits = tl.zeros([LANES // WIDTH, WIDTH], tl.uint32)
    if low > begin:  # the row's start: less than A elements
        before = tl.minimum(tl.maximum(low - begin - access * VEC, 0), VEC)
        bits = bits | ((one << before.to(tl.uint32)) - 1)
    end = tl.minimum(begin + 32 // VEC * TILE, high)
    if (end == high) & (high % VEC != 0):
        at = high - begin
        rest = ((one << VEC) - (one << (at % VEC).to(tl.uint32))) << (at // TILE * VEC).to(
            tl.uint32
        )
        bits = bits | tl.where(access == at % TILE // VEC, rest, 0)
    from_id, to_id = total_2(
        (ids < tl.maximum(begin, low) - phase).to(tl.int32), (ids < end - phase).to(tl.int32)
    )
    for j in range(from_id, to_id):
        at = tl.load(skip_ptr + j).to(tl.int32) + (phase - begin)
        bit = one << (at // TILE * VEC + at % VEC).to(tl.uint32)
        bits = bits | tl.where(access == at % TILE // VEC, bit, 0)
    return bits


@triton.jit
def row_segment(
    start, begin, low, high, phase, ids, reference, k, cap, skip_ptr,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SKIP: tl.constexpr, WHAT: tl.constexpr,
    ALIGNED: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(max, slots' sums, slots' sums of weights x their log2) over elements [low, high): WHAT = 0 the sums,
    1 the sums by less code, one loop for all tiles, 2 the maximum by as little."""
    TILE: tl.constexpr = LANES * VEC
    at = tile_positions(LANES, VEC)
    m = per_thread(LOWEST, LANES)
    z = per_slot(0.0, LANES, VEC)
    e = per_slot(0.0, LANES, VEC)
    if SKIP:
        for group in range(begin, high, 32 // VEC * TILE):
            bits = support_bits(ids, skip_ptr, group, low, high, phase, LANES, VEC)
            for o in range(group, tl.minimum(group + 32 // VEC * TILE, high), TILE):
                keep = has_bit(bits, VEC) == 0
                v = o + at
                if ALIGNED:
                    c = tl.load(start + v, mask=v < (high + (VEC - 1)) // VEC * VEC, other=NEG_INF)
                else:
                    c = tl.load(start + v, mask=keep & (v < high), other=NEG_INF)
                x = tl.where(keep, capped(widen(c, FAST), cap, HAS_CAP, FAST), NEG_INF)
                m, z, e = absorb(x, m, z, e, reference, k, False, WHAT, FAST)
                bits = bits >> VEC
    else:
        whole = begin
        if WHAT == 0:
            whole = tl.minimum(begin + TILE, high)
            for o in range(begin, whole, TILE):  # one, or none
                x = load_part(start, o, at, low, high, cap, HAS_CAP, ALIGNED, FAST, LANES, VEC)
                m, z, e = absorb(x, m, z, e, reference, k, ENTROPY, WHAT, FAST)
            first = begin + TILE
            whole = first + tl.maximum(high - first, 0) // TILE * TILE
            for o in range(first, whole, TILE):
                x = load_tile(start + o + at, None, cap, HAS_CAP, False, FAST)
                m, z, e = absorb(x, m, z, e, reference, k, ENTROPY, WHAT, FAST)
        for o in range(whole, high, TILE):
            x = load_part(start, o, at, low, high, cap, HAS_CAP, ALIGNED, FAST, LANES, VEC)
            m, z, e = absorb(x, m, z, e, reference, k, ENTROPY, WHAT, FAST)
    return tl.max(m, 0), z, e


@triton.jit
def store_segment(
    out_ptr, start, phase, vocabulary, segment, pieces, ids, k, cap, skip_ptr,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SKIP: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr, FAST: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Stores the sum and the sum of weights x their log2 of a segment behind the reference, which is there
    already (kept, it would take a register from the sums of tiles); AGAIN for it where another one is
    needed."""
    segment = opaque(segment, FAST)
    begin, low, high = segment_bounds(segment, pieces, phase, vocabulary, A, FAST)
    out = out_ptr + segment * STEP
    if begin < high:
        _, z, e = row_segment(
            start, begin, low, high, phase, ids, tl.load(out), k, cap, skip_ptr, HAS_CAP, ENTROPY, SKIP, 0,
            ALIGNED, FAST, LANES, VEC,
        )  # fmt: skip
        if ENTROPY:
            z_sum, largest, e_sum, _ = sum_slots_2(z, e)
            tl.store(out + 2, e_sum)
        else:
            z_sum, largest = sum_slots(z)
        well = well_placed(largest, z_sum)
        if SKIP:  # the reference may be of the support, and far above all else
            well = well & (largest > bits_of(TOO_SMALL))
        if not well:
            tl.store(out, AGAIN)
        tl.store(out + 1, z_sum)
    else:
        store_nothing(out, 2 + ENTROPY)


@triton.jit
def store_segment_again(
    out_ptr, start, phase, vocabulary, segment, pieces, ids, k, cap, skip_ptr,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SKIP: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr, FAST: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums the segment beside its own maximum, if `store_segment` asked for it."""
    out = out_ptr + segment * STEP
    if tl.load(out) == AGAIN:
        segment = opaque(segment, FAST)
        begin, low, high = segment_bounds(segment, pieces, phase, vocabulary, A, FAST)
        top, _, _ = row_segment(
            start, begin, low, high, phase, ids, 0.0, k, cap, skip_ptr, HAS_CAP, ENTROPY, SKIP, 2,
            ALIGNED, FAST, LANES, VEC,
        )  # fmt: skip
        _, z, e = row_segment(
            start, begin, low, high, phase, ids, top, k, cap, skip_ptr, HAS_CAP, ENTROPY, SKIP, 1,
            ALIGNED, FAST, LANES, VEC,
        )  # fmt: skip
        if ENTROPY:
            z_sum, _, e_sum, _ = sum_slots_2(z, e)
            tl.store(out + 2, e_sum)
        else:
            z_sum, _ = sum_slots(z)
        tl.store(out, top)
        tl.store(out + 1, z_sum)


@triton.jit
def row_partial(
    out_ptr, ptr, offset, vocabulary, first_segment, last_segment, pieces, reference, k, cap, skip_ptr, topk,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SKIP: tl.constexpr, KP: tl.constexpr,
    STEP: tl.constexpr, ALIGNED: tl.constexpr, FAST: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Stores (reference, sum, sum of weights x their log2) of segments [first, last) of a row, each at
    ``out_ptr`` + STEP x segment. ``reference``: a logit that is near the row's maximum, or not. SKIP leaves
    out the ``topk`` sorted ids at ``skip_ptr``."""
    start = ptr + whole_pieces(offset, A)
    phase = (offset % A).to(tl.int32)
    ids = tl.full([KP], -1, tl.int32)
    if SKIP:
        slot = tl.arange(0, KP)
        ids = tl.load(skip_ptr + slot, mask=slot < topk, other=2**31 - 1).to(tl.int32)
    for segment in range(first_segment, last_segment):
        tl.store(out_ptr + segment * STEP, reference)
    tl.debug_barrier()  # what was stored is read, by other threads as well
    if STAYS:
        for segment in tl.range(first_segment, last_segment, disable_licm=True):
            store_segment(
                out_ptr, start, phase, vocabulary, segment, pieces, ids, k, cap, skip_ptr,
                HAS_CAP, ENTROPY, SKIP, STEP, ALIGNED, FAST, A, LANES, VEC,
            )  # fmt: skip
        tl.debug_barrier()
        for segment in tl.range(first_segment, last_segment, disable_licm=True):
            store_segment_again(
                out_ptr, start, phase, vocabulary, segment, pieces, ids, k, cap, skip_ptr,
                HAS_CAP, ENTROPY, SKIP, STEP, ALIGNED, FAST, A, LANES, VEC,
            )  # fmt: skip
    else:
        for segment in range(first_segment, last_segment):
            store_segment(
                out_ptr, start, phase, vocabulary, segment, pieces, ids, k, cap, skip_ptr,
                HAS_CAP, ENTROPY, SKIP, STEP, ALIGNED, FAST, A, LANES, VEC,
            )  # fmt: skip
        tl.debug_barrier()
        for segment in range(first_segment, last_segment):
            store_segment_again(
                out_ptr, start, phase, vocabulary, segment, pieces, ids, k, cap, skip_ptr,
                HAS_CAP, ENTROPY, SKIP, STEP, ALIGNED, FAST, A, LANES, VEC,
            )  # fmt: skip


@triton.jit
def store_nothing(ptr, N: tl.constexpr):
    """The partial statistics of a segment without elements."""
    tl.store(ptr, LOWEST)
    for i in tl.static_range(1, N):
        tl.store(ptr + i, 0.0)


@triton.jit
def merged(ptr, segments, k, ENTROPY: tl.constexpr, STEP: tl.constexpr):
    """What `row_partial` stored, added up in order."""
    m = tl.full([], LOWEST, tl.float32)
    z = tl.full([], 0.0, tl.float32)
    e = tl.full([], 0.0, tl.float32)
    for segment in range(0, segments):
        at = ptr + segment * STEP
        other = tl.full([], 0.0, tl.float32)
        if ENTROPY:
            other = tl.load(at + 2)
        m, z, e = merge(m, z, e, tl.load(at), tl.load(at + 1), other, k)
    return m, z, e


@triton.jit
def normalizer(m, z, inv_temperature, k):
    """(c, rest): 2^((x - c) k - rest) is the probability of x, for the sum z of weights beside m. ``c`` is
    the logit of probability 1, so that the exponents of likely tokens are small and exact; ``rest`` what
    rounding c lost. (m, log2(z)) where z is 0, infinite or NaN."""
    power = (z.to(tl.int32, bitcast=True) >> 23) - 127
    power = tl.minimum(tl.maximum(power, -126), 126)
    fraction = tl.log2(z * power_of_two(-power))
    whole = power.to(tl.float32)
    up = (whole + fraction) * LN2 / inv_temperature
    c = m + up
    moved = c - m
    lost = (m - (c - moved)) + (up - moved)  # c + lost = m + up
    rest = tl.fma(lost, k, tl.fma(-up, k, whole) + fraction)
    good = (z > 0.0) & (z < float("inf"))
    return tl.where(good, c, m), tl.where(good, rest, tl.log2(z))


@triton.jit
def log_prob(c, row_max, row_log2sum, inv_temperature):
    """Of one token, in nats."""
    return tl.fma(c - row_max, inv_temperature, -(row_log2sum * LN2))


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
    """(number of segments, length of each in units of ALIGNMENT elements) of a row: by V alone, so that
    sums never differ. A segment is a unit shorter than its tiles, wherever in a unit the row starts."""
    wanted = max(1, min(SEGMENTS, vocabulary // (tile * TILES_PER_SEGMENT)))
    tiles = -(-(-(-vocabulary // wanted) + ALIGNMENT) // tile)
    length = min(tiles, MAX_TILES_PER_SEGMENT) * tile - ALIGNMENT
    return max(1, -(-vocabulary // length)), length // ALIGNMENT


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


def launch(
    *element_sizes: int, heavy: bool = False, joint: bool = False, beside: int = SAME_PHASE
) -> dict[str, Any]:
    """Tile shape and warps for tensors of these element sizes; ``heavy`` halves the tile, and so do
    shifted accesses of float32. ``joint`` passes (over two rows; float32 with its gradient) take one access
    of each tensor."""
    vec = 16 // min(element_sizes)  # a lane is one 16-byte access of the narrowest
    heavy = heavy or (beside == SHIFTED_BESIDE and vec == 4)
    elements = vec if joint else ELEMENTS // 2 if heavy else ELEMENTS
    lanes = elements * 32 * NUM_WARPS // vec
    warps = NUM_WARPS // 2 if torch.version.hip else NUM_WARPS  # 64 threads each: as many in all
    options = {"LANES": lanes, "VEC": vec, "A": ALIGNMENT, "FAST": FAST, "num_warps": warps}
    options["enable_fp_fusion"] = True  # the default, until Triton 3.10
    # The compiler's own choice is now and then 32 registers and a spill.
    return {**options, "maxnreg": MAX_REGISTERS} if FAST else options


def tile_of(options: dict[str, Any]) -> int:
    return options["LANES"] * options["VEC"]
