"""Reads what a person types at the terminal, message by message."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

PASTE_SECONDS = 0.1  # the lines of a paste follow each other faster


def is_terminal() -> bool:
    """Whether standard input and output are both a terminal, so that a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def shortened(text: str, length: int = 40) -> str:
    """The text on one line, cut at so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


class MessageReader:
    """Reads a person's messages, one at a time.

    At a terminal, prompt_toolkit (https://python-prompt-toolkit.readthedocs.io) edits the message. Enter
    sends it, Alt-Enter begins a new line, and the arrow keys bring back earlier messages. A paste of
    several lines is one message and waits for Enter, as do lines that were typed ahead. Elsewhere each line
    of standard input is a message.

    Args:
        history: a file that keeps the messages for the arrow keys; None: they last as long as the reader.
        commands: words that begin with ``/``, and what each does; they are completed.
        status: gives the text of the line below the message.

    Raises:
        ModuleNotFoundError: prompt_toolkit is missing at a terminal.
    """

    def __init__(
        self,
        *,
        history: str | None = None,
        commands: Mapping[str, str] | None = None,
        status: Callable[[], str] | None = None,
    ):
        self.session = _make_session(history, commands or {}, status) if is_terminal() else None

    def read(self, question: str = "") -> str | None:
        """Reads one message; its lines are joined by ``"\\n"``. Returns None at the end of the input (Ctrl-D).

        Args:
            question: shown before the input.

        Raises:
            KeyboardInterrupt: on Ctrl-C. At a terminal the first Ctrl-C only drops what was typed.
        """
        try:
            if self.session is None:
                return input(question)
            return self.session.prompt([("class:question", question)])
        except EOFError:
            return None


def _make_session(history: str | None, commands: Mapping[str, str], status: Callable[[], str] | None) -> Any:
    """A `PromptSession` of prompt_toolkit, which draws the message and keeps the history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.styles import Style

    style = {"question": "bold ansigreen", "bottom-toolbar": "noreverse ansibrightblack"}
    return PromptSession(
        multiline=True,
        key_bindings=_make_keys(),
        history=InMemoryHistory() if history is None else FileHistory(history),
        completer=WordCompleter(list(commands), meta_dict=commands, sentence=True),
        bottom_toolbar=None if status is None else lambda: [("class:bottom-toolbar", status())],
        prompt_continuation=lambda width, *_: " " * width,
        reserve_space_for_menu=4,
        style=Style.from_dict(style),
    )


def _make_keys() -> Any:
    """Enter sends, Alt-Enter begins a line, Ctrl-C drops what is typed."""
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    keys = KeyBindings()
    last = -PASTE_SECONDS

    @keys.add("enter")
    def enter(event: Any) -> None:
        """Sends what a person typed; more keys than that are a paste that the terminal did not mark as one."""
        nonlocal last
        now, queue = time.monotonic(), event.key_processor.input_queue
        if any(press.key != Keys.CPRResponse for press in queue) or now - last < PASTE_SECONDS:
            last = now
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    typed = Condition(lambda: bool(get_app().current_buffer.text))

    @keys.add("c-c", filter=typed)
    @keys.add("<sigint>", filter=typed)
    def drop(event: Any) -> None:
        event.current_buffer.reset()

    return keys


@contextlib.contextmanager
def interrupt(handler: object) -> Iterator[None]:
    """Handles Ctrl-C by `handler` within the block; does nothing outside the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        # None: a handler that Python does not know, and cannot put back.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


@contextlib.contextmanager
def unechoed() -> Iterator[None]:
    """Hides keys typed within the block, so that they do not mix with the output; the next question gets them.

    Does nothing where standard input is no terminal, and on Windows.
    """
    try:
        import termios
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Makes Ctrl-C wait for the end of the block, so that the block runs whole.

    Raises:
        KeyboardInterrupt: after the block, if Ctrl-C was pressed in it.
    """
    received = []
    with interrupt(lambda *_: received.append(True)):
        yield
    if received:
        raise KeyboardInterrupt
