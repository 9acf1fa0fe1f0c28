"""The model that a trainer is given: loaded, with its adapter, and without dropout."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import set_seed

from fastsdpo.modeling import default_dtype, load_model_and_tokenizer
from fastsdpo.prefix import above_the_decoder, causal_lm, decoder_of
from fastsdpo.quantized import how_packed, keep_differentiable
from fastsdpo.trainer.adapters import check_adapter, check_saved_whole, is_peft
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.inherited import COMPILED
from fastsdpo.trainer.launch import check_loaded_dtype, check_placement, check_quantized_launch
from fastsdpo.trainer.liger import use_liger_layers
from fastsdpo.trainer.noise import without_dropout

CHECKPOINTING = (
    "gradient checkpointing is on, as for all models of a billion weights and more; --set "
    "auto_checkpointing=false turns it off"
)
LARGE_MODEL = 10**9  # weights from which `SDPOConfig.auto_checkpointing` applies


def choose_checkpointing(args: SDPOConfig, model: nn.Module, kind: str) -> bool:
    """Turns gradient checkpointing on in ``args``, by the rule of `SDPOConfig.auto_checkpointing`.

    Args:
        kind: the type of the device that the model trains on.

    Returns:
        whether it did.
    """
    if args._checkpointing_given or not args.auto_checkpointing or kind != "cuda":
        return False
    if sum(p.numel() for p in model.parameters()) < LARGE_MODEL or not supports_checkpointing(model):
        return False
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(args, name):
            setattr(args, name, True)
    return True


def supports_checkpointing(model: nn.Module) -> bool:
    """Whether transformers can run this model's layers again in the backward pass."""
    causal = causal_lm(model)
    names = ("supports_activation_checkpointing", "supports_gradient_checkpointing")
    return any(bool(getattr(causal, name, False)) for name in names)


class PositionTable(NamedTuple):
    """A table with a row for each of ``positions`` positions, and none beyond; ``name`` says where it is."""

    name: str
    positions: int


POSITION_NAMES = re.compile(r"(^|\.)(wpe|\w*pos(ition)?s?_?(emb\w*|enc\w*)?)$")


def position_table(model: nn.Module) -> PositionTable | None:
    """The shortest table of positions that the model looks its tokens up in; None: its positions are computed.

    Learned embeddings (GPT-2, OPT) and tables made in advance (GPT-J, CodeGen, CTRL, MPT) have an end. On a GPU a
    position beyond it stops the process with a device-side assertion, in the step that meets it.
    """
    causal = causal_lm(model)
    config: Any = causal.config.get_text_config()
    decoder = decoder_of(causal)
    tables = []
    for name, module in decoder.named_modules():
        if re.search("vision|visual|image|audio", name):
            continue
        if isinstance(module, nn.Embedding) and module is not causal.get_input_embeddings():
            if POSITION_NAMES.search(name):
                tables.append(PositionTable(name, module.num_embeddings - getattr(module, "offset", 0)))
            continue
        for key, value in {**vars(module), **module._buffers}.items():
            if isinstance(value, Tensor) and value.dim() >= 2 and POSITION_NAMES.search(key):
                tables.append(PositionTable(f"{name}.{key}".lstrip("."), value.shape[0]))
    if config.model_type == "mpt":
        tables.append(PositionTable("max_seq_len", config.max_seq_len))
    return min(tables, key=lambda table: table.positions, default=None)


def prepare_model(
    model: str | os.PathLike | nn.Module, args: SDPOConfig, tokenizer: Any, peft_config: Any
) -> tuple[nn.Module, Any]:
    """``(model, tokenizer)`` as training takes them; arguments and errors are those of `SDPOTrainer`."""
    module: Any = model
    if isinstance(model, (str, os.PathLike)):
        # Loaded on the CPU: Trainer puts it, or its shards, where it trains.
        dtype = default_dtype(args.device) if args.dtype is None else args.dtype
        module, its_tokenizer = load_model_and_tokenizer(model, dtype=dtype, device="cpu")
        tokenizer = tokenizer or its_tokenizer
    if not isinstance(module, nn.Module):
        raise TypeError(f"SDPOTrainer: model must be a model or a name, got {type(model).__name__}")
    if hasattr(module, "_orig_mod"):
        raise ValueError(f"SDPOTrainer: model must be what torch.compile was given, not what it made: {COMPILED}")
    if tokenizer is not None and not hasattr(tokenizer, "all_special_tokens"):
        inner = " (pass its tokenizer)" if hasattr(tokenizer, "tokenizer") else ""
        raise TypeError(f"SDPOTrainer: processing_class must be a tokenizer, got {type(tokenizer).__name__}{inner}")
    check_placement(module)
    check_loaded_dtype(module)
    check_quantized_launch(how_packed(module), args)
    keep_differentiable(module)
    check_adapter(module, peft_config)
    if peft_config is not None:
        from peft import get_peft_model

        set_seed(args.seed)  # Trainer sets it later than the adapter draws its weights
        module = get_peft_model(module, peft_config)  # type: ignore[arg-type]
    if args.use_liger_kernel:
        args.liger_kernel_config = use_liger_layers(module, args.liger_kernel_config)
    reason = above_the_decoder(module)
    if reason is not None:
        raise NotImplementedError(f"SDPOTrainer: the model is not supported: {reason}")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            "SDPOTrainer: model must have weights to train, all are frozen"
            + (" (load an adapter with is_trainable=True)" if is_peft(module) else "")
        )
    if is_peft(module):
        check_saved_whole(module)
    if args.disable_dropout:
        without_dropout(module)
    return module, tokenizer
