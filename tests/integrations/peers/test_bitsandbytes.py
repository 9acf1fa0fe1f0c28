"""Bases of 4 and 8 bits below adapters, through the doors of all integrations, on a CPU (`make peers`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make peers")
pytest.importorskip("peft")

from transformers import BitsAndBytesConfig

from fastsdpo.prefix import check_head, head_parameters
from tests.integrations.test_adapters import compare, make

pytestmark = pytest.mark.slow


# DoRA on layers of 8 bits fails in bitsandbytes 0.50 itself, in the model's second pass on a CPU.
@pytest.mark.parametrize("adapter", ["lora", "dora-head", "modules-to-save", "ia3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights(qwen2_folder, bits, adapter):
    if (bits, adapter) == (8, "dora-head"):
        adapter = "lora-head"
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    model = make(qwen2_folder, adapter, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32)
    # 8 bits: its layers round what they read by the outliers of all tokens of a pass, and its products are fp16.
    compare(model, 1e-5 if bits == 4 else 2e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_is_refused_with_the_remedy(qwen2_folder, bits):
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=["none"])
    model = make(qwen2_folder, quantization_config=config, device_map={"": "cpu"})
    with pytest.raises(NotImplementedError, match=rf"quantized \(Linear.*{bits}.*llm_int8_skip_modules=\['lm_head'\]"):
        head_parameters(model)
    right, reason = check_head(model)
    assert not right
    assert "llm_int8_skip_modules" in reason
