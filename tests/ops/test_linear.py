"""The losses from hidden states whatever the backend: number of GEMMs, memory, the tiles that are kept."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsdpo
from fastsdpo.ops import _memory, head, linear, rows
from tests.ops.contract import LINEAR, Hidden, each_loss, relative


def test_default_chunk_size_bounds_the_tile():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for vocabulary in (1, 1000, 32000, 151936, 500000):
        for tokens in (1, 63, 64, 1000, 8192, 100000):
            for device, budget, least in ((cpu, 2**24, 256), (cuda, 2**26, 1024)):
                chunk = head.default_chunk_size(tokens, vocabulary, device)
                assert 1 <= chunk <= max(least, tokens)
                assert chunk * vocabulary <= max(budget, least * vocabulary)
                assert chunk == tokens or chunk >= min(tokens, 8)


class Watch(TorchDispatchMode):
    """Counts GEMMs, their FLOPs and the elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.flops, self.gemms, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            self.gemms += 1
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        if "empty" in name or "zeros" in name or "cat" in name or name in ("aten::mm", "aten::_to_copy"):
            self.largest = max([self.largest, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


class MetaKernels:
    """Stands for a kernel on meta tensors: the shapes of its results, no work."""

    @staticmethod
    def forward(student, teacher, tokens, options, grad):
        row = student.new_empty(student.shape[1], dtype=torch.float32)
        return rows.RowResults(*(torch.empty_like(row) for _ in range(6)))

    @staticmethod
    def support(logits, target_ids, k, ignore_index):
        return logits.new_empty(logits.shape[1], k)


@each_loss(*LINEAR)
@pytest.mark.parametrize("own", [False, True], ids=["shared-head", "own-head"])
@pytest.mark.parametrize(
    ("needs", "gemms"),
    [((True, True, False), 4), ((True, False, False), 3), ((False, True, False), 3), ((False, False, False), 2)],
)
def test_gemms_and_memory_at_full_size(loss, own, needs, gemms, monkeypatch):
    """8192 tokens, 151936 words, 4096 hidden: exactly so many T x V x D GEMMs, nothing larger than two
    float32 tiles or as many bytes of gradients, but the head's gradient."""
    tokens, dim, vocabulary = 8192, 4096, 151936
    monkeypatch.setattr(rows, "implementation", lambda backend: MetaKernels)
    monkeypatch.setattr(linear, "check_values", lambda *args: None)
    chunk = head.default_chunk_size(tokens, vocabulary, torch.device("cuda"))

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    given = rows.Tokens(empty(tokens, dtype=torch.int64), empty(tokens, dtype=torch.float32))
    plan = head.ChunkPlan(chunk, torch.bfloat16, torch.float32)
    teacher, own_head = empty(tokens, dim), empty(vocabulary, dim) if own else None
    call = linear.LinearCall(given, rows.LossOptions(**loss), plan, "triton", teacher, own_head)
    watch, hidden, weight = Watch(), empty(tokens, dim), empty(vocabulary, dim)
    with watch:
        linear.linear_forward(hidden, weight, None, call, needs)
    assert watch.flops == gemms * 2 * tokens * vocabulary * dim
    chunks, wide = tokens // chunk, tokens // head.GRADIENT_ROWS  # the head's gradient: one for 4 chunks
    assert watch.gemms == chunks * (2 if own else 1) + (wide if needs[1] else chunks) * (needs[0] + needs[1])
    assert watch.largest <= max(2 * chunk * vocabulary, vocabulary * dim if needs[1] else 0)


def test_bare_scoring_needs_one_gemm_without_a_teacher():
    case, watch = Hidden(tokens=32, hidden=8, vocabulary=40), Watch()
    options = {"teacher_logps": torch.zeros(32), "chunk_size": 16, "backend": "reference"}
    with watch:
        fastsdpo.linear_sdpo_loss(case.student, None, case.weight, case.target_ids, **options)
    assert watch.flops == 2 * 32 * 8 * 40


def full_step(case, factor=1.0, **options):
    """(loss, gradients of hidden states and head)"""
    hidden, weight = leaves = case.leaves(2)
    options |= {"weights": case.weights, "mode": "full", "backend": "reference"}
    out = fastsdpo.linear_sdpo_loss(hidden, case.teacher, weight, case.target_ids, **options)
    return out.loss.detach(), *torch.autograd.grad(factor * out.loss, leaves)


@pytest.mark.parametrize("chunk", [None, 3])
def test_float16_gradients_do_not_underflow(chunk, monkeypatch):
    """Weights of 1e-6 a token vanish in a float16 gradient tile unless it is scaled.

    In chunks of 3, two of them wait for one GEMM of the head's gradient; the last waits alone.
    """

    class HalfTiles(head.HeadGemms):
        """The GPU path on the CPU: half operands, float32 results."""

        def logits(self, x, out):
            out.copy_(x.float() @ self.weight.float().T)

        def hidden_gradient(self, grad, out):
            assert grad.dtype == torch.float16
            out.copy_(grad.float() @ self.weight.float())

        @staticmethod
        def accumulate(grad, x, total, first):
            new = grad.float().T @ x.float()
            total.copy_(new if first else total + new)

    monkeypatch.setattr(head, "GRADIENT_ROWS", 7)
    monkeypatch.setattr(linear, "HeadGemms", HalfTiles)
    monkeypatch.setattr(linear, "choose_dtypes", lambda *_: (torch.float16, torch.float32))
    case = Hidden(dtype=torch.float16)
    case.weights = torch.full((13,), 1e-6)
    _, wanted = case.oracle(mode="full", alpha=1.0)
    _, *grads = full_step(case, 2**16, chunk_size=chunk)  # the caller's loss scale, as GradScaler applies it
    assert all(relative(grad, want * 2**16) < 5e-3 for grad, want in zip(grads, wanted))


def kept_bytes():
    return [storage.nbytes() for storage in _memory._kept]


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(autouse=True)
def no_tiles():
    _memory.release_tiles()
    yield
    _memory.release_tiles()


def test_the_next_call_finds_the_memory_of_the_last():
    small, large = Hidden(tokens=9, vocabulary=40), Hidden(tokens=30, vocabulary=70)
    alone = []
    for case in (small, large):
        _memory.release_tiles()
        alone.append(full_step(case))
    _memory.release_tiles()
    full_step(small)
    assert kept_bytes() == [2 * 9 * 64 * 4]
    place = _memory._kept[0].data_ptr()
    full_step(small)
    assert [storage.data_ptr() for storage in _memory._kept] == [place]
    full_step(large)  # too small for it: one of its own size takes its place
    assert kept_bytes() == [2 * 30 * 128 * 4]
    for case, want in ((small, alone[0]), (large, alone[1]), (small, alone[0])):
        _memory._kept[0].fill_(0xFF)  # NaN: what is left there must not matter
        assert same(full_step(case), want)
        assert fastsdpo.linear_token_logps(case.student, case.weight, case.target_ids).isfinite().all()
        assert kept_bytes() == [2 * 30 * 128 * 4]
    _memory.release_tiles()
    assert kept_bytes() == []


def test_kept_memory_outlives_inference_mode():
    """An inference tensor may not be written outside of inference mode: its storage may."""
    case = Hidden()
    want = full_step(case)
    _memory.release_tiles()
    for _ in range(2):
        with torch.inference_mode():
            fastsdpo.linear_sdpo_loss(case.student, case.teacher, case.weight, case.target_ids, backend="reference")
        assert len(kept_bytes()) == 1
        assert same(full_step(case), want)


def test_large_tiles_and_those_of_a_failed_call_are_freed(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_memory, "_LARGEST_KEPT", 2 * 13 * 64 * 4 - 1)
        full_step(Hidden())
        assert kept_bytes() == []

    def fail(*args):
        raise MemoryError("no room")

    full_step(Hidden())
    monkeypatch.setattr(head.HeadGemms, "hidden_gradient", fail)
    with pytest.raises(MemoryError):
        full_step(Hidden())
    assert kept_bytes() == []


def test_threads_do_not_share_tiles():
    cases = [Hidden(tokens=40, vocabulary=60 + i) for i in range(8)]
    want = [full_step(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(same, pool.map(full_step, cases), want))
    assert len(kept_bytes()) == 1
