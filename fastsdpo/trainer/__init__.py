"""Training on logged interactions, on top of `transformers.Trainer`. Each name is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsdpo.lazy import lazy_names

if TYPE_CHECKING:
    from fastsdpo.trainer.config import SDPOConfig as SDPOConfig
    from fastsdpo.trainer.data import InteractionDataset as InteractionDataset
    from fastsdpo.trainer.finite import NonFiniteError as NonFiniteError
    from fastsdpo.trainer.stream import InteractionStream as InteractionStream
    from fastsdpo.trainer.teacher_check import TeacherCheck as TeacherCheck
    from fastsdpo.trainer.trainer import SDPOTrainer as SDPOTrainer

_MODULE_OF = {
    "InteractionDataset": "fastsdpo.trainer.data",
    "InteractionStream": "fastsdpo.trainer.stream",
    "NonFiniteError": "fastsdpo.trainer.finite",
    "SDPOConfig": "fastsdpo.trainer.config",
    "SDPOTrainer": "fastsdpo.trainer.trainer",
    "TeacherCheck": "fastsdpo.trainer.teacher_check",
}
__all__ = list(_MODULE_OF)
__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
