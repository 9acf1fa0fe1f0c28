"""`ChatLearner`: a model that learns from one interaction at a time, and can take it back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsdpo.data import Interaction, InteractionTokenizer, TokenizedInteraction
from fastsdpo.online.config import OnlineSDPOConfig
from fastsdpo.online.sampling import generate
from fastsdpo.trainer.report import write_report
from fastsdpo.trainer.template_date import keep_date
from fastsdpo.trainer.trainer import SDPOTrainer

LOG_FILE = "interactions.jsonl"
CONVERSATION_FILE = "conversation.json"


@dataclass
class ChatState:
    """What was said, and what is needed to learn from it later.

    Attributes:
        messages: in the order of the talk.
        tokens: of each answer, by its place in `messages`.
        seeds: of each answer's draw, by its place.
        learned: the update that a reaction led to, by its place.
        draws: answers drawn when this was written, in other conversations too.
        key: tells this conversation from others of the same chat.
    """

    messages: list[dict] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    seeds: dict[int, str] = field(default_factory=dict)
    learned: dict[int, int] = field(default_factory=dict)
    draws: int = 0
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def cut(self, place: int) -> None:
        """Forgets the message at a place and all after it."""
        del self.messages[place:]
        for by_place in (self.tokens, self.seeds, self.learned):
            for later in [known for known in by_place if known >= place]:
                del by_place[later]

    def to_dict(self) -> dict[str, Any]:
        """A copy that JSON can hold."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> ChatState:
        """Raises ValueError where the file is damaged."""
        try:
            kept = json.loads(Path(path).read_text("utf-8"))
            for name in ("tokens", "seeds", "learned"):
                kept[name] = {int(place): value for place, value in kept[name].items()}
            return cls(**kept)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} holds no conversation ({error}); without that file a new one begins") from error


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

    def answer(
        self, messages: list[dict], seed: str | None = None, show: Callable[[str], None] | None = None
    ) -> tuple[str, TokenizedInteraction]:
        """What is said in answer to messages that end with the user's, and all the tokens of it.

        Args:
            seed: of the draw: with the same weights the same answer. None: a new one.
            show: called while the answer grows, with all that it says so far.
        """
        prompt = self.tokenize.generation_prompt(messages)
        (sample,) = generate(
            self.model,
            [prompt],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.sampling_temperature,
            end_ids=self.end_ids,
            seed=seed or self.new_seed(),
            streamer=None if show is None else _Streamer(self.tokenize, prompt, show),
        )
        return self.tokenize.said(sample.ids, prompt), TokenizedInteraction(prompt, prompt, sample.ids)

    def new_seed(self) -> str:
        """A seed for `answer` that no answer had before, as ``answers`` counts them."""
        self.answers += 1
        return f"{self.config.seed}/{self.updates}/{self.answers}"

    def learn(
        self, messages: list[dict], completion_ids: Sequence[int], followup: str, before: ChatState | None = None
    ) -> dict[str, float]:
        """One step on the answer's own tokens, and a checkpoint.

        Args:
            messages: the prompt that was answered.
            completion_ids: the answer's tokens.
            followup: the reaction to it.
            before: the conversation that `conversation_before` gives back, to undo the update.

        Returns:
            ``loss``, and ``signal``: the mean absolute log-ratio of the tokens that count, in nats.

        Raises:
            NonFiniteError: loss or gradient are not finite; the model is as before.
        """
        item = self.tokenize(Interaction(messages, "", followup, f"update {self.updates + 1}"), completion_ids)
        figures = self.trainer.update([item])
        self._save(before)
        return {"loss": figures["loss"], "signal": figures.get("sdpo/log_ratio_abs_mean", 0.0)}

    def conversation_before(self, update: int) -> ChatState | None:
        """The conversation as it was before an update, where it was given to `learn`."""
        path = Path(self._folder(update), CONVERSATION_FILE)
        return ChatState.from_file(path) if path.exists() else None

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

    def _save(self, before: ChatState | None = None) -> None:
        """A whole checkpoint or none: it is written beside and then renamed; old ones go."""
        place = self._folder(self.updates)
        part = f"{place}.part"
        shutil.rmtree(part, ignore_errors=True)
        self.trainer.save_state_to(part)
        if before is not None:
            write_report(Path(part, CONVERSATION_FILE), before.to_dict())
        shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
        for old in self.checkpoints()[: -(self.config.save_total_limit or 1)]:
            shutil.rmtree(self._folder(old))

    def _load(self, update: int) -> None:
        self.trainer.load_state_from(self._folder(update))
        self.trainer.state.global_step = update
        # The checkpoint has the learning rate that it was written with; this chat may have another.
        scheduler: Any = self.trainer.lr_scheduler
        for index, group in enumerate(scheduler.optimizer.param_groups):
            group["lr"] *= self.config.learning_rate / scheduler.base_lrs[index]
            group["initial_lr"] = scheduler.base_lrs[index] = self.config.learning_rate


class _Streamer:
    """Gets the tokens of an answer from `transformers` as they are drawn; the prompt comes first."""

    def __init__(self, tokenize: InteractionTokenizer, prompt: list[int], show: Callable[[str], None]):
        self.tokenize, self.prompt, self.show = tokenize, prompt, show
        self.ids: list[int] = []
        self.begun = False

    def put(self, tokens: Tensor) -> None:
        if not self.begun:
            self.begun = True
            return
        self.ids += tokens.flatten().tolist()
        self.show(self.tokenize.said(self.ids, self.prompt))

    def end(self) -> None:
        """The answer is drawn; `answer` returns it."""


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
