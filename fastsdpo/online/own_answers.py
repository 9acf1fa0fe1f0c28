"""Samples the model's own answers to held-out questions: before training with and without the follow-up, and after.

The answers before training tell whether there is anything to learn (the headroom): does the model do what a
follow-up asks if the follow-up is in its context? No judge is asked. If there is no rule to check, the model's own
probabilities measure how well an answer y fits a follow-up o:

    c(y) = log p(y | x, o) - log p(y | x, o')        mean per token, o' a follow-up of another conversation

A positive value says that the model reacts to what o says, not that the user would be content.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastsdpo.data import TokenizedInteraction
from fastsdpo.online.rules import Rule
from fastsdpo.online.sampling import generate
from fastsdpo.online.terminal import shortened
from fastsdpo.online.winrate import wilson
from fastsdpo.trainer.measures import Scorer
from fastsdpo.trainer.measures_sample import Contexts, make_contexts
from fastsdpo.trainer.processes import gather_list
from fastsdpo.trainer.report import write_report

logger = logging.getLogger("fastsdpo.online")


class OwnAnswers(TrainerCallback):
    """Has the model answer the first held-out questions when training begins, and again when `after` is called.

    Decoding is greedy. Several processes share the questions. A resumed run reads the earlier answers from
    the file.

    Args:
        trainer: an `SDPOTrainer` whose held-out data came as text.
        path: the JSON file for the answers.
        rule: a check of the answers; None: no rule is known.

    Attributes:
        rows: one dict per question; None before training, or if there is nothing to answer.
    """

    def __init__(self, trainer: Any, path: Path, rule: Rule | None = None):
        self.trainer, self.path, self.rule = trainer, path, rule
        self.rows: list[dict[str, Any]] | None = None
        sample = getattr(trainer.eval_dataset, "measured", [])[: trainer.args.measure_answers]
        contexts = make_contexts(sample, trainer.tokenize) if sample else []
        if contexts and trainer.sharded:
            logger.warning("no own answers are measured: FSDP and DeepSpeed hold the weights in shards")
            contexts = []
        numbered = list(enumerate(contexts))[trainer.args.process_index :: trainer.args.world_size]
        self.numbers = [number for number, _ in numbered]
        self.mine: Sequence[Contexts] = [context for _, context in numbered]
        self.count = len(contexts)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.count:
            return
        if state.global_step > 0:
            self.rows = json.loads(self.path.read_text("utf-8")) if self.path.exists() else None
            return
        prompts = {
            "before": [c.real.prompt_ids for c in self.mine],
            "with_followup": [c.real.teacher_prompt_ids for c in self.mine],
            "with_unrelated": [c.unrelated.teacher_prompt_ids for c in self.mine],
        }
        answers = {name: self._answers(starts) for name, starts in prompts.items()}
        rows = [
            {
                "number": self.numbers[place],
                "id": c.id,
                "prompt": c.interaction.prompt[-1]["content"],
                "followup": c.interaction.followup,
                "unrelated": c.unrelated_followup,
                **{name: texts[place][1] for name, texts in answers.items()},
            }
            for place, c in enumerate(self.mine)
        ]
        for name, texts in answers.items():
            items = [
                TokenizedInteraction(c.unrelated.teacher_prompt_ids, c.real.teacher_prompt_ids, ids)
                for c, (ids, _) in zip(self.mine, texts)
            ]
            for row, score in zip(rows, Scorer(self.trainer)(items)):
                row[f"fit_{name}"] = score.teacher - score.student
        self.rows = sorted(gather_list(rows), key=lambda row: row["number"])
        self._write()

    def after(self) -> None:
        """Answers the same questions again."""
        if self.rows is None:
            return
        answers = self._answers([c.real.prompt_ids for c in self.mine])
        texts = dict(gather_list([(number, text) for number, (_, text) in zip(self.numbers, answers)]))
        for row in self.rows:
            row["after"] = texts[row["number"]]
        self._write()

    def _answers(self, starts: Sequence[list[int]]) -> list[tuple[list[int], str]]:
        """``(tokens, text)`` after each prompt."""
        if not starts:
            return []
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        samples = generate(
            model,
            starts,
            max_new_tokens=trainer.args.measure_tokens,
            temperature=0.0,
            end_ids=trainer.tokenize.end_ids(model),
        )
        return [(s.ids, trainer.tokenize.said(s.ids, start)) for s, start in zip(samples, starts)]

    def _write(self) -> None:
        if self.trainer.is_world_process_zero():
            write_report(self.path, self.rows)

    # ---------------------------------------------------------------------------------- in words

    def headroom(self) -> list[str]:
        """Returns lines for people: for how many questions the answer fits better with the follow-up in context."""
        if not self.rows:
            return []
        count = len(self.rows)
        gains = [row["fit_with_followup"] - row["fit_before"] for row in self.rows]
        other = [row["fit_with_unrelated"] - row["fit_before"] for row in self.rows]
        lines = [
            "headroom: with the follow-up in context the model's own answer fits it better in "
            f"{sum(g > 0 for g in gains)} of {count} held-out questions, by {sum(gains) / count:+.3f} nats per token; "
            f"with an unrelated one in {sum(g > 0 for g in other)}, by {sum(other) / count:+.3f} (by the model's own "
            "probabilities; there is no judge)"
        ]
        if self.rule is not None:
            lines.append(self._fulfilled(("before", "with_followup", "with_unrelated")))
        return lines

    def changes(self, shown: int = 3) -> list[str]:
        """Returns lines for people: how often the rule holds before and after, and the first answers side by side."""
        if not self.rows or "after" not in self.rows[0]:
            return []
        lines = []
        if self.rule is not None:
            lines.append(self._fulfilled(("before", "with_followup", "after")))
        for row in self.rows[:shown]:
            lines.append(f"  question        {shortened(row['prompt'], 96)}")
            for title in ("before", "with_followup", "after"):
                lines.append(f"    {title.replace('_', ' '):<13} {shortened(row[title], 96)}")
            lines.append(f"    {'follow-up':<13} {shortened(row['followup'], 96)}")
        return lines

    def _fulfilled(self, names: Sequence[str]) -> str:
        assert self.rule is not None and self.rows
        parts = []
        for name in names:
            share = sum(self.rule.holds(row[name]) for row in self.rows) / len(self.rows)
            low, high = wilson(share, len(self.rows))  # 0 of 8 is no certain 0%
            parts.append(f"{name.replace('_', ' ')} {share:.0%} ({low:.0%} to {high:.0%})")
        return f"rule {self.rule.name} (95% interval): {', '.join(parts)}"
