"""Metrics of the sampled answers, averaged over all processes, and a callback that watches for degeneration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastsdpo.data.interactions import is_blank
from fastsdpo.online.config import OnlineSDPOConfig
from fastsdpo.online.content import content
from fastsdpo.online.degeneration import CollapseDetector, degenerate
from fastsdpo.online.rollout import Answers
from fastsdpo.trainer.loss import TokenStatistics
from fastsdpo.trainer.processes import gather_list

logger = logging.getLogger("fastsdpo.online")


class AnswerFigures:
    """Collects metrics of answers, and averages them over all processes."""

    NAMES = (
        "response_length",
        "response_words",
        "ended",
        "degenerate",
        "followups",
        "satisfaction",
        "entropy",
        "keyword_recall",
        "new_keywords",
        "nothing_new",
        "refusals",
    )

    def __init__(self):
        self.values = {name: [0.0, 0.0] for name in self.NAMES}

    @classmethod
    def held_out(cls, *, satisfaction: bool) -> list[str]:
        """The names of what is known of held-out answers, to which nobody reacts."""
        unknown = ("followups", "entropy", *(() if satisfaction else ("satisfaction",)))
        return [name for name in cls.NAMES if name not in unknown]

    def add(self, name: str, values: Sequence[Any]) -> None:
        self.values[name][0] += float(sum(values))
        self.values[name][1] += len(values)

    def add_answers(self, answers: Answers, end_ids: Sequence[int]) -> None:
        """Adds each answer's length in tokens, whether its turn was ended, and whether its text is degenerate."""
        self.add("response_length", [len(sample.ids) for sample in answers.samples])
        self.add("ended", [sample.ids[-1] in end_ids for sample in answers.samples])
        self.add("degenerate", [degenerate(text) is not None for text in answers.texts])

    def add_content(self, prompts: Sequence[Sequence[dict]], texts: Sequence[str]) -> None:
        """Adds what each answer says of its question, see `fastsdpo.online.content.Content`."""
        found = [content(prompt[-1]["content"], text) for prompt, text in zip(prompts, texts)]
        self.add("keyword_recall", [one.recall for one in found if one.recall is not None])
        self.add("new_keywords", [one.new for one in found])
        self.add("nothing_new", [one.empty for one in found])
        self.add("refusals", [one.refuses for one in found])

    def add_followups(self, followups: Sequence[str | None]) -> None:
        self.add("followups", [text is not None and not is_blank(text) for text in followups])

    def flush(self, reduce_sum: Callable[[Tensor], Tensor], prefix: str) -> dict[str, float]:
        table = torch.tensor(list(self.values.values()), dtype=torch.float64)
        totals = reduce_sum(table).tolist()
        self.values = {name: [0.0, 0.0] for name in self.NAMES}
        return {f"{prefix}{name}": total / count for name, (total, count) in zip(self.NAMES, totals) if count}


class CollapseWatch(TrainerCallback):
    """Warns after a step if the model degenerates, once for each kind, and stops training if the settings say so.

    Attributes:
        detector: the `CollapseDetector` with the last answers; it is saved in checkpoints.
        stopped: why training was stopped, or None.
    """

    def __init__(self, args: OnlineSDPOConfig, figures: AnswerFigures):
        self.figures = figures
        self.detector = CollapseDetector(
            window=args.degenerate_window,
            min_entropy_share=args.min_entropy_share,
            max_share=args.stop_when_degenerate,
        )
        self.stopped: str | None = None
        self._entropies: list[tuple[int, Tensor]] = []
        self._warned: str | None = None

    def add_texts(self, texts: list[str]) -> None:
        self.detector.add(gather_list(texts))

    def add_pass(self, interactions: int, statistics: TokenStatistics) -> None:
        """Adds an estimate of the entropy per token from one forward pass.

        For a token drawn from p, -log p is an unbiased estimate of p's entropy.
        """
        counts = statistics.counts
        total = -(statistics.student_logps * counts).sum() / counts.sum().clamp(min=1)
        self._entropies.append((interactions, total.detach()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values = gather_list([float(value) for count, value in self._entropies for _ in range(count)])
        self._entropies = []
        self.figures.add("entropy", values)
        self.detector.add_entropies(values)
        problem = self.detector.problem()
        if problem is None:
            return
        kind = problem.split(" of ")[-1]
        if kind != self._warned and state.is_world_process_zero:
            logger.warning("step %d: the model is degenerating: %s", state.global_step, problem)
        self._warned = kind
        if args.stop_when_degenerate is not None:
            logger.error("stopping with a checkpoint: %s", problem)
            self.stopped = problem
            control.should_save = True
            control.should_training_stop = True
