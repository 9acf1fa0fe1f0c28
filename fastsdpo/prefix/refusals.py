"""What a model does that passes of its decoder alone, or shared passes, would get wrong."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastsdpo.prefix.model import causal_decoder, causal_lm, unwrap
from fastsdpo.prefix.recurrent import recurrent_mixers

# Layers of these types mix no tokens.
WITHOUT_MIXING = ("mlp", "moe")
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention", "conv", "mamba", "hybrid", *WITHOUT_MIXING)

# Model types that cannot share, and why.
SELECTIVE_SCAN = "its selective scan (Mamba-1) takes no state to start from"
INDEXER = "its indexer chooses the keys of each token among those before it in the pack"
UNSUPPORTED_TYPES = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba"), SELECTIVE_SCAN),
    "zamba2": "its layers share one attention module",
    "zaya": "its attention has recurrent projections, which take no state to start from",
    **dict.fromkeys(("inkling", "inkling_text", "inkling2", "inkling2_text"), "its attention has convolutions inside"),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "glm5_next", "qwen4_exp", "qwen4_exp_text"), INDEXER),
}

# Adapters that are more than layers of the decoder, by the type that PEFT gives them.
ABOVE_THE_DECODER = {
    "POLY": "needs task_ids, which interactions do not have",
    "SHADOW": "begins its own pass above the decoder",
    "XLORA": "weighs its experts by a pass of its own, above the decoder",
}


def above_the_decoder(model: nn.Module) -> str | None:
    """What an adapter of PEFT does above the decoder, or None. Calls of the decoder alone would leave it out."""
    config = getattr(unwrap(model), "active_peft_config", None)
    if config is None:
        return None
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        return f"the {kind} adapter puts virtual tokens into the sequence, above the decoder"
    if kind in ABOVE_THE_DECODER:
        return f"the {kind} adapter {ABOVE_THE_DECODER[kind]}"
    if getattr(config, "alora_invocation_tokens", None):
        return f"the {kind} adapter looks for its alora_invocation_tokens above the decoder"
    return None


def unsupported(model: nn.Module) -> str | None:
    """What the model does that shared passes are known to get wrong, or None."""
    causal = causal_lm(model)
    config = causal.config.get_text_config()
    kind = type(causal).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} has an encoder"
    if config.model_type in UNSUPPORTED_TYPES:
        return f"{kind} cannot share prefixes: {UNSUPPORTED_TYPES[config.model_type]}"
    if getattr(causal, "_is_stateful", False) and not recurrent_mixers(causal_decoder(causal)):
        return f"{kind} has recurrent layers that do not take their states from a cache"
    decoder = causal_decoder(causal)
    if not decoder._can_set_attn_implementation() and not recurrent_mixers(decoder):
        return f"{kind} does not call transformers' attention interface"
    others = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if others:
        return f"{kind} has layers of type {', '.join(sorted(others))}"
    if getattr(config, "output_router_logits", False):
        return f"{kind} adds an auxiliary loss over all routed tokens (output_router_logits=True)"
    for name, module in causal.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            return f"dropout is active ({name} has p={module.p}): branches would share its mask"
    return None


class RotaryLimit(NamedTuple):
    """Rotary embeddings of ``kind`` that change in a pass over more than ``positions`` positions."""

    kind: str
    positions: int

    def __str__(self) -> str:
        return f"its {self.kind} rotary embeddings change beyond {self.positions} positions"


def rotary_limit(model: nn.Module) -> RotaryLimit | None:
    """The longest sequence that can share a pass, where rotary embeddings depend on the longest in it.

    Beyond the limit one long sequence would change the others of its pass. None: there is no limit.
    """
    config = causal_lm(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # by layer
        limit = part.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if part.get("rope_type") in ("dynamic", "longrope") and limit:
            limits.append(RotaryLimit(part["rope_type"], limit))
    return min(limits, key=lambda limit: limit.positions, default=None)
