"""The cost model against counted FLOPs, recorded peaks and the library's own sizes; bytes: test_kernels."""

import pytest
import torch
import transformers

from benchmarks import costmodel, counted, harness, predictions
from fastsdpo.ops import head


def test_recorded_peaks():
    """Of losses from hidden states and of whole steps, each in a process of its own."""
    for row in harness.read(harness.RESULTS / "memory_avx2.json"):
        shape = row["case"]["tokens"], row["case"]["vocabulary"], row["case"]["hidden"]
        chunk = costmodel.default_chunk(*shape[:2], budget=2**24, least=256)
        ours = costmodel.LinearLoss(*shape, operand=4, chunk=chunk).peak()
        plain = costmodel.eager_linear_peak("reverse_kl", *shape)
        for who, predicted in (("fastsdpo", ours), ("PyTorch", plain)):
            assert predicted / row["rivals"][who]["peak_bytes"] == pytest.approx(1, abs=0.2), (shape, who)
    rows = [r for r in harness.read(harness.RESULTS / "sharing_avx2.json") if r["case"]["what"] == "memory"]
    for row in rows:
        for name, found in row["rivals"].items():
            before, added = predictions.process_peak(costmodel.SMOLLM2_135M, name, row["sizes"])
            assert before / found["before_bytes"] == pytest.approx(1, abs=0.2), name
            assert (before + added) / found["peak_bytes"] == pytest.approx(1, abs=0.2), name


def test_sizes_are_the_library_s():
    for frozen in (False, True):
        count = 3 if frozen else 4  # student, teacher, dHidden, dWeight
        products = count * 2.0 * 300 * 4096 * 64
        parts = costmodel.LinearLoss(300, 4096, 64, frozen_head=frozen, chunk=64).parts("jsd")
        assert costmodel.total(parts).flops == pytest.approx(products, rel=0.1)
    for tokens in (1, 300, 8192, 70_001):
        for vocabulary in (49152, 151936, 262144):
            want = head.default_chunk_size(tokens, vocabulary, torch.device("cuda"))
            assert costmodel.default_chunk(tokens, vocabulary) == want
            assert costmodel.gradient_chunks(tokens, want) == head.gradient_chunks(tokens, want)
            want = head.default_chunk_size(tokens, vocabulary, torch.device("cpu"))
            assert costmodel.default_chunk(tokens, vocabulary, budget=2**24, least=256) == want
    assert costmodel.QWEN3_8B.parameters == pytest.approx(8.19e9, rel=0.002)
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
    (setup,) = [s for s in predictions.SETUPS if s.options == options]
    found = predictions.setup_peak(costmodel.QWEN3_8B, setup, student, responses)
    assert found / 1e9 == pytest.approx(walked, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_counted_step_agrees_with_the_formulas(checkpointing):
    """Products of the trunk, kernels that grow with layers and pack alike, one copy, and no wait."""
    found = {}
    pack = counted.conversation(3, 40, 60, 10, 512)
    for layers in (2, 3):
        sizes = {**counted.QWEN3_8B, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
        config = transformers.Qwen3Config(**{**sizes, "num_hidden_layers": layers})
        found[layers] = counted.count_step(config, pack, checkpointing=checkpointing)
    step, more = found[2], found[3]
    shape = costmodel.Model("tiny", 2, 256, 32, 8, 128, 512, 512, False, True)
    work = step.tokens_and_pairs
    wanted = {
        "student forward": costmodel.trunk_forward(shape, work.student, work.student_pairs),
        "teacher forward": costmodel.trunk_forward(shape, work.teacher, work.teacher_pairs),
        "backward": costmodel.trunk_backward(shape, work.student, work.student_pairs, checkpointing=checkpointing),
    }
    for part, cost in wanted.items():
        assert sum(c.flops for _, c in step.parts[part]) == pytest.approx(cost.flops, rel=0.03), part
        most = 160 if checkpointing and part == "backward" else 110
        assert len(more.parts[part]) - len(step.parts[part]) < most, part
    assert (step.copies, step.waits_between) == (1, 0) and step.attention == more.attention == (1, 3, 1)
    seconds = step.seconds(costmodel.GPUS[0])
    assert all(device > 0 and host > 0 for device, host in seconds.values())
    assert step.step_seconds(costmodel.GPUS[0]) < step.step_seconds(costmodel.GPUS[1])
