"""A transformers model below its wrappers: the causal LM, its device, its inputs, its modes and its head."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def unwrap(model: nn.Module) -> nn.Module:
    """The model below DDP, FSDP1, DeepSpeed and torch.compile; FSDP2 and PEFT stay in place."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif type(model).__name__ in WRAPPERS:
            model = model.module
        else:
            return model


def is_wrapped(model: nn.Module) -> bool:
    """Whether something averages the gradients of several processes: DDP, FSDP or DeepSpeed."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
    names = {kind.__name__ for kind in type(model).__mro__}
    return bool(names & {*WRAPPERS, "FSDPModule"})


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model below every wrapper and below PEFT's.

    Raises:
        TypeError: there is no transformers model with a head.
    """
    inner = unwrap(model)
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        raise TypeError(f"model must be a transformers causal language model, got {type(model).__name__}")
    return inner


def decoder_of(causal: Any) -> Any:
    """The decoder below the head of a causal LM.

    Raises:
        TypeError: there is none; some models (Llama 4's text model) say that they are their own, and ModernBERT
            calls its head "decoder".
    """
    found, head = causal.get_decoder(), causal.get_output_embeddings()
    if found is causal or found is head:
        base = causal.base_model
        found = getattr(causal, "model", None if base is causal else base)
    if found is None:
        raise TypeError(f"model must have a decoder below its head, got {type(causal).__name__}")
    holds_head = hasattr(found, "get_output_embeddings") and found.get_output_embeddings() is head
    return decoder_of(found) if holds_head else found  # Llama 4 with images: it is a causal LM itself


def layers_before_head(model: nn.Module) -> nn.Module | None:
    """The module of the causal LM that holds the head behind layers of its own (BERT, RoBERTa), or None."""
    causal = causal_lm(model)
    for name in ("generator_predictions", "lm_head"):  # ELECTRA, ModernBERT: layers beside the head
        layers = getattr(causal, name, None)
        if layers is not None and causal.get_output_embeddings() not in set(layers.modules()):
            return layers
    head, decoder = causal.get_output_embeddings(), decoder_of(causal)
    for child in causal.children():
        parts = set(child.modules())
        if head in parts and decoder not in parts:
            return None if child is head or isinstance(child, nn.ModuleList) else child
    return None


def model_device(model: nn.Module) -> torch.device:
    """The device that takes the token ids."""
    return causal_lm(model).get_input_embeddings().weight.device


@contextmanager
def no_grad_pass() -> Iterator[None]:
    """`torch.no_grad`, without the warning that gradient checkpointing has nothing to do in it."""
    with torch.no_grad(), warnings.catch_warnings():
        # Reentrant checkpointing warns of this in every layer; here no gradient is wanted.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        yield


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets the model's training mode; on exit every module gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def text_inputs(module: nn.Module, input_ids: Tensor) -> dict[str, Any]:
    """The keyword arguments for a call of ``module``, a model or its decoder, on the text ``input_ids [B, L]``.

    Some multimodal models take the kind of each token, and some demand it in training; 0 is text.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    config = module.config
    # In other models 0 means something else: a segment with an embedding (GPT-2, BERT), or tokens that see
    # those behind them (PaliGemma).
    if config.get_text_config() is not config and config.model_type != "paligemma":
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inspect.signature(type(module).forward).parameters:
                inputs[name] = torch.zeros_like(input_ids)
    return inputs


def forward_name(module: nn.Module) -> str:
    """The attribute with the module's own forward function: Accelerate moves it to make room for hooks."""
    return "_old_forward" if "_old_forward" in vars(unwrap(module)) else "forward"


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` in place of its own forward function; its hooks run as always."""
    module, name = unwrap(module), forward_name(module)
    own = vars(module).get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        delattr(module, name) if own is None else setattr(module, name, own)


def hidden_scale(model: nn.Module) -> float:
    """By what the model multiplies its decoder's states before it gives them to the head."""
    config = causal_lm(model).config.get_text_config()
    return config.dim_model_base / config.hidden_size if config.model_type == "minicpm3" else 1.0


def before_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function that makes of the decoder's states ``[..., D]`` what the model gives to its head."""
    layers, scale, head = layers_before_head(model), hidden_scale(model), causal_lm(model).get_output_embeddings()

    def function(hidden: Tensor) -> Tensor:
        if layers is None:
            return hidden if scale == 1.0 else hidden * scale
        with forward_replaced(head, lambda hidden: hidden):
            found = layers(hidden)
        return found[0] if isinstance(found, tuple) else found  # XLM

    return function


class HeadParameters(NamedTuple):
    """The head as the losses from hidden states take it.

        z = logit_scale * (hidden @ weight.T + bias)
        logits = z, or softcap * tanh(z / softcap) where there is a softcap

    Attributes:
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        softcap, logit_scale: None and 1.0 where the model has none.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def head_parameters(model: nn.Module) -> HeadParameters:
    """Weight, bias, softcap and scale of the head that follows the hidden states.

    Adapters on the head (LoRA, DoRA, trained rows) are merged into the returned weight, differentiably. `check_head`
    compares the result with the model's own logits.

    Raises:
        NotImplementedError: the head is more than a linear layer with a known, positive scale or softcap, or it is
            sharded and not gathered.
    """
    name = "head_parameters"
    causal = causal_lm(model)
    head = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    for attribute in ("output_multiplier", "final_logits_bias"):
        if getattr(config, attribute, None) not in (None, 1.0):
            raise NotImplementedError(f"{name}: the configuration's {attribute} is not supported")
    # Gemma; RecurrentGemma; xLSTM
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((cap for cap in (getattr(config, attribute, None) for attribute in caps) if cap), None)
    scale = 1.0
    for attribute in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if getattr(config, attribute, None) is not None:
            scale *= float(getattr(config, attribute))
    if getattr(config, "logits_scaling", None) not in (None, 1.0) and hidden_scale(model) == 1.0:
        # Granite divides by it, HyperCLOVA X multiplies.
        if config.model_type.startswith("granite"):
            scale = 1.0 / config.logits_scaling
        elif config.model_type.startswith("hyperclovax"):
            scale = float(config.logits_scaling)
        else:
            raise NotImplementedError(f"{name}: logits_scaling of model type {config.model_type!r} is not known")
    if scale <= 0:
        raise NotImplementedError(f"{name}: the configuration's logit scale must be above 0, got {scale}")
    weight, bias = _linear_weight(head)
    for parameter in (weight, bias):
        if parameter is not None and hasattr(parameter, "full_tensor"):
            raise NotImplementedError(
                f"{name}: the head's parameters are sharded; call it in the loss_fn of "
                "shared_forward, inside the model's forward pass"
            )
    return HeadParameters(weight, bias, softcap, scale)


def _linear_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[V, D]`` and bias ``[V]`` of a linear layer, with its adapters merged in."""
    name, head = "head_parameters", unwrap(head)
    if hasattr(head, "modules_to_save") and hasattr(head, "active_adapters"):  # PEFT's trained copy
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        if active and not getattr(head, "disable_adapters", False):
            return _linear_weight(head.modules_to_save[active[0]])
        return _linear_weight(head.original_module)
    if hasattr(head, "token_adapter"):  # PEFT's trained rows of embeddings, on a head that is tied to them
        tokens = head.token_adapter
        weight, bias = _linear_weight(tokens.base_layer)
        if tokens.disable_adapters or tokens.merged or not tokens.active_adapters:
            return weight, bias
        return tokens.get_merged_weights(tokens.active_adapters), bias
    if hasattr(head, "lora_A"):
        weight, bias = _linear_weight(head.base_layer)
        return weight if head.disable_adapters or head.merged else _with_lora(head, weight), bias
    if hasattr(head, "base_layer"):
        raise NotImplementedError(
            f"{name}: the head has an adapter of {type(head).__module__}; leave the head out of its target_modules"
        )
    weight = getattr(head, "weight", None)
    packed, option = None, ""
    # A layer of bitsandbytes, GPTQ, AWQ, ..., or torchao's weight in a layer of torch.
    if getattr(head, "quant_state", None) or hasattr(weight, "quant_state") or hasattr(weight, "CB"):
        packed, option = head, "BitsAndBytesConfig(llm_int8_skip_modules=['lm_head'])"
    elif type(weight).__module__.startswith("torchao"):
        packed, option = weight, "TorchAoConfig(modules_to_not_convert=['lm_head'])"
    if packed is not None:
        raise NotImplementedError(
            f"{name}: the head is quantized ({type(packed).__name__}); load the model with its head as it is, {option}"
        )
    # FSDP2 makes a subclass, which computes the same. A subclass with another forward (quantized, ...) does not.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise NotImplementedError(f"{name}: the head must be a torch.nn.Linear, got {type(head).__name__}")
    return head.weight, head.bias


def _with_lora(head: Any, weight: Tensor) -> Tensor:
    """The weight ``[V, D]`` of PEFT's layer with its active adapters (LoRA, DoRA)."""
    name, active = "head_parameters", [adapter for adapter in head.active_adapters if adapter in head.lora_A]
    for adapter in active:
        if getattr(head.lora_dropout[adapter], "p", 0) > 0:
            raise NotImplementedError(
                f"{name}: LoRA dropout on the head, whose weight it changes for every token; set lora_dropout=0 "
                "or leave the head out of target_modules"
            )
        weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
        if head.use_dora.get(adapter):
            if len(active) > 1:
                raise NotImplementedError(f"{name}: DoRA beside another adapter on the head, got {active}")
            # Equation 5 of https://arxiv.org/abs/2402.09353; the norm is a constant (section 4.3).
            norm = torch.linalg.norm(weight.detach(), dim=1)
            weight = (head.lora_magnitude_vector[adapter].weight / norm)[:, None].to(weight.dtype) * weight
    return weight
