"""A buffer with a shadow: whether each half-word was written, and which threads wrote and read it when.

Time is counted in epochs, per thread: the number of barriers of the program that it has passed. Two accesses
to a half-word, of which one is a store that changes it, are a race if they are of two programs, or of two
warps of a program in one epoch. (A store of what is there already changes nothing for whoever reads it.)
"""

from typing import NamedTuple

import numpy as np

from .parse import Place

GUARD = 256  # bytes before and after a buffer that an access outside it can hit
PIECE = 16  # bytes of the widest access
NOBODY, SEVERAL = -1, -2  # in the place of a thread or a program

MISALIGNED = "misaligned access"
OUT_OF_BOUNDS = "access outside the buffer"
UNWRITTEN = "read of what was never written"
RACE_OF_WARPS = "race between warps"
RACE_OF_PROGRAMS = "race between programs"
COLLISION = "threads store different values at once"
BARRIER = "barrier that not all threads reach"
SHUFFLE = "shuffle without all threads of the warp"


class Fault(NamedTuple):
    kind: str
    kernel: str
    places: tuple[Place, ...]  # in the Triton source, callers last
    instruction: str
    example: str

    def __str__(self) -> str:
        chain = " < ".join(str(place) for place in self.places)
        return f"{self.kind}: {self.kernel} at {chain}: {self.instruction} ({self.example})"


class Threads(NamedTuple):
    """Who makes an access: arrays of one number per thread that takes part."""

    lane: np.ndarray  # its place in the machine's arrays
    thread: np.ndarray  # its number in the launch
    program: np.ndarray
    epoch: np.ndarray

    def where(self, chosen) -> "Threads":
        return Threads(*(x[chosen] for x in self))


class Buffer:
    """``data`` and a guard on either side. ``lead``: how many bytes the first one is behind a boundary of 64.
    ``written``: which half-words have been, None for all. ``shared``: one program's own memory."""

    def __init__(self, data: np.ndarray, name: str, lead: int = 0, written=None, shared: bool = False):
        self.name, self.first, self.size, self.shared = name, GUARD + lead, data.size, shared
        pieces = -(-(self.first + data.size) // PIECE) * PIECE
        self.bytes = np.full(pieces + GUARD, 0xFF, np.uint8)
        self.data[:] = data
        halves = self.bytes.size // 2
        self.written = np.ones(halves, bool)
        if written is not None:
            self.written[self.first // 2 : self.first // 2 + written.size] = written
        self.writer, self.reader, self.reading = (np.full(halves, NOBODY) for _ in range(3))
        self.wrote, self.read = np.zeros(halves, int), np.zeros(halves, int)  # epochs
        self.stored = np.zeros(halves, bool)  # by this launch, whatever was there

    @property
    def data(self) -> np.ndarray:
        return self.bytes[self.first : self.first + self.size]


class Access:
    """What an instruction does for some threads to ``count`` words of ``width`` bytes at ``offset`` of the
    buffer's bytes: checked when made, done by `load` or `store`. ``threads`` keeps those without a fault."""

    def __init__(self, report, buffer: Buffer, threads: Threads, offset, width: int, count: int, warps: int):
        self.report, self.buffer, self.width, self.warps = report, buffer, width, warps
        size = width * count
        aligned = offset % size == 0
        self._note(MISALIGNED, ~aligned, threads, offset)
        end, limit = offset + size, buffer.first + buffer.size
        inside = (offset >= buffer.first) & (end <= limit)
        self._note(OUT_OF_BOUNDS, ~inside, threads, offset)
        fine = aligned & inside
        if not fine.all():
            threads, offset = threads.where(fine), offset[fine]
        self.threads, self.offset = threads, offset
        self.words = (offset // width)[:, None] + np.arange(count)
        self.halves = (offset // 2)[:, None] + np.arange(max(1, size // 2))

    def _note(self, kind: str, bad, threads: Threads, offset) -> None:
        if bad.any():
            n = int(np.flatnonzero(bad)[0])
            at = int(offset[n]) - self.buffer.first
            self.report(kind, threads.lane[n], f"byte {at} of {self.buffer.name}, {self.buffer.size} long")

    def _wrong(self, kind: str, bad) -> None:
        if bad.any():
            self._note(kind, bad.any(1), self.threads, self.offset)

    def _race(self, what: str, others, since) -> None:
        """``others`` are threads (or NOBODY) whose access at epoch ``since`` clashes with this one."""
        thread, epoch = self.threads.thread[:, None], self.threads.epoch[:, None]
        clash = (others >= 0) & (others // 32 != thread // 32)
        if clash.any():
            one = others // 32 // self.warps == thread // 32 // self.warps
            self._wrong(f"{RACE_OF_WARPS}, {what}", clash & one & (since == epoch))
            if not self.buffer.shared:
                self._wrong(f"{RACE_OF_PROGRAMS}, {what}", clash & ~one)

    def load(self) -> np.ndarray:
        """[threads, count] unsigned words."""
        b, at = self.buffer, self.halves
        self._wrong(UNWRITTEN, ~b.written[at])
        self._race("read after write", b.writer[at], b.wrote[at])
        thread, program, epoch = (np.broadcast_to(x[:, None], at.shape) for x in self.threads[1:])
        # One reader is kept by its number; of several warps of a program in an epoch, that they are several.
        kept, since, of = b.reader[at], b.read[at], b.reading[at]
        more = (of == program) & (since == epoch) & (kept != NOBODY)
        more &= (kept == SEVERAL) | (kept // 32 != thread // 32)
        b.reader[at], b.read[at] = thread, epoch
        more |= b.reader[at] // 32 != thread // 32  # within this instruction
        b.reader[at[more]] = SEVERAL
        elsewhere = (of != NOBODY) & (of != program)
        b.reading[at] = program
        elsewhere |= b.reading[at] != program
        b.reading[at[elsewhere]] = SEVERAL
        return b.bytes.view(f"u{self.width}")[self.words]

    def store(self, values: np.ndarray) -> None:
        """``values`` [threads, count], unsigned words."""
        b, at = self.buffer, self.halves
        view = b.bytes.view(f"u{self.width}")
        changed = np.repeat(view[self.words] != values, max(1, self.width // 2), 1)
        changed |= ~b.written[at]
        program, epoch = self.threads.program[:, None], self.threads.epoch[:, None]
        self._race("write after write", np.where(changed, b.writer[at], NOBODY), b.wrote[at])
        mine = changed & (b.reading[at] == program)
        self._race("write after read", np.where(mine, b.reader[at], NOBODY), b.read[at])
        many = mine & (b.reader[at] == SEVERAL) & (b.read[at] == epoch)
        self._wrong(f"{RACE_OF_WARPS}, write after several reads", many)
        if not b.shared:
            others = changed & (b.reading[at] != program) & (b.reading[at] != NOBODY)
            self._wrong(f"{RACE_OF_PROGRAMS}, write after read", others)
        view[self.words] = values
        self._wrong(COLLISION, view[self.words] != values)
        b.writer[at] = np.where(changed, self.threads.thread[:, None], b.writer[at])
        b.wrote[at] = np.where(changed, epoch, b.wrote[at])
        b.written[at] = b.stored[at] = True
