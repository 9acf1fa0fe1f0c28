"""The backends against each other and against the definition, on one layer's tensors."""

from __future__ import annotations

import math

import pytest
import torch

from fastsdpo.prefix.attention import (
    SharedPass,
    choose_backend,
    dense,
    flash,
    interface,
    kernels,
    run_blocks,
    segments,
    varlen_index,
)
from fastsdpo.prefix.plan import build_plan


def shared_pass(plan, first=0):
    return SharedPass(plan, first=first, stop=plan.tokens, backend="segments", windows={})


def one_plan(lab, part="all"):
    """A plan, and its first token that attends: the students' tokens come before the teachers'."""
    plan = build_plan(lab.conversation(4, think=True) + lab.conversation(2, seed=1))
    return plan, plan.student_tokens if part == "teachers" else 0


def compare(function, plan, first, inputs, window=None, scale=0.3, tolerance=1e-12, **more):
    """Asserts that outputs and gradients are those of the definition; ``more``: sinks, softcap."""
    want = definition(*inputs, plan, first, window, scale, **more)
    got = function(*inputs, shared_pass(plan, first), window, scale, **more)
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    if inputs[0].requires_grad:
        seed = torch.randn_like(want)
        inputs = [*inputs, *(value for value in more.values() if isinstance(value, torch.Tensor))]
        grads = [torch.autograd.grad((out * seed).sum(), inputs) for out in (got, want)]
        torch.testing.assert_close(*grads, rtol=0, atol=tolerance)


def definition(query, key, value, plan, first, window, scale, sinks=None, softcap=None):
    """Softmax over what each token sees, by its path, and over a sink with the value 0."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    q = torch.arange(first, first + query.shape[2])[:, None]
    k = torch.arange(key.shape[2])[None, :]
    start, stop, position = plan.subtree_start, plan.subtree_stop, plan.position_ids
    see = (start[k] <= start[q]) & (start[q] < stop[k])
    if window is not None:
        see &= position[q] - position[k] < window
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~see, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def tensors(plan, first, heads=4, groups=2, size=8, value_size=8, dtype=torch.float64):
    queries = plan.tokens - first
    q = torch.randn(1, queries, heads, size, dtype=dtype).transpose(1, 2)
    k = torch.randn(1, plan.tokens, groups, size, dtype=dtype).transpose(1, 2)
    v = torch.randn(1, plan.tokens, groups, value_size, dtype=dtype).transpose(1, 2)
    return [t.requires_grad_() for t in (q, k, v)]


@pytest.mark.parametrize("window", [None, 1, 7, 24, 1000])
@pytest.mark.parametrize("part", ["all", "teachers"])
@pytest.mark.parametrize("backend", ["segments", "dense", "plain"])
def test_backends_equal_the_definition(lab, monkeypatch, backend, part, window):
    plan, first = one_plan(lab, part)
    if backend == "plain":  # the kernel of devices without a fused one
        kernel = kernels.Kernel(kernels.plain_forward, kernels.plain_backward)
        monkeypatch.setattr(segments, "choose_kernel", lambda q, v: kernel)
    function = dense.dense_attention if backend == "dense" else segments.segment_attention
    compare(function, plan, first, tensors(plan, first), window)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("part", ["all", "teachers"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("function", [segments.segment_attention, dense.dense_attention])
def test_sinks_and_softcap(lab, function, softcap, part, window):
    """Against a softmax with one more key, with and without values of another size."""
    plan, first = one_plan(lab, part)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for given in (sinks, None) if softcap else (sinks,):
        compare(function, plan, first, tensors(plan, first), window, sinks=given, softcap=softcap)
    compare(function, plan, first, tensors(plan, first, value_size=6), window, sinks=sinks, softcap=softcap)


def test_backends_without_sinks(caplog):
    """Where the device has a backend without them, a model with sinks takes another one and says so once."""
    interface._tell.cache_clear()
    assert [interface._with_sinks("flex", "auto") for _ in range(2)] == ["segments"] * 2
    assert [record.message for record in caplog.records] == [
        "the attention backend is 'segments': 'flex' has no attention sinks and no softcap"
    ]
    assert interface._with_sinks("dense", "dense") == "dense"
    with pytest.raises(ValueError, match="attention='flash' has no attention sinks and no softcap"):
        interface._with_sinks("flash", "flash")


def test_values_of_another_size(lab):
    """Multi-head latent attention: the fused kernels want equal sizes, the plain one does not."""
    plan, _ = one_plan(lab)
    compare(segments.segment_attention, plan, 0, tensors(plan, 0, value_size=6))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("part", ["all", "teachers"])
def test_flex_mask(lab, part, window):
    """flex_attention has no CPU backward pass; its uncompiled forward runs, mask and all."""
    plan, first = one_plan(lab, part)
    inputs = [t.detach() for t in tensors(plan, first, size=16, value_size=16)]
    compare(dense.flex_block_attention, plan, first, inputs, window, tolerance=1e-6)


def test_large_scores_do_not_overflow(lab):
    plan, _ = one_plan(lab)
    q, k, v = (t.detach() for t in tensors(plan, 0))
    compare(segments.segment_attention, plan, 0, (q * 300, k, v), scale=1.0, tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_summed_in_float32(lab, dtype):
    """A token that 200 branches read: a running sum in half precision would lose most of them."""
    items = [lab.tokenized([1] * 8, [1] * 8, [10 + n, 3]) for n in range(200)]
    plan = build_plan(items)
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors(plan, 0))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    got = segments.segment_attention(q, k, v, shared_pass(plan), None, 0.3)
    want = definition(*exact, plan, 0, None, 0.3)
    got_grads = torch.autograd.grad(got.sum(), (q, k, v))
    want_grads = torch.autograd.grad(want.sum(), exact)
    for got_grad, want_grad in zip(got_grads[1:], want_grads[1:]):
        error = (got_grad.double() - want_grad).norm() / want_grad.norm()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("window", [None, 7, 30])
def test_blocks_are_few_and_need_no_mask_inside(lab, window):
    plan = build_plan(lab.conversation(4, think=True))
    groups = run_blocks(list(plan.runs), 0, window)
    pairs = sum((b.q1 - b.q0) * (b.k1 - b.k0) for blocks in groups for b in blocks)
    if window is None:
        assert len(groups) == len(plan.runs)
        assert all(b.band is None for blocks in groups for b in blocks)
    else:  # no quadratic work: a block of queries meets at most a window and itself
        assert pairs <= 2 * window * plan.tokens
    assert [blocks[0].q0 for blocks in groups] == sorted(blocks[0].q0 for blocks in groups)
    covered = [row for blocks in groups for row in range(blocks[0].q0, blocks[0].q1)]
    assert covered == list(range(plan.tokens))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("part", ["all", "teachers"])
def test_varlen_call(lab, part, window):
    """What flash-attn is given, read by its documented rules: causal from the bottom right."""
    plan, first = one_plan(lab, part)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size):
        assert causal and cu_q.dtype == cu_k.dtype == torch.int32
        assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
        out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
        for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
            i = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            j = torch.arange(d - c)[None, :]
            see = (j <= i) & ((i - j <= window_size[0]) if window_size[0] >= 0 else j >= 0)
            repeat = q.shape[1] // k.shape[1]
            kk, vv = (x[c:d].repeat_interleave(repeat, 1).transpose(0, 1) for x in (k, v))
            scores = q[a:b].transpose(0, 1) @ kk.transpose(-1, -2) * softmax_scale
            probabilities = scores.masked_fill(~see, -math.inf).softmax(-1)
            out[a:b] = (probabilities @ vv).transpose(0, 1)
        return out

    def attend(q, k, v, shared, window, scale):
        return flash.varlen_attention(q, k, v, varlen_index(shared.runs, q.device), window, scale, varlen)

    compare(attend, plan, first, [t.detach() for t in tensors(plan, first)], window)


def test_cuda_kernel_signatures():
    """No GPU here: the shapes and arguments of torch's fused CUDA kernels, on the meta device."""
    q, k, v = (torch.empty(2, 3, 5, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    out, lse, state = kernels.cuda_forward(q, k, v, True, None, 0.3)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    grads = kernels.cuda_backward(out, q, k, v, out, lse, True, None, 0.3, state)
    assert [g.shape for g in grads] == [q.shape] * 3


def test_choose_backend():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu, torch.float32) == "segments"
    assert choose_backend("auto", cuda, torch.float32) == "flex"
    assert choose_backend("dense", cpu, torch.float32) == "dense"
    with pytest.raises(ValueError, match="must be 'auto' or one of"):
        choose_backend("sdpa", cpu, torch.float32)
    with pytest.raises(ValueError, match="attention='flash' needs"):
        choose_backend("flash", cuda, torch.float32)


def test_memory_is_linear_in_tokens(lab):
    """No tensor of queries x keys, forward or backward, with and without a window."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    Largest.numel = max(Largest.numel, t.untyped_storage().nbytes() // 8)
            return out

    history = list(range(3000))
    items = [lab.tokenized(history[:n], [*history[:n], -1], [-2] * 40) for n in (1000, 2000, 3000)]
    plan = build_plan(items)
    q, k, v = tensors(plan, 0, heads=2, groups=1)
    for window in (None, 64):
        Largest.numel = 0
        with Largest():
            out = segments.segment_attention(q, k, v, shared_pass(plan), window, 0.3)
            torch.autograd.grad(out.sum(), (q, k, v))
        assert 0 < Largest.numel <= 4 * q.numel()
