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
from fastsdpo.data.output import atomic_file
from fastsdpo.online.config import OnlineSDPOConfig
from fastsdpo.online.sampling import generate
from fastsdpo.trainer.report import write_report
from fastsdpo.trainer.template_date import keep_date
from fastsdpo.trainer.trainer import SDPOTrainer

LOG_FILE = "interactions.jsonl"
CONVERSATION_FILE = "conversation.json"


@dataclass
class ChatState:
    """One conversation: its messages, and what is needed to learn from them later.

    Attributes:
        messages: ``{"role", "content"}`` dicts, in the order of the conversation.
        tokens: the token ids of each answer, by the answer's index in `messages`.
        seeds: the seed with which each answer was drawn, by the answer's index.
        learned: the number of the update that a reaction led to, by the reaction's index.
        draws: how many answers the chat had drawn when this was written, other conversations included.
        key: identifies this conversation among those of the same chat.
    """

    messages: list[dict] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    seeds: dict[int, str] = field(default_factory=dict)
    learned: dict[int, int] = field(default_factory=dict)
    draws: int = 0
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def cut(self, place: int) -> None:
        """Removes the message with the index `place` and all after it, with their tokens, seeds and updates."""
        del self.messages[place:]
        for by_place in (self.tokens, self.seeds, self.learned):
            for later in [known for known in by_place if known >= place]:
                del by_place[later]

    def to_dict(self) -> dict[str, Any]:
        """Returns a copy as plain dicts and lists, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> ChatState:
        """Reads a conversation from a JSON file of `to_dict`.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is damaged.
        """
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
        model, tokenizer, peft_config: as for `SDPOTrainer`.
        config: the settings. ``output_dir`` holds the checkpoints; the last ``save_total_limit`` are kept. If
            there are checkpoints already, the last one is loaded.

    Raises:
        ValueError: `tokenizer` is None.
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
        """How many updates the model has had, not counting those taken back."""
        return self.trainer.state.global_step

    def checkpoints(self) -> list[int]:
        """The numbers of the updates after which a checkpoint is kept, ascending."""
        folder = Path(self.config.output_dir)
        found = [path.name.split("-")[1] for path in folder.glob("checkpoint-*")]
        return sorted(int(number) for number in found if number.isdigit())

    def answer(
        self, messages: list[dict], seed: str | None = None, show: Callable[[str], None] | None = None
    ) -> tuple[str, TokenizedInteraction]:
        """Draws an answer to the messages.

        Args:
            messages: the conversation so far; the last message is the user's.
            seed: the same seed and weights give the same answer. None: a new seed.
            show: called while the answer grows, with its whole text so far.

        Returns:
            The answer's text without private reasoning, and the prompt and answer as token ids.
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
        """Returns a seed for `answer` that this learner has not used before; it counts up ``answers``."""
        self.answers += 1
        return f"{self.config.seed}/{self.updates}/{self.answers}"

    def learn(
        self, messages: list[dict], completion_ids: Sequence[int], followup: str, before: ChatState | None = None
    ) -> dict[str, float]:
        """Takes one optimizer step on the answer's tokens, and writes a checkpoint.

        Args:
            messages: the prompt that was answered.
            completion_ids: the answer's token ids.
            followup: the user's reaction to the answer.
            before: the conversation to restore when the update is undone; `conversation_before` returns it.

        Returns:
            ``loss``, and ``signal``: the mean absolute log-ratio of the trained tokens, in nats.

        Raises:
            NonFiniteError: the loss or the gradient is not finite. The model is then as before.
        """
        item = self.tokenize(Interaction(messages, "", followup, f"update {self.updates + 1}"), completion_ids)
        figures = self.trainer.update([item])
        self._save(before)
        return {"loss": figures["loss"], "signal": figures.get("sdpo/log_ratio_abs_mean", 0.0)}

    def conversation_before(self, update: int) -> ChatState | None:
        """The conversation as it was before the update with this number; None if `learn` was given none."""
        path = Path(self._folder(update), CONVERSATION_FILE)
        return ChatState.from_file(path) if path.exists() else None

    def undo(self) -> int:
        """Takes the last update back, and returns the number of updates that are left.

        Raises:
            ValueError: there is no update, or the checkpoint before it is not kept any more.
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
    """Appends the interaction of an update to the log in `folder`, as a row like those of `fastsdpo prepare`."""
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
    """Removes the rows of all updates after the given one from the log in `folder`."""
    path = os.path.join(folder, LOG_FILE)
    with open(path, encoding="utf-8") as file:
        kept = [line for line in file if json.loads(line)["update"] <= update]
    with atomic_file(Path(path)) as written:
        written.write("".join(kept).encode())
