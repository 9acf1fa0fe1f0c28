"""TRL's eight distilling trainers with fastsdpo's losses: the same numbers, no logits.

    from fastsdpo.integrations.trl import patch_trl
    patch_trl()                                  # or: with patch_trl(): ...

Each file below is about its trainers alone, and says what they compute, which functions are replaced, and what is
refused:

    SDPOTrainer, SDFTTrainer                                            _trl_sdpo.py
    DistillationTrainer                                                 _trl_distillation.py
    GKDTrainer, GOLDTrainer, IWOPDTrainer, ServerDistillationTrainer    _trl_generalized.py
    AsyncDistillationTrainer                                            _trl_async.py

This one puts the replacements in their places and takes them away. Where TRL is not the one that they were written
for, the import raises an ImportError that names what differs.

A loss is formed inside the student's forward pass, from hidden states and a chunk of tokens at a time
(``source="hidden"``), or from logits with one pass over each (``source="logits"``). ``"auto"`` takes hidden states
where the model allows it, and otherwise warns with the reason (`_hidden_or_logits`).

The numbers are TRL's to float32 rounding, with three exceptions:

- Where TRL's value is NaN (a token of probability 0 under both policies, masked tokens with logits that are not
  finite), this is the limit or 0.
- Where the model runs in bfloat16 or float16, TRL rounds the logits to it; these stay float32.
- A process without a token to train on takes part in the collective that averages the metric. In TRL it does not,
  and the other processes wait for ever.
"""

from __future__ import annotations

from typing import Any

from fastsdpo.integrations import _trl_async, _trl_distillation, _trl_generalized, _trl_sdpo
from fastsdpo.integrations._hidden_or_logits import SOURCES as SOURCES
from fastsdpo.integrations._hidden_or_logits import Source as Source
from fastsdpo.integrations._hidden_or_logits import check_source
from fastsdpo.integrations._trl_distillation import chunked_divergence_loss as chunked_divergence_loss
from fastsdpo.integrations._trl_installed import check_arguments
from fastsdpo.integrations._trl_sdpo import MODES as MODES
from fastsdpo.integrations._trl_sdpo import FastSDPOTrainer as FastSDPOTrainer

_REPLACEMENTS = [
    *_trl_sdpo.REPLACEMENTS,
    *_trl_distillation.REPLACEMENTS,
    *_trl_generalized.REPLACEMENTS,
    *_trl_async.REPLACEMENTS,
]
check_arguments(_REPLACEMENTS)
_MISSING = object()
_patches: list[TRLPatch] = []
_before: dict[tuple[Any, str], Any] = {}


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
    wanted = {(owner, name): ours for owner, name, ours in _REPLACEMENTS}
    trainers = {owner for owner, name in wanted if name == "compute_loss"}
    wanted |= {(trainer, "fastsdpo_source"): _patches[-1].source for trainer in trainers}
    for (owner, name), value in wanted.items():
        _before.setdefault((owner, name), vars(owner).get(name, _MISSING))
        setattr(owner, name, value)


def patch_trl(source: Source = "auto") -> TRLPatch:
    """Makes every distilling trainer of TRL use fastsdpo's losses.

    This includes trainers that exist already and subclasses; a subclass that overrides a method which works on
    logits gets logits. As a function it lasts for the rest of the process, as a context manager for its block.
    Patches may overlap; TRL is as before when the last one is off.

    Args:
        source: as in `FastSDPOTrainer`, for the trainers that have a choice. `DistillationTrainer` and
            `AsyncDistillationTrainer` always work on hidden states.

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
