"""Linear layers packed in 4 or 8 bits by bitsandbytes, of which an adapter is trained (QLoRA)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import transformers
from torch import nn

QUANTIZED = ("4bit", "8bit")


def check_quantize(quantize: str | None) -> None:
    """Raises ValueError or ImportError where weights cannot be packed so; loads nothing."""
    if quantize not in (None, *QUANTIZED):
        raise ValueError(f"load_model_and_tokenizer: quantize must be {' or '.join(QUANTIZED)}, got {quantize!r}")
    if quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"--quantize {quantize} needs the package bitsandbytes; install it with: pip install 'bitsandbytes>=0.46'"
        )


def packing(quantize: str | None, device: torch.device, dtype: str | torch.dtype) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for packed weights, which are packed on the device where they stay.

    Args:
        quantize: "4bit" (NF4, its scales packed too), "8bit" (LLM.int8), or None: nothing is packed.
        dtype: of the layers that are not packed, in which those of 4 bits compute; "auto": bfloat16.
    """
    if quantize is None:
        return {}
    chosen: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "4bit":
        chosen = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        }
    return {"quantization_config": transformers.BitsAndBytesConfig(**chosen), "device_map": {"": device}}


def how_packed(model: nn.Module) -> str | None:
    """ "4bit" or "8bit" where bitsandbytes has packed the model's weights, else None."""
    for kind in QUANTIZED:
        if getattr(model, f"is_loaded_in_{kind}", False):
            return kind
    return None


def keep_differentiable(model: nn.Module) -> None:
    """Sees to it that gradients pass layers of 4 bits on a CPU.

    With AVX512-BF16, bitsandbytes packs such a layer once more when it first runs in evaluation mode. From then on
    its products are rounded to bfloat16 and gradients stop at it, with a warning and no error (0.50).

    Raises:
        ValueError: a layer was packed so before.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"SDPOTrainer: model must be as it was loaded, but its layer {name} has run in evaluation mode, for "
                "which bitsandbytes packs it on a CPU so that it has no gradient; load the model again"
            )
        module.support_avx512bf16_for_cpu = False
