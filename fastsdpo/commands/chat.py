"""Talk to a model that learns from your reactions when you say so: `fastsdpo chat`.

    fastsdpo chat --model MODEL -o chats/mine

You write, the model answers. It learns from a message when you say that it should: it then takes one
optimizer step towards what it would have answered had it known your message, and saves a checkpoint. By
default a new LoRA adapter is trained (--lora 0: all weights, and checkpoints of their size); where
--model is the folder of an adapter, that one.

    /teach TEXT    TEXT is your reaction to the last answer: the model learns from it and answers it
    /undo          takes back the last update, and the conversation since then
    /help          all commands

Each update shows what your reaction changes in the answer, and the same message answered before and
after. At a terminal Enter sends, Alt-Enter begins a new line, the arrow keys bring back earlier
messages, and a paste is one message. Ctrl-C cancels the answer, or drops what is typed; Ctrl-D ends the
chat. Where standard input is no terminal, each line of it is a message.

Started again with the same folder the chat goes on: the folder holds ``checkpoint-*/`` (--keep of them: so
far /undo goes back), ``conversation.json``, ``history.txt`` (what was typed), ``run.yaml`` (the options, for
--config) and ``interactions.jsonl``, what was learned from, which `fastsdpo train` can read. docs/chat.md has an
example.

Exit status: 0 done; 1 an input, model or setting cannot be used; 2 wrong options; 3 a loss or gradient
was not finite; 130 ended by Ctrl-C where input is no terminal, with every update saved.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import fields
from typing import Any

from fastsdpo.commands.options import (
    DONE,
    STOPPED,
    add_field_options,
    add_model_options,
    add_setting_options,
    read_config,
    run_command,
)
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.run import keep_options, load
from fastsdpo.commands.screen import PlainScreen, make_screen
from fastsdpo.commands.talk import COMMANDS, ENDS, LEARN, Talk
from fastsdpo.online.chat import ChatLearner
from fastsdpo.online.config import PRESETS, OnlineSDPOConfig
from fastsdpo.online.terminal import MessageReader, interrupt
from fastsdpo.ops.backend import describe_backend
from fastsdpo.trainer.config import SDPOConfig

HISTORY_FILE = "history.txt"
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


# Fields of the online configuration that a chat reads, and what their values are called.
CHAT_FIELDS = {"max_new_tokens": "TOKENS", "sampling_temperature": "T"}


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
    add_field_options(run, OnlineSDPOConfig, CHAT_FIELDS, CHAT)
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
    check_set(options)
    config = read_config(options, OnlineSDPOConfig, **CHAT, save_total_limit=options.keep)

    screen = make_screen(options.quiet)
    history = os.path.join(options.output, HISTORY_FILE)
    reader = MessageReader(history=history, commands=COMMANDS, status=lambda: talk.status_line())
    screen.say(describe_backend(config.device.type, config.dtype))
    with screen.busy("loading the model"):
        model, tokenizer, adapter = load(options, config, lora=16)
        learner = ChatLearner(model, config, tokenizer, adapter)
        keep_options(options, learner.trainer)
    if learner.updates:
        screen.say(f"goes on after update {learner.updates}")
    talk = Talk(learner, options, screen)
    screen.say(f"{talk.learns_from()}; /help")
    with interrupt(signal.default_int_handler):  # whatever a library has put in its place
        return converse(talk, reader, screen, options)


def check_set(options: argparse.Namespace) -> None:
    """Raises ValueError where --set names a setting that a chat does not read."""
    own = {item.name for item in fields(OnlineSDPOConfig)} - {item.name for item in fields(SDPOConfig)}
    unread = {*WITHOUT, *(own - CHAT_FIELDS.keys()), "token_cache", "tokenizer_workers", "report_to", "measure_tokens"}
    for text in options.set:
        name = text.partition("=")[0]
        if name == "save_total_limit":
            raise ValueError("--set save_total_limit: a chat has --keep")
        if name in unread or name.startswith(("eval_", "save_", "logging_", "dataloader_")):
            raise ValueError(f"--set {name}: a chat does not read it")


def converse(talk: Talk, reader: MessageReader, screen: PlainScreen, options: argparse.Namespace) -> int:
    """Reads and answers until the input ends; returns the exit status."""
    while True:
        try:
            text = reader.read("" if options.quiet else "you > ")
        except KeyboardInterrupt:
            if reader.session is not None:
                screen.say("Ctrl-D or /quit ends the chat")
                continue
            screen.say(f"stopped; {talk.learner.updates} updates are saved in {options.output}")
            return STOPPED + signal.SIGINT
        if text is None or text.strip() in ENDS:
            return DONE
        try:
            talk.take(text)
        except KeyboardInterrupt:
            pass  # it waited until the command was done
        except ValueError as error:
            screen.complain(str(error))


# One interaction a step, and no end to the steps: a teacher that cannot drift with the student, and answers
# that are read by a person, so drawn as the model's makers do.
CHAT: dict[str, Any] = {
    "teacher": "frozen",
    "learning_rate": 1e-4,
    "sampling_temperature": None,
}


if __name__ == "__main__":
    sys.exit(main())
