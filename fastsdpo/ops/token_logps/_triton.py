"""Triton kernels of the token statistics: log-probs, entropy, log-ratio, and the sampled-token loss.

One program per row (or per segment of a row, where rows are few); tiles, alignment and sums as in
`fastsdpo.ops._triton_common`. The student's and the teacher's rows are walked one after the other,
so their alignments need not agree.

    forward   reads each logits element once: 2 bytes in bfloat16 (4 with a teacher)
    backward  reads the student's once and writes the gradient once: 4 bytes
    fused     both in one launch, the second read of a row from L2

Sums accumulate in float32; the gradient is rounded once, at the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsdpo.ops._triton_common import (
    LN2,
    RUNTIME,
    Rows,
    aligned_part,
    beside,
    beside_of,
    coefficient,
    edge_positions,
    launch,
    load_beside,
    load_c,
    log_prob,
    log_ratio,
    merged,
    normalizer,
    on_device,
    processors,
    reference_of,
    row_offset,
    row_partial,
    rows_of,
    scale_of,
    segments_of,
    slope,
    splits_rows,
    tile_of,
    tile_positions,
    whole_pieces,
)

WHOLE, PARTIAL, FINISH = 0, 1, 2  # a row in one program; its segments in several; adding them up
NO_TEACHER, TEACHER_LOGITS, TEACHER_LOGPS = 0, 1, 2


@triton.jit
def logp_gradient(c, at_target, coef, row_max, row_log2sum, k, cap, HAS_CAP: tl.constexpr):
    """coef x (1[v = y] - p) x dc/dz; ``coef`` is 0 where nothing counts."""
    p = tl.exp2(tl.fma(c - row_max, k, -row_log2sum))
    return tl.fma(p, -coef, tl.where(at_target, coef, 0.0)) * slope(c, cap, HAS_CAP)


@triton.jit
def store_tile(g_ptr, g, mask):
    tl.store(g_ptr, g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tile(g_ptr, mask):
    tl.store(g_ptr, tl.zeros(g_ptr.shape, tl.float32).to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_bounds(g_offset, vocabulary, begin, stop, BESIDE: tl.constexpr, A: tl.constexpr):
    """(first, last, elements before the first, end of this program's tiles): where the tiles of a
    gradient lie. It is the gradient's alignment that leads, so that stores are 16 bytes."""
    first, last = aligned_part(g_offset, vocabulary, BESIDE, A)
    n = whole_pieces((last - first).to(tl.int32), A)
    return first, last, (first - g_offset).to(tl.int32), n, tl.minimum(stop, n)


@triton.jit
def logp_gradient_row(
    s_ptr, s_offset, g_ptr, g_offset, vocabulary, begin, stop, with_edge, live, target, coef,
    row_max, row_log2sum, k, cap,
    HAS_CAP: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr, A: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, stop) of a row's gradient; zeros, without a read, where ``live`` is false."""
    first, last, lead, n, end = gradient_bounds(g_offset, vocabulary, begin, stop, BESIDE, A)
    if with_edge:
        v, edge = edge_positions(g_offset, first, last, vocabulary, BESIDE, A)
        if live:
            c = load_c(s_ptr + s_offset + v, edge, cap, HAS_CAP, FAST)
            g = logp_gradient(c, v == target, coef, row_max, row_log2sum, k, cap, HAS_CAP)
            store_tile(g_ptr + g_offset + v, g, edge)
        else:
            zero_tile(g_ptr + g_offset + v, edge)
    s_start, s_by = beside(s_ptr, s_offset, lead, BESIDE, A, VEC)
    g_start = g_ptr + whole_pieces(first, A)
    target_at = (target - lead).to(tl.int32)
    at = tile_positions(LANES, VEC)
    if live:
        for o in range(begin, end, LANES * VEC):
            mask = o + at < n
            c = load_beside(s_start, o, at, n, s_by, cap, HAS_CAP, True, BESIDE, FAST, LANES, VEC)
            g = logp_gradient(c, at == target_at - o, coef, row_max, row_log2sum, k, cap, HAS_CAP)
            store_tile(g_start + o + at, g, mask)
    else:
        for o in range(begin, end, LANES * VEC):
            zero_tile(g_start + o + at, o + at < n)


@triton.jit(do_not_specialize=RUNTIME)
def _sampled_token_fwd_kernel(
    s_ptr, s_shift, s_b, s_l, t_ptr, t_shift, t_b, t_l, g_ptr, g_shift, g_b, g_l,
    target_ptr, given_ptr, weight_ptr, old_ptr, partial_ptr,
    student_ptr, teacher_ptr, per_token_ptr, coef_ptr, max_ptr, log2sum_ptr, entropy_ptr,
    n_l, vocabulary, segments, pieces, k, cap, inv_temperature, is_clip, ignore_index,
    STAT_STRIDE: tl.constexpr, TEACHER: tl.constexpr, LOSS: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, FUSED: tl.constexpr, BESIDE: tl.constexpr,
    ALIGNED: tl.constexpr, STAGE: tl.constexpr, FAST: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    width = tl.where(live, vocabulary, 0)  # an ignored row is an empty one: no traffic
    s_offset = row_offset(row, n_l, s_shift, s_b, s_l)
    t_offset = row_offset(row, n_l, t_shift, t_b, t_l)

    partial = partial_ptr + row * segments * 5
    if STAGE != 2:
        begin = 0
        stop = segments
        if STAGE == 1:
            begin = tl.program_id(1)
            stop = begin + 1
        c = reference_of(s_ptr + s_offset, target, width, live, cap, HAS_CAP, FAST)
        row_partial(
            partial, s_ptr, s_offset, width, begin, stop, pieces, c, k, cap, target_ptr, 0,
            HAS_CAP, ENTROPY, False, 1, 5, ALIGNED, FAST, A, LANES, VEC,
        )  # fmt: skip
        if TEACHER == 1:
            c = reference_of(t_ptr + t_offset, target, width, live, cap, HAS_CAP, FAST)
            row_partial(
                partial + 3, t_ptr, t_offset, width, begin, stop, pieces, c, k, cap, target_ptr, 0,
                HAS_CAP, False, False, 1, 5, ALIGNED, FAST, A, LANES, VEC,
            )  # fmt: skip
    if STAGE == 0:
        tl.debug_barrier()
    if STAGE != 1:
        m, z, e = merged(partial, segments, k, ENTROPY, 5)
        tm = m
        tz = z
        if TEACHER == 1:
            tm, tz, _ = merged(partial + 3, segments, k, False, 5)
        h = (tl.log2(z) - e / z) * LN2
        m, log2sum = normalizer(m, z, inv_temperature, k)
        log2sum = tl.where(live, log2sum, 0.0)
        m = tl.where(live, m, 0.0)
        c = load_c(s_ptr + s_offset + target, live, cap, HAS_CAP, FAST)
        student = tl.where(live, log_prob(c, m, log2sum, inv_temperature), 0.0)
        tl.store(student_ptr + row, student)
        if TEACHER == 0 or LOSS:
            tl.store(max_ptr + row * STAT_STRIDE, m)
            tl.store(log2sum_ptr + row * STAT_STRIDE, log2sum)
        if ENTROPY:
            tl.store(entropy_ptr + row, tl.where(live, h, 0.0))
        teacher = student
        if TEACHER == 1:
            c = load_c(t_ptr + t_offset + target, live, cap, HAS_CAP, FAST)
            tm, tl_ = normalizer(tm, tz, inv_temperature, k)
            teacher = tl.where(live, log_prob(c, tm, tl_, inv_temperature), 0.0)
        if TEACHER == 2:
            teacher = tl.where(live, tl.load(given_ptr + row), 0.0)
        if TEACHER != 0:
            tl.store(teacher_ptr + row, teacher)
        if LOSS:
            ratio = log_ratio(student, teacher)
            nothing = (ratio == 0.0) | ((student == 0.0) & (ratio == ratio))  # 0 * inf = 0
            tl.store(per_token_ptr + row, tl.where(nothing, 0.0, -ratio * student))
            weight = tl.load(weight_ptr + row)
            coef = coefficient(weight, student, old_ptr, row, is_clip, HAS_OLD)
            coef = tl.where(live, coef, 0.0)
            tl.store(coef_ptr + row, coef)
            if FUSED:
                tl.debug_barrier()  # all threads have read the target's logit: it may be overwritten
                g_offset = row_offset(row, n_l, g_shift, g_b, g_l)
                logp_gradient_row(
                    s_ptr, s_offset, g_ptr, g_offset, vocabulary, 0, vocabulary, True, live,
                    target, -ratio * coef * inv_temperature, m, log2sum, k, cap,
                    HAS_CAP, BESIDE, FAST, A, LANES, VEC,
                )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def _sampled_token_bwd_kernel(
    s_ptr, s_shift, s_b, s_l, g_ptr, g_shift, g_b, g_l,
    target_ptr, grad_ptr, coef_ptr, student_ptr, teacher_ptr, max_ptr, log2sum_ptr,
    n_l, vocabulary, tiles_per_program, k, cap, inv_temperature, ignore_index,
    STAT_STRIDE: tl.constexpr, LOSS: tl.constexpr, HAS_CAP: tl.constexpr, BESIDE: tl.constexpr,
    FAST: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    target = tl.load(target_ptr + row)
    if LOSS:
        ratio = log_ratio(tl.load(student_ptr + row), tl.load(teacher_ptr + row))
        coef = -ratio * tl.load(coef_ptr + row) * tl.load(grad_ptr)
    else:
        coef = tl.load(grad_ptr + row)
    logp_gradient_row(
        s_ptr, row_offset(row, n_l, s_shift, s_b, s_l),
        g_ptr, row_offset(row, n_l, g_shift, g_b, g_l),
        vocabulary, part * tiles_per_program * (LANES * VEC),
        (part + 1) * tiles_per_program * (LANES * VEC), part == 0,
        target != ignore_index, target, coef * inv_temperature,
        tl.load(max_ptr + row * STAT_STRIDE), tl.load(log2sum_ptr + row * STAT_STRIDE), k, cap,
        HAS_CAP, BESIDE, FAST, A, LANES, VEC,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ launchers


def gradient_grid(
    rows: int, vocabulary: int, tile: int, device: torch.device
) -> tuple[tuple[int, int], int]:
    """Programs of an elementwise pass, and tiles per program: several per row where rows are few."""
    tiles = max(1, -(-vocabulary // tile))
    wanted = -(-2 * processors(device) // max(1, rows))
    parts = max(1, min(tiles, wanted))
    per_program = -(-tiles // parts)
    return (rows, -(-tiles // per_program)), per_program


def forward(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target_ids: Tensor,
    *,
    teacher_logps: Tensor | None = None,
    weights: Tensor | None = None,
    old_logps: Tensor | None = None,
    is_clip: float = 0.0,
    temperature: float,
    softcap: float,
    ignore_index: int,
    entropy: bool = False,
    grad_logits: Tensor | None = None,
) -> dict[str, Tensor]:
    """Launches the forward kernel; ``weights`` asks for the loss, ``grad_logits`` for its gradient."""
    rows, vocabulary = target_ids.numel(), student_logits.shape[-1]
    loss = weights is not None
    new = lambda *shape: student_logits.new_empty(*shape, dtype=torch.float32)  # noqa: E731
    out = {"student_logps": new(rows), "teacher_logps": new(rows), "stats": new(rows, 2)}
    out |= {name: new(rows if loss else 0) for name in ("per_token", "coef")}
    out["entropy"] = new(rows if entropy else 0)
    if rows == 0:
        return out
    s = rows_of(student_logits)
    t = s if teacher_logits is None else rows_of(teacher_logits)
    g = s if grad_logits is None else rows_of(grad_logits)
    beside_rows = beside_of(s, g)
    sizes = [rows.pointer.element_size() for rows in (s, t, g)]
    # Tiles by dtypes alone, never by alignment: sums depend on them.
    joint = grad_logits is not None and min(sizes) == 4
    options = launch(*sizes, heavy=softcap != 0.0 or entropy, joint=joint)
    segments, pieces = segments_of(vocabulary, tile_of(options))
    split = grad_logits is None and splits_rows(rows, segments, student_logits.device)
    none = out["student_logps"]
    partial = new(rows, segments, 5)
    teacher = NO_TEACHER
    if teacher_logits is not None:
        teacher = TEACHER_LOGITS
    elif teacher_logps is not None:
        teacher = TEACHER_LOGPS
    for stage in (PARTIAL, FINISH) if split else (WHOLE,):
        grid = (rows, segments) if stage == PARTIAL else (rows,)
        with on_device(student_logits):
            _sampled_token_fwd_kernel[grid](
                *s[:4], *t[:4], *g[:4], target_ids,
                none if teacher_logps is None else teacher_logps, none if not loss else weights,
                none if old_logps is None else old_logps, partial,
                out["student_logps"], out["teacher_logps"], out["per_token"], out["coef"],
                out["stats"], out["stats"][:, 1], out["entropy"],
                n_l=student_logits.shape[1], vocabulary=vocabulary, segments=segments,
                pieces=pieces, k=scale_of(temperature), cap=softcap,
                inv_temperature=1.0 / temperature, is_clip=is_clip, ignore_index=ignore_index,
                STAT_STRIDE=2, TEACHER=teacher, LOSS=loss, HAS_OLD=old_logps is not None,
                HAS_CAP=softcap != 0.0, ENTROPY=entropy, FUSED=grad_logits is not None,
                BESIDE=beside_rows, ALIGNED=s.aligned and t.aligned, STAGE=stage, **options,
            )  # fmt: skip
    return out


def backward(
    student_logits: Tensor,
    target_ids: Tensor,
    row_max: Tensor,
    row_log2sum: Tensor,
    grad: Tensor,
    grad_logits: Tensor,
    *,
    coef: Tensor | None = None,
    student_logps: Tensor | None = None,
    teacher_logps: Tensor | None = None,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> None:
    """Launches the backward kernel: ``grad`` is per row, or with ``coef`` one number for the loss."""
    rows, vocabulary = target_ids.numel(), student_logits.shape[-1]
    if rows == 0:
        return
    s: Rows = rows_of(student_logits)
    g: Rows = rows_of(grad_logits)
    beside_rows = beside_of(s, g)
    options = launch(
        student_logits.element_size(), grad_logits.element_size(),
        heavy=softcap != 0.0, beside=beside_rows,
    )  # fmt: skip
    grid, tiles_per_program = gradient_grid(
        rows, vocabulary, tile_of(options), student_logits.device
    )
    with on_device(student_logits):
        _sampled_token_bwd_kernel[grid](
            *s[:4], *g[:4], target_ids, grad,
            grad if coef is None else coef, grad if student_logps is None else student_logps,
            grad if teacher_logps is None else teacher_logps, row_max, row_log2sum,
            n_l=student_logits.shape[1], vocabulary=vocabulary,
            tiles_per_program=tiles_per_program, k=scale_of(temperature), cap=softcap,
            inv_temperature=1.0 / temperature, ignore_index=ignore_index,
            STAT_STRIDE=row_max.stride(0), LOSS=coef is not None, HAS_CAP=softcap != 0.0,
            BESIDE=beside_rows, **options,
        )  # fmt: skip


def token_logps_forward(
    logits: Tensor,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = forward(
        logits, None, target_ids, temperature=temperature, softcap=softcap,
        ignore_index=ignore_index, entropy=return_entropy,
    )  # fmt: skip
    row_max, row_log2sum = out["stats"].unbind(1)
    return out["student_logps"], out["entropy"], row_max.clone(), row_log2sum.clone()


def token_logps_backward(
    grad_logps: Tensor,
    logits: Tensor,
    target_ids: Tensor,
    row_max: Tensor,
    row_log2sum: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> None:
    backward(
        logits, target_ids, row_max, row_log2sum, grad_logps, grad_logits,
        temperature=temperature, softcap=softcap, ignore_index=ignore_index,
    )  # fmt: skip


def token_log_ratio_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    out = forward(
        student_logits, teacher_logits, target_ids, temperature=temperature, softcap=softcap,
        ignore_index=ignore_index,
    )  # fmt: skip
    return out["student_logps"], out["teacher_logps"]
