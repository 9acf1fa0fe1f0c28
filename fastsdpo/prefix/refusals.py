"""What a model does that passes of its decoder alone, or shared passes, would get wrong."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastsdpo.prefix.attention import attends_alone, functional_dropout
from fastsdpo.prefix.model import causal_lm, decoder_of, unwrap
from fastsdpo.prefix.paths import path_mixers
from fastsdpo.prefix.recurrent import recurrent_mixers

# Layers of these types mix no tokens.
WITHOUT_MIXING = ("mlp", "moe")
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention", "conv", "mamba", "hybrid", *WITHOUT_MIXING)
LAYER_TYPES += ("chunked_attention", "indexed_attention")

# Model types that cannot share, and why.
SELECTIVE_SCAN = "its selective scan (Mamba-1) takes no state to start from"
INDEXER = "its indexer chooses keys from recurrent states"
UNSUPPORTED_TYPES = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), SELECTIVE_SCAN),
    "big_bird": "its attention is another one in longer passes",
    "cpmant": "its tokens see those behind them",
    **dict.fromkeys(("inkling", "inkling_text", "inkling2", "inkling2_text"), "its attention has convolutions inside"),
    **dict.fromkeys(("glm5_next", "qwen4_exp", "qwen4_exp_text"), INDEXER),
}

# Model types that cannot be trained on sequences of any length, and why.
UNTRAINABLE_TYPES = {"reformer": "takes sequences in training only whose length is a multiple of its chunks"}

# Adapters that are more than layers of the decoder, by the type that PEFT gives them.
ABOVE_THE_DECODER = {
    "POLY": "needs task_ids, which interactions do not have",
    "SHADOW": "begins its own pass above the decoder",
    "XLORA": "weighs its experts by a pass of its own, above the decoder",
}


def above_the_decoder(model: nn.Module) -> str | None:
    """Why no passes of the decoder alone can train this model, or None.

    An adapter of PEFT may do something above the decoder, which these would leave out.
    """
    causal = causal_lm(model)
    if causal.config.model_type in UNTRAINABLE_TYPES:
        return f"{type(causal).__name__} {UNTRAINABLE_TYPES[causal.config.model_type]}"
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
    decoder = decoder_of(causal)
    paths = path_mixers(decoder)
    if getattr(causal, "_is_stateful", False) and not (paths or recurrent_mixers(decoder)):
        return f"{kind} has recurrent layers that do not take their states from a cache"
    alone = attends_alone(decoder)
    if not (decoder._can_set_attn_implementation() or alone or recurrent_mixers(decoder)):
        return f"{kind} does not call transformers' attention interface, nor give its keys to a cache"
    dropout = functional_dropout(decoder) if alone else None
    if dropout is not None:
        return f"dropout is active ({dropout}): branches would share its mask"
    if config.model_type == "falcon" and config.alibi:
        return f"{kind} adds ALiBi's biases by the place in the pass (alibi=True), not by the position"
    others = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if others and not paths:
        return f"{kind} has layers of type {', '.join(sorted(others))}"
    if getattr(config, "attn_temperature_tuning", None) and not config.model_type.startswith("llama4"):
        # Beyond floor_scale tokens, which no short check reaches.
        return f"{kind} scales queries by their place in the pass (attn_temperature_tuning), not by their position"
    if getattr(config, "output_router_logits", False):
        return f"{kind} adds an auxiliary loss over all routed tokens (output_router_logits=True)"
    for name, module in causal.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            return f"dropout is active ({name} has p={module.p}): branches would share its mask"
    return None


class SharingLimit(NamedTuple):
    """What changes in a pass over more than ``positions`` positions; ``kind`` names its cause."""

    kind: str
    positions: int
    change: str

    def __str__(self) -> str:
        return f"its {self.change} beyond {self.positions} positions"


def sharing_limit(model: nn.Module) -> SharingLimit | None:
    """The longest sequence that can share a pass. None: there is no limit.

    Beyond it, rotary embeddings depend on the longest sequence in a pass; or attention keeps a number of keys, and
    among those with equal scores, as equal tokens have, the ones that come first in the pass (Doge).
    """
    config = causal_lm(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # by layer
        limit = part.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        kind = part.get("rope_type")
        if kind in ("dynamic", "longrope") and limit:
            limits.append(SharingLimit(kind, limit, f"{kind} rotary embeddings change"))
    if config.model_type == "doge":
        change = "attention leaves out keys by their place in the pass"
        limits.append(SharingLimit("keep_window_size", config.keep_window_size, change))
    return min(limits, key=lambda limit: limit.positions, default=None)


rotary_limit = sharing_limit  # its name while rotary embeddings were the only reason
