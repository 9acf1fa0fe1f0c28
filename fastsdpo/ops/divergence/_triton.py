"""Triton kernels of the divergences: forward KL, reverse KL, Jensen-Shannon, and over a top-k support.

One program per row (or per segment of a row, where rows are few); tiles, alignment and sums as in
`fastsdpo.ops._triton_common`. A KL is summed with the softmax statistics in one pass over both rows, as the
mean difference of the logits, each less its own row's reference, so that a constant on all of a row's
logits costs no digits. It is put together from the normalizers that the gradient has, so that in the
gradient's log-ratio less KL their roundings cancel. Jensen-Shannon needs the normalized probabilities
first, so it takes a second pass. Top-k walks each row once, leaving the support out of the sums, and
gathers the K tokens of the support by their ids.

    bytes per element in bfloat16, forward + backward:  KL 10, JSD 14, top-k 8

Student and teacher are read at the same v. One row's alignment leads (the student's, or the gradient's
where one is written); a row that starts at another place of a 16-byte piece is read beside it in pairs of
aligned accesses, shifted into place in registers.
The sampled-token loss lives in `ops/token_logps/_triton.py`: it needs the statistics only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsdpo.ops._triton_common import (
    AGAIN,
    LN2,
    LOG2E,
    LOWEST,
    NEG_INF,
    RUNTIME,
    SMALLEST_NORMAL,
    STAYS,
    beside,
    beside_of,
    beside_row,
    coefficient,
    edge_positions,
    first_max,
    from_parts,
    in_parts,
    largest_2,
    largest_4,
    largest_bits,
    launch,
    load_beside,
    load_c,
    load_part,
    load_part_beside,
    load_tile,
    log2,
    log_prob,
    merged,
    normalizer,
    on_device,
    opaque,
    per_slot,
    per_thread,
    plus,
    reference_of,
    row_offset,
    row_partial,
    rows_of,
    scale_of,
    segment_bounds,
    segments_of,
    slope,
    splits_rows,
    store_nothing,
    sum_slots_2,
    thread_max,
    tile_of,
    tile_positions,
    times,
    total_2,
    total_4,
    well_placed,
    whole_pieces,
    whole_tiles,
)
from fastsdpo.ops.token_logps import _triton as token_kernels
from fastsdpo.ops.token_logps._triton import (
    FINISH,
    PARTIAL,
    WHOLE,
    gradient_bounds,
    gradient_grid,
    store_tile,
    zero_tile,
)

FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2


@triton.jit
def merge_pair(sm, sz, tm, tz, d, sm2, sz2, tm2, tz2, d2, k, MODE: tl.constexpr):
    """Two partial (maxima, sums, sum of weights x (own - other)) of a pair of rows as one.

    The weights are the teacher's for forward KL, the student's for reverse KL; own and other are logits
    beside the maxima, with which they move.
    """
    s_top = tl.maximum(sm, sm2)
    t_top = tl.maximum(tm, tm2)
    s = sm - s_top
    s2 = sm2 - s_top
    t = tm - t_top
    t2 = tm2 - t_top
    a = tl.exp2(s * k)
    b = tl.exp2(s2 * k)
    p = tl.exp2(t * k)
    q = tl.exp2(t2 * k)
    if MODE == 0:
        d = times(p, d + times(tz, t - s)) + times(q, d2 + times(tz2, t2 - s2))
    if MODE == 1:
        d = times(a, d + times(sz, s - t)) + times(b, d2 + times(sz2, s2 - t2))
    return s_top, sz * a + sz2 * b, t_top, tz * p + tz2 * q, d


@triton.jit
def load_pair(
    s_start, t_start, t_by, o, at, low, high, cap,
    HAS_CAP: tl.constexpr, WHOLE_TILE: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, SINGLY: tl.constexpr = False,
):  # fmt: skip
    """Both rows' tiles at o, -inf outside [low, high); a WHOLE_TILE is inside."""
    if WHOLE_TILE:
        x = load_tile(s_start + o + at, None, cap, HAS_CAP, False, FAST, SINGLY)
        y = load_beside(
            t_start, o, at, 0, t_by, cap, HAS_CAP, False, BESIDE, FAST, LANES, VEC, SINGLY
        )
    else:
        x = load_part(
            s_start, o, at, low, high, cap, HAS_CAP, BESIDE != 2, FAST, LANES, VEC, SINGLY
        )
        y = load_part_beside(
            t_start, o, at, low, high, t_by, cap, HAS_CAP, BESIDE, FAST, LANES, VEC, SINGLY
        )
    return x, y


@triton.jit
def absorb_pair(
    x, y, sz, tz, d, s_reference, t_reference, k, MODE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Tiles [accesses, threads, VEC] of both rows into the slots' sums. What is weighed are logits less their
    row's reference, mostly exact: scaled, they would be rounded, and the reverse KL with them."""
    s = x - s_reference
    t = y - t_reference
    ws = tl.exp2(s * k)
    wt = tl.exp2(t * k)
    if MODE == 0:
        d = plus(d, times(wt, t - s), FAST)
    else:
        d = plus(d, times(ws, s - t), FAST)
    return plus(sz, ws, FAST), plus(tz, wt, FAST), d


@triton.jit
def pair_tiles(
    sz, tz, d, first, end, s_start, t_start, t_by, low, high, s_reference, t_reference, k, cap,
    HAS_CAP: tl.constexpr, MODE: tl.constexpr, WHOLE_TILES: tl.constexpr, BESIDE: tl.constexpr,
    FAST: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The slots' sums with the tiles from ``first`` to ``end``."""
    at = tile_positions(LANES, VEC)
    for o in range(first, end, LANES * VEC):
        x, y = load_pair(
            s_start, t_start, t_by, o, at, low, high, cap, HAS_CAP, WHOLE_TILES, BESIDE, FAST, LANES, VEC,
        )  # fmt: skip
        sz, tz, d = absorb_pair(x, y, sz, tz, d, s_reference, t_reference, k, MODE, FAST)
    return sz, tz, d


@triton.jit
def pair_segment(
    s_start, t_start, t_by, begin, low, high, s_reference, t_reference, k, cap,
    HAS_CAP: tl.constexpr, MODE: tl.constexpr, BRIEF: tl.constexpr, BESIDE: tl.constexpr,
    FAST: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Joint sums of each slot over elements [low, high). BRIEF code has one loop for all tiles."""
    TILE: tl.constexpr = LANES * VEC
    sz = per_slot(0.0, LANES, VEC)
    tz = per_slot(0.0, LANES, VEC)
    d = per_slot(0.0, LANES, VEC)
    whole = begin
    # With 8 slots, a softcap leaves no registers for what two more loops keep: all tiles are masked ones.
    if not (BRIEF or (HAS_CAP and VEC > 4)):
        first = begin + TILE
        whole = whole_tiles(first, high, BESIDE, LANES, VEC)
        sz, tz, d = pair_tiles(  # one, or none
            sz, tz, d, begin, tl.minimum(first, high), s_start, t_start, t_by, low, high, s_reference,
            t_reference, k, cap, HAS_CAP, MODE, False, BESIDE, FAST, LANES, VEC,
        )  # fmt: skip
        sz, tz, d = pair_tiles(
            sz, tz, d, first, whole, s_start, t_start, t_by, low, high, s_reference,
            t_reference, k, cap, HAS_CAP, MODE, True, BESIDE, FAST, LANES, VEC,
        )  # fmt: skip
    return pair_tiles(
        sz, tz, d, whole, high, s_start, t_start, t_by, low, high, s_reference,
        t_reference, k, cap, HAS_CAP, MODE, False, BESIDE, FAST, LANES, VEC,
    )  # fmt: skip


@triton.jit
def pair_max(
    s_start, t_start, t_by, begin, low, high, cap,
    HAS_CAP: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Both rows' maxima over elements [low, high)."""
    at = tile_positions(LANES, VEC)
    sm = per_thread(LOWEST, LANES)
    tm = per_thread(LOWEST, LANES)
    for o in range(begin, high, LANES * VEC):
        x, y = load_pair(
            s_start, t_start, t_by, o, at, low, high, cap, HAS_CAP, False, BESIDE, FAST, LANES, VEC
        )
        sm = tl.maximum(sm, thread_max(x))
        tm = tl.maximum(tm, thread_max(y))
    return largest_2(sm, tm)


@triton.jit
def pair_sums(sz, tz, d):
    """(sum, bits of the largest) of both rows' weights, and the sum of d."""
    zero = tl.zeros(largest_bits(d).shape, tl.int32)
    # +inf stays; -inf, which an overflow alone can make, is as good as NaN.
    signed = tl.where(d == NEG_INF, float("nan"), d)
    s_largest, t_largest, largest, _ = largest_4(
        largest_bits(sz), largest_bits(tz), largest_bits(signed), zero
    )
    up, high, low = in_parts(d, largest)
    high, low = total_2(high, low)
    s_up, s_high, s_low = in_parts(sz, s_largest)
    t_up, t_high, t_low = in_parts(tz, t_largest)
    s_high, s_low, t_high, t_low = total_4(s_high, s_low, t_high, t_low)
    return (
        from_parts(s_up, s_high, s_low, s_largest), s_largest,
        from_parts(t_up, t_high, t_low, t_largest), t_largest, from_parts(up, high, low, largest),
    )  # fmt: skip


@triton.jit
def store_pair(
    out_ptr, s_start, t_start, t_by, phase, vocabulary, segment, pieces, k, cap,
    HAS_CAP: tl.constexpr, MODE: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """`store_segment` of both rows: (reference, sum) of each and the sum of weights x the difference of the
    logits beside their references, own - other. The references are there already: kept, they would take
    registers from the sums of tiles."""
    segment = opaque(segment, FAST)
    begin, low, high = segment_bounds(segment, pieces, phase, vocabulary, A, FAST)
    out = out_ptr + segment * 5
    if begin < high:
        sz, tz, d = pair_segment(
            s_start, t_start, t_by, begin, low, high, tl.load(out), tl.load(out + 2), k, cap,
            HAS_CAP, MODE, False, BESIDE, FAST, LANES, VEC,
        )  # fmt: skip
        s_sum, s_largest, t_sum, t_largest, d_sum = pair_sums(sz, tz, d)
        if not (well_placed(s_largest, s_sum) & well_placed(t_largest, t_sum)):
            tl.store(out, AGAIN)
        tl.store(out + 1, s_sum)
        tl.store(out + 3, t_sum)
        tl.store(out + 4, d_sum)
    else:
        store_nothing(out, 2)
        store_nothing(out + 2, 3)


@triton.jit
def store_pair_again(
    out_ptr, s_start, t_start, t_by, phase, vocabulary, segment, pieces, k, cap,
    HAS_CAP: tl.constexpr, MODE: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums the segment beside its own maxima, if `store_pair` asked for it."""
    out = out_ptr + segment * 5
    if tl.load(out) == AGAIN:
        segment = opaque(segment, FAST)
        begin, low, high = segment_bounds(segment, pieces, phase, vocabulary, A, FAST)
        s_top, t_top = pair_max(
            s_start, t_start, t_by, begin, low, high, cap, HAS_CAP, BESIDE, FAST, LANES, VEC
        )
        sz, tz, d = pair_segment(
            s_start, t_start, t_by, begin, low, high, s_top, t_top, k, cap,
            HAS_CAP, MODE, True, BESIDE, FAST, LANES, VEC,
        )  # fmt: skip
        s_sum, _, t_sum, _, d_sum = pair_sums(sz, tz, d)
        tl.store(out, s_top)
        tl.store(out + 1, s_sum)
        tl.store(out + 2, t_top)
        tl.store(out + 3, t_sum)
        tl.store(out + 4, d_sum)


@triton.jit
def pair_partial(
    out_ptr, s_ptr, s_offset, t_ptr, t_offset, vocabulary, first_segment, last_segment, pieces,
    s_reference, t_reference, k, cap,
    HAS_CAP: tl.constexpr, MODE: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Stores the joint statistics of student and teacher of segments [first, last) of a row, five numbers
    each."""
    s_start = s_ptr + whole_pieces(s_offset, A)
    phase = (s_offset % A).to(tl.int32)
    t_start, t_by = beside_row(t_ptr, t_offset, phase, BESIDE, A, VEC)
    for segment in range(first_segment, last_segment):
        tl.store(out_ptr + segment * 5, s_reference)
        tl.store(out_ptr + segment * 5 + 2, t_reference)
    tl.debug_barrier()  # what was stored is read, by other threads as well
    if STAYS:
        for segment in tl.range(first_segment, last_segment, disable_licm=True):
            store_pair(
                out_ptr, s_start, t_start, t_by, phase, vocabulary, segment, pieces, k, cap,
                HAS_CAP, MODE, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip
        tl.debug_barrier()
        for segment in tl.range(first_segment, last_segment, disable_licm=True):
            store_pair_again(
                out_ptr, s_start, t_start, t_by, phase, vocabulary, segment, pieces, k, cap,
                HAS_CAP, MODE, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip
    else:
        for segment in range(first_segment, last_segment):
            store_pair(
                out_ptr, s_start, t_start, t_by, phase, vocabulary, segment, pieces, k, cap,
                HAS_CAP, MODE, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip
        tl.debug_barrier()
        for segment in range(first_segment, last_segment):
            store_pair_again(
                out_ptr, s_start, t_start, t_by, phase, vocabulary, segment, pieces, k, cap,
                HAS_CAP, MODE, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip


@triton.jit
def merged_pair(ptr, segments, k, MODE: tl.constexpr):
    """What `pair_partial` stored, added up in order."""
    sm = tl.full([], LOWEST, tl.float32)
    sz = tl.full([], 0.0, tl.float32)
    tm = tl.full([], LOWEST, tl.float32)
    tz = tl.full([], 0.0, tl.float32)
    d = tl.full([], 0.0, tl.float32)
    for segment in range(0, segments):
        at = ptr + segment * 5
        sm, sz, tm, tz, d = merge_pair(
            sm, sz, tm, tz, d, tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
            tl.load(at + 4), k, MODE,
        )  # fmt: skip
    return sm, sz, tm, tz, d


@triton.jit
def log2_kl(mean, m, c, rest, other_m, other_c, other_rest, k):
    """KL in units of log2, from the mean of own - other logits beside m and other_m, by the `normalizer`s
    (c, rest) that a gradient has: their roundings cancel in own - other - KL."""
    moved = c - m
    other_moved = other_c - other_m
    lost = ((c - moved) - m) - ((other_c - other_moved) - other_m)
    return tl.fma(mean - (moved - other_moved), k, tl.fma(-lost, k, other_rest - rest))


@triton.jit
def jsd_terms(x, y, sm, sl, tm, tl_, k, alpha, FAST: tl.constexpr):
    """(p, log2 p - log2 m, q, log2 q - log2 m) of a tile, m the mixture. The differences are finite where p
    (q) is 0, so that their products need no guard. A subnormal mixture counts as the smallest normal number:
    its log2 would be -inf (`log2`) and the row NaN."""
    s = tl.fma(x - sm, k, -sl)
    t = tl.fma(y - tm, k, -tl_)
    p = tl.exp2(s)
    q = tl.exp2(t)
    m = (1.0 - alpha) * p + alpha * q
    lm = log2(tl.maximum(m, SMALLEST_NORMAL), FAST)
    return p, tl.maximum(s, LOWEST) - lm, q, tl.maximum(t, LOWEST) - lm


@triton.jit
def jsd_tiles(
    ls, lt, first, end, s_start, t_start, t_by, low, high, sm, sl, tm, tl_, k, cap, alpha,
    HAS_CAP: tl.constexpr, WHOLE_TILES: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The slots' sums with the tiles from ``first`` to ``end``."""
    at = tile_positions(LANES, VEC)
    for o in range(first, end, LANES * VEC):
        x, y = load_pair(
            s_start, t_start, t_by, o, at, low, high, cap, HAS_CAP, WHOLE_TILES, BESIDE, FAST, LANES, VEC,
            True,
        )  # fmt: skip
        p, ds, q, dt = jsd_terms(x, y, sm, sl, tm, tl_, k, alpha, FAST)
        ls = plus(ls, p * ds, FAST)
        lt = plus(lt, q * dt, FAST)
    return ls, lt


@triton.jit
def jsd_segment(
    of_s, of_t, s_start, t_start, t_by, phase, vocabulary, segment, pieces, sm, sl, tm, tl_, k, cap, alpha,
    known,
    HAS_CAP: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr, A: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``of_s`` and ``of_t`` with a segment's part."""
    segment = opaque(segment, FAST)
    begin, low, high = segment_bounds(segment, pieces, phase, vocabulary, A, FAST)
    if (begin < high) & (known == 0.0):
        ls = per_slot(0.0, LANES, VEC)
        lt = per_slot(0.0, LANES, VEC)
        first = begin + LANES * VEC
        ls, lt = jsd_tiles(  # one, or none
            ls, lt, begin, tl.minimum(first, high), s_start, t_start, t_by, low, high, sm, sl, tm, tl_, k,
            cap, alpha, HAS_CAP, False, BESIDE, FAST, LANES, VEC,
        )  # fmt: skip
        whole = whole_tiles(first, high, BESIDE, LANES, VEC)
        ls, lt = jsd_tiles(
            ls, lt, first, whole, s_start, t_start, t_by, low, high, sm, sl, tm, tl_, k,
            cap, alpha, HAS_CAP, True, BESIDE, FAST, LANES, VEC,
        )  # fmt: skip
        ls, lt = jsd_tiles(
            ls, lt, whole, high, s_start, t_start, t_by, low, high, sm, sl, tm, tl_, k,
            cap, alpha, HAS_CAP, False, BESIDE, FAST, LANES, VEC,
        )  # fmt: skip
        s_sum, _, t_sum, _ = sum_slots_2(ls, lt)
        of_s += s_sum
        of_t += t_sum
    return of_s, of_t


@triton.jit
def jsd_partial(
    s_ptr, s_offset, t_ptr, t_offset, vocabulary, first_segment, last_segment, pieces, sm, sl,
    tm, tl_, k, cap, alpha,
    HAS_CAP: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr, A: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(KL(p || m), KL(q || m)) in log2 over segments [first, last) of a row."""
    s_start = s_ptr + whole_pieces(s_offset, A)
    phase = (s_offset % A).to(tl.int32)
    t_start, t_by = beside_row(t_ptr, t_offset, phase, BESIDE, A, VEC)
    of_s = tl.full([], 0.0, tl.float32)
    of_t = tl.full([], 0.0, tl.float32)
    known = (sl - sl) + (tl_ - tl_)  # NaN where a row has one
    if STAYS:
        for segment in tl.range(first_segment, last_segment, disable_licm=True):
            of_s, of_t = jsd_segment(
                of_s, of_t, s_start, t_start, t_by, phase, vocabulary, segment, pieces, sm, sl, tm, tl_, k,
                cap, alpha, known, HAS_CAP, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip
    else:
        for segment in range(first_segment, last_segment):
            of_s, of_t = jsd_segment(
                of_s, of_t, s_start, t_start, t_by, phase, vocabulary, segment, pieces, sm, sl, tm, tl_, k,
                cap, alpha, known, HAS_CAP, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip
    return of_s + known, of_t + known


@triton.jit
def divergence_gradient(
    x, y, coef, sm, sl, tm, tl_, kl, k, cap, alpha,
    HAS_CAP: tl.constexpr, MODE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """coef x dL/du x dc/dz; ``kl`` in nats as the rows' statistics hold it."""
    if MODE == 2:
        p, ds, _q, _dt = jsd_terms(x, y, sm, sl, tm, tl_, k, alpha, FAST)
        g = p * (ds - kl * LOG2E) * (coef * (1.0 - alpha) * LN2)
    elif MODE == 0:
        p = tl.exp2(tl.fma(x - sm, k, -sl))
        q = tl.exp2(tl.fma(y - tm, k, -tl_))
        g = (p - q) * coef
    else:
        s = tl.fma(x - sm, k, -sl)
        t = tl.fma(y - tm, k, kl * LOG2E - tl_)  # with the KL: s - t is what the gradient weighs
        g = times(tl.exp2(s), s - t) * (coef * LN2)
    return g * slope(x, cap, HAS_CAP)


@triton.jit
def divergence_gradient_row(
    s_ptr, s_offset, t_ptr, t_offset, g_ptr, g_offset, vocabulary, begin, stop, with_edge, live,
    coef, sm, sl, tm, tl_, kl, k, cap, alpha,
    HAS_CAP: tl.constexpr, MODE: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, stop) of a row's gradient; zeros, without a read, where ``live`` is false."""
    first, last, lead, n, end = gradient_bounds(g_offset, vocabulary, begin, stop, BESIDE, A)
    if with_edge:
        v, edge = edge_positions(g_offset, first, last, vocabulary, BESIDE, A)
        if live:
            x = load_c(s_ptr + s_offset + v, edge, cap, HAS_CAP, FAST)
            y = load_c(t_ptr + t_offset + v, edge, cap, HAS_CAP, FAST)
            g = divergence_gradient(
                x, y, coef, sm, sl, tm, tl_, kl, k, cap, alpha, HAS_CAP, MODE, FAST
            )
            store_tile(g_ptr + g_offset + v, g, edge)
        else:
            zero_tile(g_ptr + g_offset + v, edge)
    s_start, s_by = beside(s_ptr, s_offset, lead, BESIDE, A, VEC)
    t_start, t_by = beside(t_ptr, t_offset, lead, BESIDE, A, VEC)
    g_start = g_ptr + whole_pieces(first, A)
    at = tile_positions(LANES, VEC)
    if live:
        whole = begin + tl.maximum(end - begin, 0) // (LANES * VEC) * (LANES * VEC)
        for o in range(begin, whole, LANES * VEC):
            x = load_beside(s_start, o, at, n, s_by, cap, HAS_CAP, False, BESIDE, FAST, LANES, VEC)
            y = load_beside(t_start, o, at, n, t_by, cap, HAS_CAP, False, BESIDE, FAST, LANES, VEC)
            g = divergence_gradient(
                x, y, coef, sm, sl, tm, tl_, kl, k, cap, alpha, HAS_CAP, MODE, FAST
            )
            store_tile(g_start + o + at, g, None)
        for o in range(whole, end, LANES * VEC):
            mask = o + at < n
            x = load_beside(s_start, o, at, n, s_by, cap, HAS_CAP, True, BESIDE, FAST, LANES, VEC)
            y = load_beside(t_start, o, at, n, t_by, cap, HAS_CAP, True, BESIDE, FAST, LANES, VEC)
            g = divergence_gradient(
                x, y, coef, sm, sl, tm, tl_, kl, k, cap, alpha, HAS_CAP, MODE, FAST
            )
            store_tile(g_start + o + at, g, mask)
    else:
        for o in range(begin, end, LANES * VEC):
            zero_tile(g_start + o + at, o + at < n)


@triton.jit(do_not_specialize=RUNTIME)
def _divergence_fwd_kernel(
    s_ptr, s_shift, s_b, s_l, t_ptr, t_shift, t_b, t_l, g_ptr, g_shift, g_b, g_l,
    target_ptr, weight_ptr, old_ptr, partial_ptr,
    student_ptr, teacher_ptr, per_token_ptr, coef_ptr, stats_ptr,
    n_l, vocabulary, segments, pieces, k, cap, inv_temperature, alpha, is_clip, ignore_index,
    MODE: tl.constexpr, HAS_OLD: tl.constexpr, HAS_CAP: tl.constexpr, FUSED: tl.constexpr,
    BESIDE: tl.constexpr, STAGE: tl.constexpr, FAST: tl.constexpr, A: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Statistics, the targets' log-probs and, for KL, the loss. JSD's comes from `_jsd_kernel`, or from
    here where FUSED."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    width = tl.where(live, vocabulary, 0)
    s_offset = row_offset(row, n_l, s_shift, s_b, s_l)
    t_offset = row_offset(row, n_l, t_shift, t_b, t_l)
    partial = partial_ptr + row * segments * 5
    if STAGE != 2:
        begin = 0
        stop = segments
        if STAGE == 1:
            begin = tl.program_id(1)
            stop = begin + 1
        x = reference_of(s_ptr + s_offset, target, width, live, cap, HAS_CAP, FAST)
        y = reference_of(t_ptr + t_offset, target, width, live, cap, HAS_CAP, FAST)
        if MODE == 2:  # JSD needs each row's own statistics first
            row_partial(
                partial, s_ptr, s_offset, width, begin, stop, pieces, x, k, cap, target_ptr, 0,
                HAS_CAP, False, False, 1, 5, BESIDE != 2, FAST, A, LANES, VEC,
            )  # fmt: skip
            # Addresses anew: kept, they would take registers from the sums. Below, too.
            again = opaque(tl.program_id(0), FAST).to(tl.int64)
            partial = partial_ptr + again * segments * 5
            t_offset = row_offset(again, n_l, t_shift, t_b, t_l)
            row_partial(
                partial + 2, t_ptr, t_offset, width, begin, stop, pieces, y, k, cap, target_ptr, 0,
                HAS_CAP, False, False, 1, 5, BESIDE != 2, FAST, A, LANES, VEC,
            )  # fmt: skip
        else:
            pair_partial(
                partial, s_ptr, s_offset, t_ptr, t_offset, width, begin, stop, pieces, x, y, k, cap,
                HAS_CAP, MODE, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip
    if STAGE == 0:
        tl.debug_barrier()
    if STAGE != 1:
        if MODE == 2:
            sm, sz, _ = merged(partial, segments, k, False, 5)
            tm, tz, _ = merged(partial + 2, segments, k, False, 5)
        else:
            sm, sz, tm, tz, d = merged_pair(partial, segments, k, MODE)
        again = opaque(tl.program_id(0), FAST).to(tl.int64)
        s_offset = row_offset(again, n_l, s_shift, s_b, s_l)
        t_offset = row_offset(again, n_l, t_shift, t_b, t_l)
        s_base = sm
        t_base = tm
        sm, sl = normalizer(sm, sz, inv_temperature, k)
        tm, tl_ = normalizer(tm, tz, inv_temperature, k)
        if MODE == 0:
            d = log2_kl(d / tz, t_base, tm, tl_, s_base, sm, sl, k)
        if MODE == 1:
            d = log2_kl(d / sz, s_base, sm, sl, t_base, tm, tl_, k)
        sl = tl.where(live, sl, 0.0)
        tl_ = tl.where(live, tl_, 0.0)
        sm = tl.where(live, sm, 0.0)
        tm = tl.where(live, tm, 0.0)
        c = load_c(s_ptr + s_offset + target, live, cap, HAS_CAP, FAST)
        student = tl.where(live, log_prob(c, sm, sl, inv_temperature), 0.0)
        c = load_c(t_ptr + t_offset + target, live, cap, HAS_CAP, FAST)
        teacher = tl.where(live, log_prob(c, tm, tl_, inv_temperature), 0.0)
        tl.store(student_ptr + row, student)
        tl.store(teacher_ptr + row, teacher)
        coef = coefficient(tl.load(weight_ptr + row), student, old_ptr, row, is_clip, HAS_OLD)
        coef = tl.where(live, coef, 0.0)
        tl.store(coef_ptr + row, coef)
        tl.store(stats_ptr + row * 5, sm)
        tl.store(stats_ptr + row * 5 + 1, sl)
        tl.store(stats_ptr + row * 5 + 2, tm)
        tl.store(stats_ptr + row * 5 + 3, tl_)
        kl = tl.full([], 0.0, tl.float32)
        loss = kl
        if MODE == 0:
            loss = tl.where(live, d * LN2, 0.0)
        if MODE == 1:
            kl = tl.where(live, d * LN2, 0.0)
            loss = kl
        if MODE == 2 and FUSED:
            of_s, of_t = jsd_partial(
                s_ptr, s_offset, t_ptr, t_offset, width, 0, segments, pieces, sm, sl, tm, tl_,
                k, cap, alpha, HAS_CAP, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip
            kl = tl.where(live, of_s * LN2, 0.0)
            loss = tl.where(live, ((1.0 - alpha) * of_s + alpha * of_t) * LN2, 0.0)
        if MODE != 2 or FUSED:
            tl.store(per_token_ptr + row, loss)
            tl.store(stats_ptr + row * 5 + 4, kl)
        if FUSED:
            tl.debug_barrier()
            coef = tl.load(coef_ptr + row, volatile=True)  # not kept while the loss was summed
            divergence_gradient_row(
                s_ptr, s_offset, t_ptr, t_offset, g_ptr, row_offset(row, n_l, g_shift, g_b, g_l),
                vocabulary, 0, vocabulary, True, live, coef * inv_temperature, sm, sl, tm, tl_, kl,
                k, cap, alpha, HAS_CAP, MODE, BESIDE, FAST, A, LANES, VEC,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def _jsd_kernel(
    s_ptr, s_shift, s_b, s_l, t_ptr, t_shift, t_b, t_l,
    target_ptr, partial_ptr, per_token_ptr, stats_ptr,
    n_l, vocabulary, segments, pieces, k, cap, alpha, ignore_index,
    HAS_CAP: tl.constexpr, BESIDE: tl.constexpr, STAGE: tl.constexpr, FAST: tl.constexpr,
    A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The Jensen-Shannon loss of each row from its finished statistics."""
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(target_ptr + row) != ignore_index
    if STAGE == 2:
        of_s = tl.full([], 0.0, tl.float32)
        of_t = tl.full([], 0.0, tl.float32)
        for segment in range(0, segments):
            at = partial_ptr + (row * segments + segment) * 2
            of_s += tl.load(at)
            of_t += tl.load(at + 1)
    else:
        begin = 0
        stop = segments
        if STAGE == 1:
            begin = tl.program_id(1)
            stop = begin + 1
        stats = stats_ptr + row * 5
        of_s, of_t = jsd_partial(
            s_ptr, row_offset(row, n_l, s_shift, s_b, s_l),
            t_ptr, row_offset(row, n_l, t_shift, t_b, t_l), tl.where(live, vocabulary, 0),
            begin, stop, pieces, tl.load(stats), tl.load(stats + 1), tl.load(stats + 2),
            tl.load(stats + 3), k, cap, alpha, HAS_CAP, BESIDE, FAST, A, LANES, VEC,
        )  # fmt: skip
    if STAGE == 1:
        at = partial_ptr + (row * segments + tl.program_id(1)) * 2
        tl.store(at, of_s)
        tl.store(at + 1, of_t)
    else:
        tl.store(stats_ptr + row * 5 + 4, tl.where(live, of_s * LN2, 0.0))
        loss = ((1.0 - alpha) * of_s + alpha * of_t) * LN2
        tl.store(per_token_ptr + row, tl.where(live, loss, 0.0))


@triton.jit(do_not_specialize=RUNTIME)
def _divergence_bwd_kernel(
    s_ptr, s_shift, s_b, s_l, t_ptr, t_shift, t_b, t_l, g_ptr, g_shift, g_b, g_l,
    target_ptr, grad_ptr, coef_ptr, stats_ptr,
    n_l, vocabulary, tiles_per_program, k, cap, inv_temperature, alpha, ignore_index,
    MODE: tl.constexpr, HAS_CAP: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    live = tl.load(target_ptr + row) != ignore_index
    stats = stats_ptr + row * 5
    divergence_gradient_row(
        s_ptr, row_offset(row, n_l, s_shift, s_b, s_l),
        t_ptr, row_offset(row, n_l, t_shift, t_b, t_l),
        g_ptr, row_offset(row, n_l, g_shift, g_b, g_l), vocabulary,
        part * tiles_per_program * (LANES * VEC), (part + 1) * tiles_per_program * (LANES * VEC),
        part == 0, live, tl.load(coef_ptr + row) * tl.load(grad_ptr) * inv_temperature,
        tl.load(stats), tl.load(stats + 1), tl.load(stats + 2), tl.load(stats + 3),
        tl.load(stats + 4), k, cap, alpha, HAS_CAP, MODE, BESIDE, FAST, A, LANES, VEC,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- top-k


@triton.jit
def support_classes(c, keep, live, outside_max, outside_sum, k, TAIL: tl.constexpr):
    """From capped logits of the support and (max, sum) of the rest: (max over everything, log2 of
    the normalizer beside it, class log2-probs, tail's log2-prob: finite where its sum underflows)."""
    row_max = tl.where(live, tl.maximum(outside_max, tl.max(c, 0)), 0.0)
    u = (c - row_max) * k
    inside = tl.sum(tl.where(keep, tl.exp2(u), 0.0), 0)
    empty = outside_sum == 0.0
    tail = (outside_max - row_max) * k + tl.log2(tl.where(empty, 1.0, outside_sum))
    tail = tl.where(empty, NEG_INF, tail)
    whole = tl.where(live, tl.log2(inside + tl.exp2(tail)), 0.0)
    over = whole
    if not TAIL:
        over = tl.log2(inside)
    return row_max, whole, u - over, tail - over


@triton.jit
def classes_loss(s, t, keep, s_tail, t_tail, alpha, MODE: tl.constexpr, TAIL: tl.constexpr):
    """(loss, K, class gradients, tail's gradient), in nats, over the support and the tail."""
    p = tl.where(keep, tl.exp2(s), 0.0)
    q = tl.where(keep, tl.exp2(t), 0.0)
    zero = tl.full([], 0.0, tl.float32)
    p_tail = zero
    q_tail = zero
    if TAIL:
        p_tail = tl.exp2(s_tail)
        q_tail = tl.exp2(t_tail)
    kl = zero
    g_tail = zero
    if MODE == 0:
        loss = tl.sum(times(q, t - s), 0)
        if TAIL:
            loss += times(q_tail, t_tail - s_tail)
        g = p - q
        g_tail = p_tail - q_tail
        loss = loss * LN2
    elif MODE == 1:
        kl = tl.sum(times(p, s - t), 0)
        if TAIL:
            kl += times(p_tail, s_tail - t_tail)
        g = times(p, s - t - kl) * LN2
        if TAIL:
            g_tail = times(p_tail, s_tail - t_tail - kl) * LN2
        kl = kl * LN2
        loss = kl
    else:
        m = (1.0 - alpha) * p + alpha * q
        lm = tl.log2(tl.where(m == 0.0, 1.0, m))
        of_s = tl.sum(times(p, s - lm), 0)
        of_t = tl.sum(times(q, t - lm), 0)
        lm_tail = zero
        if TAIL:
            m_tail = (1.0 - alpha) * p_tail + alpha * q_tail
            lm_tail = tl.log2(tl.where(m_tail == 0.0, 1.0, m_tail))
            of_s += times(p_tail, s_tail - lm_tail)
            of_t += times(q_tail, t_tail - lm_tail)
        g = times(p, s - lm - of_s) * (LN2 * (1.0 - alpha))
        if TAIL:
            g_tail = times(p_tail, s_tail - lm_tail - of_s) * (LN2 * (1.0 - alpha))
        loss = ((1.0 - alpha) * of_s + alpha * of_t) * LN2
        kl = of_s * LN2
    return loss, kl, tl.where(keep, g, 0.0), g_tail


@triton.jit
def support_reference(
    ptr, id_ptr, topk, width, live, cap, HAS_CAP: tl.constexpr, KP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A logit near the largest outside the support: the lowest of the support, or of the first tokens."""
    j = tl.arange(0, KP)
    keep = (j < topk) & live
    ids = tl.load(id_ptr + j, mask=keep, other=0)
    c = load_c(ptr + ids, keep, cap, HAS_CAP, FAST)
    lowest = tl.min(tl.where(c == NEG_INF, -LOWEST, c), 0)
    return tl.maximum(lowest, first_max(ptr, width, cap, HAS_CAP, FAST))


@triton.jit
def topk_tail_gradient(c, share, outside_max, outside_log2sum, k, cap, HAS_CAP: tl.constexpr):
    part = tl.exp2((c - outside_max) * k - outside_log2sum)
    return times(part, share) * slope(c, cap, HAS_CAP)


@triton.jit
def topk_gradient_row(
    s_ptr, s_offset, g_ptr, g_offset, id_ptr, class_grads, vocabulary, begin, stop, with_edge,
    live, coef, tail_grad, outside_max, outside_log2sum, topk, k, cap,
    HAS_CAP: tl.constexpr, TAIL: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    KP: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, stop): the tail's gradient, shared out by each token's part of it, everywhere;
    then the support's own gradients over it."""
    first, last, lead, n, end = gradient_bounds(g_offset, vocabulary, begin, stop, BESIDE, A)
    # The support's ids that this program writes, and their slopes before anything is overwritten.
    j = tl.arange(0, KP)
    ids = tl.load(id_ptr + j, mask=j < topk, other=0)
    at_id = ids - lead
    mine = (at_id >= begin) & (at_id < end)
    if with_edge:
        mine = mine | (at_id < 0) | (at_id >= n)
    mine = mine & (j < topk) & live
    support = class_grads * coef
    if HAS_CAP:
        support *= slope(load_c(s_ptr + s_offset + ids, mine, cap, HAS_CAP, FAST), cap, HAS_CAP)
        tl.debug_barrier()
    share = tail_grad * coef
    if with_edge:
        v, edge = edge_positions(g_offset, first, last, vocabulary, BESIDE, A)
        if live & TAIL:
            c = load_c(s_ptr + s_offset + v, edge, cap, HAS_CAP, FAST)
            g = topk_tail_gradient(c, share, outside_max, outside_log2sum, k, cap, HAS_CAP)
            store_tile(g_ptr + g_offset + v, g, edge)
        else:
            zero_tile(g_ptr + g_offset + v, edge)
    s_start, s_by = beside(s_ptr, s_offset, lead, BESIDE, A, VEC)
    g_start = g_ptr + whole_pieces(first, A)
    at = tile_positions(LANES, VEC)
    if live & TAIL:
        for o in range(begin, end, LANES * VEC):
            mask = o + at < n
            c = load_beside(s_start, o, at, n, s_by, cap, HAS_CAP, True, BESIDE, FAST, LANES, VEC)
            g = topk_tail_gradient(c, share, outside_max, outside_log2sum, k, cap, HAS_CAP)
            store_tile(g_start + o + at, g, mask)
    else:
        for o in range(begin, end, LANES * VEC):
            zero_tile(g_start + o + at, o + at < n)
    tl.debug_barrier()  # the support's stores come after the dense ones of the same program
    store_tile(g_ptr + g_offset + ids, support, mine)


@triton.jit(do_not_specialize=RUNTIME)
def _topk_fwd_kernel(
    s_ptr, s_shift, s_b, s_l, t_ptr, t_shift, t_b, t_l, g_ptr, g_shift, g_b, g_l,
    target_ptr, id_ptr, sorted_ptr, given_ptr, weight_ptr, old_ptr, partial_ptr,
    student_ptr, teacher_ptr, per_token_ptr, coef_ptr, stats_ptr, class_ptr,
    n_l, vocabulary, segments, pieces, topk, k, cap, inv_temperature, alpha, is_clip,
    ignore_index,
    MODE: tl.constexpr, TAIL: tl.constexpr, GIVEN: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_CAP: tl.constexpr, FUSED: tl.constexpr, BESIDE: tl.constexpr, ALIGNED: tl.constexpr,
    STAGE: tl.constexpr, FAST: tl.constexpr, KP: tl.constexpr, A: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    width = tl.where(live, vocabulary, 0)
    s_offset = row_offset(row, n_l, s_shift, s_b, s_l)
    t_offset = row_offset(row, n_l, t_shift, t_b, t_l)
    skip = sorted_ptr + row * topk
    partial = partial_ptr + row * segments * 4
    if STAGE != 2:
        begin = 0
        stop = segments
        if STAGE == 1:
            begin = tl.program_id(1)
            stop = begin + 1
        c = support_reference(s_ptr + s_offset, skip, topk, width, live, cap, HAS_CAP, KP, FAST)
        row_partial(
            partial, s_ptr, s_offset, width, begin, stop, pieces, c, k, cap, skip, topk,
            HAS_CAP, False, True, KP, 4, ALIGNED, FAST, A, LANES, VEC,
        )  # fmt: skip
        if not GIVEN:
            c = support_reference(t_ptr + t_offset, skip, topk, width, live, cap, HAS_CAP, KP, FAST)
            row_partial(
                partial + 2, t_ptr, t_offset, width, begin, stop, pieces, c, k, cap, skip, topk,
                HAS_CAP, False, True, KP, 4, ALIGNED, FAST, A, LANES, VEC,
            )  # fmt: skip
    if STAGE == 0:
        tl.debug_barrier()
    if STAGE != 1:
        sm, sz, _ = merged(partial, segments, k, False, 4)
        tm = sm
        tz = sz
        if not GIVEN:
            tm, tz, _ = merged(partial + 2, segments, k, False, 4)
        j = tl.arange(0, KP)
        inside = j < topk
        keep = inside & live
        ids = tl.load(id_ptr + row * topk + j, mask=inside, other=0)
        c = load_c(s_ptr + s_offset + ids, keep, cap, HAS_CAP, FAST)
        row_max, whole, s, s_tail = support_classes(c, keep, live, sm, sz, k, TAIL)
        z = load_c(s_ptr + s_offset + target, live, cap, HAS_CAP, FAST)
        student = tl.where(live, log_prob(z, row_max, whole, inv_temperature), 0.0)
        if GIVEN:
            given = tl.load(given_ptr + row * topk + j, mask=keep, other=float("-inf"))
            t = given * LOG2E
            w = tl.where(keep, tl.exp2(t), 0.0)
            total = tl.sum(w, 0)
            rest = tl.maximum(1.0 - total, 0.0)
            t_tail = tl.where(rest == 0.0, NEG_INF, tl.log2(tl.where(rest == 0.0, 1.0, rest)))
            if not TAIL:
                t = t - tl.log2(total)
            hit = keep & (ids == target)
            found = tl.sum(hit.to(tl.int32), 0)
            teacher = tl.sum(tl.where(hit, given, 0.0), 0)
            teacher = tl.where(found > 0, teacher, float("nan"))
        else:
            y = load_c(t_ptr + t_offset + ids, keep, cap, HAS_CAP, FAST)
            t_max, t_whole, t, t_tail = support_classes(y, keep, live, tm, tz, k, TAIL)
            z = load_c(t_ptr + t_offset + target, live, cap, HAS_CAP, FAST)
            teacher = log_prob(z, t_max, t_whole, inv_temperature)
        teacher = tl.where(live, teacher, 0.0)
        loss, kl, grads, tail_grad = classes_loss(s, t, keep, s_tail, t_tail, alpha, MODE, TAIL)
        tail_grad = tl.where(live, tail_grad, 0.0)
        # An empty tail: every logit in it is -inf.
        sm = tl.where(sz == 0.0, 0.0, sm)
        sl = tl.log2(tl.where(sz == 0.0, 1.0, sz))
        coef = coefficient(tl.load(weight_ptr + row), student, old_ptr, row, is_clip, HAS_OLD)
        coef = tl.where(live, coef, 0.0)
        tl.store(student_ptr + row, student)
        tl.store(teacher_ptr + row, teacher)
        tl.store(per_token_ptr + row, tl.where(live, loss, 0.0))
        tl.store(coef_ptr + row, coef)
        tl.store(stats_ptr + row * 4, sm)
        tl.store(stats_ptr + row * 4 + 1, sl)
        tl.store(stats_ptr + row * 4 + 2, tail_grad)
        tl.store(stats_ptr + row * 4 + 3, tl.where(live, kl, 0.0))
        tl.store(class_ptr + row * topk + j, grads, mask=inside)
        if FUSED:
            tl.debug_barrier()  # all threads have read the support's logits: they may be overwritten
            topk_gradient_row(
                s_ptr, s_offset, g_ptr, row_offset(row, n_l, g_shift, g_b, g_l),
                id_ptr + row * topk, grads, vocabulary, 0, vocabulary, True, live,
                coef * inv_temperature, tail_grad, sm, sl, topk, k, cap,
                HAS_CAP, TAIL, BESIDE, FAST, KP, A, LANES, VEC,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def _topk_bwd_kernel(
    s_ptr, s_shift, s_b, s_l, g_ptr, g_shift, g_b, g_l,
    target_ptr, id_ptr, grad_ptr, coef_ptr, stats_ptr, class_ptr,
    n_l, vocabulary, tiles_per_program, topk, k, cap, inv_temperature, ignore_index,
    TAIL: tl.constexpr, HAS_CAP: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
    KP: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    live = tl.load(target_ptr + row) != ignore_index
    j = tl.arange(0, KP)
    grads = tl.load(class_ptr + row * topk + j, mask=j < topk, other=0.0)
    topk_gradient_row(
        s_ptr, row_offset(row, n_l, s_shift, s_b, s_l),
        g_ptr, row_offset(row, n_l, g_shift, g_b, g_l),
        id_ptr + row * topk, grads, vocabulary, part * tiles_per_program * (LANES * VEC),
        (part + 1) * tiles_per_program * (LANES * VEC), part == 0, live,
        tl.load(coef_ptr + row) * tl.load(grad_ptr) * inv_temperature,
        tl.load(stats_ptr + row * 4 + 2), tl.load(stats_ptr + row * 4),
        tl.load(stats_ptr + row * 4 + 1), topk, k, cap, HAS_CAP, TAIL, BESIDE, FAST, KP, A, LANES,
        VEC,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ launchers


def _mode(alpha: float) -> int:
    return FORWARD_KL if alpha == 0 else REVERSE_KL if alpha == 1 else JSD


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(*shape, dtype=torch.float32)


def sampled_token_forward(
    student_logits, teacher_logits, teacher_logps, target_ids, weights, old_logps, is_clip,
    temperature, softcap, ignore_index,
):  # fmt: skip
    out = token_kernels.forward(
        student_logits, teacher_logits, target_ids, teacher_logps=teacher_logps, weights=weights,
        old_logps=old_logps, is_clip=is_clip, temperature=temperature, softcap=softcap,
        ignore_index=ignore_index,
    )  # fmt: skip
    names = ("per_token", "coef", "student_logps", "teacher_logps", "stats")
    return tuple(out[name] for name in names)


def sampled_token_backward(
    grad_loss, coef, student_logps, teacher_logps, student_logits, target_ids, row_stats,
    temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    token_kernels.backward(
        student_logits, target_ids, row_stats[:, 0], row_stats[:, 1], grad_loss, grad_logits,
        coef=coef, student_logps=student_logps, teacher_logps=teacher_logps,
        temperature=temperature, softcap=softcap, ignore_index=ignore_index,
    )  # fmt: skip


def sampled_token_fused(
    student_logits, teacher_logits, teacher_logps, target_ids, weights, old_logps, is_clip,
    temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    out = token_kernels.forward(
        student_logits, teacher_logits, target_ids, teacher_logps=teacher_logps, weights=weights,
        old_logps=old_logps, is_clip=is_clip, temperature=temperature, softcap=softcap,
        ignore_index=ignore_index, grad_logits=grad_logits,
    )  # fmt: skip
    return tuple(out[name] for name in ("per_token", "coef", "student_logps", "teacher_logps"))


def _divergence(
    student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
    temperature, softcap, ignore_index, grad_logits=None,
):  # fmt: skip
    rows, vocabulary = target_ids.numel(), student_logits.shape[-1]
    per_token, coef, student, teacher = (_new(student_logits, rows) for _ in range(4))
    stats = _new(student_logits, rows, 5)
    if rows == 0:
        return per_token, coef, student, teacher, stats
    mode, fused = _mode(alpha), grad_logits is not None
    sizes = [
        t.element_size() for t in (student_logits, teacher_logits, grad_logits) if t is not None
    ]
    options = launch(*sizes, heavy=True, joint=True)
    segments, pieces = segments_of(vocabulary, tile_of(options))
    split = not fused and splits_rows(rows, segments, student_logits.device)
    stages = (PARTIAL, FINISH) if split else (WHOLE,)
    partial = _new(student_logits, rows, segments, 5)
    s, t = rows_of(student_logits), rows_of(teacher_logits)
    g = rows_of(grad_logits) if fused else s
    common = {
        "n_l": student_logits.shape[1], "vocabulary": vocabulary, "segments": segments,
        "pieces": pieces, "k": scale_of(temperature), "cap": softcap, "alpha": alpha,
        "ignore_index": ignore_index, "HAS_CAP": softcap != 0.0, "BESIDE": beside_of(s, t, g),
        **options,
    }  # fmt: skip
    for stage in stages:
        grid = (rows, segments) if stage == PARTIAL else (rows,)
        with on_device(student_logits):
            _divergence_fwd_kernel[grid](
                *s[:4], *t[:4], *g[:4], target_ids, weights,
                weights if old_logps is None else old_logps, partial, student, teacher, per_token,
                coef, stats, inv_temperature=1.0 / temperature, is_clip=is_clip, MODE=mode,
                HAS_OLD=old_logps is not None, FUSED=fused, STAGE=stage, **common,
            )  # fmt: skip
    if mode == JSD and not fused:
        for stage in stages:
            grid = (rows, segments) if stage == PARTIAL else (rows,)
            with on_device(student_logits):
                _jsd_kernel[grid](
                    *s[:4], *t[:4], target_ids, partial, per_token, stats, STAGE=stage, **common
                )
    return per_token, coef, student, teacher, stats


def divergence_forward(
    student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
    temperature, softcap, ignore_index,
):  # fmt: skip
    return _divergence(
        student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
        temperature, softcap, ignore_index,
    )  # fmt: skip


def divergence_fused(
    student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
    temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    return _divergence(
        student_logits, teacher_logits, target_ids, weights, old_logps, is_clip, alpha,
        temperature, softcap, ignore_index, grad_logits,
    )[:4]  # fmt: skip


def divergence_backward(
    grad_loss, coef, student_logits, teacher_logits, target_ids, row_stats, alpha,
    temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    rows, vocabulary = target_ids.numel(), student_logits.shape[-1]
    if rows == 0:
        return
    s, t, g = rows_of(student_logits), rows_of(teacher_logits), rows_of(grad_logits)
    sizes = (t.element_size() for t in (student_logits, teacher_logits, grad_logits))
    options = launch(*sizes, heavy=True, joint=True)
    grid, tiles_per_program = gradient_grid(
        rows, vocabulary, tile_of(options), student_logits.device
    )
    with on_device(student_logits):
        _divergence_bwd_kernel[grid](
            *s[:4], *t[:4], *g[:4], target_ids, grad_loss, coef, row_stats,
            n_l=student_logits.shape[1], vocabulary=vocabulary,
            tiles_per_program=tiles_per_program, k=scale_of(temperature), cap=softcap,
            inv_temperature=1.0 / temperature, alpha=alpha, ignore_index=ignore_index,
            MODE=_mode(alpha), HAS_CAP=softcap != 0.0, BESIDE=beside_of(s, t, g), **options,
        )  # fmt: skip


def _topk(
    student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights, old_logps,
    is_clip, alpha, add_tail, temperature, softcap, ignore_index, grad_logits=None,
):  # fmt: skip
    rows, vocabulary, topk = target_ids.numel(), student_logits.shape[-1], topk_ids.shape[1]
    per_token, coef, student, teacher = (_new(student_logits, rows) for _ in range(4))
    stats, class_grads = _new(student_logits, rows, 4), _new(student_logits, rows, topk)
    if rows == 0:
        return per_token, coef, student, teacher, stats, class_grads
    fused = grad_logits is not None
    sizes = [
        t.element_size() for t in (student_logits, teacher_logits, grad_logits) if t is not None
    ]
    options = launch(*sizes, heavy=fused or softcap != 0.0 or min(sizes) == 4)
    segments, pieces = segments_of(vocabulary, tile_of(options))
    split = not fused and splits_rows(rows, segments, student_logits.device)
    partial = _new(student_logits, rows, segments, 4)
    s = rows_of(student_logits)
    t = s if teacher_logits is None else rows_of(teacher_logits)
    g = rows_of(grad_logits) if fused else s
    topk_ids = topk_ids.contiguous()
    in_order = topk_ids.sort(-1).values
    for stage in (PARTIAL, FINISH) if split else (WHOLE,):
        grid = (rows, segments) if stage == PARTIAL else (rows,)
        with on_device(student_logits):
            _topk_fwd_kernel[grid](
                *s[:4], *t[:4], *g[:4], target_ids, topk_ids, in_order,
                weights if teacher_topk_logps is None else teacher_topk_logps, weights,
                weights if old_logps is None else old_logps, partial, student, teacher, per_token,
                coef, stats, class_grads, n_l=student_logits.shape[1], vocabulary=vocabulary,
                segments=segments, pieces=pieces, topk=topk, k=scale_of(temperature),
                cap=softcap, inv_temperature=1.0 / temperature, alpha=alpha, is_clip=is_clip,
                ignore_index=ignore_index, MODE=_mode(alpha), TAIL=add_tail,
                GIVEN=teacher_logits is None, HAS_OLD=old_logps is not None,
                HAS_CAP=softcap != 0.0, FUSED=fused, BESIDE=beside_of(s, g), ALIGNED=s.aligned and t.aligned,
                STAGE=stage, KP=triton.next_power_of_2(topk), **options,
            )  # fmt: skip
    return per_token, coef, student, teacher, stats, class_grads


def topk_forward(
    student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights, old_logps,
    is_clip, alpha, add_tail, temperature, softcap, ignore_index,
):  # fmt: skip
    return _topk(
        student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights,
        old_logps, is_clip, alpha, add_tail, temperature, softcap, ignore_index,
    )  # fmt: skip


def topk_fused(
    student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights, old_logps,
    is_clip, alpha, add_tail, temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    return _topk(
        student_logits, teacher_logits, topk_ids, teacher_topk_logps, target_ids, weights,
        old_logps, is_clip, alpha, add_tail, temperature, softcap, ignore_index, grad_logits,
    )[:4]  # fmt: skip


def topk_backward(
    grad_loss, coef, student_logits, topk_ids, target_ids, row_stats, class_grads, add_tail,
    temperature, softcap, ignore_index, grad_logits,
):  # fmt: skip
    rows, vocabulary, topk = target_ids.numel(), student_logits.shape[-1], topk_ids.shape[1]
    if rows == 0:
        return
    s, g = rows_of(student_logits), rows_of(grad_logits)
    beside_rows = beside_of(s, g)
    options = launch(
        student_logits.element_size(), grad_logits.element_size(),
        heavy=softcap != 0.0, beside=beside_rows,
    )  # fmt: skip
    grid, tiles_per_program = gradient_grid(
        rows, vocabulary, tile_of(options), student_logits.device
    )
    with on_device(student_logits):
        _topk_bwd_kernel[grid](
            *s[:4], *g[:4], target_ids, topk_ids.contiguous(), grad_loss, coef, row_stats,
            class_grads, n_l=student_logits.shape[1], vocabulary=vocabulary,
            tiles_per_program=tiles_per_program, topk=topk, k=scale_of(temperature), cap=softcap,
            inv_temperature=1.0 / temperature, ignore_index=ignore_index, TAIL=add_tail,
            HAS_CAP=softcap != 0.0, BESIDE=beside_rows, KP=triton.next_power_of_2(topk),
            **options,
        )  # fmt: skip
