"""What the trainer has to know of PEFT's adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsdpo.prefix import model_device, training_mode, unwrap
from fastsdpo.trainer.noise import few_logits


def is_peft(model: nn.Module) -> bool:
    """Whether it is a `peft.PeftModel`; not a model whose layers alone are PEFT's."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def check_adapter(model: nn.Module, peft_config: Any) -> None:
    """Raises ValueError where an adapter would be lost or hidden.

    Args:
        peft_config: of the adapter to add; None: the model is trained as it is.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "SDPOTrainer: model must be a whole model or a peft.PeftModel, got a transformers model with "
            "an adapter in its layers (what from_pretrained makes of an adapter's folder); pass that "
            "folder's name, or PeftModel.from_pretrained(base_model, folder, is_trainable=True)"
        )
    if is_peft(model) and peft_config is not None:
        raise ValueError(
            "SDPOTrainer: peft_config must be None, the model has an adapter, which training goes on "
            "with; for a new one, merge it into its base model first (fastsdpo merge)"
        )


def check_saved_whole(model: Any) -> None:
    """Raises ValueError where a `peft.PeftModel` trains weights that PEFT does not save with the adapter."""
    from peft import get_peft_model_state_dict

    saved = set()
    for name in model.peft_config:
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        saved |= {value.data_ptr() for value in state.values()}
    trained = {name: p.data_ptr() for name, p in model.named_parameters() if p.requires_grad}
    lost = [name for name, place in trained.items() if place and place not in saved]
    if lost:
        raise ValueError(
            f"SDPOTrainer: model trains {len(lost)} weights beside its adapter, which PEFT would not save with it "
            f"({', '.join(lost[:3])}{', ...' * (len(lost) > 3)}); name their modules in modules_to_save of the "
            "adapter's configuration, or freeze them"
        )


def adapter_is_silent(model: Any) -> bool:
    """Whether a `peft.PeftModel` gives its base model's logits, as with a new adapter, and will when it is off."""
    inner: Any = unwrap(model)
    own = inner.base_model.prefix, ".modules_to_save."  # what is off with the adapter; a trained bias is not
    if any(p.requires_grad and not any(part in name for part in own) for name, p in inner.named_parameters()):
        return False
    for config in inner.peft_config.values():
        if getattr(config, "trainable_token_indices", None) or hasattr(config, "token_indices"):
            return False  # what it does depends on the tokens, of which only a few are tried
    if model_device(model).type == "meta":
        return True  # no values: made from a configuration, as a new one is
    with training_mode(model, False):
        with_adapter = few_logits(model)
        with inner.disable_adapter():
            return torch.equal(few_logits(model), with_adapter)


def warning_of_base(model: Any, checkpoint: str) -> str | None:
    """What to say where a checkpoint's adapter was trained on a base model of another name; None: nothing."""
    file = Path(checkpoint, "adapter_config.json")
    if not is_peft(unwrap(model)) or not file.is_file():
        return None
    was = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    inner: Any = unwrap(model)
    now = next(iter(inner.peft_config.values())).base_model_name_or_path
    if not was or not now or was == now:
        return None
    return f"the adapter of {checkpoint} was trained on {was}, and goes on with {now}; they must be one model"
