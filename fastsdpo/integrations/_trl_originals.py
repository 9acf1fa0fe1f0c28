"""TRL as it is installed: a version for which the replacements are written, and its own functions.

Everything that replaces a part of TRL imports this module first: it raises where the parts look different.
"""

# The version is checked before anything of TRL is imported.
# ruff: noqa: E402
from __future__ import annotations

import inspect
import types
import warnings
from importlib.metadata import version
from typing import Any

NEEDED = "1.16.0"

try:
    import trl  # noqa: F401
    from packaging.version import Version
except ImportError as error:
    raise ImportError(
        f"fastsdpo.integrations.trl needs TRL >= {NEEDED}: pip install 'trl>={NEEDED}' ({error})"
    ) from error

if Version(version("trl")) < Version(NEEDED):
    raise ImportError(
        f"fastsdpo.integrations.trl needs TRL >= {NEEDED}, got {version('trl')}; pip install -U 'trl>={NEEDED}'"
    )

with warnings.catch_warnings():
    # Whoever imports this module has read that trl.experimental may change: the check below is for it.
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental.sdpo import SDPOTrainer

from trl.trainer import distillation_trainer as _distillation

from fastsdpo.ops.token_logps import token_logps

# What is replaced, with the arguments that the replacement relies on.
_REPLACED = {
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "_forward_logits": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_compute_policy_loss": ("self", "inputs", "student_logits"),
    "_compute_self_distillation_loss": ("self", "model", "inputs", "distillation_logits"),
    "_compute_rollout_logps": (
        "self",
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
    ),
}
# What is used of TRL's private methods besides.
_USED = ("_get_teacher_context_for_self_distillation", "_log_self_distillation_metric")
_DIVERGENCE = (
    "student_hidden_states",
    "teacher_hidden_states",
    "student_lm_head_weight",
    "teacher_lm_head_weight",
    "completion_mask",
    "beta",
    "num_items_in_batch",
    "student_lm_head_bias",
    "teacher_lm_head_bias",
    "student_logit_scale",
    "teacher_logit_scale",
    "student_final_logit_softcapping",
    "teacher_final_logit_softcapping",
    "temperature",
)


def _check_trl() -> None:
    """TRL is at the version whose private methods are replaced, or they still look the same."""
    problems = [
        f"SDPOTrainer.{name}{inspect.signature(getattr(SDPOTrainer, name))}"
        if hasattr(SDPOTrainer, name)
        else f"SDPOTrainer.{name} is missing"
        for name, arguments in _REPLACED.items()
        if tuple(inspect.signature(getattr(SDPOTrainer, name, print)).parameters) != arguments
    ]
    problems += [f"SDPOTrainer.{name} is missing" for name in _USED if not hasattr(SDPOTrainer, name)]
    divergence = getattr(_distillation, "_chunked_divergence_loss", print)
    if tuple(inspect.signature(divergence).parameters) != _DIVERGENCE:
        problems.append("trl.trainer.distillation_trainer._chunked_divergence_loss")
    if problems:
        raise ImportError(
            f"fastsdpo.integrations.trl: TRL {version('trl')} differs from {NEEDED}, for which this "
            f"was written, in what is replaced: {'; '.join(problems)}. Install TRL {NEEDED} "
            "or a newer fastsdpo."
        )


_check_trl()
_TRL = {name: vars(SDPOTrainer)[name] for name in _REPLACED}
_TRL_DIVERGENCE = _distillation._chunked_divergence_loss


def _rebound(function: Any, **names: Any) -> Any:
    """``function`` with other values of some of its module's names; the module stays as it is."""
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


# TRL's own clipping and normalization, fed with log-probs in place of logits, or with logits and
# the fused kernel.
_policy_loss_from_logps = _rebound(_TRL["_compute_policy_loss"], selective_log_softmax=lambda logps, ids: logps)
_policy_loss_from_logits = _rebound(
    _TRL["_compute_policy_loss"], selective_log_softmax=lambda logits, ids: token_logps(logits, ids)
)
