"""Interactions that are read while they are trained on: no pass over them before, and no memory that grows with them.

    source -> parts of a conversation -> shuffle buffer -> tokens -> the interactions of one optimizer step

The first process alone reads and tokenizes. It sends what a step takes to all of them, as accelerate's
``dispatch_batches`` does with tensors, and each finds its share by `GroupSampler`, as of data that lies there. So a
step has the same interactions for any number of processes, a source can be one that is read once (standard input),
and all processes end, or fail, at the same step.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from fastsdpo.data import Interaction, TokenizedInteraction, load_interactions
from fastsdpo.data.columns import Columns
from fastsdpo.data.loading import expand_source
from fastsdpo.data.token_cache import LARGE, size_of
from fastsdpo.data.tokenizing import Tokenization, tokenize_chunks
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import MESSAGES, SAMPLE_SIZE, InteractionDataset, Reading, is_path, most_workers
from fastsdpo.trainer.packs import GroupSampler
from fastsdpo.trainer.processes import first_alone

logger = logging.getLogger("fastsdpo.trainer")

STANDARD_INPUT = "-"
SHUFFLE_BUFFER = 1000  # interactions
KEPT_MESSAGES = 100  # about interactions that were left out

# Settings that are about data which lies there; their defaults, and how `SDPOConfig` says that one was given.
ONLY_WITHOUT = {
    "token_cache": ("auto", None),
    "dataloader_prefetch_factor": (None,),
    "dataloader_persistent_workers": (False,),
    "dataloader_multiprocessing_context": (None,),
}

Item = Interaction | TokenizedInteraction


@dataclass(frozen=True)
class Position:
    """How far a stream was trained on.

    Attributes:
        read: interactions in the order in which the shuffle buffer gives them.
        taken: after those, interactions that could be tokenized.
        left_out: of ``read``, those that could not.
        trained: how many were trained on.
    """

    read: int = 0
    taken: int = 0
    left_out: int = 0
    trained: int = 0


class InteractionStream:
    """What `SDPOTrainer` reads while it trains.

    Args:
        source: a path (or a list of them) that `load_interactions` reads, ``"-"`` for standard input, or an
            iterable of interactions as `InteractionDataset.from_source` takes them, such as a
            `datasets.IterableDataset`. It is gone through once.

    Attributes:
        sample: the first 64 interactions that came as text, for the teacher check.
        dropped: messages about the first hundred interactions that could not be used.
        left_out: how many could not.
        interactions: how many were trained on.
        idle: one of these, for processes that have none: its passes must be as many as the others' (FSDP gathers
            weights in each), so it is a real one, with all that a teacher reads.
        by_conversation: a conversation's interactions stay together; set by the trainer.
        start: where training begins; resumed: as a checkpoint says.
    """

    def __init__(self, source: Any):
        self.source = source
        self.sample: list[Interaction] = []
        self.dropped: list[str] = []
        self.left_out = self.interactions = 0
        self.idle = TokenizedInteraction([0], [0], [0])
        self.by_conversation = True
        self.start, self.resumed = Position(), False
        self.positions: dict[int, Position] = {}  # at the start of steps: of the last one, and of the next
        self._waiting: Iterator[Item] | None = None

    def open(self, reading: Reading, args: SDPOConfig) -> None:
        """Takes the trainer's settings, and reads the first interactions.

        Raises:
            TypeError, ValueError: a setting does not go with a stream, or an interaction is malformed; by index or
                file and line.
            OSError: the source cannot be read.
        """
        _check(args, reading.name)
        self.reading, self.args = reading, args
        self.seed = args.order_seed
        self.buffer = SHUFFLE_BUFFER if args.shuffle_buffer is None else args.shuffle_buffer

        def begin() -> tuple[list[Interaction], TokenizedInteraction]:
            items = self._items()
            head = list(itertools.islice(items, SAMPLE_SIZE))
            self._waiting = itertools.chain(head, items)
            how = Tokenization(reading.tokenizer, reading.template, reading.options)
            found = (InteractionDataset(chunk.columns) for item in head for chunk in tokenize_chunks([item], how, 1))
            idle = next((dataset[0] for dataset in found if len(dataset)), self.idle)
            return [item for item in head if isinstance(item, Interaction)], idle

        self.sample, self.idle = first_alone(begin, args.process_index == 0)

    def _items(self) -> Iterator[Item]:
        if self.source == STANDARD_INPUT:
            return self.reading.checked(load_interactions(Path("/dev/stdin")))
        return self.reading.checked(load_interactions(self.source) if is_path(self.source) else iter(self.source))

    def _workers(self) -> int:
        """How many processes tokenize: as for data that lies there, and many where its size is not known."""
        if self.args.tokenizer_workers is not None:
            return self.args.tokenizer_workers
        if not is_path(self.source):
            return 1
        files = [] if self.source == STANDARD_INPUT else expand_source(self.source)
        known = [file for file in files if isinstance(file, Path) and file.is_file()]
        return 1 if files and len(known) == len(files) and size_of(known) < LARGE else most_workers()

    def steps(self, size: int) -> Iterator[tuple[Columns, Position]]:
        """The interactions of each step, ``size`` of them but for the last, and the position behind them."""
        items, self._waiting = self._items() if self._waiting is None else self._waiting, None
        drawn = shuffled(items, self.buffer, self.by_conversation, self.seed)
        rest = itertools.islice(drawn, self.start.read, None)
        reading, step, at = self.reading, Columns(), self.start
        self.left_out = at.left_out
        how = Tokenization(reading.tokenizer, reading.template, reading.options)
        for chunk in tokenize_chunks(rest, how, self._workers()):
            self._note(chunk.dropped)
            while at.taken < len(chunk.columns):
                stop = min(len(chunk.columns), at.taken + size - len(step))
                step.extend(chunk.columns.part(at.taken, stop))
                at = replace(at, taken=stop, trained=at.trained + stop - at.taken)
                if len(step) == size:
                    yield step, at
                    step = Columns()
            used, left_out = len(chunk.columns), len(chunk.dropped)
            at = Position(at.read + used + left_out, at.taken - used, at.left_out + left_out, at.trained)
        if len(step):
            yield step, at

    def _note(self, dropped: list[str]) -> None:
        for message in dropped[: max(0, MESSAGES - self.left_out)]:
            logger.warning("%s: left out: %s", self.reading.name, message)
        self.left_out += len(dropped)
        self.dropped += dropped[: max(0, KEPT_MESSAGES - len(self.dropped))]

    # ------------------------------------------------------------------------------- checkpoints

    def _decides(self) -> dict[str, Any]:
        """What decides the order, by the names of settings."""
        grouped = self.by_conversation
        return {"data_seed": self.seed, "shuffle_buffer": self.buffer, "group_by_conversation": grouped}

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream is at the start of a step, as JSON."""
        return {**asdict(self.positions[step]), **self._decides()}

    def begin(self, state: dict[str, Any] | None) -> None:
        """Training begins where `state` was taken; None: at the beginning.

        Raises:
            ValueError: the order would be another one.
        """
        self.start, self.resumed = Position(), state is not None
        if state is not None:
            for name, value in self._decides().items():
                if state[name] != value:
                    raise ValueError(f"SDPOTrainer: {name} must be that of the checkpoint, {state[name]}, got {value}")
            self.start = Position(**{item.name: state[item.name] for item in fields(Position)})


def _check(args: SDPOConfig, name: str) -> None:
    if args.max_steps <= 0:
        raise ValueError(
            f"SDPOTrainer: {name} is a stream, whose length is not known, so max_steps must be given, "
            f"got {args.max_steps}"
        )
    for setting, usual in ONLY_WITHOUT.items():
        value = getattr(args, setting)
        if value not in usual:
            raise ValueError(f"SDPOTrainer: {setting} must not be given where {name} is a stream, got {value!r}")
    if args._workers_given:
        raise ValueError(
            f"SDPOTrainer: dataloader_num_workers must not be given where {name} is a stream: its workers are "
            "tokenizer_workers"
        )


def shuffled(items: Iterable[Item], buffer: int, by_conversation: bool, seed: int) -> Iterator[Item]:
    """The items in an order drawn from a buffer of so many; with 1 in their own.

    `datasets` shuffles row by row; here interactions of a conversation that follow each other are drawn together, for
    what they share to be computed once. The order is decided by the seed, the buffer and the items.
    """
    draw, numbers = random.Random(f"{seed}/stream"), itertools.count()

    def conversation(item: Item) -> Any:
        return next(numbers) if not by_conversation or item.conversation_id is None else item.conversation_id

    held: list[list[Item]] = []
    size = 0
    for _, group in itertools.groupby(items, conversation):
        while part := list(itertools.islice(group, buffer)):  # a conversation without end is not held whole
            while held and size + len(part) > buffer:
                drawn = _draw(held, draw)
                size -= len(drawn)
                yield from drawn
            held.append(part)
            size += len(part)
    while held:
        yield from _draw(held, draw)


def _draw(held: list[list[Item]], draw: random.Random) -> list[Item]:
    place = draw.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


class StepShare(NamedTuple):
    """How a step is shared out; the arguments of `GroupSampler`.

    Attributes:
        each: interactions that one process takes at once.
        processes: their number.
        accumulated: how often they take so many in one optimizer step.
        index: this process.
    """

    each: int
    processes: int
    accumulated: int
    index: int


class StreamSteps(IterableDataset):
    """The micro-batches of one process, of one optimizer step after another, equally many of each.

    All processes must take them together.

    Args:
        stream: opened.
        share: how a step is shared out.
        sharing: the level, for costs.
        begun: called when training begins: the optimizer steps that were taken before, and how many of them
            transformers will pass over; empty micro-batches are given for these.
        check: called with the interactions of each step, in all processes.
    """

    def __init__(
        self,
        stream: InteractionStream,
        share: StepShare,
        *,
        sharing: str,
        begun: Callable[[], tuple[int, int]],
        check: Callable[[InteractionDataset], None],
    ):
        self.stream, self.share, self.sharing = stream, share, sharing
        self.begun, self.check = begun, check

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream, share = self.stream, self.share
        number, skipped = self.begun()
        position = stream.start
        stream.positions, stream.interactions = {number: position}, position.trained
        for _ in range(skipped * share.accumulated):
            yield {"interactions": []}
        first = share.index == 0
        size = share.each * share.processes * share.accumulated
        steps = stream.steps(size) if first else None
        while found := first_alone(lambda: next(steps, None) if steps is not None else None, first):
            interactions, after = InteractionDataset(found[0]), found[1]
            self.check(interactions)
            stream.positions = {number: position, number + 1: after}
            stream.interactions = after.trained
            stream.idle = interactions[0]
            yield from self.micro_batches(interactions)
            number, position = number + 1, after
        if number == 0:
            raise ValueError(
                f"SDPOTrainer: {stream.reading.name} must hold an interaction, got none"
                + (f"; {stream.left_out} could not be tokenized: {stream.dropped[0]}" if stream.left_out else "")
            )

    def micro_batches(self, interactions: InteractionDataset) -> Iterator[dict[str, Any]]:
        """Those of this process in one step."""
        share = self.share
        order = list(
            GroupSampler(
                interactions.groups(self.stream.by_conversation),
                each=share.each,
                processes=share.processes,
                accumulated=share.accumulated,
                costs=interactions.costs(self.sharing) if share.processes > 1 else None,
                shuffle=False,
            )
        )
        for number in range(share.accumulated):  # the last step's may be empty
            start = (number * share.processes + share.index) * share.each
            mine = [interactions[index] for index in order[start : start + share.each]]
            yield {"interactions": [item for item in mine if item is not None]}
