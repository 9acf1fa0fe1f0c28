"""Log-probs of target tokens from hidden states, a chunk of logits at a time (`ops.head`).

The backward pass computes the logits of each chunk again: 1 GEMM forward, 3 backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsdpo.ops import token_terms
from fastsdpo.ops.backend import resolve_backend
from fastsdpo.ops.checks import (
    check_ignore_index,
    check_like,
    check_logits,
    check_softcap,
    check_temperature,
    flat_ids,
)
from fastsdpo.ops.head import ChunkPlan, choose_dtypes
from fastsdpo.ops.linear_checks import check_chunk, check_head_tensors, check_scale, check_tile, flat_hidden, gathered
from fastsdpo.ops.rows import LossOptions


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    extra_ids: Tensor | None = None,
    chunk_size: int | None = None,
    tile_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each target token from hidden states, without storing the logits.

        z = logit_scale * (hidden @ weight.T + bias);  then as `token_logps`

    Args:
        hidden: ``(..., D)`` floating.
        weight: ``(V, D)`` the head; a DTensor is gathered.
        target_ids: ``(...)`` integer in [0, V), or ``ignore_index`` (0 and no gradient).
        bias: ``(V,)`` or None.
        temperature, softcap, return_entropy, entropy_grad, extra_ids, backend: as `token_logps`.
        logit_scale: multiplies the head's output before the softcap; > 0.
        chunk_size: tokens per tile; None chooses (`ops.head.default_chunk_size`).
        tile_dtype: dtype of the logit tiles on a GPU; None is float32. bfloat16 tiles halve the
            tile's memory and put 7% to 10% error into gradients where two policies are close.

    Returns:
        ``(...)`` float32 (float64 for float64 inputs), differentiable in ``hidden``, ``weight``
        and ``bias``; with ``return_entropy`` and ``extra_ids`` a tuple as of `token_logps`.

    Raises:
        ValueError, TypeError, ImportError: as `token_logps`, by argument.

    Memory: one float32 tile of chunk_size * V (and a gradient tile in the operands' dtype where
        that is not float32) beyond the gradients; backward recomputes the logits: 1 GEMM forward,
        3 backward. On a CPU the tile stays allocated for the next call, up to 512 MiB
        (`fastsdpo.ops.linear.release_tiles` frees it).
    """
    name = "linear_token_logps"
    hidden = check_logits(name, "hidden", hidden, "D")
    weight, bias = gathered(weight), gathered(bias)
    weight, bias = check_head_tensors(name, "weight", hidden, weight, bias)
    target_ids = check_like(name, "target_ids", target_ids, hidden.shape[:-1], hidden.device, integer=True)
    scale = check_scale(name, logit_scale)
    temperature = check_temperature(name, temperature) / scale
    cap = check_softcap(name, softcap) / scale
    check_tile(name, tile_dtype, hidden.device)
    flat = flat_hidden(hidden)
    chunk = check_chunk(name, chunk_size, flat.shape[0], weight)
    operand, tile = choose_dtypes(hidden, weight, tile_dtype)
    backend = resolve_backend(name, backend, weight.new_empty(0, dtype=tile))
    options = LossOptions(temperature, cap, check_ignore_index(name, ignore_index)).packed()
    rest = *options, return_entropy, *ChunkPlan(chunk, operand, tile).packed(), backend
    extra = token_terms.check_extra_ids(name, extra_ids, target_ids, entropy_grad, return_entropy)
    ids = [flat_ids(target_ids), extra]
    logps, entropy, *_ = token_terms.linear_token_terms_op(flat, weight, bias, ids, *rest)
    entropy = (entropy if entropy_grad else entropy.detach()) if return_entropy else None
    return token_terms.results(logps, entropy, target_ids, extra, ignore_index)
