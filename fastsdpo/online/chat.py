"""Talk to a model that learns from your follow-ups: `fastsdpo chat`.

    fastsdpo chat --model MODEL -o chats/mine

Each message that you write after an answer is the follow-up to it: the model takes one optimizer step
towards what it would have answered had it known your message, saves a checkpoint, and answers on. By
default a new LoRA adapter is trained (--lora 0: all weights, and checkpoints of their size); where
--model is the folder of an adapter, that one.

    /undo          takes back the last update
    /new           a new conversation: the next message is no follow-up
    /learn off|on  whether follow-ups are learned from
    /save FOLDER   writes the model (the adapter, with LoRA) and its tokenizer
    /help, /quit   (or Ctrl-D)

Started again with the same folder it goes on from the last checkpoint. The folder holds
``checkpoint-*/`` (--keep of them: so far /undo goes back) and ``interactions.jsonl``, what was learned
from, which `fastsdpo train` can read.

Exit status: 0 done; 1 an input, model or setting cannot be used; 2 wrong options; 3 a loss or gradient
was not finite.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsdpo.data import Interaction, TokenizedInteraction
from fastsdpo.online.config import PRESETS, OnlineSDPOConfig
from fastsdpo.online.sampling import generate
from fastsdpo.train import (
    add_model_options,
    add_setting_options,
    load,
    read_config,
    run_command,
)
from fastsdpo.trainer.trainer import SDPOTrainer

LOG_FILE = "interactions.jsonl"


class Learner:
    """A model, and one optimizer step per interaction that can be taken back.

    Args:
        model, tokenizer, peft_config: as `SDPOTrainer`.
        config: its ``output_dir`` holds the checkpoints; ``save_total_limit`` of them are kept.
    """

    def __init__(
        self, model: Any, config: OnlineSDPOConfig, tokenizer: Any, peft_config: Any = None
    ):
        self.trainer = SDPOTrainer(
            model, config, processing_class=tokenizer, peft_config=peft_config
        )
        self.config, self.tokenizer = config, tokenizer
        assert self.trainer._tokenizer_for_check is not None
        self.tokenize = self.trainer._tokenizer_for_check
        ends = [self.tokenize.end_of_turn_id, tokenizer.eos_token_id]
        self.end_ids = list(dict.fromkeys(token for token in ends if token is not None))
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1_000_000)
        self.answers = 0
        last = self.checkpoints()[-1:]
        if last:
            self._load(last[0])
        else:
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
        """An answer to messages that end with the user's, and its tokens."""
        prompt = self.tokenize(Interaction(messages, "", "-")).prompt_ids
        self.answers += 1
        (sample,) = generate(
            self.model, [prompt], max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.sampling_temperature, end_ids=self.end_ids,
            seed=f"{self.config.seed}/{self.updates}/{self.answers}",
        )  # fmt: skip
        text = self.tokenizer.decode(sample.ids, skip_special_tokens=True).strip()
        return text, TokenizedInteraction(prompt, prompt, sample.ids)

    def learn(self, messages: list[dict], answer: TokenizedInteraction, followup: str) -> dict:
        """One step on the answer's own tokens, and a checkpoint; its figures.

        Raises:
            NonFiniteError: loss or gradient are not finite; the model is as before.
        """
        trainer = self.trainer
        read = self.tokenize(Interaction(messages, "", followup, f"update {self.updates + 1}"))
        item = dataclasses.replace(read, completion_ids=answer.completion_ids)
        trainer.model.train()
        loss, statistics = trainer.run_pass(trainer.model, [item], trainer._count([item]))
        loss.backward()
        trainer._step = [([item], statistics.sequence_loss)]
        try:
            trainer.check_finite()
            parameters = [p for p in trainer.model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
            optimizer: Any = trainer.optimizer
            optimizer.step()
        finally:
            trainer.model.zero_grad()
        if trainer._ema is not None:
            trainer._ema.update(self.config.ema_rate)
        trainer.state.global_step += 1
        self._save()
        ratio: Tensor = statistics.log_ratio.float()
        return {"loss": float(loss.detach()), "signal": float(ratio.abs().mean())}

    def undo(self) -> int:
        """Takes the last update back; returns the number of updates that are left.

        Raises:
            ValueError: there is none, or its checkpoint is not kept any more.
        """
        kept = self.checkpoints()
        if self.updates == 0:
            raise ValueError("there is no update to take back")
        if self.updates - 1 not in kept:
            raise ValueError(
                f"the checkpoint before update {self.updates} is not kept any more (--keep)"
            )
        undone = self.updates
        self._load(undone - 1)
        shutil.rmtree(self._folder(undone))
        return self.updates

    def _folder(self, update: int) -> str:
        return os.path.join(self.config.output_dir, f"checkpoint-{update}")

    def _save(self) -> None:
        """A whole checkpoint or none: it is written beside and then renamed; old ones go."""
        trainer, place = self.trainer, self._folder(self.updates)
        part = f"{place}.part"
        shutil.rmtree(part, ignore_errors=True)
        trainer.save_model(part)
        trainer._save_optimizer_and_scheduler(part)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
        for old in self.checkpoints()[: -(self.config.save_total_limit or 1)]:
            shutil.rmtree(self._folder(old))

    def _load(self, update: int) -> None:
        place = self._folder(update)
        self.trainer._load_from_checkpoint(place)
        self.trainer._load_optimizer_and_scheduler(place)
        self.trainer.state.global_step = update


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsdpo chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("chat")
    run.add_argument("-o", "--output", required=True, metavar="FOLDER")
    run.add_argument("--system", default=None, metavar="TEXT", help="the system prompt")
    run.add_argument("--keep", type=int, default=10, metavar="CHECKPOINTS",
                     help="how many are kept; /undo goes back one fewer")  # fmt: skip
    run.add_argument("--max-new-tokens", type=int, help="of an answer")
    run.add_argument("--sampling-temperature", type=float)
    run.add_argument("--quiet", action="store_true", default=False, help="the answers only")
    add_model_options(parser)
    add_setting_options(parser, PRESETS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    return run_command("chat", chat, build_parser().parse_args(argv))


def chat(options: argparse.Namespace) -> int:
    """Reads messages from the standard input until it ends."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if options.keep < 2:
        raise ValueError(f"--keep must be at least 2, got {options.keep}")
    config = read_config(options, OnlineSDPOConfig, **CHAT, save_total_limit=options.keep)
    model, tokenizer, adapter = load(options, config, lora=16)
    learner = Learner(model, config, tokenizer, adapter)
    start = [{"role": "system", "content": options.system}] if options.system else []

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr, flush=True)

    if learner.updates:
        say(f"[goes on after update {learner.updates}]")
    say("[your messages after an answer are learned from; /help]")
    messages, answer, learning = list(start), None, True
    while True:
        text = _read("you > " if not options.quiet else "")
        if text is None or text == "/quit":
            return 0
        if not text:
            continue
        if text.startswith("/"):
            command, _, rest = text.partition(" ")
            if command == "/undo":
                try:
                    left = learner.undo()
                except ValueError as error:
                    say(f"[{error}]")
                else:
                    _forget(config.output_dir, left)
                    say(f"[update {left + 1} is taken back]")
            elif command == "/new":
                messages, answer = list(start), None
                say("[a new conversation]")
            elif command == "/learn" and rest in ("on", "off"):
                learning = rest == "on"
                say(f"[learning is {rest}]")
            elif command == "/save" and rest:
                learner.trainer.save_model(rest)
                say(f"[saved in {rest}]")
            else:
                say(str(__doc__).split("\n\n")[3])
            continue
        if answer is not None and learning:
            history = messages[:-1]
            figures = learner.learn(history, answer, text)
            _log(config.output_dir, learner.updates, history, messages[-1]["content"], text)
            say(f"[update {learner.updates}: loss {figures['loss']:.3f}, signal "
                f"{figures['signal']:.3f} nats per token]")  # fmt: skip
        messages.append({"role": "user", "content": text})
        reply, answer = learner.answer(messages)
        messages.append({"role": "assistant", "content": reply})
        print(f"model > {reply}" if not options.quiet else reply, flush=True)


# One interaction a step, and no end to the steps: a teacher that cannot drift with the student, the wording
# that small models follow best, and answers that are read by a person.
CHAT: dict[str, Any] = {
    "template": "note",
    "teacher": "frozen",
    "learning_rate": 1e-4,
    "sampling_temperature": 0.7,
}


def _read(question: str) -> str | None:
    try:
        return input(question).strip()
    except EOFError:
        return None


def _log(folder: str, update: int, prompt: list[dict], completion: str, followup: str) -> None:
    row = {
        "prompt": prompt,
        "completion": {"role": "assistant", "content": completion},
        "user_response": {"role": "user", "content": followup},
        "id": f"update-{update}",
        "update": update,
    }
    with open(os.path.join(folder, LOG_FILE), "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _forget(folder: str, update: int) -> None:
    """Drops what was learned after an update from the log."""
    path = os.path.join(folder, LOG_FILE)
    with open(path, encoding="utf-8") as file:
        kept = [line for line in file if json.loads(line)["update"] <= update]
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(f"{path}.part", path)


if __name__ == "__main__":
    sys.exit(main())
