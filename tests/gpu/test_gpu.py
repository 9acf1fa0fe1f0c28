"""What only a GPU can show: compiled kernels, streams, graphs, memory, attention kernels, a training run.

`make gpu` runs these. Without a GPU, ``FASTSDPO_GPU_TEST_DEVICE=cpu TRITON_INTERPRET=1`` runs those
that Triton's interpreter can, to try the tests themselves.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch

import fastsdpo
from fastsdpo.testing import assert_gradient_close, make_rows, oracle_sdpo_loss

# What torch says of TF32, deterministic kernels and prototypes on a GPU is shown, and no error.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
DEVICE = os.environ.get("FASTSDPO_GPU_TEST_DEVICE", "cuda")
cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's runtime")

MODES = [
    {"mode": "sampled_token"},
    {"mode": "full", "alpha": 0.0},
    {"mode": "full", "alpha": 1.0},
    {"mode": "full", "alpha": 0.5},
    {"mode": "topk", "alpha": 1.0, "topk": 20},
    {"mode": "topk", "alpha": 0.5, "topk": 20, "add_tail": False},
]
MODE_IDS = ["sampled", "forward", "reverse", "jsd", "topk", "topk-renorm"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VOCABULARIES = [1, 127, 32001, 50257, 151936] if DEVICE != "cpu" else [1, 127, 1001]


def loss_of(rows, options, device=DEVICE, backend="triton", weights=True):
    leaf = rows.student.to(device, copy=True).requires_grad_()
    out = fastsdpo.sdpo_loss(
        leaf,
        rows.teacher.to(device),
        rows.target_ids.to(device),
        weights=rows.weights.to(device) if weights else None,
        backend=backend,
        **options,
    )
    out.loss.backward()
    return out, leaf.grad


@pytest.mark.parametrize("options", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_values_and_gradients_against_float64(options, dtype, vocabulary):
    if options["mode"] == "topk":
        options = {**options, "topk": min(20, vocabulary)}
    rows = make_rows((9,), vocabulary, dtype=dtype, ignored=0.2)
    ids = {}
    if options["mode"] == "topk":  # ties in half precision: the support is the one torch.topk takes
        ids = {"topk_ids": rows.student.to(DEVICE).topk(options["topk"], -1).indices.cpu()}
    want = oracle_sdpo_loss(rows.student, rows.teacher, rows.target_ids, weights=rows.weights, **options, **ids)
    out, grad = loss_of(rows, options)
    assert out.per_token_loss.device.type == torch.device(DEVICE).type
    for got, wanted in (
        (out.loss, want.loss),
        (out.per_token_loss, want.per_token_loss),
        (out.student_logps, want.student_logps),
        (out.teacher_logps, want.teacher_logps),
    ):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=2e-5, atol=2e-5)
    assert_gradient_close(grad.cpu(), want.grad)


@pytest.mark.parametrize("options", MODES, ids=MODE_IDS)
def test_rows_alone_give_the_same_bits(options):
    """The number of rows and their order change nothing (with V a multiple of 8)."""
    rows = make_rows((300 if DEVICE != "cpu" else 5,), 40000 if DEVICE != "cpu" else 9000)
    whole, whole_grad = loss_of(rows, options)
    for which in ([0], [4, 2, 3]):
        part = type(rows)(rows.student[which], rows.teacher[which], rows.target_ids[which], rows.weights[which])
        got, grad = loss_of(part, options)
        assert torch.equal(got.per_token_loss, whole.per_token_loss[which])
        assert torch.equal(grad, whole_grad[which])


@pytest.mark.parametrize("options", MODES, ids=MODE_IDS)
def test_two_runs_agree_bit_by_bit(options):
    rows = make_rows((64 if DEVICE != "cpu" else 5,), VOCABULARIES[-1], dtype=torch.bfloat16)
    (a, grad_a), (b, grad_b) = loss_of(rows, options), loss_of(rows, options)
    assert torch.equal(a.per_token_loss, b.per_token_loss)
    assert torch.equal(grad_a, grad_b)


@cuda_only
@pytest.mark.parametrize("options", MODES, ids=MODE_IDS)
def test_no_host_synchronization(options):
    rows = make_rows((64,), 32001, dtype=torch.bfloat16)
    loss_of(rows, options)  # compiled by now
    student = rows.student.to(DEVICE).requires_grad_()
    given = rows.teacher.to(DEVICE), rows.target_ids.to(DEVICE)
    weights = rows.weights.to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastsdpo.sdpo_loss(student, *given, weights=weights, backend="triton", **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert student.grad.isfinite().all()


@cuda_only
@pytest.mark.parametrize("options", MODES, ids=MODE_IDS)
def test_a_cuda_graph_replays_new_values(options):
    first, second = make_rows((32,), 32001, seed=1), make_rows((32,), 32001, seed=2)
    student = first.student.to(DEVICE).requires_grad_()
    teacher, targets = first.teacher.to(DEVICE), first.target_ids.to(DEVICE)
    weights = first.weights.to(DEVICE)

    def step():
        out = fastsdpo.sdpo_loss(student, teacher, targets, weights=weights, backend="triton", **options)
        return out.loss.detach(), *torch.autograd.grad(out.loss, student)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    with torch.no_grad():
        student.copy_(second.student)
        teacher.copy_(second.teacher)
        targets.copy_(second.target_ids)
        weights.copy_(second.weights)
    graph.replay()
    want, want_grad = loss_of(second, options)
    torch.testing.assert_close(loss, want.loss.detach(), rtol=0, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=0)


@cuda_only
@pytest.mark.parametrize("options", MODES[:4], ids=MODE_IDS[:4])
def test_nothing_of_vocabulary_size_is_allocated_but_the_gradient(options):
    rows = make_rows((256,), 50257, dtype=torch.bfloat16)
    student = rows.student.to(DEVICE).requires_grad_()
    given = rows.teacher.to(DEVICE), rows.target_ids.to(DEVICE)
    fastsdpo.sdpo_loss(student, *given, backend="triton", **options).loss.backward()
    student.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fastsdpo.sdpo_loss(student, *given, backend="triton", **options).loss.backward()
    added = torch.cuda.max_memory_allocated() - before
    size = student.numel() * student.element_size()
    assert added < 1.05 * size + 2**20


@cuda_only
def test_a_second_gpu_is_used_where_its_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    rows = make_rows((16,), 32001)
    (a, grad_a), (b, grad_b) = (loss_of(rows, MODES[2], device=f"cuda:{i}") for i in (0, 1))
    assert b.loss.device.index == 1
    assert torch.equal(a.per_token_loss.cpu(), b.per_token_loss.cpu())
    assert torch.equal(grad_a.cpu(), grad_b.cpu())


@pytest.mark.parametrize("options", MODES, ids=MODE_IDS)
def test_the_loss_from_hidden_states(options):
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, vocabulary = (200, 256, 32001) if DEVICE != "cpu" else (6, 16, 301)
    student, teacher, weight = (
        torch.randn(shape, generator=generator) * scale
        for shape, scale in (
            ((tokens, hidden), 1),
            ((tokens, hidden), 1),
            ((vocabulary, hidden), 0.1),
        )
    )
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    found = []
    for device, backend in (("cpu", "reference"), (DEVICE, "triton")):
        a, w = (x.to(device, copy=True).requires_grad_() for x in (student, weight))
        out = fastsdpo.linear_sdpo_loss(
            a, teacher.to(device), w, targets.to(device), chunk_size=64, backend=backend, **options
        )
        out.loss.backward()
        found.append((out.loss.cpu(), a.grad.cpu(), w.grad.cpu()))
    for (got, want), bound in zip(zip(found[1], found[0]), (1e-4, 5e-3, 5e-3)):
        assert (got - want).norm() <= bound * want.norm()  # a GPU's GEMM may use TF32


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**shape))


@cuda_only
@pytest.mark.parametrize("attention", ["auto", "segments", "flex", "dense", "flash"])
def test_shared_prefixes_on_every_attention_backend(attention):
    """Hidden states and gradients of the shared passes against unshared ones, in bfloat16."""
    from types import SimpleNamespace

    from fastsdpo.prefix import shared_forward

    if attention == "flash":
        pytest.importorskip("flash_attn")
    model = tiny_llama().to(DEVICE, torch.bfloat16)
    draw = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(512, (count,), generator=draw).tolist()

    history, items = ids(40), []
    for _ in range(4):
        prompt, answer = history + ids(20), ids(30)
        items.append(SimpleNamespace(prompt_ids=prompt, teacher_prompt_ids=prompt + ids(12), completion_ids=answer))
        history = prompt + answer
    direction = torch.randn(4 * 30, 256, generator=draw).to(DEVICE)
    found = []
    for sharing, backend in (("off", "auto"), ("conversation", attention)):
        model.zero_grad()
        states = shared_forward(model, items, sharing=sharing, attention=backend)
        # The sum of a normed vector's squares would be constant.
        (states.student_hidden.float() * direction).sum().backward()
        grads = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((states.student_hidden.float(), states.teacher_hidden.float(), grads))
    for got, want in zip(found[1][:2], found[0][:2]):
        assert (got - want).norm() < 0.03 * want.norm()
    for name, want in found[0][2].items():
        assert (found[1][2][name] - want).norm() < 0.06 * want.norm(), name


def test_a_training_step_equals_the_cpu_s():
    """Loss and gradient of one step through sharing and the fused loss, in float32."""
    from types import SimpleNamespace

    from fastsdpo.prefix import head_parameters, shared_forward

    draw = torch.Generator().manual_seed(2)

    def ids(count):
        return torch.randint(512, (count,), generator=draw).tolist()

    prompt = ids(12)
    items = [SimpleNamespace(prompt_ids=prompt, teacher_prompt_ids=prompt + ids(5), completion_ids=ids(9))]
    cpu = tiny_llama()
    models = ((cpu, "cpu", "reference"), (copy.deepcopy(cpu).to(DEVICE), DEVICE, "triton"))
    found = []
    for model, _device, backend in models:
        states = shared_forward(model, items)
        head = head_parameters(model)
        out = fastsdpo.linear_sdpo_loss(
            states.student_hidden,
            states.teacher_hidden,
            head.weight,
            states.target_ids,
            mode="full",
            alpha=1.0,
            backend=backend,
        )
        out.loss.backward()
        found.append((float(out.loss), {n: p.grad.cpu() for n, p in model.named_parameters()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    for name, want in found[0][1].items():
        assert (found[1][1][name] - want).norm() < 1e-2 * want.norm(), name
