"""What only a GPU can show: compiled kernels, streams, graphs, memory, attention kernels, a training run.

`make gpu` runs these. Without a GPU, ``FASTSDPO_GPU_TEST_DEVICE=cpu TRITON_INTERPRET=1`` runs those
that Triton's interpreter can, to try the tests themselves.
"""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastsdpo
from fastsdpo import SDPOConfig, SDPOTrainer, TokenizedInteraction
from fastsdpo.prefix import head_parameters, shared_forward
from fastsdpo.testing import make_rows
from tests.ops import contract

# What torch says of TF32, deterministic kernels and prototypes on a GPU is shown, and no error.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
DEVICE = os.environ.get("FASTSDPO_GPU_TEST_DEVICE", "cuda")
cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's runtime")
MOVED = {"rtol": 1e-5, "atol": 1e-6}  # a row that starts at another place of 16 bytes is summed in another order
SIX = ("sampled", "forward", "reverse", "jsd", "topk-reverse", "topk-jsd-renorm")
LOSSES = {name: contract.LOSSES[name] | ({"topk": 20} if "topk" in name else {}) for name in SIX}
each_loss = pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)


VOCABULARIES = [1, 127, 32001, 50257, 151936] if DEVICE != "cpu" else [1, 127, 1001]


class Compiled(contract.Contract):
    backend = "triton"
    device = DEVICE
    value = total = 2e-5
    moved = MOVED
    vocabularies = ()
    several = 40_000 if DEVICE != "cpu" else 9000
    floor_rising = 2e-5


class TestCompiled(Compiled, contract.Values, contract.Edges, contract.Layouts, contract.LogProbs):
    @contract.each_loss()
    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    def test_every_dtype_of_every_vocabulary(self, loss, dtype, vocabulary):
        case, topk = self.rows((9,), vocabulary, dtype=dtype, ignored=0.2), {"topk": min(20, vocabulary)}
        self.check(case, weights=case.weights, **{**loss, **(topk if "topk" in loss else {})})


def loss_of(rows, options, device=DEVICE):
    leaf = rows.student.to(device, copy=True).requires_grad_()
    given = rows.teacher.to(device), rows.target_ids.to(device)
    out = fastsdpo.sdpo_loss(leaf, *given, weights=rows.weights.to(device), backend="triton", **options)
    out.loss.backward()
    return out, leaf.grad


@cuda_only
@each_loss
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
@each_loss
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
@pytest.mark.parametrize("options", list(LOSSES.values())[:4], ids=SIX[:4])
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
    (a, grad_a), (b, grad_b) = (loss_of(rows, LOSSES["reverse"], device=f"cuda:{i}") for i in (0, 1))
    assert b.loss.device.index == 1
    assert torch.equal(a.per_token_loss.cpu(), b.per_token_loss.cpu())
    assert torch.equal(grad_a.cpu(), grad_b.cpu())


@each_loss
def test_the_loss_from_hidden_states(options):
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, vocabulary = (200, 256, 32001) if DEVICE != "cpu" else (6, 16, 301)
    student, teacher, weight = (torch.randn(n, hidden, generator=generator) for n in (tokens, tokens, vocabulary))
    weight *= 0.1
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    found = []
    for device, backend in (("cpu", "reference"), (DEVICE, "triton")):
        a, w = (x.to(device, copy=True).requires_grad_() for x in (student, weight))
        given = teacher.to(device), w, targets.to(device)
        out = fastsdpo.linear_sdpo_loss(a, *given, chunk_size=64, backend=backend, **options)
        out.loss.backward()
        found.append((out.loss.cpu(), a.grad.cpu(), w.grad.cpu()))
    for (got, want), bound in zip(zip(found[1], found[0]), (1e-4, 5e-3, 5e-3)):
        assert (got - want).norm() <= bound * want.norm()  # a GPU's GEMM may use TF32


def tiny_llama():
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**heads, **sizes))


def drawn_ids(seed):
    """(generator, ids(count): ids drawn by it)"""
    draw = torch.Generator().manual_seed(seed)
    return draw, lambda count: torch.randint(512, (count,), generator=draw).tolist()


@cuda_only
@pytest.mark.parametrize("attention", ["auto", "segments", "flex", "dense", "flash"])
def test_shared_prefixes_on_every_attention_backend(attention):
    """Hidden states and gradients of the shared passes against unshared ones, in bfloat16."""
    if attention == "flash":
        pytest.importorskip("torch.nn.attention.varlen")
    model = tiny_llama().to(DEVICE, torch.bfloat16)
    draw, ids = drawn_ids(1)
    history, items = ids(40), []
    for _ in range(4):
        prompt, answer = history + ids(20), ids(30)
        items.append(SimpleNamespace(prompt_ids=prompt, teacher_prompt_ids=prompt + ids(12), completion_ids=answer))
        history = prompt + answer
    for length in (25, 70, 71, 150, 150):  # branches, so that keys are shared by several runs
        prompt = history[:length] + ids(20)
        items.append(SimpleNamespace(prompt_ids=prompt, teacher_prompt_ids=prompt + ids(5), completion_ids=ids(30)))
    direction = torch.randn(len(items) * 30, 256, generator=draw).to(DEVICE)
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
    _, ids = drawn_ids(2)
    prompt = ids(12)
    items = [SimpleNamespace(prompt_ids=prompt, teacher_prompt_ids=prompt + ids(5), completion_ids=ids(9))]
    cpu = tiny_llama()
    models = ((cpu, "cpu", "reference"), (copy.deepcopy(cpu).to(DEVICE), DEVICE, "triton"))
    found = []
    for model, _device, backend in models:
        states = shared_forward(model, items)
        given = states.student_hidden, states.teacher_hidden, head_parameters(model).weight, states.target_ids
        out = fastsdpo.linear_sdpo_loss(*given, mode="full", alpha=1.0, backend=backend)
        out.loss.backward()
        found.append((float(out.loss), {n: p.grad.cpu() for n, p in model.named_parameters()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    for name, want in found[0][1].items():
        assert (found[1][1][name] - want).norm() < 1e-2 * want.norm(), name


@cuda_only
@pytest.mark.parametrize("attention", ["auto", "segments", "flex", "dense", "flash"])
def test_a_training_step_waits_for_nothing(tmp_path, attention):
    """Of the trainer's own step, once its batch is on the GPU."""
    items = [TokenizedInteraction([1] * n, [1] * n + [2, 3], [4, 5, 6, n]) for n in (10, 20, 30)]
    args = SDPOConfig(output_dir=str(tmp_path), report_to=[], save_strategy="no", teacher_check=0, attention=attention)
    model = tiny_llama().to(torch.bfloat16)
    trainer = SDPOTrainer(model, args, items)
    trainer.create_optimizer()
    batch = {"interactions": items}
    trainer.learner.ready(batch, args.device)
    count = torch.tensor(3, device=args.device)
    trainer.training_step(trainer.model, batch, count)  # compiled by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(trainer.model, batch, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
