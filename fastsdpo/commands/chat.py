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
import sys
from typing import Any

from fastsdpo.commands.options import add_model_options, add_setting_options, choose_device, read_text
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.paths import check_folder, check_template
from fastsdpo.commands.running import run_command
from fastsdpo.online.presets import PRESETS
from fastsdpo.settings import OnlineSDPOSettings, SDPOSettings

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


# The only settings of the online configuration that a chat reads.
CHAT_FIELDS = ("max_new_tokens", "sampling_temperature")
OWN = OnlineSDPOSettings.__dataclass_fields__.keys() - SDPOSettings.__dataclass_fields__.keys()
UNREAD = ("token_cache", "tokenizer_workers", "report_to", "allow_leaks", "group_by_conversation", "non_finite")
LEARN = ("told", "always")


def build_parser() -> Parser:
    parser = Parser("chat", __doc__, settings=OnlineSDPOSettings.__dataclass_fields__)
    run = parser.add_argument_group("chat")
    run.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FOLDER",
        help="The folder for checkpoints and for what was learned from.",
    )
    parser.add_config_option(run)
    run.add_argument("--system", metavar="TEXT", help="The system prompt. @FILE reads it from a file.")
    run.add_argument(
        "--learn",
        choices=LEARN,
        default="told",
        help="told: the model learns from the messages that /teach names. always: from every message after an answer.",
    )
    run.add_argument(
        "--keep",
        type=int,
        default=10,
        metavar="CHECKPOINTS",
        help="How many checkpoints are kept. /undo goes back one fewer.",
    )
    run.add_argument("--quiet", action="store_true", help="Print the answers only.")
    add_model_options(parser, lora=16)
    without = {*WITHOUT, *OWN.difference(CHAT_FIELDS)}
    add_setting_options(parser, PRESETS, OnlineSDPOSettings, changed=CHAT, without=without)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    return run_command(parser, start, parser.parse_args(argv))


def start(options: argparse.Namespace) -> int:
    """What needs no torch is checked first: it takes seconds to import."""
    if options.keep < 2:
        raise ValueError(f"--keep must be at least 2, got {options.keep}")
    check_set(options)
    check_folder(options.output, allowed=True)
    if options.system is not None:
        options.system = read_text(options.system)
    check_template(options)
    choose_device(options)
    from fastsdpo.commands.chat_run import chat

    return chat(options, CHAT)


def check_set(options: argparse.Namespace) -> None:
    """Raises ValueError where --set names a setting that a chat does not read."""
    unread = {*WITHOUT, *OWN.difference(CHAT_FIELDS), *UNREAD}
    for text in options.set:
        name = text.partition("=")[0]
        if name == "save_total_limit":
            raise ValueError("--set save_total_limit: a chat has --keep")
        if name in unread or name.startswith(("eval_", "save_", "logging_", "dataloader_", "measure_")):
            raise ValueError(f"--set {name}: a chat does not read it")


# One interaction a step, and no end to the steps: a teacher that cannot drift with the student, and answers
# that are read by a person, so drawn as the model's makers do.
CHAT: dict[str, Any] = {"teacher": "frozen", "learning_rate": 1e-4, "sampling_temperature": None}


if __name__ == "__main__":
    sys.exit(main())
