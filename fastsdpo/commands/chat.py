"""Talk to a model that learns from your reactions when you say so: `fastsdpo chat`.

    fastsdpo chat --model MODEL -o chats/mine

You write, the model answers. It learns from a message when you say that it should: it then takes one
optimizer step towards what it would have answered had it known your message, and saves a checkpoint. By
default a new LoRA adapter is trained (--lora 0: all weights, and checkpoints of their size); where
--model is the folder of an adapter, that one.

    /teach TEXT    TEXT is your reaction to the last answer: the model learns from it and answers it
    /teach         your last message was a reaction to the answer before it: the model learns from it
    /undo          takes back the last update
    /new           a new conversation
    /learn always  from now on every message after an answer is learned from; /learn told: as at first
    /save FOLDER   writes the model (the adapter, with LoRA) and its tokenizer
    /help, /quit   (or Ctrl-D)

A paste of several lines is one message. Ctrl-C while the model answers cancels the answer. Started again
with the same folder it goes on from the last checkpoint. The folder holds ``checkpoint-*/`` (--keep of
them: so far /undo goes back) and ``interactions.jsonl``, what was learned from, which `fastsdpo train`
can read.

Exit status: 0 done; 1 an input, model or setting cannot be used; 2 wrong options; 3 a loss or gradient
was not finite; 130 ended by Ctrl-C, with every update saved.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from fastsdpo.commands.options import (
    STOPPED,
    add_field_options,
    add_model_options,
    add_setting_options,
    read_config,
    run_command,
)
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.run import load
from fastsdpo.data import TokenizedInteraction
from fastsdpo.data.interactions import is_blank
from fastsdpo.online.chat import ChatLearner, forget_updates, log_update
from fastsdpo.online.config import PRESETS, OnlineSDPOConfig
from fastsdpo.online.terminal import interrupt, read_message, uninterrupted
from fastsdpo.ops.backend import describe_backend

LEARN = ("told", "always")
# Settings that a chat does not read: its steps have one interaction each, and no end.
WITHOUT = (
    "data",
    "logs",
    "teacher_check",
    "normalization",
    "global_batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
)


def build_parser() -> Parser:
    parser = Parser(
        "chat",
        __doc__,
        settings=OnlineSDPOConfig.__dataclass_fields__,
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("chat")
    run.add_argument("-o", "--output", required=True, metavar="FOLDER", help="checkpoints and what was learned from")
    parser.add_config_option(run)
    run.add_argument("--system", default=None, metavar="TEXT", help="the system prompt")
    run.add_argument(
        "--learn",
        choices=LEARN,
        default="told",
        help="from the messages that /teach names (default), or from every message that follows an answer",
    )
    run.add_argument(
        "--keep", type=int, default=10, metavar="CHECKPOINTS", help="how many are kept; /undo goes back one fewer"
    )
    add_field_options(run, OnlineSDPOConfig, {"max_new_tokens": "TOKENS", "sampling_temperature": "T"}, CHAT)
    run.add_argument("--quiet", action="store_true", default=False, help="the answers only")
    add_model_options(parser, lora=16)
    add_setting_options(parser, PRESETS, OnlineSDPOConfig, changed=CHAT, without=WITHOUT)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    return run_command(parser, chat, parser.parse_args(argv))


def chat(options: argparse.Namespace) -> int:
    """Reads messages from the standard input until it ends."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if options.keep < 2:
        raise ValueError(f"--keep must be at least 2, got {options.keep}")
    config = read_config(options, OnlineSDPOConfig, **CHAT, save_total_limit=options.keep)

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr, flush=True)

    say(f"[{describe_backend(config.device.type, config.dtype)}]")
    model, tokenizer, adapter = load(options, config, lora=16)
    learner = ChatLearner(model, config, tokenizer, adapter)
    if learner.updates:
        say(f"[goes on after update {learner.updates}]")
    talk = Talk(learner, options, say)
    say(f"[{talk.learns_from()}; /help]")
    with interrupt(signal.default_int_handler):  # whatever a library has put in its place
        while True:
            try:
                text = read_message("you > " if not options.quiet else "")
            except KeyboardInterrupt:
                say(f"\n[stopped; {learner.updates} updates are saved in {options.output}]")
                return STOPPED + signal.SIGINT
            if text is None or text.strip() in ("/quit", "/exit"):
                return 0
            try:
                talk.take(text)
            except KeyboardInterrupt:
                pass  # it waited until the command was done
            except ValueError as error:
                print(f"[{error}]", file=sys.stderr, flush=True)


class Talk:
    """What is typed, answered and learned from.

    Args:
        options: of the command: ``system``, ``learn``, ``quiet``, ``output``.
        say: shows what is no answer.
    """

    def __init__(self, learner: ChatLearner, options: argparse.Namespace, say: Callable[[str], None]):
        self.learner, self.options, self.say = learner, options, say
        self.always = options.learn == "always"
        self.start()

    def start(self) -> None:
        """A new conversation; the model keeps what it has learned."""
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []
        # By the place of the message: an answer's tokens, and the update that a reaction led to.
        self.answers: dict[int, TokenizedInteraction] = {}
        self.learned: dict[int, int] = {}

    def learns_from(self) -> str:
        if self.always:
            return "the model learns from every message after an answer; /learn told ends that"
        return "the model learns only when told: /teach TEXT, your reaction to its last answer"

    def take(self, text: str) -> None:
        """A message or a command; nothing for what nobody would see.

        Raises:
            ValueError: there is no such command, or it cannot be done; nothing has changed.
        """
        if is_blank(text):
            return
        if not text.startswith("/"):
            self.write(text.strip(), learn=self.always and bool(self.answers))
            return
        command, rest = [*text.split(maxsplit=1), ""][:2]
        rest = rest.strip()
        if command == "/teach":
            if not rest:
                self.teach(len(self.messages) - 2)
            elif is_blank(rest):
                raise ValueError("/teach: nobody can see anything in that text")
            else:
                self.write(rest, learn=True)
        elif command == "/learn" and rest in LEARN:
            self.always = rest == "always"
            self.say(f"[{self.learns_from()}]")
        elif command == "/save" and rest and "\n" not in rest:
            with uninterrupted():
                self.save(rest)
        elif rest or command not in ("/undo", "/new", "/help"):
            raise ValueError(
                f"there is no command {text.splitlines()[0].strip()!r} (/help lists them), and nothing "
                "was sent; a space before the / makes it a message"
            )
        elif command == "/undo":
            with uninterrupted():
                self.undo()
        elif command == "/new":
            self.start()
            self.say("[a new conversation]")
        else:
            print(str(__doc__).split("\n\n")[3], file=sys.stderr, flush=True)

    def write(self, text: str, *, learn: bool = False) -> None:
        """Answers a message of the user's; with ``learn`` the model learns from it first."""
        place = len(self.messages)
        try:
            if learn:
                self.teach(place, text)
            self.messages.append({"role": "user", "content": text})
            reply, answer = self.learner.answer(self.messages)
        except BaseException as error:
            del self.messages[place:]
            self.learned.pop(place, None)
            if not isinstance(error, KeyboardInterrupt):
                raise
            self.say("\n[cancelled; your message is left out of the conversation]")
            return
        if not reply and len(answer.completion_ids) >= self.learner.config.max_new_tokens:
            del self.messages[place:]
            self.learned.pop(place, None)
            self.say(
                "[cut while it was still reasoning; raise --max-new-tokens. Your message is left out of "
                "the conversation]"
            )
            return
        self.messages.append({"role": "assistant", "content": reply})
        self.answers[place + 1] = answer
        print(f"model > {reply}" if not self.options.quiet else reply, flush=True)

    def teach(self, place: int, text: str | None = None) -> None:
        """One update from the message at a place, the reaction to the answer before it.

        Args:
            text: the message, where it is not there yet.

        Raises:
            ValueError: there is no answer before it, or it was learned from already.
        """
        if place - 1 not in self.answers:
            raise ValueError("/teach: there is no answer that this would be a reaction to")
        if place in self.learned:
            raise ValueError(f"/teach: your last message was learned from in update {self.learned[place]}")
        followup = self.messages[place]["content"] if text is None else text
        history, answer = self.messages[: place - 1], self.messages[place - 1]["content"]
        with uninterrupted():
            figures = self.learner.learn(history, self.answers[place - 1], followup)
            update = self.learned[place] = self.learner.updates
            log_update(self.options.output, update, history, answer, followup)
            self.say(
                f"[update {update}: learned from {_short(followup)} as your reaction to {_short(answer)}; /undo "
                f"takes it back. Loss {figures['loss']:.3f}, signal {figures['signal']:.3f} nats per token]"
            )

    def undo(self) -> None:
        left = self.learner.undo()
        forget_updates(self.options.output, left)
        self.learned = {place: update for place, update in self.learned.items() if update <= left}
        self.say(f"[update {left + 1} is taken back]")

    def save(self, folder: str) -> None:
        try:
            self.learner.trainer.save_model(folder)
        except OSError as error:
            raise ValueError(f"/save: {error}") from error
        self.say(f"[saved in {folder}]")


def _short(text: str, length: int = 40) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= length else line[: length - 3] + "...")


# One interaction a step, and no end to the steps: a teacher that cannot drift with the student, and answers
# that are read by a person, so drawn as the model's makers do.
CHAT: dict[str, Any] = {
    "teacher": "frozen",
    "learning_rate": 1e-4,
    "sampling_temperature": None,
}


if __name__ == "__main__":
    sys.exit(main())
