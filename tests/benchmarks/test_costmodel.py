"""The cost model against what can be counted or measured: FLOPs, bytes, saved tensors, memory."""

import json
import math
import warnings
import weakref

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_logits, costmodel, report
from fastsdpo import bench, train
from fastsdpo.ops import head, linear, rows
from fastsdpo.ops.head import Plan
from fastsdpo.trainer import memory

MODES = ["sampled", "forward_kl", "reverse_kl", "jsd"]


class ByteCounter(TorchDispatchMode):
    """Bytes that operators read and write, views and metadata left out; calls; the peak of what is alive."""

    def __init__(self, *inputs):
        super().__init__()
        self.bytes = self.calls = 0
        self.inputs = {t.untyped_storage()._cdata for t in inputs}
        self.live, self.now, self.peak = set(), 0, 0  # bytes of the tensors that are alive

    def watch(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.inputs or key in self.live:
            return
        self.live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed():
            self.live.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if torch.is_tensor(tensor):
                self.watch(tensor)
        if func.is_view or "detach" in str(func) or "empty" in str(func):
            return out
        self.calls += 1
        read = [a for a in args if isinstance(a, torch.Tensor)]
        written = [t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
        # A broadcast (expanded) operand is read once.
        self.bytes += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in read + written)
        return out


class Products(ByteCounter):
    """Matrix products are counted, and not their bytes."""

    def __init__(self, *inputs):
        super().__init__(*inputs)
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.bytes
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.products += 1
            self.bytes = before
        return out


@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_the_eager_losses(mode):
    tokens, vocabulary = 32, 4096
    student = torch.randn(tokens, vocabulary, requires_grad=True)
    teacher, ids = torch.randn(tokens, vocabulary), torch.randint(vocabulary, (tokens,))
    with ByteCounter() as counter:
        loss = bench_logits.plain_loss(mode, student, teacher, ids)
        loss.backward()
    predicted = costmodel.eager_loss_from_logits(mode, tokens, vocabulary)
    assert counter.bytes / predicted.bytes == pytest.approx(1, abs=0.1), counter.bytes / (tokens * vocabulary)
    assert counter.calls / predicted.launches == pytest.approx(1, abs=0.1), counter.calls


@pytest.mark.parametrize("mode", MODES)
def test_bytes_and_tensors_of_trl_s_losses(mode, monkeypatch):
    """As its trainer calls them: both logits over the temperature first."""
    pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    case = bench.LogitsCase(32, 4096, torch.bfloat16, "cpu")
    cells, leaf = case.student.numel(), case.student.detach().requires_grad_()
    with warnings.catch_warnings(), ByteCounter() as counter:
        warnings.simplefilter("ignore")
        student, teacher = leaf / 1.0, case.teacher / 1.0
        bench.trl_loss(mode, student, teacher, case.target_ids).backward()
    predicted = costmodel.RIVAL_BYTES_BFLOAT16["TRL SDPO, eager"][mode]
    assert counter.bytes / cells == pytest.approx(predicted, rel=0.1)
    live = 2 + counter.peak / cells / 2  # the logits themselves were there before
    assert live == pytest.approx(costmodel.TRL_LIVE[mode], rel=0.2)


@pytest.mark.parametrize("mode", MODES)
def test_tensors_alive_in_the_eager_loss_from_hidden_states(mode):
    tokens, vocabulary, hidden = 64, 4096, 8
    case = bench.HiddenCase(tokens, vocabulary, hidden, torch.float32, "cpu")
    run = case.loss_of(bench.plain_loss, mode)
    with ByteCounter(case.student, case.weight) as counter:
        run()
    predicted = costmodel.eager_linear_peak(mode, tokens, vocabulary, hidden)
    assert counter.peak == pytest.approx(predicted, rel=0.2)


@pytest.mark.parametrize("mode", costmodel.KL)
def test_rivals_from_hidden_states(mode):
    """Their products, and, of Liger's plain PyTorch, the bytes between them and what is alive."""
    pytest.importorskip("trl")
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    case = bench.HiddenCase(64, 4096, 8, torch.bfloat16, "cpu")
    trl, liger = costmodel.RIVALS
    with Products() as counter:
        case._trl(mode)()
    assert counter.products == trl.gemms[mode]

    loss = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=bench.MODES[mode], compiled=False
    )
    student, weight = case._leaves()
    with Products(student, weight, case.teacher) as counter:
        loss(student, weight, case.teacher, case.weight, case.target_ids).backward()
    cells = 64 * 4096
    assert counter.products == liger.gemms[mode]
    assert counter.bytes / cells == pytest.approx(liger.bytes_per_cell[mode], rel=0.1)
    assert counter.peak / cells == pytest.approx(liger.tile_bytes_per_cell[mode], rel=0.2)


def recorded(theme):
    path = report.newest(theme)
    assert path is not None, theme
    return json.loads(path.with_suffix(".json").read_text())


def test_recorded_peaks_of_the_losses_from_hidden_states():
    """Rise of resident memory in a process of its own: bench_memory."""
    rows = recorded("memory_cpu")["rows"]
    assert len(rows) >= 14
    for row in rows:
        shape = row["tokens"], row["vocabulary"], row["hidden"]
        predicted = costmodel.eager_linear_peak("reverse_kl", *shape)
        if row["who"] == "fastsdpo":
            chunk = costmodel.default_chunk(*shape[:2], budget=2**24, least=256)
            predicted = costmodel.linear_loss_peak(*shape, operand=4, chunk=chunk)
        assert predicted / row["peak_bytes"] == pytest.approx(1, abs=0.2), (shape, row["who"])


def test_recorded_peaks_of_whole_steps():
    """Resident memory of a process with weights, gradients and Adam's states: bench_sharing."""
    runs = [run for run in recorded("sharing_cpu")["runs"] if run["kind"] == "memory"]
    assert runs
    for run in runs:
        for variant, (before, peak) in run["gib"].items():
            said = costmodel.process_peak(costmodel.SMOLLM2_135M, variant, run["sizes"])
            found = (run["conversation"], variant, [part / 2**30 for part in said], before, peak)
            assert said[0] / before / 2**30 == pytest.approx(1, abs=0.2), found
            assert sum(said) / peak / 2**30 == pytest.approx(1, abs=0.2), found


def test_expected_longest_of_several_draws():
    assert costmodel.expected_longest({"0": 1, "64": 1}, 64, 1) == 64
    assert costmodel.expected_longest({"0": 1, "64": 1}, 64, 2) == 0.25 * 32 + 0.75 * 96


def tiny(kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        tie_word_embeddings=kind == "Qwen3",
    )
    config._attn_implementation = "eager"  # its products are counted like any others
    model = getattr(transformers, f"{kind}Model")(config)
    return model, costmodel.Model.from_config(config)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_the_trunk(kind, checkpointing):
    model, shape = tiny(kind)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(512, (2, 64))
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids, use_cache=False).last_hidden_state
        forward = counter.get_total_flops()
        hidden.sum().backward()
    backward = counter.get_total_flops() - forward
    # Eager attention forms all pairs, and its backward twice the products of forward (it keeps
    # the probabilities), where the model assumes fused attention, which forms scores again.
    pairs = 2 * 64 * 64
    assert forward == costmodel.trunk_forward(shape, 128, pairs).flops
    attention = shape.layers * 4.0 * pairs * shape.heads * shape.head_dim
    predicted = costmodel.trunk_backward(shape, 128, pairs, checkpointing=checkpointing).flops
    assert backward == pytest.approx(predicted - 0.5 * attention, rel=0.02)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tensors_saved_for_backward(kind, dtype):
    model, shape = tiny(kind)
    model.set_attn_implementation("sdpa")
    model = model.to(dtype)
    tokens, kept = 256, {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(torch.randint(512, (1, tokens)), use_cache=False).last_hidden_state
    del out
    predicted = costmodel.activation_memory(shape, tokens, dtype.itemsize)
    predicted += tokens * shape.hidden * (3 * dtype.itemsize)  # the final norm
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_parameters(kind):
    model, shape = tiny(kind)
    head = 0 if shape.tied else shape.head  # the trunk has no head of its own
    assert shape.parameters - head == sum(p.numel() for p in model.parameters())


class Watch(TorchDispatchMode):
    """The storages that operators made, never given back: an upper end of the peak. And the products."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {t.untyped_storage()._cdata for t in inputs}
        self.made, self.products, self.bytes, self.flops = {}, 0, 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            a, b = args[-2:]
            self.products += 1
            self.flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
            tensors = [*(t for t in args if torch.is_tensor(t)), out]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        for t in out if isinstance(out, tuple) else (out,):
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in self.inputs:
                self.made[t.untyped_storage()._cdata] = t.untyped_storage()
        return out

    @property
    def peak(self):
        return sum(storage.nbytes() for storage in self.made.values())


@pytest.mark.parametrize("mode", ["sampled", "reverse_kl", "jsd"])
@pytest.mark.parametrize("trained", ["trained", "frozen", "no gradients"])
def test_linear_loss(mode, trained):
    """FLOPs, bytes of the products, and tensors allocated."""
    tokens, vocabulary, hidden, chunk = 192, 4096, 64, 64
    student, teacher = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    weight, ids = torch.randn(vocabulary, hidden), torch.randint(vocabulary, (tokens,))
    needs = {"trained": (True, True), "frozen": (True, False), "no gradients": (False, False)}[trained]
    name, alpha = {"sampled": ("sampled_token", 1.0), "reverse_kl": ("full", 1.0)}.get(mode, ("full", 0.5))

    def run():
        call = linear.LinearCall(
            rows.Tokens(ids, torch.full((tokens,), 1 / tokens)),
            rows.LossOptions(mode=name, alpha=alpha),
            Plan(chunk, torch.float32, torch.float32),
            backend,
            teacher,
        )
        linear.linear_forward(student, weight, None, call, (*needs, False))

    backend = linear.resolve_backend("test", "auto", weight)
    with Watch(student, teacher, weight, ids) as watch:
        run()
    options = {"gradients": needs[0], "frozen_head": not needs[1], "chunk": chunk, "operand": 4}
    parts = costmodel.linear_loss(mode, tokens, vocabulary, hidden, **options)
    predicted = costmodel.total(parts)
    products = 2.0 * tokens * vocabulary * hidden
    products *= costmodel.linear_gemms(gradients=needs[0], frozen_head=not needs[1])
    assert watch.flops == products
    assert predicted.flops == pytest.approx(products, rel=0.1)
    assert watch.products == math.ceil(tokens / chunk) * (1 + needs[0] + needs[1])
    if backend != "native":
        return  # the reference allocates what the kernels do not
    peak = costmodel.linear_loss_peak(tokens, vocabulary, hidden, **options)
    assert watch.peak == pytest.approx(peak, rel=0.2)
    kernel = 4 * tokens * vocabulary
    kernel *= sum(costmodel.PASSES[mode]) if needs[0] else costmodel.PASSES[mode][0]
    assert watch.bytes + kernel == pytest.approx(predicted.bytes, rel=0.1)


def test_passes_are_those_of_the_table_in_the_losses():
    """Bytes per position in bf16 that `ops.divergence` states: sampled 8, KL 10, JSD 14, top-k 8 to 10."""
    stated = {"sampled": 8, "forward_kl": 10, "reverse_kl": 10, "jsd": 14, "topk": 10}
    for mode, expected in stated.items():
        assert costmodel.loss_from_logits(mode, 100, 1000, 2).bytes == expected * 100 * 1000


def test_default_chunk_is_the_library_s():
    for tokens in (1, 300, 8192, 70_001):
        for vocabulary in (49152, 151936, 262144):
            want = head.default_chunk_size(tokens, vocabulary, torch.device("cuda"))
            assert costmodel.default_chunk(tokens, vocabulary) == want
            assert costmodel.gradient_chunks(tokens, want) == head.gradient_chunks(tokens, want)
            want = head.default_chunk_size(tokens, vocabulary, torch.device("cpu"))
            assert costmodel.default_chunk(tokens, vocabulary, budget=2**24, least=256) == want


def test_qwen3_8b_has_its_published_size():
    assert costmodel.QWEN3_8B.parameters == pytest.approx(8.19e9, rel=0.002)
    assert costmodel.QWEN3_4B.parameters == pytest.approx(4.02e9, rel=0.002)
    assert costmodel.SMOLLM2_135M.parameters == pytest.approx(134.5e6, rel=0.002)


@pytest.mark.parametrize(
    ("options", "student", "responses", "walked"),
    [
        ("--gradient-checkpointing", 8400, 4800, 139),
        ("--gradient-checkpointing", 16800, 9600, 142),
        ("(defaults: float32 master)", 8400, 4800, 202),
        ("--lora 16", 16800, 9600, 199),
        ("--lora 16 --gradient-checkpointing", 8400, 4800, 22.9),
    ],
)
def test_memory_of_documented_options(options, student, responses, walked):
    """Against the peaks of steps that were walked operator by operator on meta tensors."""
    (setup,) = [s for s in costmodel.SETUPS if s.options == options]
    found = costmodel.setup_peak(costmodel.QWEN3_8B, setup, student, responses)
    assert found / 1e9 == pytest.approx(walked, rel=0.1)


def test_documented_options_exist_and_give_the_set_up():
    """The bytes per weight of each set-up, by the trainer's own estimate for these options."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).bfloat16()
    size = sum(p.numel() for p in model.parameters())
    for setup in costmodel.SETUPS:
        options = setup.options.split() if setup.options[0] == "-" else []
        parsed = train.build_parser().parse_args(["d", "--model", "m", "-o", "o", "--cpu", *options])
        args = train.read_config(parsed)
        assert bool(parsed.lora) == bool(setup.rank)
        assert bool(args.gradient_checkpointing) == setup.checkpointing
        if not setup.rank:
            parts = memory.estimate_memory(model, args, 10, 10)
            assert sum(parts[:3]) == setup.bytes_per_weight * size, setup
    assert train.SDPOConfig(output_dir="o", use_cpu=True).max_tokens_per_pack == costmodel.PACK


def test_predictions_are_written():
    text = costmodel.markdown()
    assert all(setup.options in text for setup in costmodel.SETUPS)
    assert "Predictions, not measurements" in text
    assert all(gpu.name in text for gpu in costmodel.GPUS)
