r"""A cross entropy of the targets (hard labels) in the same pass as a divergence.

    loss = sum_t w_t r_t l_t  -  sum_t h_t log p'_S[y_t]        p' = softmax(c / ce_temperature)

h are `Tokens.ce_weights`; the divergence l has its own temperature. Each row's gradient is the sum of two that the
kernels write, put together a block of rows at a time: no second tensor with a V axis exists. From hidden states the
block is the tile of the head's chunk, so the head's products are those of the divergence alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastsdpo.ops import rows
from fastsdpo.ops.checks import accumulation_dtype
from fastsdpo.ops.rows import LossOptions, RowCall, RowResults


def label_options(options: LossOptions) -> LossOptions:
    """Those of the log-probs in the cross entropy."""
    return replace(options, temperature=options.ce_temperature)


def cross_entropy(ce_weights: Tensor, logps: Tensor) -> Tensor:
    """``-sum h log p``; a token of weight 0 counts 0 even where its log-prob is infinite."""
    return -torch.where(ce_weights == 0, 0.0, ce_weights * logps).sum()


def value(call: RowCall) -> Tensor | float:
    """The cross entropy of a call's rows; 0 without weights for it."""
    tokens = call.tokens
    if tokens.ce_weights is None:
        return 0.0
    logps = rows.token_forward(call.student, tokens.target_ids, label_options(call.options), call.backend).logps
    return cross_entropy(tokens.ce_weights, logps)


def backward(upstream: Tensor, found: RowResults, call: RowCall, grad: Tensor) -> None:
    """`rows.backward`, with the gradient of ``upstream`` times the cross entropy added."""
    student, teacher, tokens, options, backend = call
    if tokens.ce_weights is None:
        rows.backward(upstream, found, call, grad)
        return
    slopes, at, dtype = -tokens.ce_weights * upstream, label_options(options), accumulation_dtype(student)
    labels = rows.of_weight(tokens.target_ids, tokens.ce_weights, options)
    for which, (logits, others, out) in rows.row_blocks(student, teacher, grad):
        assert logits is not None and out is not None
        part, ids = RowResults(*(v[which] if v.numel() else v for v in found)), labels[which]
        first, second = (torch.empty_like(logits, dtype=dtype) for _ in range(2))
        rows.backward(upstream, part, RowCall(logits, others, tokens.chunk(which), options, backend), first)
        stats = rows.token_forward(logits, ids, at, backend).stats
        rows.token_backward(slopes[which].contiguous(), stats, logits, ids, at, backend, second)
        out.copy_(first.add_(second))
