"""Rollouts: prompts -> the model's answers -> the user's follow-ups -> interactions to train on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastsdpo.data import Interaction, InteractionTokenizer, TokenizedInteraction
from fastsdpo.data.interactions import is_blank
from fastsdpo.data.output import atomic_file
from fastsdpo.online.sampling import Sample
from fastsdpo.online.users import UserSimulator, ask

INTERACTIONS_FILE = "interactions.jsonl"
ANSWERS_FILE = "eval_answers.jsonl"

Messages = list[dict]


@dataclass(frozen=True)
class SampledInteraction(TokenizedInteraction):
    """A tokenized interaction with the numbers from its sampling that some losses need.

    Attributes:
        old_logps: log-probability at sampling time of each completion token, in nats; None: the current model's.
        advantages: teacher's minus student's log-probability of each completion token, in nats; None: computed
            from the current model.
    """

    old_logps: tuple[float, ...] | None = None
    advantages: tuple[float, ...] | None = None


class Answers(NamedTuple):
    """What was asked, and what the model and the user said; one entry per answer."""

    prompts: list[Messages]
    samples: list[Sample]
    texts: list[str]
    followups: list[str | None]


class Rollout(NamedTuple):
    """The result of `roll_out`.

    Attributes:
        micro_batches: the interactions that have a follow-up, by micro-batch.
        rows: every answer, as a row like those of `fastsdpo prepare`.
        answers: the same answers with their samples.
    """

    micro_batches: list[list[SampledInteraction]]
    rows: list[dict]
    answers: Answers


def roll_out(
    micro_batches: Sequence[Sequence[tuple[int, Messages]]],
    *,
    sample: Callable[[list[list[int]]], list[Sample]],
    tokenize: InteractionTokenizer,
    user: UserSimulator,
    answers_per_prompt: int,
    number: int,
    step: int,
) -> Rollout:
    """Answers the prompts, asks the user about each answer, and tokenizes the interactions with a follow-up.

    Args:
        micro_batches: lists of ``(index in the dataset, messages)``.
        sample: takes prompts as token ids, and returns one answer for each.
        tokenize: turns an interaction into token ids.
        user: who reacts to the answers.
        answers_per_prompt: how many answers each prompt gets.
        number: the rollout's number, which becomes part of the interactions' ids.
        step: the number of optimizer steps so far, which the rows record.
    """
    asked = [
        (micro, index, messages)
        for micro, prompts in enumerate(micro_batches)
        for index, messages in prompts
        for _ in range(answers_per_prompt)
    ]
    prompts = [messages for _, _, messages in asked]
    starts = [tokenize.generation_prompt(messages) for messages in prompts]
    samples = sample(starts)
    texts = [tokenize.said(one.ids, start) for one, start in zip(samples, starts)]
    followups = ask(user, prompts, texts)
    found: list[list[SampledInteraction]] = [[] for _ in micro_batches]
    rows: list[dict] = []
    for (micro, index, messages), one, text, followup in zip(asked, samples, texts, followups):
        row = {
            "prompt": messages,
            "completion": {"role": "assistant", "content": text},
            "user_response": {"role": "user", "content": followup or ""},
            "id": f"{number}-{index}-{len(rows)}",
            "conversation_id": f"{number}-{index}",
            "step": step,
        }
        rows.append(row)
        if followup is None or is_blank(followup):
            continue
        # The tokens that were sampled, not those of their text.
        item = tokenize(Interaction(messages, "", followup, row["id"], row["conversation_id"]), one.ids)
        logps = None if one.logps is None else tuple(one.logps.tolist())
        found[micro].append(SampledInteraction(**vars(item), old_logps=logps))
    return Rollout(found, rows, Answers(prompts, samples, texts, followups))


def read_rows(path: str | os.PathLike, last_step: int) -> list[str]:
    """Returns the lines of a file of rows up to a step. A line that a killed run has cut off is left out."""
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= last_step:
                kept.append(line)
    return kept


class RowFiles:
    """Writes files of rows to the output folder. If ``enabled`` is off, it writes nothing."""

    def __init__(self, folder: str | os.PathLike, *, enabled: bool):
        self.folder, self.enabled = folder, enabled

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.enabled:
            os.makedirs(self.folder, exist_ok=True)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            with open(os.path.join(self.folder, name), "a", encoding="utf-8") as file:
                file.write(text)

    def keep(self, name: str, last_step: int) -> None:
        """Removes the rows of all steps after `last_step` from a file."""
        path = os.path.join(self.folder, name)
        if not self.enabled or not os.path.exists(path):
            return
        kept = read_rows(path, last_step)
        with atomic_file(Path(path)) as file:
            file.write("".join(kept).encode())
