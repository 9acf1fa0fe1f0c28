"""Attention kernels that give and take log-sum-exps: torch's fused ones, and plain matrix products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kernel(NamedTuple):
    """One attention kernel: ``[G, R, L, E]`` queries, G key heads, R query heads to each, L tokens.

    forward(query, key, value, causal, mask, scale) -> (output, log-sum-exp [G, R, L], state)
    backward(grad, query, key, value, output, log-sum-exp, causal, mask, scale, state)
        -> (dquery, dkey, dvalue)
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose_kernel(q: Tensor, v: Tensor) -> Kernel:
    """The fused kernels of torch where one takes these tensors, else plain matrix products."""
    same_size = q.shape[-1] == v.shape[-1]
    if q.device.type == "cpu" and same_size:
        return Kernel(cpu_forward, cpu_backward)
    if q.device.type == "meta" and same_size:
        return Kernel(shape_forward, shape_backward)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and same_size and q.shape[-1] in (64, 128, 256):
        return Kernel(cuda_forward, cuda_backward)
    return Kernel(plain_forward, plain_backward)


def cpu_forward(q, k, v, causal, mask, scale):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=None if mask is None else mask[None, None], scale=scale
    )
    return out, lse, None


def cpu_backward(grad, q, k, v, out, lse, causal, mask, scale, _state):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=None if mask is None else mask[None, None], scale=scale
    )


def cuda_forward(q, k, v, causal, mask, scale):
    if mask is not None:
        return plain_forward(q, k, v, causal, mask, scale)
    out, lse, *state = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse, state


def cuda_backward(grad, q, k, v, out, lse, causal, mask, scale, state):
    if mask is not None:
        return plain_backward(grad, q, k, v, out, lse, causal, mask, scale, state)
    lengths_q, lengths_k, most_q, most_k, seed, offset, *_ = state
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        lengths_q,
        lengths_k,
        most_q,
        most_k,
        0.0,
        causal,
        seed,
        offset,
        scale=scale,
    )


def shape_forward(q, k, v, causal, mask, scale):
    """What a fused kernel allocates, for tensors without memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=dtype), None


def shape_backward(grad, q, k, v, out, lse, causal, mask, scale, _state):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class ShapeAttention(torch.autograd.Function):
    """Attention of ``[B, H, T, E]`` by a fused kernel, as tensors without memory: outputs, log-sum-exps, gradients."""

    @staticmethod
    def forward(ctx, query, key, value):
        output, lse, _ = shape_forward(query, key, value, True, None, 1.0)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        query, key, value, _, lse = ctx.saved_tensors
        _delta = torch.empty_like(lse)
        return shape_backward(grad_output, query, key, value, None, lse, True, None, 1.0, None)


def softcapped_kernel(softcap: float) -> Kernel:
    """Plain matrix products with scores of ``softcap * tanh(score / softcap)``; no fused kernel of torch has them."""
    return Kernel(partial(plain_forward, softcap=softcap), partial(plain_backward, softcap=softcap))


def _plain_scores(q, k, causal, mask, scale, softcap):
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def plain_forward(q, k, v, causal, mask, scale, softcap=None):
    scores = _plain_scores(q, k, causal, mask, scale, softcap)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse, None


def plain_backward(grad, q, k, v, out, lse, causal, mask, scale, _state, softcap=None):
    scores = _plain_scores(q, k, causal, mask, scale, softcap)
    p = (scores - lse.unsqueeze(-1)).exp()
    dp = (grad @ v.transpose(-1, -2)).to(p.dtype)
    ds = p * (dp - (grad * out).sum(-1, keepdim=True).to(p.dtype)) * scale
    if softcap is not None:  # the derivative of tanh; hidden scores have p = 0
        ds = ds * (1 - (scores / softcap).clamp(-1, 1).square())
    dv = p.to(grad.dtype).transpose(-1, -2) @ grad
    return ds.to(k.dtype) @ k, ds.to(q.dtype).transpose(-1, -2) @ q, dv
