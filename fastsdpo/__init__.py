"""fastsdpo: learning from user interactions, fast.

The losses need torch only and are imported here. Interactions, shared prefixes and training need
`transformers` and are imported when their names are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastsdpo._version import __version__ as __version__
from fastsdpo.ops.backend import available_backends as available_backends
from fastsdpo.ops.divergence import SDPOLossOutput as SDPOLossOutput
from fastsdpo.ops.divergence import sdpo_loss as sdpo_loss
from fastsdpo.ops.linear import linear_sdpo_loss as linear_sdpo_loss
from fastsdpo.ops.linear_token_logps import linear_token_logps as linear_token_logps
from fastsdpo.ops.modules import LinearSDPOLoss as LinearSDPOLoss
from fastsdpo.ops.modules import SDPOLoss as SDPOLoss
from fastsdpo.ops.token_logps import TokenLogRatio as TokenLogRatio
from fastsdpo.ops.token_logps import token_log_ratio as token_log_ratio
from fastsdpo.ops.token_logps import token_logps as token_logps
from fastsdpo.ops.weights import sequence_mean_weights as sequence_mean_weights
from fastsdpo.ops.weights import token_mean_weights as token_mean_weights

_LAZY = {
    "Interaction": "fastsdpo.data",
    "TokenizedInteraction": "fastsdpo.data",
    "HindsightTemplate": "fastsdpo.data",
    "extract_interactions": "fastsdpo.data",
    "load_conversations": "fastsdpo.data",
    "load_interactions": "fastsdpo.data",
    "tokenize_interaction": "fastsdpo.data",
    "tokenize_interactions": "fastsdpo.data",
    "shared_forward": "fastsdpo.prefix",
    "SDPOConfig": "fastsdpo.trainer",
    "SDPOTrainer": "fastsdpo.trainer",
    "OnlineSDPOConfig": "fastsdpo.online",
    "OnlineSDPOTrainer": "fastsdpo.online",
    "UserSimulator": "fastsdpo.online",
}

__all__ = [
    "LinearSDPOLoss",
    "SDPOLoss",
    "SDPOLossOutput",
    "TokenLogRatio",
    "__version__",
    "available_backends",
    "linear_sdpo_loss",
    "linear_token_logps",
    "sdpo_loss",
    "sequence_mean_weights",
    "token_log_ratio",
    "token_logps",
    "token_mean_weights",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastsdpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
