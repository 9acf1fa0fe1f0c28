"""TRL's `SDPOTrainer` and `DistillationTrainer` with fastsdpo's losses: the same numbers, no logits.

    from fastsdpo.integrations.trl import patch_trl
    patch_trl()                                  # or: with patch_trl(): ...

TRL's SDPO trainer forms the logits of student and teacher, divides both by the temperature and takes log-softmaxes
of both. Here the loss is formed inside the student's forward pass, from hidden states and a chunk of tokens at a
time (``source="hidden"``), or from the logits with one pass over each (``source="logits"``). ``"auto"`` takes
hidden states where the model allows it, and otherwise warns with the reason. Generation, rewards, teachers and their
updates, normalization and metrics remain TRL's.

The numbers are TRL's to float32 rounding, with three exceptions:

- Where TRL's value is NaN (a token of probability 0 under both policies, masked tokens with logits that are not
  finite), this is the limit or 0.
- Where the model runs in bfloat16 or float16, TRL rounds the logits to it; these stay float32.
- A process without a token to train on takes part in the collective that averages the metric. In TRL it does not,
  and the other processes wait for ever.
"""

from __future__ import annotations

from typing import Any

from fastsdpo.integrations._hidden_or_logits import SOURCES as SOURCES
from fastsdpo.integrations._hidden_or_logits import Source as Source
from fastsdpo.integrations._hidden_or_logits import check_source
from fastsdpo.integrations._trl_async import async_trainer, replacement
from fastsdpo.integrations._trl_distillation import chunked_divergence_loss as chunked_divergence_loss
from fastsdpo.integrations._trl_generalized import replacements
from fastsdpo.integrations._trl_originals import SDFTTrainer, SDPOTrainer, distillation_trainer
from fastsdpo.integrations._trl_sdpo import MODES as MODES
from fastsdpo.integrations._trl_sdpo import OURS, OURS_OF_SDFT
from fastsdpo.integrations._trl_sdpo import FastSDPOTrainer as FastSDPOTrainer


class TRLPatch:
    """A patch that is on. `unpatch` takes it off, and so does leaving it as a context manager."""

    def __init__(self, source: Source):
        self.source: Source = source

    def unpatch(self) -> None:
        """Restores TRL's own functions, unless another patch is still on. A second call does nothing."""
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
_wanted: dict[tuple[Any, str], Any] = {}


def _apply() -> None:
    """Sets what the latest patch wants, or restores what was there before the first one."""
    if not _patches:
        for (owner, name), value in _before.items():
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        _before.clear()
        return
    if not _before:
        _wanted.update(_replacements())
    wanted = dict(_wanted)
    for owner in {owner for owner, name in _wanted if name == "compute_loss"}:
        wanted[owner, "fastsdpo_source"] = _patches[-1].source
    for (owner, name), value in wanted.items():
        _before.setdefault((owner, name), vars(owner).get(name, _MISSING))
        setattr(owner, name, value)


def _replacements() -> dict[tuple[Any, str], Any]:
    """What is set in classes and modules of TRL, as long as TRL is as it is installed."""
    found = {(SDPOTrainer, name): value for name, value in OURS.items()}
    found |= {(SDFTTrainer, name): value for name, value in OURS_OF_SDFT.items()}
    found[distillation_trainer, "_chunked_divergence_loss"] = chunked_divergence_loss
    found |= {(owner, name): value for owner, name, value in replacements()}
    module = async_trainer()
    found[module, "_chunked_jsd_loss"] = replacement(module)
    return found


def patch_trl(source: Source = "auto") -> TRLPatch:
    """Makes every `SDPOTrainer` and `DistillationTrainer` of TRL use fastsdpo's losses.

    This includes trainers that exist already and subclasses; a subclass that overrides a method which works on
    logits gets logits. As a function it lasts for the rest of the process, as a context manager for its block.
    Patches may overlap; TRL is as before when the last one is off.

    Args:
        source: as in `FastSDPOTrainer`, for SDPO. The DistillationTrainer always works on hidden states.

    Returns:
        `TRLPatch`, with ``unpatch()``.
    """
    patch = TRLPatch(check_source("patch_trl", source))
    _patches.append(patch)
    _apply()
    return patch


def unpatch_trl() -> None:
    """Takes every patch off; does nothing where none is on."""
    _patches.clear()
    _apply()
