"""The losses from hidden states: values, gradients, GEMM count, memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsdpo
from fastsdpo.ops import _memory, head, linear, rows
from fastsdpo.testing import oracle_sdpo_loss

BACKENDS = [name for name in ("reference", "native", "triton") if fastsdpo.available_backends()[name] == "available"]
LOSSES = [
    ("sampled_token", 1.0, None),
    ("full", 0.0, None),
    ("full", 1.0, None),
    ("full", 0.3, None),
    ("topk", 1.0, 5),
]
LOSS_IDS = [f"{m}-a{a}" for m, a, _ in LOSSES]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


class Case:
    def __init__(self, tokens=13, hidden=16, vocabulary=50, dtype=torch.float32, distance=0.3):
        self.student = torch.randn(tokens, hidden).to(dtype)
        self.teacher = (self.student.float() + distance * torch.randn(tokens, hidden)).to(dtype)
        self.weight = (torch.randn(vocabulary, hidden) * 2 * hidden**-0.5).to(dtype)
        self.bias = torch.randn(vocabulary).to(dtype)
        self.target_ids = torch.randint(0, vocabulary, (tokens,))
        self.target_ids[3] = -100
        self.weights = torch.rand(tokens)

    def oracle(self, bias, logit_scale, **kwargs):
        """float64 through a plain head, its gradient taken by autograd."""
        leaves = [t.double().requires_grad_() for t in (self.student, self.weight, self.bias)]
        z = logit_scale * (leaves[0] @ leaves[1].T + (leaves[2] if bias else 0.0))
        with torch.no_grad():
            z_teacher = logit_scale * (
                self.teacher.double() @ self.weight.double().T + (self.bias.double() if bias else 0.0)
            )
        result = oracle_sdpo_loss(z, z_teacher, self.target_ids, weights=self.weights, **kwargs)
        z.backward(result.grad)
        return result, [leaf.grad for leaf in leaves]


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 100])
def test_equals_the_formula_for_any_chunk(backend, loss, chunk_size):
    case = Case()
    mode, alpha, topk = loss
    kwargs = {"mode": mode, "alpha": alpha, "topk": topk, "temperature": 0.9, "softcap": 4.0}
    expected, grads = case.oracle(True, 1.7, **kwargs)
    leaves = [t.clone().requires_grad_() for t in (case.student, case.weight, case.bias)]
    out = fastsdpo.linear_sdpo_loss(
        leaves[0],
        case.teacher,
        leaves[1],
        case.target_ids,
        bias=leaves[2],
        logit_scale=1.7,
        weights=case.weights,
        chunk_size=chunk_size,
        backend=backend,
        **kwargs,
    )
    (3 * out.loss).backward()
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    for field in ("per_token_loss", "student_logps", "teacher_logps"):
        got, want = getattr(out, field).double(), getattr(expected, field)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for leaf, want in zip(leaves, grads):
        assert relative(leaf.grad, 3 * want) < 5e-6


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_near_teacher_gradients_in_bfloat16(backend, loss):
    """float32 tiles: from bfloat16 logits these gradients would be several percent off."""
    case = Case(tokens=64, hidden=64, vocabulary=500, dtype=torch.bfloat16, distance=0.02)
    mode, alpha, topk = loss
    kwargs = {"mode": mode, "alpha": alpha, "topk": topk}
    _, grads = case.oracle(False, 1.0, **kwargs)
    leaves = [t.clone().requires_grad_() for t in (case.student, case.weight)]
    out = fastsdpo.linear_sdpo_loss(
        leaves[0],
        case.teacher,
        leaves[1],
        case.target_ids,
        weights=case.weights,
        chunk_size=16,
        backend=backend,
        **kwargs,
    )
    out.loss.backward()
    for leaf, want in zip(leaves, grads):
        assert leaf.grad.dtype == torch.bfloat16
        rounded = relative(want.bfloat16(), want)  # the result's own rounding
        assert relative(leaf.grad, want) < 2e-3 + rounded


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
def test_only_what_requires_a_gradient_gets_one(backend, frozen):
    case = Case()
    tensors = {"hidden": case.student, "weight": case.weight, "bias": case.bias}
    leaves = {k: v.clone().requires_grad_(frozen not in (k, "all")) for k, v in tensors.items()}
    out = fastsdpo.linear_sdpo_loss(
        leaves["hidden"],
        case.teacher.requires_grad_(),
        leaves["weight"],
        case.target_ids,
        bias=leaves["bias"],
        mode="full",
        backend=backend,
    )
    assert out.loss.requires_grad == (frozen != "all")
    if frozen != "all":
        out.loss.backward()
    for leaf in leaves.values():
        assert (leaf.grad is not None) == leaf.requires_grad
    assert case.teacher.grad is None


def test_teacher_with_its_own_head(backend):
    case = Case()
    teacher = torch.randn(13, 9)
    head, bias = torch.randn(50, 9), torch.randn(50)
    z = case.student @ case.weight.T
    z_teacher = teacher @ head.T + bias
    want = fastsdpo.sdpo_loss(z, z_teacher, case.target_ids, mode="full", alpha=0.5)
    got = fastsdpo.linear_sdpo_loss(
        case.student,
        teacher,
        case.weight,
        case.target_ids,
        teacher_weight=head,
        teacher_bias=bias,
        mode="full",
        alpha=0.5,
        chunk_size=5,
        backend=backend,
    )
    torch.testing.assert_close(got.per_token_loss, want.per_token_loss, rtol=1e-4, atol=1e-5)


def test_teacher_logps_topk_and_importance_ratio(backend):
    case = Case()
    z, z_teacher = case.student @ case.weight.T, case.teacher @ case.weight.T
    logps, ids = torch.log_softmax(z_teacher, -1).topk(6, -1)
    old = torch.full((13,), -5.0)
    target_logps = fastsdpo.token_logps(z_teacher, case.target_ids)
    for kwargs in (
        {"teacher_logps": target_logps, "old_logps": old, "is_clip": 1.5},
        {"mode": "topk", "alpha": 0.5, "teacher_topk": (ids, logps)},
    ):
        leaf = z.clone().requires_grad_()
        want = fastsdpo.sdpo_loss(leaf, None, case.target_ids, backend=backend, **kwargs)
        want.loss.backward()
        hidden = case.student.clone().requires_grad_()
        got = fastsdpo.linear_sdpo_loss(
            hidden, None, case.weight, case.target_ids, chunk_size=4, backend=backend, **kwargs
        )
        got.loss.backward()
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(hidden.grad, leaf.grad @ case.weight, rtol=1e-3, atol=1e-5)


def test_token_logps(backend):
    case = Case()
    leaves = [t.double().clone().requires_grad_() for t in (case.student, case.weight, case.bias)]
    z = 0.5 * (leaves[0] @ leaves[1].T + leaves[2])
    want, want_entropy = fastsdpo.token_logps(z, case.target_ids, softcap=3.0, temperature=1.1, return_entropy=True)
    (want * case.weights).sum().backward()
    mine = [t.clone().requires_grad_() for t in (case.student, case.weight, case.bias)]
    got, entropy = fastsdpo.linear_token_logps(
        mine[0],
        mine[1],
        case.target_ids,
        bias=mine[2],
        logit_scale=0.5,
        softcap=3.0,
        temperature=1.1,
        return_entropy=True,
        chunk_size=5,
        backend=backend,
    )
    (got * case.weights).sum().backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=1e-5)
    for a, b in zip(mine, leaves):
        assert relative(a.grad, b.grad) < 5e-6
    (grad,) = torch.autograd.grad(
        fastsdpo.linear_token_logps(mine[0], mine[1], case.target_ids, backend=backend).sum(),
        mine[0],
        create_graph=True,
    )
    with pytest.raises(ValueError, match="second derivative"):
        grad.sum().backward()


def test_second_backward_and_second_derivative_raise(backend):
    case = Case()
    hidden = case.student.clone().requires_grad_()
    out = fastsdpo.linear_sdpo_loss(hidden, case.teacher, case.weight, case.target_ids, backend=backend)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()
    out = fastsdpo.linear_sdpo_loss(hidden, case.teacher, case.weight, case.target_ids, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
    with pytest.raises(ValueError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
def test_compiles_as_one_graph(backend, loss):
    torch.compiler.reset()  # each case is a program of its own
    case = Case()
    mode, alpha, topk = loss

    def step(hidden, weight):
        return fastsdpo.linear_sdpo_loss(
            hidden,
            case.teacher,
            weight,
            case.target_ids,
            mode=mode,
            alpha=alpha,
            topk=topk,
            chunk_size=4,
            backend=backend,
        ).loss

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (case.student, case.weight)]
        value = f(*leaves)
        value.backward()
        results.append((value.detach(), leaves[0].grad, leaves[1].grad))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_empty_batch_gives_zero(backend):
    weight = torch.randn(7, 4, requires_grad=True)
    hidden = torch.zeros(0, 4, requires_grad=True)
    out = fastsdpo.linear_sdpo_loss(
        hidden, torch.zeros(0, 4), weight, torch.zeros(0, dtype=torch.long), backend=backend
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert not weight.grad.any()


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
    """Counts GEMM FLOPs and the largest tensor made, by operator."""

    def __init__(self):
        super().__init__()
        self.flops, self.gemms, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:] if name == "aten::mm" and len(args) == 2 else (None, None)
            if a is None:
                tensors = [t for t in args if isinstance(t, torch.Tensor)]
                a, b = tensors[-2:]
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


def meta_call(loss, monkeypatch, *, tokens=8192, dim=4096, vocabulary=151936, chunk, needs, own=False):
    monkeypatch.setattr(rows, "implementation", lambda backend: MetaKernels)
    monkeypatch.setattr(linear, "check_values", lambda *args: None)
    mode, alpha, topk = loss
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    call = linear.LinearCall(
        rows.Tokens(empty(tokens, dtype=torch.int64), empty(tokens, dtype=torch.float32)),
        rows.LossOptions(mode=mode, alpha=alpha, topk=topk or 0),
        head.Plan(chunk, torch.bfloat16, torch.float32),
        "triton",
        empty(tokens, dim),
        empty(vocabulary, dim) if own else None,
    )
    watch, hidden, weight = Watch(), empty(tokens, dim), empty(vocabulary, dim)
    with watch:
        linear.linear_forward(hidden, weight, None, call, needs)
    return watch


@pytest.mark.parametrize("loss", LOSSES, ids=LOSS_IDS)
@pytest.mark.parametrize("own", [False, True], ids=["shared-head", "own-head"])
@pytest.mark.parametrize(
    ("needs", "gemms"),
    [
        ((True, True, False), 4),
        ((True, False, False), 3),
        ((False, True, False), 3),
        ((False, False, False), 2),
    ],
)
def test_gemms_and_memory_at_full_size(loss, own, needs, gemms, monkeypatch):
    """8192 tokens, 151936 words, 4096 hidden: exactly so many T x V x D GEMMs, nothing larger than two
    float32 tiles or as many bytes of gradients, but the head's gradient."""
    chunk = head.default_chunk_size(8192, 151936, torch.device("cuda"))
    watch = meta_call(loss, monkeypatch, chunk=chunk, needs=needs, own=own)
    assert watch.flops == gemms * 2 * 8192 * 151936 * 4096
    chunks, wide = (
        8192 // chunk,
        8192 // head.GRADIENT_ROWS,
    )  # the head's gradient: one for 4 chunks
    logits = chunks * (2 if own else 1)
    assert watch.gemms == logits + (wide if needs[1] else chunks) * (needs[0] + needs[1])
    tiles = 2 * chunk * 151936
    assert watch.largest <= max(tiles, 151936 * 4096 if needs[1] else 0)


def test_bare_scoring_needs_one_gemm_without_a_teacher():
    case = Case(tokens=32, hidden=8, vocabulary=40)
    watch = Watch()
    with watch:
        fastsdpo.linear_sdpo_loss(
            case.student,
            None,
            case.weight,
            case.target_ids,
            teacher_logps=torch.zeros(32),
            chunk_size=16,
            backend="reference",
        )
    assert watch.flops == 2 * 32 * 8 * 40


@pytest.mark.parametrize("chunk", [None, 3])
def test_float16_gradients_do_not_underflow(chunk, monkeypatch):
    """Weights of 1e-6 a token vanish in a float16 gradient tile unless it is scaled.

    In chunks of 3, two of them wait for one GEMM of the head's gradient; the last waits alone.
    """
    monkeypatch.setattr(head, "GRADIENT_ROWS", 7)
    case = Case(dtype=torch.float16)
    case.weights = torch.full((13,), 1e-6)
    _, grads = case.oracle(False, 1.0, mode="full", alpha=1.0)

    class HalfTiles(head.Head):
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

    monkeypatch.setattr(linear, "Head", HalfTiles)
    monkeypatch.setattr(linear, "choose_dtypes", lambda *_: (torch.float16, torch.float32))
    leaves = [case.student.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    out = fastsdpo.linear_sdpo_loss(
        leaves[0],
        case.teacher,
        leaves[1],
        case.target_ids,
        weights=case.weights,
        mode="full",
        backend="reference",
        chunk_size=chunk,
    )
    (out.loss * 2**16).backward()  # the caller's loss scale, as GradScaler applies it
    for leaf, want in zip(leaves, grads):
        assert relative(leaf.grad, want * 2**16) < 5e-3


def kept_bytes():
    return [storage.nbytes() for storage in _memory._kept]


def full_step(case, **kwargs):
    leaves = [case.student.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    out = fastsdpo.linear_sdpo_loss(
        leaves[0],
        case.teacher,
        leaves[1],
        case.target_ids,
        weights=case.weights,
        mode="full",
        backend="reference",
        **kwargs,
    )
    out.loss.backward()
    return out.loss.detach(), *(leaf.grad for leaf in leaves)


@pytest.fixture
def no_tiles():
    _memory.release_tiles()
    yield
    _memory.release_tiles()


def test_the_next_call_finds_the_memory_of_the_last(no_tiles):
    small, large = Case(tokens=9, vocabulary=40), Case(tokens=30, vocabulary=70)
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
        for got, expected in zip(full_step(case), want):
            assert torch.equal(got, expected)
        logps = fastsdpo.linear_token_logps(case.student, case.weight, case.target_ids)
        assert logps.isfinite().all()
        assert kept_bytes() == [2 * 30 * 128 * 4]
    _memory.release_tiles()
    assert kept_bytes() == []


def test_kept_memory_outlives_inference_mode(no_tiles):
    """An inference tensor may not be written outside of inference mode: its storage may."""
    case = Case()
    want = full_step(case)
    _memory.release_tiles()
    for _ in range(2):
        with torch.inference_mode():
            fastsdpo.linear_sdpo_loss(case.student, case.teacher, case.weight, case.target_ids, backend="reference")
        assert len(kept_bytes()) == 1
        for got, expected in zip(full_step(case), want):
            assert torch.equal(got, expected)


def test_large_tiles_and_those_of_a_failed_call_are_freed(no_tiles, monkeypatch):
    monkeypatch.setattr(_memory, "_LARGEST_KEPT", 2 * 13 * 64 * 4 - 1)
    full_step(Case())
    assert kept_bytes() == []
    monkeypatch.undo()

    def fail(*args):
        raise MemoryError("no room")

    full_step(Case())
    with monkeypatch.context() as patch:
        patch.setattr(head.Head, "hidden_gradient", fail)
        with pytest.raises(MemoryError):
            full_step(Case())
    assert kept_bytes() == []


def test_threads_do_not_share_tiles(no_tiles):
    from concurrent.futures import ThreadPoolExecutor

    cases = [Case(tokens=40, vocabulary=60 + i) for i in range(8)]
    want = [full_step(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, expected in zip(pool.map(full_step, cases), want):
                for g, e in zip(got, expected):
                    assert torch.equal(g, e)
    assert len(kept_bytes()) == 1
