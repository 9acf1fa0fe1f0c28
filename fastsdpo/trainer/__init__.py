"""Training on logged interactions, on top of `transformers.Trainer`. Each name is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsdpo.trainer.config import SDPOConfig as SDPOConfig
    from fastsdpo.trainer.data import InteractionDataset as InteractionDataset
    from fastsdpo.trainer.finite import NonFiniteError as NonFiniteError
    from fastsdpo.trainer.stream import InteractionStream as InteractionStream
    from fastsdpo.trainer.teacher_check import TeacherCheck as TeacherCheck
    from fastsdpo.trainer.trainer import SDPOTrainer as SDPOTrainer

_MODULE_OF = {
    "InteractionDataset": "data",
    "InteractionStream": "stream",
    "NonFiniteError": "finite",
    "SDPOConfig": "config",
    "SDPOTrainer": "trainer",
    "TeacherCheck": "teacher_check",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastsdpo.trainer' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
