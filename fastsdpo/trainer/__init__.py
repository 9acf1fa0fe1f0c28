"""Training on logged interactions, on top of `transformers.Trainer`."""

from fastsdpo.trainer.config import SDPOConfig as SDPOConfig
from fastsdpo.trainer.data import InteractionDataset as InteractionDataset
from fastsdpo.trainer.teacher_check import TeacherCheck as TeacherCheck
from fastsdpo.trainer.trainer import NonFiniteError as NonFiniteError
from fastsdpo.trainer.trainer import SDPOTrainer as SDPOTrainer
