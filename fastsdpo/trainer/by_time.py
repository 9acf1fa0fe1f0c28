"""Evaluations and checkpoints by the clock, for runs whose steps take longer than anyone wants to wait."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

FIRST, EVERY = 5 * 60.0, 30 * 60.0  # seconds
MOST = 0.1  # of the time, for evaluations


class ByTime(TrainerCallback):
    """After five minutes, and then every half hour: a held-out evaluation and a checkpoint.

    Args:
        evaluate, save: which of the two.
        first, every: seconds; longer where an evaluation takes more than a tenth of them.
    """

    def __init__(self, evaluate: bool, save: bool, first: float = FIRST, every: float = EVERY):
        self.evaluate, self.save, self.first, self.every = evaluate, save, first, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.next = time.monotonic() + self.first

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = time.monotonic() >= self.next
        if args.world_size > 1:  # the first process's clock decides
            told = torch.tensor(int(due), device=args.device)
            torch.distributed.broadcast(told, 0)
            due = bool(told)
        if due:
            self.next = time.monotonic() + self.every
            control.should_save = control.should_save or self.save
            control.should_evaluate = control.should_evaluate or self.evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        seconds = float((metrics or {}).get("eval_runtime", 0))
        self.next = max(self.next, time.monotonic() + seconds / MOST)
