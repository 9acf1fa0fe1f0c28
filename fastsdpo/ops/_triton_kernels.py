"""The Triton kernels of the losses from logits. `ops._triton` launches them.

Two passes over the logits, statistics and gradient; JSD takes one more between them. A program owns PART
elements of one row and walks over them in tiles of N x VEC, a 16-byte access per thread and tensor. In the
statistics each thread keeps an ordinary online softmax (maximum, sum, one moment); threads are added up once,
after the loop. A small kernel then puts the parts of each row together. With c the capped logits:

    k = log2(e) / temperature,  m = max c,  z = sum 2^((c - m) k),  p = 2^((c - m) k - log2 z)

Everything is float32 and in units of log2; losses and log-probs leave in nats. PART is a constant, so a row's
results do not depend on the number of rows. Its place in a 16-byte piece decides which thread takes which
element: rows at the same place give the same bits, as all rows of contiguous logits do where V is a multiple
of 8; others may differ in the last one.

ALIGNED rows start at the same place of a 16-byte piece in all tensors: tiles begin at the boundary at or
before the row. Other rows are accessed element by element, neighbouring threads side by side. A row's first
and last tile are masked: nothing outside the rows is touched. Logits of ignored rows are never read.

A gradient may overwrite the student's logits: each place is read by the thread that writes it, and what
other threads need of the logits (a target's, the support's) is read by an earlier launch.

MODE: "token", "entropy", "log_ratio" (log-probs of the targets), or of a loss "sampled_token", "forward_kl",
"reverse_kl", "jsd", "topk" (outside the support), "support" (nothing outside it). `s` is the student or the
only policy, `t` the teacher; pointers that a call does not need are None. `n_l` is L of logits [B, L, V].
"""

import triton
import triton.language as tl

LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
NEG_INF, LOWEST = tl.constexpr(float("-inf")), tl.constexpr(-1e30)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
PART_COLUMNS = tl.constexpr(6)  # of what `statistics_kernel` finds

# Arguments whose values never compile another variant.
RUNTIME = (
    "rows", "n_l", "vocabulary", "parts", "topk", "s_b", "s_l", "t_b", "t_l", "g_b", "g_l", "k", "cap",
    "inv_temperature", "alpha", "is_clip", "ignore_index",
)  # fmt: skip


# ---- arithmetic ----------------------------------------------------------------------------------


@triton.jit
def times(weight, value):
    """weight * value with 0 * anything = 0; NaN in the weight stays."""
    return weight * tl.where(weight == 0.0, 0.0, value)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """log2 of x >= SMALLEST_NORMAL in one instruction; tl.log2 takes about 30."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x for x >= 1 in one instruction; a division takes six."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def widen(z, FAST: tl.constexpr):
    """float32; bfloat16 two by two, by two instructions instead of four."""
    if FAST and z.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [z],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return z.to(tl.float32)


@triton.jit
def capped(z, cap, HAS_CAP: tl.constexpr, FAST: tl.constexpr):
    """c = cap * tanh(z / cap); -inf stays -inf. By exp2, near 0 by a polynomial beside z itself."""
    if HAS_CAP:
        x = z * (1.0 / cap)
        far = tl.fma(reciprocal(1.0 + tl.exp2(x * (2.0 * LOG2E)), FAST), -2.0 * cap, cap)
        s = x * x
        # (tanh(x) / x - 1) / s, of least relative error for |x| < 0.7: 2^-26 of tanh(x).
        near = tl.fma(s, tl.fma(s, -0.00515511, 0.02011166), -0.05356699)
        near = tl.fma(s, tl.fma(s, near, 0.13329243), -0.33333197)
        near = tl.fma(z * s, near, z)
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


# ---- rows and tiles ------------------------------------------------------------------------------


@triton.jit
def row_start(ptr, row, n_l, stride_b, stride_l, ALIGNED: tl.constexpr):
    """(pointer, elements between it and the row's first): a 16-byte boundary where ALIGNED, else the row."""
    offset = (row // n_l).to(tl.int64) * stride_b + (row % n_l).to(tl.int64) * stride_l
    if ALIGNED:
        return ptr + offset // 8 * 8, (offset % 8).to(tl.int32)
    else:
        return ptr + offset, 0


@triton.jit
def places(N: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """[N, VEC] places of a tile: VEC neighbours to a thread, or threads side by side."""
    i = tl.arange(0, N)[:, None]
    j = tl.arange(0, VEC)[None, :]
    if ALIGNED:
        return i * VEC + j
    else:
        return j * N + i


@triton.jit
def tile_range(part, low, high, EDGES: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr):
    """(start, stop, step) of a part's whole tiles in [low, high); with EDGES of its others, at most two."""
    begin = part * PART
    stop = tl.minimum(begin + PART, high)
    first = tl.where(begin < low, begin + TILE, begin)
    last = first + tl.maximum(stop - first, 0) // TILE * TILE
    if EDGES:
        return tl.where(begin < low, begin, last), stop, tl.maximum(last - begin, TILE)
    else:
        return first, last, TILE


@triton.jit
def load_tile(
    ptr, v, low, high, cap, EDGES: tl.constexpr, HAS_CAP: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Capped logits at v; with EDGES -inf outside [low, high)."""
    if EDGES:
        z = tl.load(ptr + v, mask=(v >= low) & (v < high), other=NEG_INF)
    else:
        z = tl.load(ptr + v)
    return capped(widen(z, FAST), cap, HAS_CAP, FAST)


@triton.jit
def load_logit(ptr, mask, cap, HAS_CAP: tl.constexpr, FAST: tl.constexpr):
    """Single capped logits, -inf where masked."""
    return capped(tl.load(ptr, mask=mask, other=NEG_INF).to(tl.float32), cap, HAS_CAP, FAST)


# ---- statistics ----------------------------------------------------------------------------------


@triton.jit
def absorb(c, m, z, k):
    """A tile into each thread's (m, z): (c beside the new m, weights, new m, new z, what m moved by)."""
    top = tl.maximum(m, tl.max(c, 1))
    u = c - top[:, None]
    w = tl.exp2(u * k)
    moved = m - top
    return u, w, top, z * tl.exp2(moved * k) + tl.sum(w, 1), moved


@triton.jit
def moved_sum(d, z, own, other, k):
    """sum w (u_own - u_other) after the origins of u have moved by ``own`` and ``other``; z is sum w."""
    return times(tl.exp2(own * k), d + times(z, own - other))


@triton.jit
def moved_moment(d, sz, tz, s_moved, t_moved, k, MODE: tl.constexpr):
    """The moment of a mode after the origins have moved: sum w u for the entropy, sum w (u - other u) for
    a KL. ``sz``, ``tz`` as before the move; ``t_moved`` is the origin's of the reverse KL."""
    if MODE == "entropy":
        return moved_sum(d, sz, s_moved, 0.0, k)
    elif MODE == "forward_kl":
        return moved_sum(d, tz, t_moved, s_moved, k)
    elif MODE == "reverse_kl":
        return moved_sum(d, sz, s_moved, t_moved, k)
    else:
        return d


@triton.jit
def count_below(id_ptr, topk, bound, KP: tl.constexpr):
    """How many of a row's ids are < bound."""
    j = tl.arange(0, KP)
    ids = tl.load(id_ptr + j, mask=j < topk, other=0)
    return tl.sum(((j < topk) & (ids < bound)).to(tl.int32), 0)


@triton.jit(do_not_specialize=RUNTIME)
def statistics_kernel(
    s_ptr, s_b, s_l, t_ptr, t_b, t_l, target_ptr, sorted_ptr, part_ptr,
    n_l, vocabulary, topk, k, cap, ignore_index,
    MODE: tl.constexpr, HAS_CAP: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
    KP: tl.constexpr, N: tl.constexpr, VEC: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(m, z) of the student, of the teacher, the moment and its origin, of a part of a row: ``part_ptr [N,
    parts, 6]``. "topk" leaves out the row's ids at ``sorted_ptr``."""
    row, part = tl.program_id(0), tl.program_id(1)
    s, low = row_start(s_ptr, row, n_l, s_b, s_l, ALIGNED)
    if t_ptr is not None:
        t, _ = row_start(t_ptr, row, n_l, t_b, t_l, ALIGNED)
    live = tl.load(target_ptr + row) != ignore_index
    high = tl.where(live, low + vocabulary, 0)
    if MODE == "topk":
        id_ptr = sorted_ptr + row.to(tl.int64) * topk
    at = places(N, VEC, ALIGNED)
    sm = tl.full([N], LOWEST, tl.float32)
    sz = tl.zeros([N], tl.float32)
    tm = sm
    tz = sz
    d = sz
    origin = sm
    for EDGES in tl.static_range(2):
        start, stop, step = tile_range(part, low, high, EDGES, N * VEC, PART)
        j = 0  # of the sorted ids, those behind us
        if MODE == "topk":
            j = count_below(id_ptr, topk, start - low, KP)
        for o in range(start, stop, step):
            x = load_tile(s, o + at, low, high, cap, EDGES, HAS_CAP, FAST)
            if t_ptr is not None:
                y = load_tile(t, o + at, low, high, cap, EDGES, HAS_CAP, FAST)
            if MODE == "topk":
                if EDGES:
                    j = count_below(id_ptr, topk, o - low, KP)
                left_out = tl.load(id_ptr + j, mask=j < topk, other=0).to(tl.int32) + low - o
                while (j < topk) & (left_out < N * VEC):
                    x = tl.where(at == left_out, NEG_INF, x)
                    if t_ptr is not None:
                        y = tl.where(at == left_out, NEG_INF, y)
                    j += 1
                    left_out = tl.load(id_ptr + j, mask=j < topk, other=0).to(tl.int32) + low - o
            s_u, s_w, sm, s_sum, s_moved = absorb(x, sm, sz, k)
            if t_ptr is not None:
                t_u, t_w, tm, t_sum, t_moved = absorb(y, tm, tz, k)
                if MODE == "reverse_kl":
                    before = origin
                    origin = tl.where(s_moved < 0.0, tm, origin)
                    t_moved = before - origin
                    t_u = y - origin[:, None]
                d = moved_moment(d, sz, tz, s_moved, t_moved, k, MODE)
                tz = t_sum
            else:
                d = moved_moment(d, sz, sz, s_moved, s_moved, k, MODE)
            sz = s_sum
            if MODE == "entropy":
                d += tl.sum(s_w * tl.maximum(s_u, LOWEST), 1)
            elif MODE == "forward_kl":
                d += tl.sum(times(t_w, t_u - s_u), 1)
            elif MODE == "reverse_kl":
                d += tl.sum(times(s_w, s_u - t_u), 1)
    s_top = tl.max(sm, 0)
    t_top = tl.max(tm, 0)
    s_moved = sm - s_top
    t_moved = tm - t_top
    out = part_ptr + (row.to(tl.int64) * tl.num_programs(1) + part) * PART_COLUMNS
    tl.store(out, s_top)
    tl.store(out + 1, tl.sum(sz * tl.exp2(s_moved * k), 0))
    tl.store(out + 2, t_top)
    tl.store(out + 3, tl.sum(tz * tl.exp2(t_moved * k), 0))
    if MODE == "reverse_kl":
        o_top = tl.max(tl.where(sm == s_top, origin, NEG_INF), 0)
        t_moved = origin - o_top
        tl.store(out + 5, o_top)
    tl.store(out + 4, tl.sum(moved_moment(d, sz, tz, s_moved, t_moved, k, MODE), 0))


@triton.jit
def load_part(ptr, inside, MODE: tl.constexpr):
    origin = 0.0
    if MODE == "reverse_kl":
        origin = tl.load(ptr + 5, mask=inside, other=LOWEST)
    return (
        tl.load(ptr, mask=inside, other=LOWEST), tl.load(ptr + 1, mask=inside, other=0.0),
        tl.load(ptr + 2, mask=inside, other=LOWEST), tl.load(ptr + 3, mask=inside, other=0.0),
        tl.load(ptr + 4, mask=inside, other=0.0), origin,
    )  # fmt: skip


@triton.jit
def merged(ptr, parts, inside, k, MODE: tl.constexpr):
    """What `statistics_kernel` left of rows, put together in order."""
    sm, sz, tm, tz, d, origin = load_part(ptr, inside, MODE)
    for part in range(1, parts):
        sm2, sz2, tm2, tz2, d2, origin2 = load_part(ptr + part * PART_COLUMNS, inside, MODE)
        s_top = tl.maximum(sm, sm2)
        t_top = tl.maximum(tm, tm2)
        a = sm - s_top
        b = tm - t_top
        a2 = sm2 - s_top
        b2 = tm2 - t_top
        sum_t = tz * tl.exp2(b * k) + tz2 * tl.exp2(b2 * k)
        if MODE == "reverse_kl":
            top = tl.where(a < 0.0, origin2, origin)
            b = origin - top
            b2 = origin2 - top
            origin = top
        d = moved_moment(d, sz, tz, a, b, k, MODE) + moved_moment(d2, sz2, tz2, a2, b2, k, MODE)
        sz = sz * tl.exp2(a * k) + sz2 * tl.exp2(a2 * k)
        tz = sum_t
        sm = s_top
        tm = t_top
    return sm, sz, tm, tz, d, origin


@triton.jit
def log_prob(c, m, l, k):
    """In nats; m the maximum, l the log2 of the sum beside it."""
    return tl.fma(c - m, k, -l) * LN2


@triton.jit
def coefficient(weight_ptr, old_ptr, row, live, student, is_clip):
    """Weight times clipped importance ratio; 0 where ignored, or of weight 0 and any ratio."""
    weight = tl.load(weight_ptr + row, mask=live, other=0.0)
    if old_ptr is not None:
        moved = student - tl.load(old_ptr + row, mask=live, other=0.0)
        moved = tl.minimum(tl.maximum(moved, -20.0), 20.0)
        weight = times(weight, tl.minimum(tl.exp2(moved * LOG2E), is_clip))
    return weight


@triton.jit(do_not_specialize=RUNTIME)
def finish_kernel(
    s_ptr, s_b, s_l, t_ptr, t_b, t_l, target_ptr, given_ptr, weight_ptr, old_ptr, part_ptr, jsd_ptr,
    student_ptr, teacher_ptr, entropy_ptr, per_token_ptr, coef_ptr, stats_ptr, class_ptr,
    rows, n_l, parts, k, cap, alpha, is_clip, ignore_index,
    MODE: tl.constexpr, HAS_CAP: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows from their parts: log-probs of the targets, statistics ``[N, COLUMNS]``, and of a loss the
    coefficient and the loss itself. ``given_ptr``: the teacher's log-probs. ``jsd_ptr``: of `jsd_kernel`.
    ``class_ptr [N, 2]``: what the gradient subtracts, the moment's origin and mean, or JSD's KL in log2."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    live = target != ignore_index
    sm, sz, tm, tz, d, origin = merged(part_ptr + row * parts * PART_COLUMNS, parts, inside, k, MODE)
    sl = tl.log2(tl.where(live, sz, 1.0))
    tl_ = tl.log2(tl.where(live, tz, 1.0))
    s, _ = row_start(s_ptr, row, n_l, s_b, s_l, False)
    c = load_logit(s + target, live, cap, HAS_CAP, FAST)
    student = tl.where(live, log_prob(c, sm, sl, k), 0.0)
    tl.store(student_ptr + row, student, mask=inside)
    if t_ptr is not None:
        t, _ = row_start(t_ptr, row, n_l, t_b, t_l, False)
        c = load_logit(t + target, live, cap, HAS_CAP, FAST)
        teacher = tl.where(live, log_prob(c, tm, tl_, k), 0.0)
    elif given_ptr is not None:
        teacher = tl.load(given_ptr + row, mask=live, other=0.0)
    if teacher_ptr is not None:
        tl.store(teacher_ptr + row, teacher, mask=inside)
    if MODE == "entropy":
        tl.store(entropy_ptr + row, tl.where(live, (sl - d / sz * k) * LN2, 0.0), mask=inside)
    if stats_ptr is not None:
        stats = stats_ptr + row * COLUMNS
        tl.store(stats, tl.where(live, sm, 0.0), mask=inside)
        tl.store(stats + 1, sl, mask=inside)
    if weight_ptr is not None:
        tl.store(stats + 2, tl.where(live, tm, 0.0), mask=inside)
        tl.store(stats + 3, tl_, mask=inside)
        coef = coefficient(weight_ptr, old_ptr, row, live, student, is_clip)
        tl.store(coef_ptr + row, coef, mask=inside)
        kl = tl.zeros([BLOCK], tl.float32)  # of the gradient
        if MODE == "forward_kl":
            loss = (d / tz * k - tl_ + sl) * LN2
        elif MODE == "reverse_kl":
            mean = d / sz
            kl = ((mean + (tm - origin)) * k - sl + tl_) * LN2
            loss = kl
            tl.store(class_ptr + row * 2, tl.where(live, origin, 0.0), mask=inside)
            tl.store(class_ptr + row * 2 + 1, tl.where(live, mean, 0.0), mask=inside)
        elif MODE == "jsd":
            of_s = kl
            of_t = kl
            for part in range(0, parts):
                at = jsd_ptr + (row * parts + part) * 2
                of_s += tl.load(at, mask=inside, other=0.0)
                of_t += tl.load(at + 1, mask=inside, other=0.0)
            kl = of_s * LN2
            loss = ((1.0 - alpha) * of_s + alpha * of_t) * LN2
            tl.store(class_ptr + row * 2 + 1, tl.where(live, of_s, 0.0), mask=inside)
        else:  # 0 * inf = 0, and nothing is the difference of two -inf
            ratio = tl.where(student == teacher, 0.0, teacher - student)
            nothing = (ratio == 0.0) | ((student == 0.0) & (ratio == ratio))
            loss = tl.where(nothing, 0.0, -ratio * student)
        tl.store(stats + 4, tl.where(live, kl, 0.0), mask=inside)
        tl.store(per_token_ptr + row, tl.where(live, loss, 0.0), mask=inside)


# ---- JSD -----------------------------------------------------------------------------------------


@triton.jit
def jsd_terms(x, y, sm, sl, tm, tl_, k, alpha, FAST: tl.constexpr):
    """(p, log2 p - log2 m, q, log2 q - log2 m), m the mixture; all finite where p or q is 0."""
    s = tl.fma(x - sm, k, -sl)
    t = tl.fma(y - tm, k, -tl_)
    p = tl.exp2(s)
    q = tl.exp2(t)
    m = (1.0 - alpha) * p + alpha * q
    log_m = log2(tl.maximum(m, SMALLEST_NORMAL), FAST)
    return p, tl.maximum(s, LOWEST) - log_m, q, tl.maximum(t, LOWEST) - log_m


@triton.jit(do_not_specialize=RUNTIME)
def jsd_kernel(
    s_ptr, s_b, s_l, t_ptr, t_b, t_l, target_ptr, part_ptr, jsd_ptr,
    n_l, vocabulary, k, cap, alpha, ignore_index,
    HAS_CAP: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr, N: tl.constexpr,
    VEC: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(KL(p || m), KL(q || m)) of a part of a row, in log2: ``jsd_ptr [N, parts, 2]``."""
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    s, low = row_start(s_ptr, row, n_l, s_b, s_l, ALIGNED)
    t, _ = row_start(t_ptr, row, n_l, t_b, t_l, ALIGNED)
    live = tl.load(target_ptr + row) != ignore_index
    high = tl.where(live, low + vocabulary, 0)
    first = row.to(tl.int64) * parts
    sm, sz, tm, tz, _d, _o = merged(part_ptr + first * PART_COLUMNS, parts, live, k, "jsd")
    sl = tl.log2(sz)
    tl_ = tl.log2(tz)
    at = places(N, VEC, ALIGNED)
    of_s = tl.zeros([N], tl.float32)
    of_t = tl.zeros([N], tl.float32)
    for EDGES in tl.static_range(2):
        start, stop, step = tile_range(part, low, high, EDGES, N * VEC, PART)
        for o in range(start, stop, step):
            x = load_tile(s, o + at, low, high, cap, EDGES, HAS_CAP, FAST)
            y = load_tile(t, o + at, low, high, cap, EDGES, HAS_CAP, FAST)
            p, s_m, q, t_m = jsd_terms(x, y, sm, sl, tm, tl_, k, alpha, FAST)
            of_s += tl.sum(p * s_m, 1)
            of_t += tl.sum(q * t_m, 1)
    out = jsd_ptr + (first + part) * 2
    tl.store(out, tl.sum(of_s, 0))
    tl.store(out + 1, tl.sum(of_t, 0))


# ---- gradients -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def gradient_kernel(
    s_ptr, s_b, s_l, t_ptr, t_b, t_l, g_ptr, g_b, g_l,
    target_ptr, upstream_ptr, coef_ptr, student_ptr, teacher_ptr, stats_ptr, id_ptr, class_ptr,
    n_l, vocabulary, topk, k, cap, inv_temperature, alpha, ignore_index,
    MODE: tl.constexpr, HAS_CAP: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
    KP: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, VEC: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The gradient of a part of a row; of one ignored or of weight 0, zeros without a read of logits. "topk" shares
    out the tail's by each token's part of it; then the support's ``class_ptr [N, topk]`` is put over it. For
    "reverse_kl" and "jsd" ``class_ptr`` is of `finish_kernel`.

    ``upstream_ptr``: [N] for "token"; else [1], or None for 1, and times ``coef_ptr [N]``."""
    row, part = tl.program_id(0), tl.program_id(1)
    s, low = row_start(s_ptr, row, n_l, s_b, s_l, ALIGNED)
    if t_ptr is not None:
        t, _ = row_start(t_ptr, row, n_l, t_b, t_l, ALIGNED)
    g, _ = row_start(g_ptr, row, n_l, g_b, g_l, ALIGNED)
    high = low + vocabulary
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    stats = stats_ptr + row.to(tl.int64) * COLUMNS
    sm, sl = tl.load(stats), tl.load(stats + 1)
    if t_ptr is not None:
        tm, tl_ = tl.load(stats + 2), tl.load(stats + 3)
    factor = inv_temperature
    if MODE == "token":
        factor *= tl.load(upstream_ptr + row)
    else:
        coef = tl.load(coef_ptr + row)
        live = live & (coef != 0.0)
        factor *= coef
        if upstream_ptr is not None:
            factor *= tl.load(upstream_ptr)
    if MODE == "sampled_token":
        student, teacher = tl.load(student_ptr + row), tl.load(teacher_ptr + row)
        factor *= tl.where(student == teacher, 0.0, student - teacher)
    elif MODE == "topk":
        tail = factor * tl.load(stats + 2)
    elif MODE == "reverse_kl":
        factor *= inv_temperature
        origin, mean = tl.load(class_ptr + row.to(tl.int64) * 2), tl.load(class_ptr + row.to(tl.int64) * 2 + 1)
    elif MODE == "jsd":
        factor *= (1.0 - alpha) * LN2
        mean = tl.load(class_ptr + row.to(tl.int64) * 2 + 1)
    target_at = target.to(tl.int32) + low
    if id_ptr is not None:
        j = tl.arange(0, KP)
        first = row.to(tl.int64) * topk
        ids = tl.load(id_ptr + first + j, mask=j < topk, other=0) + low
        mine = live & (j < topk) & (ids // PART == part)
        of_support = tl.load(class_ptr + first + j, mask=mine, other=0.0) * factor
        if HAS_CAP:
            of_support *= slope(load_logit(s + ids, mine, cap, HAS_CAP, FAST), cap, HAS_CAP)
            tl.debug_barrier()  # all have read them: they may be overwritten
    at = places(N, VEC, ALIGNED)
    for EDGES in tl.static_range(2):
        start, stop, step = tile_range(part, low, high, EDGES, N * VEC, PART)
        for o in range(start, stop, step):
            v = o + at
            value = tl.zeros([N, VEC], tl.float32)
            if live & (MODE != "support"):
                x = load_tile(s, v, low, high, cap, EDGES, HAS_CAP, FAST)
                if t_ptr is not None:
                    y = load_tile(t, v, low, high, cap, EDGES, HAS_CAP, FAST)
                if MODE == "jsd":
                    p, s_m, _q, _t_m = jsd_terms(x, y, sm, sl, tm, tl_, k, alpha, FAST)
                    value = p * (s_m - mean) * factor
                else:
                    p = tl.exp2(tl.fma(x - sm, k, -sl))
                    if MODE == "topk":
                        value = p * tail
                    elif MODE == "forward_kl":
                        value = (p - tl.exp2(tl.fma(y - tm, k, -tl_))) * factor
                    elif MODE == "reverse_kl":
                        value = times(p, (x - sm) - (y - origin) - mean) * factor
                    else:
                        value = tl.fma(p, -factor, tl.where(at == target_at - o, factor, 0.0))
                value *= slope(x, cap, HAS_CAP)
            value = value.to(g_ptr.dtype.element_ty)
            if EDGES:
                tl.store(g + v, value, mask=(v >= low) & (v < high))
            else:
                tl.store(g + v, value)
    if id_ptr is not None:
        tl.debug_barrier()  # its stores come after those of the tiles
        tl.store(g + ids, of_support.to(g_ptr.dtype.element_ty), mask=mine)


# ---- top-k ---------------------------------------------------------------------------------------


@triton.jit
def renormalized(c, k):
    """Log2-probs of the classes alone, however unlikely they are together; -inf stays -inf."""
    u = (c - tl.max(c, 0)) * k
    return u - tl.log2(tl.sum(tl.exp2(u), 0))


@triton.jit
def classes_of(
    row_ptr, ids, target, keep, live, m, z, j, topk, k, cap,
    TAIL: tl.constexpr, HAS_CAP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(log2-probs of a policy's classes [KP], the tail's at ``topk``; log-prob of the target) from its row
    and the (m, z) outside the support."""
    c = load_logit(row_ptr + ids, keep, cap, HAS_CAP, FAST)
    top = tl.maximum(m, tl.max(c, 0))
    u = tl.where(j == topk, (m - top) * k + tl.log2(z), (c - top) * k)
    whole = tl.log2(tl.sum(tl.exp2(u), 0))
    of_target = load_logit(row_ptr + target, live, cap, HAS_CAP, FAST)
    if TAIL:
        u -= whole
    else:
        u = renormalized(c, k)
    return u, log_prob(of_target, top, whole, k)


@triton.jit
def classes_loss(u, w, classes, alpha, MODE: tl.constexpr):
    """(loss, gradients of the classes) in nats, from log2-probs u of the student and w of the teacher."""
    p = tl.where(classes, tl.exp2(u), 0.0)
    q = tl.where(classes, tl.exp2(w), 0.0)
    if MODE == "forward_kl":
        return tl.sum(times(q, w - u), 0) * LN2, p - q
    elif MODE == "reverse_kl":
        loss = tl.sum(times(p, u - w), 0)
        return loss * LN2, times(p, u - w - loss) * LN2
    else:
        m = (1.0 - alpha) * p + alpha * q
        log_m = tl.log2(tl.where(m == 0.0, 1.0, m))
        of_s = tl.sum(times(p, u - log_m), 0)
        of_t = tl.sum(times(q, w - log_m), 0)
        loss = (1.0 - alpha) * of_s + alpha * of_t
        return loss * LN2, times(p, u - log_m - of_s) * ((1.0 - alpha) * LN2)


@triton.jit(do_not_specialize=RUNTIME)
def topk_finish_kernel(
    s_ptr, s_b, s_l, t_ptr, t_b, t_l, target_ptr, id_ptr, given_ptr, weight_ptr, old_ptr, part_ptr,
    student_ptr, teacher_ptr, per_token_ptr, coef_ptr, stats_ptr, class_ptr,
    n_l, parts, topk, k, cap, alpha, is_clip, ignore_index,
    MODE: tl.constexpr, TAIL: tl.constexpr, HAS_CAP: tl.constexpr, FAST: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """One row from its parts, a divergence over ``topk`` classes and the tail: loss, coefficient, log-probs
    of the target, statistics of the tail, and the support's gradients ``class_ptr [N, topk]``, before the
    softcap. ``given_ptr [N, topk]``: the teacher's log-probs of the support, in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    j = tl.arange(0, KP)
    keep = (j < topk) & live
    classes = keep
    if TAIL:
        classes = (j <= topk) & live
    ids = tl.load(id_ptr + row * topk + j, mask=keep, other=0)
    sm, sz, tm, tz, _d, _o = merged(part_ptr + row * parts * PART_COLUMNS, parts, live, k, "topk")
    s, _ = row_start(s_ptr, row, n_l, s_b, s_l, False)
    u, student = classes_of(s, ids, target, keep, live, sm, sz, j, topk, k, cap, TAIL, HAS_CAP, FAST)
    student = tl.where(live, student, 0.0)
    if t_ptr is not None:
        t, _ = row_start(t_ptr, row, n_l, t_b, t_l, False)
        w, teacher = classes_of(t, ids, target, keep, live, tm, tz, j, topk, k, cap, TAIL, HAS_CAP, FAST)
    else:
        given = tl.load(given_ptr + row * topk + j, mask=keep, other=NEG_INF)
        w = given * LOG2E
        if TAIL:
            w = tl.where(j == topk, tl.log2(tl.maximum(1.0 - tl.sum(tl.exp2(w), 0), 0.0)), w)
        else:
            w = renormalized(w, 1.0)
        hit = keep & (ids == target)
        teacher = tl.sum(tl.where(hit, given, 0.0), 0)
        teacher = tl.where(tl.sum(hit.to(tl.int32), 0) > 0, teacher, float("nan"))
    loss, g = classes_loss(u, w, classes, alpha, MODE)
    empty = sz == 0.0  # nothing, or all masked, outside the support
    tl.store(student_ptr + row, student)
    tl.store(teacher_ptr + row, tl.where(live, teacher, 0.0))
    tl.store(per_token_ptr + row, tl.where(live, loss, 0.0))
    tl.store(coef_ptr + row, coefficient(weight_ptr, old_ptr, row, live, student, is_clip))
    tl.store(stats_ptr + row * 5, tl.where(empty, 0.0, sm))
    tl.store(stats_ptr + row * 5 + 1, tl.log2(tl.where(empty, 1.0, sz)))
    tl.store(stats_ptr + row * 5 + 2, tl.sum(tl.where(classes & (j == topk), g, 0.0), 0))
    tl.store(stats_ptr + row * 5 + 3, 0.0)
    tl.store(stats_ptr + row * 5 + 4, 0.0)
    tl.store(class_ptr + row * topk + j, tl.where(keep, g, 0.0), mask=j < topk)
