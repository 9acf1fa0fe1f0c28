"""The backends against each other and against the definition, on one layer's tensors."""

import math
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsdpo.prefix.attention import (
    ChunkWindow,
    Scoring,
    SharedPass,
    choose_backend,
    dense,
    flash,
    flex,
    interface,
    kernels,
    run_blocks,
    segments,
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
    got = function(*inputs, shared_pass(plan, first), Scoring(window, scale, **more))
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
    if isinstance(window, ChunkWindow):
        see &= position[q] // window.size == position[k] // window.size
    elif window is not None:
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


@pytest.mark.parametrize("window", [None, 1, 7, 24, 1000, ChunkWindow(1), ChunkWindow(16), ChunkWindow(1000)])
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("part", ["all", "teachers"])
def test_flex_mask(lab, part, window):
    """flex_attention has no CPU backward pass; its uncompiled forward runs, mask and all."""
    plan, first = one_plan(lab, part)
    inputs = [t.detach() for t in tensors(plan, first, size=16, value_size=16)]
    compare(flex.flex_block_attention, plan, first, inputs, window, tolerance=1e-6)


def test_large_scores_do_not_overflow(lab):
    plan, _ = one_plan(lab)
    q, k, v = (t.detach() for t in tensors(plan, 0))
    compare(segments.segment_attention, plan, 0, (q * 300, k, v), scale=1.0, tolerance=1e-9)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("segments", torch.bfloat16), ("segments", torch.float16), ("flash", torch.bfloat16)]
)
def test_half_precision_gradients_are_summed_in_float32(lab, varlen_on_cpu, backend, dtype):
    """A token that 200 branches read, or a history under 64 at different places: a running sum would lose most."""
    if backend == "flash":
        items = [lab.tokenized([1] * (8 + n), [1] * (8 + n), [10 + n, 3]) for n in range(64)]
    else:
        items = [lab.tokenized([1] * 8, [1] * 8, [10 + n, 3]) for n in range(200)]
    plan = build_plan(items)
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors(plan, 0))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    if backend == "flash":
        got = flash.flash_attention(q, k, v, shared_pass(plan), 0.3)
    else:
        got = segments.segment_attention(q, k, v, shared_pass(plan), Scoring(None, 0.3))
    got_grads = torch.autograd.grad(got.sum(), (q, k, v))
    want_grads = torch.autograd.grad(definition(*exact, plan, 0, None, 0.3).sum(), exact)
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


@pytest.mark.parametrize("part", ["all", "teachers", "students"])
@pytest.mark.parametrize("window", [None, 1000])
def test_flash_equals_the_definition(lab, varlen_on_cpu, part, window):
    """Keys of the pass and of the one before it are read where they are, forward and backward."""
    plan, first = one_plan(lab, part)
    stop = plan.student_tokens if part == "students" else plan.tokens
    query, key, value = tensors(plan, first)
    if part == "students":
        query, key, value = (t.detach()[:, :, :stop].requires_grad_() for t in (query, key, value))
    shared = SharedPass(plan, first=first, stop=stop, backend="flash", windows={})
    assert flash.flash_takes(query, value, shared, window) and not flash.flash_takes(query, value, shared, 7)
    assert not flash.flash_takes(query, value, shared, ChunkWindow(7))
    before = (key[:, :, :first].detach(), value[:, :, :first].detach()) if first else None
    got = flash.flash_attention(query, key[:, :, first:], value[:, :, first:], shared, 0.3, before)
    want = definition(query, key, value, plan, first, None, 0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if first:
        return  # the teacher's pass has no gradient
    seed = torch.randn_like(want)
    grads = [torch.autograd.grad((out * seed).sum(), (query, key, value)) for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    again = torch.autograd.grad(
        (flash.flash_attention(query, key, value, shared, 0.3) * seed).sum(), (query, key, value)
    )
    assert all(map(torch.equal, again, grads[0]))  # repeatable to the last bit


@pytest.mark.parametrize("turns", [1, 3, 24])
@pytest.mark.parametrize("think", [False, True])
def test_flash_calls_are_few_and_gather_nothing(lab, turns, think):
    """Keys are read where they are: of 24 nested interactions 1.0 per token are kept, and none is gathered."""
    plan = build_plan(lab.conversation(turns, think=think) + lab.conversation(5, think=True, seed=1))
    for first, stop in ((0, plan.student_tokens), (plan.student_tokens, plan.tokens)):
        runs = [run for run in plan.runs if first <= run.start < stop]
        calls = flash.flash_calls(runs, first)
        seen = torch.zeros(stop - first, stop, dtype=torch.int32)
        for call in calls:
            base = 0 if call.before else first
            q, k = call.cu_seqlens_q + call.queries[0], call.cu_seqlens_k + call.keys[0] + base
            assert (q.diff() >= 0).all() and (k.diff() >= 0).all()  # so no query and no key is in it twice
            assert q[-1] <= stop - first and k[-1] <= (first if call.before else stop)
            for a, b, c, d in zip(q[:-1].tolist(), q[1:].tolist(), k[:-1].tolist(), k[1:].tolist()):
                seen[a:b, c:d] += torch.ones(b - a, d - c, dtype=torch.int32).tril() if call.causal else 1
        see = dense.visible(SharedPass(plan, first=first, stop=stop, backend="dense", windows={}), None, "cpu")
        assert torch.equal(seen, see(torch.arange(stop - first)[:, None], torch.arange(stop)[None, :]).int())
        depth = max(len(run.ancestors) for run in runs)
        assert len(calls) <= 1 + 2 * max(1, depth) * math.ceil(math.log2(turns + 6))

        # Torch's own operators, by their shapes alone.
        query, key, value = (t.detach()[:, :, : stop if t.shape[1] == 2 else None] for t in tensors(plan, first))
        inputs = [t.bfloat16().to("meta").requires_grad_() for t in (query[:, :, : stop - first], key, value)]
        own = [inputs[0], *(t[:, :, first:] for t in inputs[1:])]
        before = tuple(t.detach()[:, :, :first] for t in inputs[1:]) if first else None
        shared = SharedPass(plan, first=first, stop=stop, backend="flash", windows={})
        with CopiedBytes() as copied:
            flash.flash_attention(*own, shared, 0.3, before)
        assert copied.kernels == len(calls) and copied.bytes == 0


class CopiedBytes(TorchDispatchMode):
    """Bytes of operators that only move values, and calls of torch's varlen kernel."""

    bytes = kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        self.kernels += name == "_varlen_attn"
        if name in ("index_select", "index", "gather", "cat", "clone", "_to_copy", "copy_", "repeat_interleave"):
            self.bytes += out.nbytes if out.dim() > 3 or out.shape[1:].numel() == 16 else 0
        return out


@pytest.mark.parametrize("window", [None, 1, 100, 300, ChunkWindow(50)])
def test_the_block_mask_is_that_of_all_pairs(lab, window):
    """Counted from the runs; flex's own evaluates the mask on queries x keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    history = list(range(700))
    items = [lab.tokenized(history[:n], [*history[: n - 9], -1, -2], [-3 - n] * 90) for n in (300, 310, 600, 700)]
    plan = build_plan(items + [lab.tokenized([5] * 260, [5] * 128 + [6], [7] * 5)])
    for first, stop in ((0, plan.student_tokens), (plan.student_tokens, plan.tokens)):
        shared = SharedPass(plan, first=first, stop=stop, backend="flex", windows={})
        see = dense.visible(shared, window, torch.device("cpu"))
        table = flex.block_table(shared.runs, first, stop - first, stop, window)
        found = flex.block_mask(table, stop - first, stop, see)
        want = create_block_mask(lambda b, h, q, k, see=see: see(q, k), None, None, stop - first, stop, "cpu")
        for name in ("kv", "full_kv", "q", "full_q"):
            counts, indices = getattr(found, f"{name}_num_blocks"), getattr(found, f"{name}_indices")
            assert torch.equal(counts, getattr(want, f"{name}_num_blocks")), name
            used = torch.arange(indices.shape[-1]) < counts[..., None]
            assert torch.equal(indices[used], getattr(want, f"{name}_indices")[used]), name


def test_the_block_mask_of_64k_tokens_is_small_and_quick(lab):
    """Under 50 MB and 50 ms; queries x keys would be 4.3e9 evaluations and 43 GB."""
    turns, items, history = 24, [], []
    for conversation in range(4):
        history = [conversation]
        for turn in range(turns):
            ids = [1000 * conversation + 10 * turn + 1] * 520
            items.append(lab.tokenized(history, [*history, 7], [*ids, 2]))
            history = [*history, *ids, 3, *ids[:60]]
    plan = build_plan(items)
    assert plan.tokens > 64_000
    runs = list(plan.runs)
    times = []
    for _ in range(5):
        started = time.thread_time()
        table = flex.block_table(runs, 0, plan.tokens, plan.tokens, None)
        times.append(time.thread_time() - started)
    assert sum(t.nbytes for t in table) < 50e6 and min(times) < 0.05, times


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
            out = segments.segment_attention(q, k, v, shared_pass(plan), Scoring(window, 0.3))
            torch.autograd.grad(out.sum(), (q, k, v))
        assert 0 < Largest.numel <= 4 * q.numel()
