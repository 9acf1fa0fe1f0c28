r"""Attention over a plan: every token sees its own run up to itself, and slices of the runs above.

A transformers model calls `plan_attention` in place of its own attention function, through the
public `AttentionInterface`, for the passes that carry a `SharedPass` and for no other. Backends:

``segments``  any device. A run is split into *blocks* (queries x unbroken keys, full or causal or
    within a band), each computed by a fused kernel without a mask where none is needed, and merged
    by their log-sum-exps. For blocks b of one query with outputs o_b and log-sum-exps l_b,

        lse = log sum_b exp(l_b),     out = sum_b exp(l_b - lse) o_b,

    and the kernel's own backward pass, given the merged ``out`` and ``lse`` in place of a block's,
    returns exactly the block's share of the gradients (dS = P * (dP - rowsum(dO * out))). Keys and
    values are read in place: none is copied, concatenated or repeated for grouped queries, and no
    full-size gradient is made per slice. Memory is linear in the tokens.
``flex``  GPUs: one compiled flex_attention call, its block mask made from the walk's times.
``flash`` GPUs, with the package flash-attn: one varlen call; the keys of each run are gathered
    behind those of its ancestors, and flash-attn's causal mask is aligned at the end.
``dense`` any device: one scaled_dot_product_attention call with a mask of queries x keys.

Sliding windows are honoured by all four. None of the GPU paths has run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsdpo.prefix.pack import Piece, Plan, Run

BACKENDS = ("segments", "flex", "flash", "dense")

# Queries per block where a sliding window needs a mask: bounds the mask to [512, 512 + window].
BAND_BLOCK = 512


class Block(NamedTuple):
    """Queries ``[q0, q1)`` against keys ``[k0, k1)``.

    ``band`` is None, or (offset, window): query i sees key j where i - j + offset < window.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    band: tuple[int, int] | None


class SharedPass:
    """One forward pass over ``runs`` of a plan, and the keys and values it leaves or finds.

    Handed to the attention through the model's keyword arguments, so a layer that gradient
    checkpointing runs again in the backward pass finds it again. Not a dataclass, on purpose:
    wrappers such as FSDP and DDP take dataclasses apart and rebuild them, and what the layers
    put into a copy would be lost.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        first: int,
        stop: int,
        backend: str,
        windows: dict[int, int | None],
        keys_values: dict[int, tuple[Tensor, Tensor]],
        capture: bool,
    ):
        """Tokens ``[first, stop)`` of ``plan``; ``keys_values`` of ``[0, first)`` by layer.

        ``backend`` is a backend's name or "auto"; ``windows`` gives each layer's sliding window;
        while ``capture`` is true the layers put their keys and values into ``keys_values``.
        """
        self.plan = plan
        self.first, self.stop = first, stop
        self.backend = backend
        self.windows = windows
        self.keys_values = keys_values
        self.capture = capture
        self.runs = [run for run in plan.runs if first <= run.start < stop]
        self.layers: set[int] = set()
        # Masks and indices, made by the first layer that needs them.
        self.cache: dict[Any, Any] = {}

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


# ------------------------------------------------------------------- what transformers models call


def plan_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    fastsdpo_pass: SharedPass,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [1, H, T, E]``, ``key [1, G, T, E]``, ``value [1, G, T, F]`` -> ``[1, T, H, F]``.

    The mask is ignored: the plan says what is visible.

    Raises:
        NotImplementedError: something that the plan's attention does not do, by name.
    """
    shared = fastsdpo_pass
    layer = module.layer_idx
    for name in ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"shared prefixes: layer {layer} uses attention {name}")
    if dropout:
        raise NotImplementedError(f"shared prefixes: layer {layer} has attention dropout {dropout}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError(f"shared prefixes: the attention of layer {layer} is not causal")
    if sliding_window != shared.windows.get(layer):
        raise NotImplementedError(
            f"shared prefixes: layer {layer} has sliding window {shared.windows.get(layer)} by its "
            f"configuration, but passes {sliding_window} to its attention"
        )
    if query.shape[0] != 1 or query.shape[2] != shared.stop - shared.first:
        raise NotImplementedError(f"shared prefixes: layer {layer} changed the packed layout to {tuple(query.shape)}")
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for scaled_dot_product_attention; rotary embeddings may leave float32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    shared.layers.add(layer)
    if shared.capture:
        shared.keys_values[layer] = (key.detach(), value.detach())
    elif shared.first:
        before_key, before_value = shared.keys_values[layer]
        key = torch.cat([before_key, key], dim=2)
        value = torch.cat([before_value, value], dim=2)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Not before: only here is it known what autocast makes of the dtype.
    backend = choose_backend(shared.backend, query.device, query.dtype)
    attend = {"segments": _segments, "flex": _flex, "flash": _flash, "dense": _dense}
    output = attend[backend](query, key, value, shared, sliding_window, scale)
    return output, None


class BackendError(ValueError):
    """A backend that was asked for by name does not exist or cannot run here."""


def check_backend(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"shared_forward: attention must be 'auto' or one of {BACKENDS}, got {name!r}")


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for ``name`` and the dtype of the queries; "auto" is ``segments`` but on CUDA.

    Raises:
        BackendError: an unknown name, or one that cannot run here; a name is never replaced.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        if device.type != "cuda":
            return "segments"
        return "flash" if half and _flash_attn_installed() else "flex"
    check_backend(name)
    if name == "flex" and device.type == "cpu":
        raise BackendError("shared_forward: attention='flex' has no backward pass on a CPU")
    if name == "flash" and not (device.type == "cuda" and half and _flash_attn_installed()):
        raise BackendError(
            "shared_forward: attention='flash' needs the package flash-attn, a CUDA device and "
            f"float16 or bfloat16, got {device.type} and {dtype}"
        )
    return name


@cache
def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


# ---------------------------------------------------------------------------------------- segments


def _segments(
    query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, window: int | None, scale: float
) -> Tensor:
    blocks = shared.cached(("blocks", window), lambda: run_blocks(shared.runs, shared.first, window))
    return _SegmentAttention.apply(query, key, value, blocks, scale)


def run_blocks(runs: list[Run], first: int, window: int | None) -> list[list[Block]]:
    """The blocks of each group of queries; the queries count from packed token ``first``.

    Within a list, the first block holds all queries of the group and every other one some of them.
    """
    groups = []
    for run in runs:
        q0, q1 = run.start - first, run.stop - first
        if window is None or run.position + run.stop - run.start <= window:
            own = Block(q0, q1, run.start, run.stop, True, None)
            above = [Block(q0, q1, p.start, p.stop, False, None) for p in run.ancestors]
            groups.append([own, *above])
            continue
        step = min(BAND_BLOCK, window)
        pieces = [*run.ancestors, Piece(run.start, run.stop, run.position)]
        for start in range(run.start, run.stop, step):
            groups.append(_windowed_blocks(run, start, min(start + step, run.stop), pieces, first, window))
    return groups


def _windowed_blocks(run: Run, start: int, stop: int, pieces: list[Piece], first: int, window: int) -> list[Block]:
    """Queries ``[start, stop)`` of ``run``, at most ``window`` of them, against all they see."""
    low = run.position + start - run.start  # position of the first query
    blocks = [Block(start - first, stop - first, start, stop, True, None)]
    for piece in pieces:
        # Keys before the queries, and not before the window of the first of them.
        begin = max(piece.position, low - window + 1)
        end = min(piece.position + piece.stop - piece.start, low)
        if begin >= end:
            continue
        # Queries so far on that they see none of these keys would leave a softmax over nothing.
        last = min(low + stop - start, end - 1 + window)
        k0 = piece.start + begin - piece.position
        full = last - 1 - begin < window
        band = None if full else (low - begin, window)
        q0 = start - first
        blocks.append(Block(q0, q0 + last - low, k0, k0 + end - begin, False, band))
    return blocks


class _Kernel(NamedTuple):
    """A fused attention kernel for ``[G, R, L, E]`` that gives and takes log-sum-exps.

    forward(query, key, value, causal, mask, scale) -> (output, log-sum-exp [G, R, L], state)
    backward(grad, query, key, value, output, log-sum-exp, causal, mask, scale, state)
        -> (dquery, dkey, dvalue)
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class _SegmentAttention(torch.autograd.Function):
    """All blocks of a layer in one node: one gradient buffer for the keys, one for the values."""

    @staticmethod
    def forward(ctx, query, key, value, groups, scale):
        # Grouped queries: [G, R, T, E], R query heads to a key head; the key head is a stride-0 view.
        q = query[0].unflatten(0, (key.shape[1], -1))
        k, v = _per_query_head(key, q.shape[1]), _per_query_head(value, q.shape[1])
        kernel = _choose_kernel(q, v)
        tokens, heads = query.shape[2], query.shape[1]
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        out = output[0].unflatten(1, q.shape[:2]).permute(1, 2, 0, 3)  # [G, R, T, F]
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.empty(q.shape[:3], dtype=lse_dtype, device=query.device)
        states = []
        for blocks in groups:
            for number, block in enumerate(blocks):
                rows, columns = slice(block.q0, block.q1), slice(block.k0, block.k1)
                part, part_lse, state = kernel.forward(
                    q[:, :, rows],
                    k[:, :, columns],
                    v[:, :, columns],
                    block.causal,
                    _band_mask(block, q),
                    scale,
                )
                states.append(state)
                if number == 0:
                    out[:, :, rows] = part
                    lse[:, :, rows] = part_lse
                else:
                    _merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.groups, ctx.scale, ctx.states = groups, scale, states
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, lse = ctx.saved_tensors
        q = query[0].unflatten(0, (key.shape[1], -1))
        k, v = _per_query_head(key, q.shape[1]), _per_query_head(value, q.shape[1])
        kernel = _choose_kernel(q, v)
        grad, out = (t[0].unflatten(1, q.shape[:2]).permute(1, 2, 0, 3) for t in (grad_output, output))
        # A token of a long history collects gradients from many branches: sum them in float32.
        total_dtype = lse.dtype
        grad_q = torch.zeros(q.shape, dtype=total_dtype, device=q.device)
        grad_k, grad_v = (torch.zeros(t[0].shape, dtype=total_dtype, device=q.device) for t in (key, value))
        states = iter(ctx.states)
        for blocks in ctx.groups:
            for block in blocks:
                rows, columns = slice(block.q0, block.q1), slice(block.k0, block.k1)
                dq, dk, dv = kernel.backward(
                    grad[:, :, rows],
                    q[:, :, rows],
                    k[:, :, columns],
                    v[:, :, columns],
                    out[:, :, rows],
                    lse[:, :, rows],
                    block.causal,
                    _band_mask(block, q),
                    ctx.scale,
                    next(states),
                )
                grad_q[:, :, rows] += dq
                grad_k[:, columns] += dk.sum(1)
                grad_v[:, columns] += dv.sum(1)
        grad_query = grad_q.flatten(0, 1)[None].to(query.dtype)
        return (
            grad_query,
            grad_k[None].to(key.dtype),
            grad_v[None].to(value.dtype),
            None,
            None,
            None,
        )


def _per_query_head(x: Tensor, repeats: int) -> Tensor:
    """``[1, G, T, E]`` as ``[G, repeats, T, E]`` without a copy."""
    return x[0].unsqueeze(1).expand(-1, repeats, -1, -1)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds keys to ``out`` and ``lse``, in place; both are finite, since every query sees a key."""
    total = torch.logaddexp(lse, part_lse)
    part_share = torch.exp(part_lse - total).unsqueeze(-1).to(out.dtype)
    out.lerp_(part, part_share)  # the shares of old and new sum to one
    lse.copy_(total)


def _band_mask(block: Block, q: Tensor) -> Tensor | None:
    """The additive mask ``[L, S]`` of a block at the edge of a sliding window."""
    if block.band is None:
        return None
    offset, window = block.band
    i = torch.arange(block.q1 - block.q0, device=q.device)[:, None]
    j = torch.arange(block.k1 - block.k0, device=q.device)[None, :]
    beyond = i - j + offset >= window  # the keys of such a block all come before its queries
    return torch.zeros(beyond.shape, dtype=q.dtype, device=q.device).masked_fill_(beyond, float("-inf"))


def _choose_kernel(q: Tensor, v: Tensor) -> _Kernel:
    """The fused kernels of torch where one takes these tensors, else plain matrix products."""
    same_size = q.shape[-1] == v.shape[-1]
    if q.device.type == "cpu" and same_size:
        return _Kernel(_cpu_forward, _cpu_backward)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and same_size and q.shape[-1] in (64, 128, 256):
        return _Kernel(_cuda_forward, _cuda_backward)
    return _Kernel(_plain_forward, _plain_backward)


def _cpu_forward(q, k, v, causal, mask, scale):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=None if mask is None else mask[None, None], scale=scale
    )
    return out, lse, None


def _cpu_backward(grad, q, k, v, out, lse, causal, mask, scale, _state):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        0.0,
        causal,
        attn_mask=None if mask is None else mask[None, None],
        scale=scale,
    )


def _cuda_forward(q, k, v, causal, mask, scale):
    if mask is not None:
        return _plain_forward(q, k, v, causal, mask, scale)
    out, lse, *state = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse, state


def _cuda_backward(grad, q, k, v, out, lse, causal, mask, scale, state):
    if mask is not None:
        return _plain_backward(grad, q, k, v, out, lse, causal, mask, scale, state)
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


def _plain_scores(q, k, causal, mask, scale):
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _plain_forward(q, k, v, causal, mask, scale):
    scores = _plain_scores(q, k, causal, mask, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse, None


def _plain_backward(grad, q, k, v, out, lse, causal, mask, scale, _state):
    p = (_plain_scores(q, k, causal, mask, scale) - lse.unsqueeze(-1)).exp()
    dp = (grad @ v.transpose(-1, -2)).to(p.dtype)
    ds = p * (dp - (grad * out).sum(-1, keepdim=True).to(p.dtype)) * scale
    dv = p.to(grad.dtype).transpose(-1, -2) @ grad
    return ds.to(k.dtype) @ k, ds.to(q.dtype).transpose(-1, -2) @ q, dv


# ------------------------------------------------------------------------------------------- dense


def visible(shared: SharedPass, window: int | None, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """``(q, k) -> bool`` on broadcast indices, the queries counted from ``shared.first``."""
    plan = shared.plan
    start, stop, position = shared.cached(
        ("times", device),
        lambda: [t[: shared.stop].to(device) for t in (plan.subtree_start, plan.subtree_stop, plan.position_ids)],
    )

    def see(q: Tensor, k: Tensor) -> Tensor:
        q = q + shared.first
        above = (start[k] <= start[q]) & (start[q] < stop[k])
        return above if window is None else above & (position[q] - position[k] < window)

    return see


def _dense(query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, window: int | None, scale: float) -> Tensor:
    def make() -> Tensor:
        q = torch.arange(query.shape[2], device=query.device)[:, None]
        k = torch.arange(key.shape[2], device=query.device)[None, :]
        return visible(shared, window, query.device)(q, k)[None, None]

    mask = shared.cached(("mask", window), make)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2)


# -------------------------------------------------------------------------------------------- flex


@cache
def _compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, window: int | None, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def make() -> Any:
        see = visible(shared, window, query.device)
        lengths = query.shape[2], key.shape[2]
        return create_block_mask(lambda _b, _h, q, k: see(q, k), None, None, *lengths, query.device)

    mask = shared.cached(("flex", window), make)
    # Uncompiled, flex_attention is its own dense definition: what the CPU runs, in tests.
    attend = flex_attention if query.device.type == "cpu" else _compiled_flex_attention()
    grouped = query.shape[1] != key.shape[1]
    output = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)


# ------------------------------------------------------------------------------------------- flash


class VarlenIndex(NamedTuple):
    """Keys of each run behind those of its ancestors, as flash-attn's varlen functions take them."""

    key_rows: Tensor  # packed indices, all runs in order
    cu_seqlens_q: Tensor  # int32, runs + 1
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def varlen_index(runs: list[Run], device: torch.device) -> VarlenIndex:
    rows, queries, keys = [], [0], [0]
    for run in runs:
        path = [range(p.start, p.stop) for p in run.ancestors] + [range(run.start, run.stop)]
        rows.extend(row for part in path for row in part)
        queries.append(queries[-1] + run.stop - run.start)
        keys.append(len(rows))
    q, k = torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32)
    longest = int(q.diff().max()), int(k.diff().max())
    return VarlenIndex(torch.tensor(rows, device=device), q.to(device), k.to(device), *longest)


def _flash(query: Tensor, key: Tensor, value: Tensor, shared: SharedPass, window: int | None, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    index = shared.cached("varlen", lambda: varlen_index(shared.runs, query.device))
    return _varlen(query, key, value, index, window, scale, flash_attn_varlen_func)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: VarlenIndex,
    window: int | None,
    scale: float,
    varlen_func: Callable,
) -> Tensor:
    q = query[0].transpose(0, 1)  # [T, H, E]
    k, v = (x[0].transpose(0, 1).index_select(0, index.key_rows) for x in (key, value))
    output = varlen_func(
        q,
        k,
        v,
        index.cu_seqlens_q,
        index.cu_seqlens_k,
        index.max_seqlen_q,
        index.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return output[None]
