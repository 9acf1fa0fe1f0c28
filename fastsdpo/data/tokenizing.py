"""Tokenizes many interactions into columns, in this process or in several others.

The other processes are started by a command of their own, not forked from or spawned by this one: this process may
hold a GPU, and its script may lack the ``if __name__ == "__main__"`` that keeps an import from running it again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from fastsdpo.data.columns import Columns
from fastsdpo.data.interactions import Interaction
from fastsdpo.data.keys import TextKeys
from fastsdpo.data.tokenization import InteractionTokenizer, TokenizedInteraction

CHUNK = 256  # interactions
# It imports no torch, which takes longer to start than thousands of interactions take to tokenize.
PROGRAM = "from fastsdpo.data.tokenizing import serve; serve()"


class TokenChunk(NamedTuple):
    """The result of tokenizing some interactions.

    Attributes:
        columns: the tokens of those that can be tokenized.
        kept: the interactions of these as text; those that came as tokens are left out.
        dropped: the error messages of the others.
    """

    columns: Columns
    kept: list[Interaction]
    dropped: list[str]


class Tokenization(NamedTuple):
    """How interactions are tokenized: the arguments of `InteractionTokenizer`."""

    tokenizer: Any
    template: str
    options: dict[str, Any]

    def make(self) -> InteractionTokenizer:
        return InteractionTokenizer(self.tokenizer, self.template, **self.options)


def tokenize_chunks(
    items: Iterable[Interaction | TokenizedInteraction], how: Tokenization, workers: int = 1
) -> Iterator[TokenChunk]:
    """Tokenizes interactions in order; those that are tokens already are taken as they are.

    Args:
        items: interactions, or tokens.
        how: the arguments of the tokenizer.
        workers: how many processes tokenize; 1: this process does.

    Raises:
        RuntimeError: a worker ended before its work was done.
        Exception: what `items` raises, and `InteractionTokenizer` when it is made.
    """
    if workers > 1:
        yield from _by_workers(_chunks(items), how, workers)
        return
    tokenize = None
    for chunk in _chunks(items):
        if isinstance(chunk[0], TokenizedInteraction):
            yield _as_they_are(chunk)
        else:
            tokenize = tokenize or how.make()
            columns, places, dropped = _tokenized(tokenize, chunk)
            yield TokenChunk(columns, [chunk[place] for place in places], dropped)


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Up to `CHUNK` items in a row, all of them text, or all tokens."""
    for _, part in itertools.groupby(items, lambda item: isinstance(item, Interaction)):
        while chunk := list(itertools.islice(part, CHUNK)):
            yield chunk


def _as_they_are(chunk: list[Any]) -> TokenChunk:
    columns = Columns()
    for item in chunk:
        columns.add(item)
    return TokenChunk(columns, [], [])


def _tokenized(tokenize: InteractionTokenizer, chunk: list[Any]) -> tuple[Columns, list[int], list[str]]:
    """(columns of what can be tokenized, its places in the chunk, errors of the rest)"""
    columns, texts = Columns(), TextKeys()
    places: list[int] = []
    dropped: list[str] = []
    for place, result in enumerate(tokenize.stream(chunk)):
        if isinstance(result, ValueError):
            dropped.append(str(result))
        else:
            columns.add(result, chunk[place], texts)
            places.append(place)
    return columns, places, dropped


def _by_workers(chunks: Iterable[list[Any]], how: Tokenization, count: int) -> Iterator[TokenChunk]:
    how.make()  # what it raises is raised here
    workers = [_Worker(how) for _ in range(count)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(chunk: list[Any]) -> TokenChunk:
        if isinstance(chunk[0], TokenizedInteraction):
            return _as_they_are(chunk)
        worker = idle.get()
        try:
            columns, places, dropped = worker(chunk)
        finally:
            idle.put(worker)
        return TokenChunk(columns, [chunk[place] for place in places], dropped)

    pool = ThreadPoolExecutor(count)
    try:
        running: deque = deque()
        for chunk in chunks:
            running.append(pool.submit(run, chunk))
            if len(running) > 2 * count:  # what is read ahead is bounded
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for worker in workers:
            worker.process.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that tokenizes chunks, one at a time: pickles in, pickles out."""

    def __init__(self, how: Tokenization):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._first: list[Any] = [how]

    def __call__(self, chunk: list[Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            for value in (*self._first, chunk):
                pickle.dump(value, self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self._first = []
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            status = self.process.wait()
            raise RuntimeError(
                f"a process that tokenizes ended with status {status} before its work was done; its own words are "
                "above, if it had any. tokenizer_workers=1 does the work in this process"
            ) from error

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was written for it, and not read
                pipe.close()  # type: ignore[union-attr]
        self.process.wait()


def serve() -> None:
    """Runs a worker process: reads a `Tokenization`, then chunks of interactions, and writes each chunk's tokens."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a package prints must not come between
    try:
        tokenize = pickle.load(source).make()
        while True:
            pickle.dump(_tokenized(tokenize, pickle.load(source)), sink, pickle.HIGHEST_PROTOCOL)
            sink.flush()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
