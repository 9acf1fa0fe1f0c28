"""TRL's `SDPOTrainer` and `DistillationTrainer` with fastsdpo's losses: the same numbers, no logits.

    from fastsdpo.integrations.trl import patch_trl
    patch_trl()                                  # or: with patch_trl(): ...

TRL's SDPO trainer forms the logits of student and teacher, divides both by the temperature and takes
log-softmaxes of both. Here the loss is formed inside the student's forward pass from hidden states, a
chunk of tokens at a time (``source="hidden"``), or from the logits in one pass over each
(``source="logits"``); ``"auto"`` takes hidden states where the model allows it and says where not.
TRL keeps the rest: generation, rewards, teachers and their updates, normalization, metrics.

What a patched trainer computes is TRL's, to float32 rounding, with these exceptions:
where TRL's value is NaN (a token of probability 0 under both policies; masked tokens whose logits are
not finite) it is the limit or 0; where the model runs in bfloat16 or float16, TRL rounds the logits to
it and this does not; and the collective that averages the metric runs also on a process without a
token to train on, which TRL skips, and then waits for ever.
"""

from __future__ import annotations

from typing import Any, Literal

from fastsdpo.integrations._trl_distillation import chunked_divergence_loss as chunked_divergence_loss
from fastsdpo.integrations._trl_originals import SDPOTrainer, _distillation
from fastsdpo.integrations._trl_sdpo import (
    _OURS,
    _compute_loss,
    _compute_policy_loss,
    _compute_rollout_logps,
    _compute_self_distillation_loss,
    _forward_logits,
)

Source = Literal["auto", "hidden", "logits"]
SOURCES = ("auto", "hidden", "logits")


class FastSDPOTrainer(SDPOTrainer):
    """TRL's `SDPOTrainer` with fastsdpo's losses; arguments and numbers are TRL's.

    Args:
        source: "hidden" forms the loss from hidden states, without logits, or raises
            NotImplementedError; "logits" from logits; "auto" the first where it can be done, and
            otherwise the second, with a warning that says why.
        others: as `trl.experimental.sdpo.SDPOTrainer`.
    """

    fastsdpo_source: Source = "auto"

    def __init__(self, *args: Any, source: Source = "auto", **kwargs: Any):
        self.fastsdpo_source = _check_source("FastSDPOTrainer", source)
        super().__init__(*args, **kwargs)

    compute_loss = _compute_loss
    _forward_logits = _forward_logits
    _compute_policy_loss = _compute_policy_loss
    _compute_self_distillation_loss = _compute_self_distillation_loss
    _compute_rollout_logps = _compute_rollout_logps


# ------------------------------------------------------------------------------------ the patching


class TRLPatch:
    """A patch that is on; `unpatch` or leaving it as a context manager takes it off."""

    def __init__(self, source: Source):
        self.source: Source = source

    def unpatch(self) -> None:
        """Restores TRL's own functions, unless another patch is still on. Twice is once."""
        if self in _patches:
            _patches.remove(self)
            _apply()

    def __enter__(self) -> TRLPatch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unpatch()


_MISSING = object()
_patches: list[TRLPatch] = []
_before: dict[tuple[Any, str], Any] = {}


def _apply() -> None:
    """Sets what the latest patch wants, or puts back what was there before the first one."""
    if not _patches:
        for (owner, name), value in _before.items():
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        _before.clear()
        return
    wanted = {(SDPOTrainer, name): value for name, value in _OURS.items()}
    wanted[SDPOTrainer, "fastsdpo_source"] = _patches[-1].source
    wanted[_distillation, "_chunked_divergence_loss"] = chunked_divergence_loss
    for (owner, name), value in wanted.items():
        _before.setdefault((owner, name), vars(owner).get(name, _MISSING))
        setattr(owner, name, value)


def _check_source(name: str, source: Any) -> Any:
    if source not in SOURCES:
        raise ValueError(f"{name}: source must be one of {SOURCES}, got {source!r}")
    return source


def patch_trl(source: Source = "auto") -> TRLPatch:
    """Makes every `SDPOTrainer` and `DistillationTrainer` of TRL use fastsdpo's losses.

    Trainers that exist already and subclasses included; a subclass that overrides a method which
    works on logits gets logits. Works as a function, for the rest of the process, and as a context
    manager; patches may overlap, and TRL is as it was when the last one is off.

    Args:
        source: as in `FastSDPOTrainer`, for SDPO. The DistillationTrainer has hidden states anyway.

    Returns:
        `TRLPatch`, with ``unpatch()``.
    """
    patch = TRLPatch(_check_source("patch_trl", source))
    _patches.append(patch)
    _apply()
    return patch


def unpatch_trl() -> None:
    """Takes every patch off; does nothing where none is on."""
    _patches.clear()
    _apply()
