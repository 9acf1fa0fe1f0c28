"""Measures of held-out interactions that ignoring the user does not improve (docs/objectives.md).

Of the model as it is, with and without the follow-up in context; mean per token, in nats, in eval mode, without
gradient, at temperature 1. The teacher's own weights are no part of them: they ask what the model itself does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.data import TokenizedInteraction
from fastsdpo.ops.linear_token_logps import linear_token_logps
from fastsdpo.prefix import ResponseStates, head_parameters, no_grad_pass, shared_forward, training_mode
from fastsdpo.trainer.measures_sample import Contexts, MeasuredInteraction, make_contexts
from fastsdpo.trainer.processes import gather_list

# The measures, and what a report calls them. Each is a mean over interactions.
NAMES = {
    "real_abs": "mean |A|, real follow-up",
    "unrelated_abs": "mean |A|, unrelated follow-up",
    "answer_logp": "log p(y|x), the logged answer",
    "margin": "margin log p(y'|x) - log p(y|x), next answer",
    "stranger_margin": "  the same, a stranger's, as long",
    "stranger_length_margin": "  the same, a stranger's, other length",
    "headroom": "what o adds to that margin, next answer",
    "stranger_headroom": "  the same, a stranger's, as long",
}


class Score(NamedTuple):
    """Log-probabilities of an answer, mean per token, and of their difference the mean absolute value."""

    student: float
    teacher: float
    ratio_abs: float


def measures_of(scores: dict[str, Score]) -> dict[str, float]:
    """Of `NAMES` those that the scores of one interaction give; ``scores``: by the names of `Contexts`."""
    real = scores["real"]
    row = {"real_abs": real.ratio_abs, "unrelated_abs": scores["unrelated"].ratio_abs, "answer_logp": real.student}
    for name, prefix in (("next", ""), ("stranger", "stranger_"), ("stranger_length", "stranger_length_")):
        if name in scores:
            score = scores[name]
            row[f"{prefix}margin"] = score.student - real.student
            row[f"{prefix}headroom"] = (score.teacher - real.teacher) - (score.student - real.student)
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the interactions that have the measure, and the share whose headroom is above 0."""
    means = {}
    for name in NAMES:
        values = [row[name] for row in rows if name in row]
        if values:
            means[f"measures/{name}"] = sum(values) / len(values)
    for name in ("headroom", "stranger_headroom"):
        values = [row[name] > 0 for row in rows if name in row]
        if values:
            means[f"measures/{name}_share"] = sum(values) / len(values)
    means["measures/interactions"] = float(len(rows))
    means["measures/next_answers"] = float(sum("margin" in row for row in rows))
    return means


class Scorer:
    """The model of a trainer, with and without follow-ups.

    Args:
        trainer: a `StepTrainer`; its sharing, packs, autocast and wrapper are used.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def __call__(self, items: Sequence[TokenizedInteraction]) -> list[Score]:
        """Scores of answers in order; where the weights are sharded, all processes call it, each with its items."""
        trainer = self.trainer
        model = trainer.model_wrapped if trainer.sharded else trainer.model
        packs = [pack for chunk in self._chunks(items) for pack in trainer.learner.packs(chunk)]
        idle = 0
        if trainer.sharded:  # each pass gathers weights: all processes make as many
            counted: Any = trainer.accelerator.gather(torch.tensor([len(packs)], device=trainer.args.device))
            idle = int(counted.max()) - len(packs)
        scores: dict[int, Score] = {}
        with training_mode(trainer.model, False), no_grad_pass(), trainer.compute_loss_context_manager():
            for pack in packs:
                for item, score in zip(pack, self._pass(model, pack)):
                    scores[id(item)] = score
            for _ in range(idle):
                self._pass(model, [items[0] if items else trainer.idle_interaction()])
        return [scores[id(item)] for item in items]

    def _chunks(self, items: Sequence[TokenizedInteraction]) -> Iterator[list[TokenizedInteraction]]:
        size = self.trainer.args.eval_batch_size
        for start in range(0, len(items), size):
            yield list(items[start : start + size])

    def _pass(self, model: Any, pack: Sequence[TokenizedInteraction]) -> list[Score]:
        trainer = self.trainer

        def logps(states: ResponseStates) -> Tensor:
            head = head_parameters(model)  # inside the head's forward pass, where FSDP has gathered it
            both = [
                linear_token_logps(
                    hidden,
                    target_ids=states.target_ids,
                    **head._asdict(),
                    chunk_size=trainer.args.chunk_size,
                    backend=trainer.args.backend,
                )
                for hidden in (states.student_hidden, states.teacher_hidden)
            ]
            return torch.stack(both)  # type: ignore[arg-type]

        sharing, attention = trainer.learner.sharing.of(pack), trainer.args.attention
        found = shared_forward(model, pack, sharing=sharing, attention=attention, loss_fn=logps)
        sizes = [len(item.completion_ids) for item in pack]
        return [
            Score(float(part[0].mean()), float(part[1].mean()), float((part[1] - part[0]).abs().mean()))
            for part in found.to("cpu", torch.float64).split(sizes, dim=1)
        ]


class HeldOutMeasures:
    """The measures of a sample, whenever they are asked for.

    Args:
        sample: from `sample_measured`.
    """

    def __init__(self, trainer: Any, sample: Sequence[MeasuredInteraction]):
        self.score = Scorer(trainer)
        self.contexts: list[Contexts] = make_contexts(sample, trainer.tokenize)

    @property
    def names(self) -> list[str]:
        """Of what `summary` gives."""
        score = Score(0.0, 0.0, 0.0)
        return list(summary([measures_of({name: score for name, _ in context.items()}) for context in self.contexts]))

    def __call__(self) -> list[dict[str, Any]]:
        """One row per interaction, in all processes: ``id`` and those of `NAMES` that there are."""
        args = self.score.trainer.args
        numbered = list(enumerate(self.contexts))[args.process_index :: args.world_size]
        items = [(number, context.id, name, item) for number, context in numbered for name, item in context.items()]
        scores: dict[int, dict[str, Score]] = {}
        for (number, _, name, _), score in zip(items, self.score([item for *_, item in items])):
            scores.setdefault(number, {})[name] = score
        rows = [(number, {"id": self.contexts[number].id, **measures_of(found)}) for number, found in scores.items()]
        return [row for _, row in sorted(gather_list(rows), key=lambda pair: pair[0])]
