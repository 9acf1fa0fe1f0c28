"""TRL as it is installed: the check of its version, and the functions of it that are replaced.

Every module that replaces a part of TRL imports this one first. The import raises an ImportError where TRL is
missing, too old, or differs in what is replaced.
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
    # TRL warns that trl.experimental may change; `_check_signatures` notices such changes.
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental import sdft as trl_sdft
    from trl.experimental import sdpo as trl_sdpo

from trl.trainer import distillation_trainer as trl_distillation

from fastsdpo.ops.token_logps import token_logps

# TRL has no types for most of what its trainers hold.
SDPOTrainer: Any = trl_sdpo.SDPOTrainer
SDFTTrainer: Any = trl_sdft.SDFTTrainer
distillation_trainer: Any = trl_distillation

# The methods of `SDPOTrainer` that are replaced, with the arguments that the replacements take. `SDFTTrainer` has the
# same but for the policy loss.
REPLACED = {
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "_forward_logits": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_compute_policy_loss": ("self", "inputs", "student_logits"),
    "_compute_self_distillation_loss": ("self", "model", "inputs", "distillation_logits"),
    "_compute_rollout_logps": ("self", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
}
SDFT_REPLACED = tuple(name for name in REPLACED if name != "_compute_policy_loss")
# Methods that the replacements call.
_CALLED = ("_get_teacher_context_for_self_distillation", "_log_self_distillation_metric")
# The arguments of the function that is replaced for `DistillationTrainer`.
_DIVERGENCE = (
    *("student_hidden_states", "teacher_hidden_states", "student_lm_head_weight", "teacher_lm_head_weight"),
    *("completion_mask", "beta", "num_items_in_batch", "student_lm_head_bias", "teacher_lm_head_bias"),
    *("student_logit_scale", "teacher_logit_scale"),
    *("student_final_logit_softcapping", "teacher_final_logit_softcapping", "temperature"),
)


def _check_signatures() -> None:
    """Raises an ImportError where a function of TRL is missing or takes other arguments than expected."""

    def arguments(owner: Any, name: str) -> tuple[str, ...] | None:
        return tuple(inspect.signature(getattr(owner, name)).parameters) if hasattr(owner, name) else None

    problems = []
    for trainer, methods in ((SDPOTrainer, REPLACED), (SDFTTrainer, SDFT_REPLACED)):
        for name in methods:
            found = arguments(trainer, name)
            if found != REPLACED[name]:
                looks = " is missing" if found is None else f"({', '.join(found)})"
                problems.append(f"{trainer.__name__}.{name}{looks}")
        problems += [f"{trainer.__name__}.{name} is missing" for name in _CALLED if not hasattr(trainer, name)]
    if arguments(distillation_trainer, "_chunked_divergence_loss") != _DIVERGENCE:
        problems.append("trl.trainer.distillation_trainer._chunked_divergence_loss")
    if problems:
        raise ImportError(
            f"fastsdpo.integrations.trl: TRL {version('trl')} differs from {NEEDED}, for which this "
            f"was written, in what is replaced: {'; '.join(problems)}. Install TRL {NEEDED} "
            "or a newer fastsdpo."
        )


_check_signatures()
TRL_METHODS = {name: vars(SDPOTrainer)[name] for name in REPLACED}
SDFT_METHODS = {name: vars(SDFTTrainer)[name] for name in SDFT_REPLACED}
trl_divergence = distillation_trainer._chunked_divergence_loss


def _with_globals(function: Any, **names: Any) -> Any:
    """A copy of ``function`` that sees other values of some of its module's names."""
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


# TRL's policy loss, with its clipping and normalization. The first takes the completion's log-probs ``[B, T]`` in
# place of logits; the second takes logits ``[B, T, V]`` and computes their log-probs with the fused kernel.
policy_loss_from_logps = _with_globals(
    TRL_METHODS["_compute_policy_loss"], selective_log_softmax=lambda logps, ids: logps
)
policy_loss_from_logits = _with_globals(TRL_METHODS["_compute_policy_loss"], selective_log_softmax=token_logps)
