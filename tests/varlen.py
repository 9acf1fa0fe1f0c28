"""Torch's varlen attention by its contract, in plain matrix products, for machines without a GPU.

The kernels run on CUDA alone. This takes the same arguments, holds them to what is documented (int32 cumulative
lengths from 0 that never fall, longest lengths, heads), and leaves NaN wherever the contract promises nothing: in
rows of queries without keys, and in the gradients of rows that no sequence pairs.
"""

import torch
from torch import Tensor

from fastsdpo.prefix.attention.flash import Varlen, VarlenCall


class VarlenOnCPU(Varlen):
    """Attributes:
    calls: how many kernels ran.
    """

    def __init__(self):
        self.calls = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        self.calls += 1
        out = torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=q.dtype)
        lse = torch.full((q.shape[1], q.shape[0]), torch.inf, dtype=_wide(q))
        for rows, columns in _sequences(q, k, call):
            scores = _scores(q[rows], k[columns], call.causal, scale)
            lse[:, rows] = scores.logsumexp(-1)
            weights = (scores - lse[:, rows, None]).exp()
            out[rows] = (weights @ _heads(v[columns], q)).transpose(0, 1).to(q.dtype)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        assert grad.stride(-1) == out.stride(-1) == 1 and lse.is_contiguous()
        grads = tuple(torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (q, k, v))
        for rows, columns in _sequences(q, k, call):
            g, o = (t[rows].transpose(0, 1).to(lse.dtype) for t in (grad, out))
            keys, values = _heads(k[columns], q), _heads(v[columns], q)
            p = (_scores(q[rows], k[columns], call.causal, scale) - lse[:, rows, None]).exp()
            ds = p * (g @ values.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale
            queries = q[rows].transpose(0, 1).to(lse.dtype)
            parts = ds @ keys, ds.transpose(-1, -2) @ queries, p.transpose(-1, -2) @ g
            for total, part, where in zip(grads, parts, (rows, columns, columns)):
                part = part.unflatten(0, (total.shape[1], -1)).sum(1)  # of the query heads of a key head
                total[where] = part.transpose(0, 1).to(total.dtype)
        return grads


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _sequences(q: Tensor, k: Tensor, call: VarlenCall):
    for cu, tokens, longest in ((call.cu_seqlens_q, q, call.longest_q), (call.cu_seqlens_k, k, call.longest_k)):
        assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == len(tokens) and cu.diff().min() >= 0
        assert longest == cu.diff().max()
    assert q.stride(-1) == k.stride(-1) == 1 and q.shape[1] % k.shape[1] == 0
    q_edges, k_edges = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for a, b, c, d in zip(q_edges[:-1], q_edges[1:], k_edges[:-1], k_edges[1:]):
        if b > a and d > c:
            yield slice(a, b), slice(c, d)


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """``[S, G, E]`` for each query head, ``[H, S, E]``."""
    return x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0).to(_wide(q))


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q.transpose(0, 1).to(_wide(q)) @ _heads(k, q).transpose(-1, -2) * scale
    if causal:  # from the bottom right
        i = torch.arange(len(q))[:, None] + len(k) - len(q)
        scores = scores.masked_fill(torch.arange(len(k))[None, :] > i, -torch.inf)
    return scores
