"""fastsdpo: learning from user interactions, fast.

The losses need torch only; interactions, shared prefixes and training need `transformers` too. Each public name is
imported when it is first used, so that `import fastsdpo` and the command line start without either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsdpo._version import __version__ as __version__
from fastsdpo.lazy import lazy_names

if TYPE_CHECKING:
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

_MODULE_OF = {
    "LinearSDPOLoss": "fastsdpo.ops.modules",
    "SDPOLoss": "fastsdpo.ops.modules",
    "SDPOLossOutput": "fastsdpo.ops.divergence",
    "TokenLogRatio": "fastsdpo.ops.token_logps",
    "available_backends": "fastsdpo.ops.backend",
    "linear_sdpo_loss": "fastsdpo.ops.linear",
    "linear_token_logps": "fastsdpo.ops.linear_token_logps",
    "sdpo_loss": "fastsdpo.ops.divergence",
    "sequence_mean_weights": "fastsdpo.ops.weights",
    "token_log_ratio": "fastsdpo.ops.token_logps",
    "token_logps": "fastsdpo.ops.token_logps",
    "token_mean_weights": "fastsdpo.ops.weights",
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

__all__ = ["__version__", *_MODULE_OF]
__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
