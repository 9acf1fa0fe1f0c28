"""`ChatLearner`: a model that learns from one interaction at a time, and can take it back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastsdpo.data import Interaction, TokenizedInteraction
from fastsdpo.online.config import OnlineSDPOConfig
from fastsdpo.online.sampling import generate
from fastsdpo.trainer.template_date import keep_date
from fastsdpo.trainer.trainer import SDPOTrainer

LOG_FILE = "interactions.jsonl"


class ChatLearner:
    """A model, and one optimizer step per interaction that can be taken back.

    Args:
        model, tokenizer, peft_config: as `SDPOTrainer`.
        config: its ``output_dir`` holds the checkpoints; ``save_total_limit`` of them are kept.
    """

    def __init__(self, model: Any, config: OnlineSDPOConfig, tokenizer: Any, peft_config: Any = None):
        self.trainer = SDPOTrainer(model, config, processing_class=tokenizer, peft_config=peft_config)
        self.config, self.tokenizer = config, tokenizer
        if self.trainer.tokenize is None:
            raise ValueError("ChatLearner: tokenizer must be a tokenizer, got None")
        self.tokenize = self.trainer.tokenize
        self.end_ids = self.tokenize.end_ids(self.model)
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1_000_000)
        self.answers = 0
        last = self.checkpoints()[-1:]
        if last:
            self._load(last[0])
        else:
            keep_date(config)
            self._save()

    @property
    def model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def updates(self) -> int:
        """How many updates the model has taken, less those taken back."""
        return self.trainer.state.global_step

    def checkpoints(self) -> list[int]:
        """The updates after which there is a checkpoint, ascending."""
        folder = Path(self.config.output_dir)
        found = [path.name.split("-")[1] for path in folder.glob("checkpoint-*")]
        return sorted(int(number) for number in found if number.isdigit())

    def answer(self, messages: list[dict]) -> tuple[str, TokenizedInteraction]:
        """What is said in answer to messages that end with the user's, and all the tokens of it."""
        prompt = self.tokenize.generation_prompt(messages)
        self.answers += 1
        (sample,) = generate(
            self.model,
            [prompt],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.sampling_temperature,
            end_ids=self.end_ids,
            seed=f"{self.config.seed}/{self.updates}/{self.answers}",
        )
        return self.tokenize.said(sample.ids, prompt), TokenizedInteraction(prompt, prompt, sample.ids)

    def learn(self, messages: list[dict], answer: TokenizedInteraction, followup: str) -> dict[str, float]:
        """One step on the answer's own tokens, and a checkpoint.

        Returns:
            ``loss``, and ``signal``: the mean absolute log-ratio of the tokens that count, in nats.

        Raises:
            NonFiniteError: loss or gradient are not finite; the model is as before.
        """
        item = self.tokenize(Interaction(messages, "", followup, f"update {self.updates + 1}"), answer.completion_ids)
        figures = self.trainer.update([item])
        self._save()
        return {"loss": figures["loss"], "signal": figures.get("sdpo/log_ratio_abs_mean", 0.0)}

    def undo(self) -> int:
        """Takes the last update back; returns the number of updates that are left.

        Raises:
            ValueError: there is none, or its checkpoint is not kept any more.
        """
        kept = self.checkpoints()
        if self.updates == 0:
            raise ValueError("there is no update to take back")
        if self.updates - 1 not in kept:
            raise ValueError(f"the checkpoint before update {self.updates} is not kept any more (--keep)")
        undone = self.updates
        self._load(undone - 1)
        shutil.rmtree(self._folder(undone))
        return self.updates

    def _folder(self, update: int) -> str:
        return os.path.join(self.config.output_dir, f"checkpoint-{update}")

    def _save(self) -> None:
        """A whole checkpoint or none: it is written beside and then renamed; old ones go."""
        place = self._folder(self.updates)
        part = f"{place}.part"
        shutil.rmtree(part, ignore_errors=True)
        self.trainer.save_state_to(part)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
        for old in self.checkpoints()[: -(self.config.save_total_limit or 1)]:
            shutil.rmtree(self._folder(old))

    def _load(self, update: int) -> None:
        self.trainer.load_state_from(self._folder(update))
        self.trainer.state.global_step = update


def log_update(folder: str, update: int, prompt: list[dict], completion: str, followup: str) -> None:
    """Appends what was learned from, as `fastsdpo prepare` writes interactions."""
    row = {
        "prompt": prompt,
        "completion": {"role": "assistant", "content": completion},
        "user_response": {"role": "user", "content": followup},
        "id": f"update-{update}",
        "update": update,
    }
    with open(os.path.join(folder, LOG_FILE), "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def forget_updates(folder: str, update: int) -> None:
    """Drops what was learned after an update from the log."""
    path = os.path.join(folder, LOG_FILE)
    with open(path, encoding="utf-8") as file:
        kept = [line for line in file if json.loads(line)["update"] <= update]
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(f"{path}.part", path)
