"""sdpo/mfu, data_wait and peak_memory_gb: against FLOPs that torch counts, a loader that is slow, and the process."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastsdpo.trainer.speed import peak_memory, peak_tflops

aten = torch.ops.aten


@pytest.mark.parametrize(("lora", "teacher"), [(False, "live"), (True, "live"), (False, "ema")])
def test_flops_are_those_of_the_products(tmp_path, lab, lora, teacher):
    peft = pytest.importorskip("peft") if lora else None
    adapter = None if peft is None else peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": 1, "backend": "reference", "peak_tflops": 1e-3}
    made = lab.make_trainer(tmp_path, teacher=teacher, peft_config=adapter, **settings)
    counter = FlopCounterMode(display=False)
    step, add, noted = made.training_step, made.speed.add, []

    def counted(*arguments):
        with counter:
            return step(*arguments)

    def note(statistics, parts):
        noted.append((made.speed.work.flops(statistics, parts), statistics.computed_tokens))
        add(statistics, parts)

    made.training_step, made.speed.add = counted, note
    made.train()
    products = counter.get_flop_counts()["Global"]
    linear = sum(products.get(name, 0) for name in (aten.mm, aten.addmm))
    flops, tokens = map(sum, zip(*noted))
    # Nothing goes back from the first layer's adapters, which only a small model notices.
    assert flops == pytest.approx(linear, rel=0.05 if lora else 0.02), products
    (row,) = [row for row in made.state.log_history if "loss" in row]
    assert row["sdpo/mfu"] == pytest.approx(flops / tokens * row["sdpo/tokens_per_second"] / 1e9, rel=0.05)
    assert row["sdpo/peak_memory_gb"] == pytest.approx(peak_memory(torch.device("cpu")) / 1e9, rel=0.2)


def test_waiting_for_data_is_told(tmp_path, lab):
    made = lab.make_trainer(tmp_path, max_steps=1)
    collate = made.data_collator

    def slow(items):
        time.sleep(0.3)
        return collate(items)

    made.data_collator = slow
    made.train()
    (row,) = [row for row in made.state.log_history if "loss" in row]
    assert 0.15 < row["sdpo/data_wait"] < 1 and "sdpo/mfu" not in row


def test_cards_are_known_by_name():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA L4", "a GPU")
    assert list(map(peak_tflops, names)) == [989, 756, 312, 362, 121, None]
