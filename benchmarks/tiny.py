"""Tiny random models of the causal-LM types of the installed transformers."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastsdpo.prefix import text_inputs

VOCABULARY = 256
LAYERS = 4
NOISE = re.compile("drop|jitter")  # probabilities that make two passes in training mode differ
MOST_PARAMETERS = 40_000_000
# Names of sizes, whatever the type; a configuration takes those that it has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "model_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "shared_intermediate_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "moe_shared_expert_intermediate_size": 32,
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_d_state"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("mamba_n_heads",), 8),
    **dict.fromkeys(("mamba_n_groups",), 1),
    **dict.fromkeys(("mamba_expand",), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "index_topk": 8,  # fewer keys than the plans have
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("sliding_window", "attention_window_size"), 32),
    "is_decoder": True,
}
VISION = {
    **dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size", "attention_dim", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "num_blocks"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = ["linear_attention", "full_attention"] * 2
# What single types need beside these.
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_next": {"layer_types": LINEAR},
    "olmo_hybrid": {"layer_types": LINEAR},
    "kimi_linear": {
        "layer_types": LINEAR,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_key_value_heads": 4,
        "num_experts_per_token": 2,
    },
    "bailing_hybrid": {"num_key_value_heads": 4, "num_expert_group": 1, "topk_group": 1, "layer_group_size": 2}
    | {"linear_num_heads": 4, "linear_head_dim": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": {}, "num_key_value_heads": 4, "head_dim": 32},
    "gemma3n_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}
    | {"per_layer_config": {}, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"layer_types": LINEAR, "hc_lowrank": 8, "ngram_vocab_size_base": 500, "split_ngram_parts": 1}
    | {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    | {"indexer_budget": 32, "indexer_compress_ratio": 4, "heads_per_ngram": 2},
    "longcat_flash": {"ffn_hidden_size": 96, "zero_expert_num": 2, "num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96},
    },
    "git": {"vision_config": TOWER | {"num_hidden_layers": 1}},
    "phi4_multimodal": {"vision_config": TOWER | {"num_hidden_layers": 1}, "audio_config": TOWER | {"num_blocks": 1}},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * LAYERS, "hidden_size": 64},
    "xlm": {"emb_dim": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "granitemoehybrid": {"layer_types": LINEAR},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "moe_latent_size": None,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "key_multiplier": 0.7},
    # Short, so that the plans meet the end of a chunk and the scales of queries.
    "llama4_text": {"attention_chunk_size": 16, "floor_scale": 16},
    "minicpm3": {"dim_model_base": 16},
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]},
    "bamba": {"attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}


# Tried one after the other, until transformers builds the model and runs it on text.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 2, "head_dim": 16},
    {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    {"rotary_dim": 8},
    {"num_experts_per_tok": 1},
    {"layer_types": None, "num_hidden_layers": None},
)


def causal_lm_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(model_type: str) -> Any:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, name)


def configuration(model_type: str, variant: dict[str, Any]) -> Any:
    """The configuration with small sizes, of the text model alone where transformers has a class for it."""
    whole = model_class(model_type).config_class()
    default = whole if whole.is_encoder_decoder else whole.get_text_config(decoder=True)
    known = default.to_dict()
    options = {**OPTIONS.get(default.model_type, {}), **OPTIONS.get(model_type, {})}
    given = {name: value for name, value in SIZES.items() if known.get(name) is not None}
    given |= {name: value for name, value in variant.items() if name in known} | options
    if known.get("layer_types") and "layer_types" not in given:
        kinds = list(dict.fromkeys(known["layer_types"]))
        given["layer_types"] = [kinds[n % len(kinds)] for n in range(LAYERS)]
    given = {name: value for name, value in given.items() if value is not None or name not in variant}
    given |= {name: 0.0 for name, value in known.items() if NOISE.search(name) and isinstance(value, float)}
    given |= {name: 0.0 for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "layerdrop") if name in known}
    small = type(default)(**{**given, "is_decoder": True})
    if default is whole:
        return small
    for name, part in list(vars(whole).items()):
        if part is default:
            setattr(whole, name, small)
        elif isinstance(part, transformers.PreTrainedConfig):
            sizes = part.to_dict()
            setattr(whole, name, type(part)(**{n: v for n, v in VISION.items() if sizes.get(n) is not None}))
    return whole


def build(model_type: str) -> nn.Module:
    """A model of few random weights, all of which matter, in float32 and training mode.

    Raises:
        Exception: what transformers raises for the first of `VARIANTS`, where no one works.
    """
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            model = _build(model_type, variant)
            ids = torch.tensor([[5, 6, 7, 8, 9]])
            with torch.no_grad():
                call(model, ids)
            return model
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def _build(model_type: str, variant: dict[str, Any]) -> nn.Module:
    config = configuration(model_type, variant)
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    mixture = any(getattr(config.get_text_config(), name, None) for name in experts)
    options: dict[str, Any] = {"experts_implementation": "eager"} if mixture else {}  # torch's takes no float64
    kind = model_class(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind._from_config(copy.deepcopy(config), **options).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"it has {size:,} parameters with the sizes of `benchmarks/tiny.py`")
    torch.manual_seed(0)
    model = kind._from_config(config, dtype=torch.float32, **options).train()
    with torch.no_grad():  # away from the defaults, under which some parameters do nothing
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                wide = parameter.ndim <= 1 or "conv" in name
                parameter.add_((0.1 if wide else 0.08) * torch.randn_like(parameter))
    return model


class _Float64:
    """torch, with float64 in place of float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """The models of transformers cast norms, routers, rotary embeddings and delta rules to float64, not to float32.

    Or the rounding of these casts would hide all errors below 1e-3.
    """
    prefixes = ("transformers.models.", "transformers.integrations", "transformers.modeling_rope_utils")
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(prefixes) and hasattr(m, "torch")]
    modules = [module for module in modules if module.torch is torch]
    own, default = torch.Tensor.float, torch.get_default_dtype()
    defaults = {f: f.__defaults__ for f in _functions(modules) if torch.float32 in (f.__defaults__ or ())}
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    for module in modules:
        module.torch = _Float64()
    for function, given in defaults.items():  # RecurrentGemma's scan
        function.__defaults__ = tuple(torch.float64 if value is torch.float32 else value for value in given)
    try:
        yield
    finally:
        for function, given in defaults.items():
            function.__defaults__ = given
        torch.set_default_dtype(default)
        torch.Tensor.float = own  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch


def _functions(modules: list[Any]) -> Iterator[Any]:
    """The functions of the modules, and of their classes."""
    for module in modules:
        for value in list(vars(module).values()):
            if isinstance(value, FunctionType):
                yield value
            elif isinstance(value, type):
                yield from (method for method in vars(value).values() if isinstance(method, FunctionType))


def call(model: nn.Module, ids: Tensor) -> Any:
    """The model's own call on one sequence ``[1, L]``."""
    return model(**text_inputs(model, ids))
