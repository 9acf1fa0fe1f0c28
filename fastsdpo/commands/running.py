"""How a command runs: exit statuses, and errors in one sentence that names options."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsdpo.commands.parser import Parser

DONE, FAILED, DEGENERATE = 0, 1, 4
LOST = "stopped at once, without a checkpoint of the steps since the last"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a write, which does not name its file
STOPPED = 128  # + the signal's number, as shells count: 130 for Ctrl-C, 143 for SIGTERM

# Shown as one sentence; any other error is a fault of this package and shows its traceback.
USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError, ImportError)

# What the package's functions begin their errors with; a command's user has not called them.
FUNCTIONS = re.compile(
    r"\b(?:load_model_and_tokenizer|load_configuration|(?:Online)?SDPO(?:Config|Trainer)|prepare|HindsightTemplate|"
    r"InteractionDataset|ConversationFilter|ChatLearner|ChatEndpoint|RuleUser|EndpointUser|tokenize_interaction|"
    r"compute_signal|extract_interactions|ServerSampler): "
)
# Arguments of those functions that have another name than their option.
ARGUMENTS = {"name": "model", "train_dataset": "data", "eval_dataset": "eval_data", "config": "subset"}
EXTRAS = {"openai": "online", "langdetect": "online", "bitsandbytes": "quantize", "deepspeed": "deepspeed"}
EXTRAS |= {"if_verifiable": "ifeval", "nltk": "ifeval"}


class StandardError(logging.StreamHandler):
    """Writes to what is standard error at the time: a spinner that turns there makes way for the line."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """The base class sets what it was made with."""


def run_command(
    parser: Parser,
    run: Callable[[argparse.Namespace], int],
    options: argparse.Namespace,
    *,
    stopped: str = "stopped at once",
) -> int:
    """Runs a command and turns errors into one sentence on standard error and an exit status.

    Args:
        parser: of the command.
        run: the command; it returns its exit status.
        options: what was given; ``quiet`` silences all logs but errors.
        stopped: said after Ctrl-C.

    Returns:
        the status of ``run``; 1 (or the error's own ``exit_status``) after one of `USER_ERRORS`, which the
        environment variable FASTSDPO_TRACEBACK=1 lets through; 130 after Ctrl-C.
    """
    quiet = getattr(options, "quiet", False)
    logger = logging.getLogger("fastsdpo")
    level = logger.level
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    # Not on the root: what other packages show themselves would be shown twice.
    if not logger.hasHandlers():
        logger.addHandler(StandardError())
    # What peft asks of transformers is no news to the user.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        return run(options)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED + 13
    except Exception as error:
        if os.environ.get("FASTSDPO_TRACEBACK") or not is_users(error):
            raise
        status, said = getattr(error, "exit_status", FAILED), describe_error(error, parser)
    except KeyboardInterrupt:
        status, said = STOPPED + signal.SIGINT, stopped
    finally:
        logger.setLevel(level)
    print(f"fastsdpo {parser.command}: {said}", file=sys.stderr)
    return status


def is_users(error: Exception) -> bool:
    """Whether an error is about what the user gave or has, and no fault of this package."""
    torch: Any = sys.modules.get("torch")
    if (
        isinstance(error, USER_ERRORS)
        or hasattr(error, "exit_status")
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    ):
        return True
    trace = error.__traceback__  # the services of --report-to raise errors of their own
    while trace is not None:
        if "/transformers/integrations/" in Path(trace.tb_frame.f_code.co_filename).as_posix():
            return True
        trace = trace.tb_next
    return False


def describe_error(error: Exception, parser: Parser | None = None) -> str:
    """The error as a sentence that names options, not functions; for a missing package, how to install it."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.split(".")[0]
        extra = EXTRAS.get(package, "train")
        return f"needs the package {package!r}; install it with: pip install 'fastsdpo[{extra}]'"
    if isinstance(error, OSError) and error.strerror and (error.filename or error.errno in FULL):  # as Python words it
        flag = parser.flag_of("output") if parser is not None else None
        return f"{error.filename or flag or 'writing'}: {error.strerror.lower()}"
    said = str(error).replace("HindsightTemplate: name ", "template ")
    said = FUNCTIONS.sub("", said) or type(error).__name__
    return said if parser is None else name_flags(said, parser)


def name_flags(text: str, parser: Parser) -> str:
    """``alpha must be 1 with mode='full'`` -> ``--alpha must be 1 with --mode full``."""

    def flag_of(name: str) -> str | None:
        return parser.flag_of(ARGUMENTS.get(name, name))

    def subject(match: re.Match) -> str:
        return f"{flag_of(match[1]) or match[1]}{match[2]}"

    def argument(match: re.Match) -> str:
        flag = flag_of(match[1])
        if flag is None or match[3] in ("None", "False"):
            return match[0]
        if flag.startswith("--set "):
            return f"{flag}={match[3]}"
        return flag if match[3] == "True" else f"{flag} {match[3]}"

    text = re.sub(r"\b(\w+)=('?)([^\s,;:()'`]+)\2", argument, text)
    return re.sub(r"^(\w+)( must | needs |: )", subject, text)
