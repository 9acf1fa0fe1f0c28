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
        first, every: seconds; between evaluations at least ten times as long as one takes.
    """

    def __init__(self, evaluate: bool, save: bool, first: float = FIRST, every: float = EVERY):
        self.evaluate, self.save, self.first, self.every = evaluate, save, first, every
        self.next_save = self.next_evaluation = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.next_save = time.monotonic() + self.first
        self.next_evaluation = max(self.next_evaluation, self.next_save)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        due = [self.save and now >= self.next_save, self.evaluate and now >= self.next_evaluation]
        if args.world_size > 1:  # the first process's clock decides
            told = torch.tensor(due, dtype=torch.uint8, device=args.device)
            torch.distributed.broadcast(told, 0)
            due = told.bool().tolist()
        if due[0]:
            self.next_save, control.should_save = now + self.every, True
        if due[1]:
            self.next_evaluation, control.should_evaluate = now + self.every, True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        took = float((metrics or {}).get("eval_runtime", 0))
        self.next_evaluation = max(self.next_evaluation, time.monotonic() + took / MOST)
