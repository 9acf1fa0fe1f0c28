"""How a chat is shown: in colour at a terminal, as it is written; else as plain lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from fastsdpo.online.terminal import is_terminal, shortened
from fastsdpo.signal import SignalResult, color_depth, render_answer, render_legend
from fastsdpo.signal.terminal import terminal_theme
from fastsdpo.signal.tokens import visible
from fastsdpo.signal.words import verdict

Drawn = TypeVar("Drawn")
Show = Callable[[str], None]
Draw = Callable[[Show | None], tuple[str, Drawn]]


class PlainScreen:
    """Answers on standard output, all else on standard error, each when it is whole.

    Args:
        quiet: the answers and complaints only.
    """

    def __init__(self, quiet: bool):
        self.quiet = quiet

    def say(self, text: str) -> None:
        """What is no answer and no error."""
        if not self.quiet:
            print(f"[{text}]", file=sys.stderr, flush=True)

    def complain(self, text: str) -> None:
        """An error of the person's."""
        print(f"[{text}]", file=sys.stderr, flush=True)

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Names and what belongs to them."""
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"  {name:{width}}  {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Shows that there is something to wait for."""
        yield

    def answer(self, draw: Draw[Drawn]) -> tuple[str, Drawn]:
        """Draws an answer and shows it, if it says anything.

        Args:
            draw: gives the answer and what belongs to it; it calls its argument while the answer grows.
        """
        reply, drawn = draw(None)
        if reply:
            print(reply if self.quiet else f"model > {reply}", flush=True)
        return reply, drawn

    def compare(self, before: str, draw: Draw[Drawn]) -> tuple[str, Drawn]:
        """Draws the answer to the same messages after an update and shows both."""
        self.say(f"before > {before}")
        after, drawn = draw(None)
        self.say(f"after  > {after}")
        return after, drawn

    def signal(self, result: SignalResult, followup: str) -> None:
        """The answer tinted by a follow-up, with a legend and a verdict in words."""
        if not self.quiet:
            shown = render_answer(result, result.real, colors=0)
            print(f"{shown}\n[{verdict(result)}]\n[{render_legend(colors=0)}]", file=sys.stderr, flush=True)


class TerminalScreen(PlainScreen):
    """All on the terminal, answers as they grow."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.theme import Theme

        super().__init__(quiet=False)
        self.colors, self.theme = color_depth(sys.stdout), terminal_theme()
        self.explained = False  # the legend is shown once
        # Words of the model's and the person's are no markup, and not coloured for what they look like.
        self.console = Console(
            markup=False, highlight=False, emoji=False, theme=Theme({"model": "bold blue", "status.spinner": "blue"})
        )

    def say(self, text: str) -> None:
        self.console.print(visible(text, marks=False), style="bright_black")

    def complain(self, text: str) -> None:
        self.console.print(visible(text, marks=False), style="yellow")

    def table(self, rows: list[tuple[str, str]]) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, text in rows:
            table.add_row(visible(name, marks=False), visible(text, marks=False))
        self.console.print(table, style="bright_black")

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        with self.console.status(what):
            yield

    def answer(self, draw: Draw[Drawn]) -> tuple[str, Drawn]:
        return self._stream("model > ", draw)

    def compare(self, before: str, draw: Draw[Drawn]) -> tuple[str, Drawn]:
        self.console.print("before > ", style="bold", end="")
        self.console.out(visible(before, marks=False))
        return self._stream("after  > ", draw)

    def signal(self, result: SignalResult, followup: str) -> None:
        self.console.print(f"what {shortened(followup)!r} changes in the answer", style="bold")
        print(render_answer(result, result.real, colors=self.colors, theme=self.theme))
        if not self.explained:
            scale, _, words = render_legend(colors=self.colors, theme=self.theme).partition("\n")
            print(scale, flush=True)
            self.say(words)
            self.explained = True
        self.say(verdict(result))

    def _stream(self, label: str, draw: Draw[Drawn]) -> tuple[str, Drawn]:
        """Writes what is added to the text at each call; a spinner turns until there is any."""
        written = ""
        status = self.console.status("writing (Ctrl-C cancels)")

        def show(text: str) -> None:
            nonlocal written
            text = visible(text.rstrip("\ufffd"), marks=False)  # a character may take several tokens
            if text == written or not text.startswith(written):
                return
            if not written:
                status.stop()
                self.console.print(label, style="model", end="")
            self.console.file.write(text[len(written) :])
            self.console.file.flush()
            written = text

        try:
            with status:
                reply, drawn = draw(show)
            show(reply)
            whole = visible(reply, marks=False)
            if written != whole:  # what was streamed turned out to be no part of what is said
                self.console.file.write(f"\n{label}{whole}")
        finally:
            if written:
                self.console.file.write("\n")
                self.console.file.flush()
        return reply, drawn


def make_screen(quiet: bool) -> PlainScreen:
    """The screen for where this process runs.

    Raises:
        ModuleNotFoundError: rich is missing at a terminal.
    """
    return TerminalScreen() if is_terminal() and not quiet else PlainScreen(quiet)
