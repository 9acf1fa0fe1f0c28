"""What a person types at the terminal, message by message."""

from __future__ import annotations

import contextlib
import select
import signal
import sys
import threading
from collections.abc import Iterator

PASTE_SECONDS = 0.1  # the lines of a paste follow each other faster


def read_message(question: str = "") -> str | None:
    """One message from standard input, its lines joined by ``"\\n"``; None at the end of the input.

    On a terminal a paste of several lines is one message: readline keeps it together until Enter is
    pressed, and where there is no such readline, the lines that are already waiting belong to it. Input
    that is no terminal has one message per line.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # from here on input() has line editing and a history

            if "libedit" not in (readline.__doc__ or ""):
                readline.parse_and_bind("set enable-bracketed-paste on")
    lines: list[str] = []
    with contextlib.suppress(EOFError):
        lines.append(input(question))
        while terminal and _waiting():
            lines.append(input())
    return "\n".join(lines) if lines else None


def _waiting() -> bool:
    """Whether standard input holds another line already."""
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
    except (OSError, ValueError):  # a console of Windows, or no file
        return False


@contextlib.contextmanager
def interrupt(handler: object) -> Iterator[None]:
    """Another handler of Ctrl-C within the block; none outside the main thread, which has no signals."""
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
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, so that what is in it happens whole.

    Raises:
        KeyboardInterrupt: after the block, if there was one.
    """
    received = []
    with interrupt(lambda *_: received.append(True)):
        yield
    if received:
        raise KeyboardInterrupt
