"""What happens at certain points of the training loop, each a callback of one duty.

`MovingAverage`, `SignalWindow`, `LongWarmUp`, `EpochOrder` and `BestCheckpoint` belong to every trainer here, as does
`FiniteCheck` (finite.py); `Progress`, `BeforeTraining`, `LastEvaluation` and `StopOnSignal` are what the commands add.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from fastsdpo.trainer.inherited import WITHOUT_WARMUP
from fastsdpo.trainer.learner import Learner
from fastsdpo.trainer.metrics import SignalMetrics
from fastsdpo.trainer.processes import agreed
from fastsdpo.trainer.report import write_report
from fastsdpo.trainer.speed import SpeedMeter

logger = logging.getLogger("fastsdpo.trainer")


def clock(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress(TrainerCallback):
    """Loss, signal, speed and time left: a bar on a terminal, else a line per log.

    The signal is the mean absolute log-ratio of teacher and student, in nats per token.

    Args:
        bar: False: lines on a terminal too, where something else asks questions there.
    """

    def __init__(self, bar: bool = True):
        self.stream = sys.stderr
        self.has_bar = bar and self.stream.isatty()
        self.bar = None
        self.started, self.first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self.has_bar:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, file=self.stream, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not self.started:
            return
        if "eval_loss" in logs and state.global_step == 0:
            return  # told by `BeforeTraining`
        if "eval_loss" in logs:
            self._write(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}")
        elif "eval_response_length" in logs and state.global_step > 0:
            satisfied = logs.get("eval_satisfaction")
            self._write(
                f"step {state.global_step}/{state.max_steps}  held-out answers: "
                + ("" if satisfied is None else f"satisfied {satisfied:.0%}  ")
                + f"{logs['eval_response_length']:.0f} tokens"
            )
        if "loss" not in logs:
            return
        values = {
            "loss": f"{logs['loss']:.4f}",
            "signal": f"{logs.get('sdpo/log_ratio_abs_mean', float('nan')):.3f}",
            "tok/s": f"{logs.get('sdpo/tokens_per_second', 0):.0f}",
        }
        if "online/satisfaction" in logs:
            values["satisfied"] = f"{logs['online/satisfaction']:.0%}"
        if "online/response_length" in logs:
            values["answer tokens"] = f"{logs['online/response_length']:.0f}"
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=True)
            return
        done = state.global_step - self.first_step
        left = (time.perf_counter() - self.started) / max(1, done)
        left *= state.max_steps - state.global_step
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        self._write(f"step {state.global_step}/{state.max_steps}  {text}  left {clock(left)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)


class BeforeTraining(TrainerCallback):
    """Measures the held-out figures before the first step, and keeps them in a file for a run that goes on.

    Inside the training loop, where the model is wrapped for several processes.

    Args:
        path: the file, JSON.
        tell: called with the figures.

    Attributes:
        metrics: the figures; None as long as there are none.
        measured: the measures of each held-out interaction (`SDPOTrainer.measured_rows`).
    """

    def __init__(self, trainer: Trainer, path: Path, tell: Callable[[dict[str, float]], None]):
        self.trainer, self.path, self.tell = trainer, path, tell
        self.metrics: dict[str, float] | None = None
        self.measured: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = self.metrics = self.trainer.evaluate()
        self.measured = getattr(self.trainer, "measured_rows", [])
        if state.is_world_process_zero:
            write_report(self.path, {**metrics, "measured": self.measured})
        self.tell(metrics)

    def read(self) -> None:
        """Takes the figures from the file, where there is one."""
        if self.path.exists():
            metrics = json.loads(self.path.read_text("utf-8"))
            self.measured, self.metrics = metrics.pop("measured", []), metrics


class LastEvaluation(TrainerCallback):
    """Keeps the held-out figures of the last step, where training evaluated after it."""

    def __init__(self):
        self.step, self.metrics = 0, {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        self.step, self.metrics = state.global_step, dict(metrics or {})

    def of(self, trainer: Trainer) -> dict[str, float] | None:
        """The figures of the trainer's model as training left it; None: they have to be measured."""
        as_it_was = self.step == trainer.state.global_step > 0 and not trainer.args.load_best_model_at_end
        return self.metrics if as_it_was else None


class MovingAverage(TrainerCallback):
    """The teacher that is a moving average follows the student after each optimizer step."""

    def __init__(self, learner: Learner):
        self.learner = learner

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learner.after_step()


class SignalWindow(TrainerCallback):
    """The windows of what is logged begin with training, so what was measured before is dropped, and end with it."""

    def __init__(self, metrics: SignalMetrics, speed: SpeedMeter):
        self.metrics, self.speed = metrics, speed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.metrics.reset()
        self.speed.reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class LongWarmUp(TrainerCallback):
    """Says where the learning rate is still rising when the run ends; of one step it may be 0."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = args.get_warmup_steps(state.max_steps)
        if state.is_world_process_zero and steps >= state.max_steps and args.lr_scheduler_type not in WITHOUT_WARMUP:
            logger.warning(
                "the warm-up takes %d steps and the run %d: the learning rate does not reach %g; set a smaller "
                "warmup_steps (--warmup)",
                steps,
                state.max_steps,
                args.learning_rate,
            )


class EpochOrder(TrainerCallback):
    """Each epoch has an order of its own, also behind the wrappers that accelerate puts around a sampler.

    Args:
        sampler: gives the sampler that trains, or None.
    """

    def __init__(self, sampler: Callable[[], Any]):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.sampler()
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))


class BestCheckpoint(TrainerCallback):
    """Where a run goes on in a folder that was moved, the best checkpoint is there too; transformers would drop it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.best_global_step:
            return
        here = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        state.best_model_checkpoint = agreed(state.best_model_checkpoint or (str(here) if here.is_dir() else None))
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            raise FileNotFoundError(
                f"SDPOTrainer: load_best_model_at_end: the best checkpoint, {here.name}, is not there any more; "
                "without that setting a run that goes on ends with the last model"
            )


class WrittenCheckpoint(TrainerCallback):
    """A checkpoint that is written while training goes on is whole after the first step at which all have written it.

    Args:
        finish: `CheckpointTrainer.finish_checkpoint`.
    """

    def __init__(self, finish: Callable[..., None]):
        self.finish = finish

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish(wait=False)


class StopOnSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    Used around training (``with stop: trainer.train()``) it gives the signals back however that ends.

    Attributes:
        received: the signal's number once training stopped for it, else None.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print("stopping after this step, with a checkpoint ...", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        received = self.received or 0
        if args.world_size > 1:
            # All processes stop after the same step, whichever of them was told.
            told = torch.tensor(received, device=args.device)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
            received = int(told)
        if received:
            self.received = received
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.__exit__()

    def __enter__(self) -> StopOnSignal:
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
