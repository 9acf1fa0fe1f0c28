"""`fastsdpo chat`, in order: the model, the conversation, message by message."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Mapping
from typing import Any

from fastsdpo.commands.options import read_config
from fastsdpo.commands.run import keep_options, load
from fastsdpo.commands.running import DONE, STOPPED
from fastsdpo.commands.screen import PlainScreen, make_screen
from fastsdpo.commands.talk import COMMANDS, ENDS, Talk
from fastsdpo.online.chat import ChatLearner
from fastsdpo.online.config import OnlineSDPOConfig
from fastsdpo.online.terminal import MessageReader, interrupt, is_terminal, unechoed
from fastsdpo.ops.backend import describe_backend

HISTORY_FILE = "history.txt"


def chat(options: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Reads messages from the standard input until it ends.

    Args:
        settings: those of a chat, which the options may change.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = read_config(options, OnlineSDPOConfig, **settings, save_total_limit=options.keep)

    with unechoed():
        return talk_with(options, config)


def talk_with(options: argparse.Namespace, config: OnlineSDPOConfig) -> int:
    """Loads the model and goes on with the folder's conversation; returns the exit status."""
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


def converse(talk: Talk, reader: MessageReader, screen: PlainScreen, options: argparse.Namespace) -> int:
    """Reads and answers until the input ends; returns the exit status."""
    while True:
        try:
            text = reader.read("you > " if is_terminal() and not options.quiet else "")
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
