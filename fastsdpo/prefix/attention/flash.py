"""The backend ``flash``: torch's varlen attention on keys in place, a few calls to a layer.

A varlen call takes sequences of queries, each with the keys of its own, and writes the gradient of each key once.
Runs that branch off another run see different lengths of it, so a shared key belongs to many of them. Yet no key is
gathered: the tokens of a run, cut where others branch off, are *pieces*, and the branches that see the first j
pieces read them in blocks of 2^i pieces, by the binary digits of j. For one i no block and no branch appears twice:

    pieces of a run        0   1   2   3   4   5   6   7
    i = 2                [ 4 branches see 0 1 2 3 ]          those with j in 4..7
    i = 1                [ j = 2, 3 ]    [ j = 6, 7 ]
    i = 0                [ j=1 ] [ j=3 ] [ j=5 ] [ j=7 ]

All runs at one depth of the trie share the calls of their i. Branches of a run lie one after the other in the pack,
by where they branch off (`fastsdpo.prefix.plan`), so that each block of keys has one unbroken range of queries. A
layer takes 1 + the sum over the depths of log2(branches) calls, all keys together are read once per call, and none is
copied. The outputs are merged by their log-sum-exps and the backward pass gets the merged ones, as in ``segments``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.prefix.attention.shared_pass import SharedPass
from fastsdpo.prefix.attention.windows import Window, is_cut_short
from fastsdpo.prefix.plan import Run


class Pair(NamedTuple):
    """Queries ``[q0, q1)`` of the pass against packed keys ``[k0, k1)``."""

    q0: int
    q1: int
    k0: int
    k1: int


class VarlenCall(NamedTuple):
    """One varlen call of a pass.

    Attributes:
        before: its keys are those of the tokens before the pass, else the pass's own.
        causal: queries and keys are the same tokens.
        queries, keys: the spans ``[start, stop)`` that are handed over, of the pass's queries and of those keys.
        cu_seqlens_q, cu_seqlens_k: int32 ``[sequences + 1]``, from the spans' beginnings. Gaps are sequences too,
            of queries without keys or of keys without queries.
        longest_q, longest_k: of a sequence.
        no_keys: bool ``[queries]``, those in a gap; None: there is none.
        no_queries: bool ``[keys]``, those in a gap; None: there is none.
    """

    before: bool
    causal: bool
    queries: tuple[int, int]
    keys: tuple[int, int]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int
    no_keys: Tensor | None
    no_queries: Tensor | None


def flash_calls(runs: Sequence[Run], first: int) -> list[VarlenCall]:
    """The calls of a pass; its first query is packed token ``first``. The first call holds all queries."""
    own = [Pair(run.start - first, run.stop - first, run.start, run.stop) for run in runs]
    calls = [_call(own, False, True, first)]
    for (_depth, _level, before), pairs in sorted(_pairs_above(runs, first).items()):
        calls.extend(_call(some, before, False, first) for some in _in_order(pairs))
    return calls


def _pairs_above(runs: Sequence[Run], first: int) -> dict[tuple[int, int, bool], list[Pair]]:
    """What the runs see of those above, by depth, i, and whether it lies before the pass."""
    found: dict[tuple[int, int, bool], list[Pair]] = {}
    for depth in range(max((len(run.ancestors) for run in runs), default=0)):
        for branches in _branches(runs, depth):
            start = branches[0].ancestors[depth].start
            ends = [start]  # of the pieces
            starts = [branches[0].start]  # starts[j]: the first query that sees j pieces and more
            for run in branches:
                stop = run.ancestors[depth].stop
                if stop > ends[-1]:
                    ends.append(stop)
                    starts.append(run.start)
            starts.append(branches[-1].stop)
            for level, low, middle, high in _dyadic(len(ends) - 1):
                pair = Pair(starts[middle] - first, starts[high] - first, ends[low], ends[middle])
                found.setdefault((depth, level, start < first), []).append(pair)
    return found


def _in_order(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs in as many lists as it takes for queries and keys to rise in each, so that none appears twice in it."""
    lists: list[list[Pair]] = []
    for pair in pairs:
        fits = (some for some in lists if some[-1].q1 <= pair.q0 and some[-1].k1 <= pair.k0)
        some = next(fits, None)
        if some is None:
            lists.append([pair])
        else:
            some.append(pair)
    return lists


def _branches(runs: Sequence[Run], depth: int) -> Iterator[list[Run]]:
    """Runs, one after the other, that see more and more of the same run at ``depth`` above them."""
    group: list[Run] = []
    for run in runs:
        above = run.ancestors[depth] if len(run.ancestors) > depth else None
        last = group[-1].ancestors[depth] if group else None
        if last is not None and (above is None or above.start != last.start or above.stop < last.stop):
            yield group
            group = []
        if above is not None:
            group.append(run)
    if group:
        yield group


def _dyadic(count: int) -> Iterator[tuple[int, int, int, int]]:
    """``(i, low, middle, high)``: branches with j in [middle, high) read pieces [low, middle), for j = 1..count."""
    for level in range(count.bit_length()):
        step = 2**level
        for low in range(0, count, 2 * step):
            if low + step <= count:
                yield level, low, low + step, min(low + 2 * step, count + 1)


def _call(pairs: list[Pair], before: bool, causal: bool, first: int) -> VarlenCall:
    base = 0 if before else first  # the packed index of the first of these keys
    queries = pairs[0].q0, pairs[-1].q1
    keys = pairs[0].k0 - base, pairs[-1].k1 - base
    at_q, at_k = [0], [0]
    no_keys = torch.zeros(queries[1] - queries[0], dtype=torch.bool)
    no_queries = torch.zeros(keys[1] - keys[0], dtype=torch.bool)
    for pair in pairs:
        q0, q1 = pair.q0 - queries[0], pair.q1 - queries[0]
        k0, k1 = pair.k0 - base - keys[0], pair.k1 - base - keys[0]
        if q0 > at_q[-1]:
            no_keys[at_q[-1] : q0] = True
            at_q.append(q0)
            at_k.append(at_k[-1])
        if k0 > at_k[-1]:
            no_queries[at_k[-1] : k0] = True
            at_q.append(at_q[-1])
            at_k.append(k0)
        at_q.append(q1)
        at_k.append(k1)
    cu_q, cu_k = torch.tensor(at_q, dtype=torch.int32), torch.tensor(at_k, dtype=torch.int32)
    return VarlenCall(
        before,
        causal,
        queries,
        keys,
        cu_q,
        cu_k,
        int(cu_q.diff().max()),
        int(cu_k.diff().max()),
        no_keys if bool(no_keys.any()) else None,
        no_queries if bool(no_queries.any()) else None,
    )


class Varlen:
    """Torch's varlen attention (`torch.nn.attention.varlen`), forward and backward as two functions.

    The backward pass of the public function would take the call's own log-sum-exps; here it takes the merged ones.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        """``[L, H, E]``, ``[S, G, E]`` twice -> output ``[L, H, E]``, log-sum-exp ``[H, L]`` float32.

        What the rows of ``call.no_keys`` hold is not defined.
        """
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        return varlen_attn(  # type: ignore[return-value]
            q,
            k,
            v,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.longest_q,
            call.longest_k,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0) if call.causal else (-1, -1),
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v; rows in a gap are not defined."""
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
        return torch.ops.torch_attn._varlen_attn_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.longest_q,
            call.longest_k,
            call.causal,
            state,
            scale,
            [-1, 0] if call.causal else [-1, -1],
        )


VARLEN = Varlen()


@cache
def varlen_installed() -> bool:
    """Whether this torch has varlen attention."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def flash_takes(query: Tensor, value: Tensor, shared: SharedPass, window: Window) -> bool:
    """Whether the varlen calls compute this layer: heads of one size, and no window that cuts a sequence short."""
    size = query.shape[-1]
    whole = not is_cut_short(shared.runs, window)
    return whole and size == value.shape[-1] and size <= 256 and size % 8 == 0


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared: SharedPass,
    scale: float,
    before: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `plan_attention`, for layers that `flash_takes`; ``before`` are the keys and values of the tokens before."""

    def make() -> list[VarlenCall]:
        return [to_device(call, query.device) for call in flash_calls(shared.runs, shared.first)]

    calls = shared.cached("flash", make)
    return FlashAttention.apply(query, key, value, before, calls, scale)


def to_device(call: VarlenCall, device: torch.device) -> VarlenCall:
    return call._replace(**{n: v.to(device) for n, v in call._asdict().items() if isinstance(v, Tensor)})


class FlashAttention(torch.autograd.Function):
    """All calls of a layer as one autograd node. Keys and values before the pass have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, before: Any, calls: list[VarlenCall], scale: float
    ):
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, E], without a copy
        sides = {False: (k, v)}
        if before is not None:
            sides[True] = tuple(t[0].transpose(0, 1) for t in before)  # type: ignore[assignment]
        out, lse = VARLEN.forward(q, k, v, calls[0], scale)
        for call in calls[1:]:
            rows, columns = slice(*call.queries), slice(*call.keys)
            their_k, their_v = sides[call.before]
            part, part_lse = VARLEN.forward(q[rows], their_k[columns], their_v[columns], call, scale)
            _merge(out[rows], lse[:, rows], part, part_lse, call.no_keys)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        grad = grad_output[0].contiguous()
        first, *others = ctx.calls
        total = VARLEN.backward(grad, q, k, v, out, lse, first, ctx.scale)
        if others:  # many branches add to the gradient of a token of a long history: sum in float32, in this order
            total = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in total]
        for call in others:
            assert not call.before, "a pass over keys of another one has no gradient"
            rows, columns = slice(*call.queries), slice(*call.keys)
            parts = VARLEN.backward(
                grad[rows], q[rows], k[columns], v[columns], out[rows], lse[:, rows].contiguous(), call, ctx.scale
            )
            for sums, part, where, gap in zip(
                total, parts, (rows, columns, columns), (call.no_keys, call.no_queries, call.no_queries)
            ):
                sums[where] += part if gap is None else part.masked_fill(gap[:, None, None], 0)
        grads = [t.to(x.dtype).transpose(0, 1)[None] for t, x in zip(total, (query, key, value))]
        return (*grads, None, None, None)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, no_keys: Tensor | None) -> None:
    """Merges a call's ``part [L, H, E]`` into ``out``, in place, but for the rows without keys."""
    if no_keys is not None:
        part_lse = part_lse.masked_fill(no_keys, float("-inf"))
        part = torch.where(no_keys[:, None, None], out, part)
    total = torch.logaddexp(lse, part_lse)
    share = torch.exp(part_lse - total).transpose(0, 1).unsqueeze(-1)
    out.lerp_(part, share.to(out.dtype))
    lse.copy_(total)
