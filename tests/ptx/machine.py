"""Runs a parsed kernel: the threads of several programs are lanes of numpy arrays.

Lanes that stand at different blocks are run block by block, the lowest first, and meet again where their
paths do. A barrier ends a block: lanes wait there for the rest of their program. Registers start as garbage.
A value that is the same for all lanes is kept as an array of one number.
"""

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import memory
from .arithmetic import dtype_of, function_of
from .memory import GUARD, NOBODY, Access, Buffer, Fault, Threads
from .parse import Address, Constant, Instruction, Kernel, Register, Symbol, UnknownInstruction, Vector

SPAN = 1 << 36  # buffer n of the global memory lies at address (n + 1) * SPAN
DONE = 1 << 30  # in the place of a block's number
UNSIGNED = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
AT_ONCE = 16  # programs
# Of loads and stores: how they go through caches, and their order beside others', change no value here.
HINTS = {"volatile", "relaxed", "acquire", "release", "gpu", "sys", "cta", "weak", "nc", "ca", "cg", "cs", "wb"}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
REDUCTIONS = {"add": np.add, "max": np.maximum, "min": np.minimum, **LOGIC}

Step = Callable[[np.ndarray | None], None]  # executes an instruction for the lanes of a mask, None for all


@dataclass
class Counts:
    """What a launch did. Bytes are of global memory, each address once for reading and once for writing."""

    programs: int = 0
    instructions: int = 0  # by threads: an instruction of a whole warp counts 32
    barriers: int = 0  # of all programs
    read: int = 0
    written: int = 0
    accesses: collections.Counter = field(default_factory=collections.Counter)
    # of global memory, by threads: {("ld" or "st", bytes of one): count}


class Machine:
    """A kernel, ready to run. A run adds to ``faults``, each place once, and makes ``counts`` anew."""

    def __init__(self, kernel: Kernel, shared_bytes: int):
        self.kernel, self.threads = kernel, kernel.threads
        self.shared_bytes = -(-max(16, shared_bytes) // 16) * 16
        self.constants: list[np.ndarray] = []
        self.code = [[self._step(i) for i in block] for block in kernel.blocks]
        self.faults: dict[tuple, Fault] = {}
        self.counts = Counts()

    # ----------------------------------------------------------------------------------------- running

    def run(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[int],
        buffers: list[Buffer],
        order: int | Sequence[int] | None = None,
    ) -> None:
        """Runs all programs. ``arguments`` are the parameters' bits.

        ``order``: None runs all warps together; a sequence of a program's warps runs each as far as the next
        barrier before the next one starts; a number is the seed of such an order for each program, and of an
        order of the programs. Of a sequence, warps that a program does not have are left out.
        """
        self.buffers, self.grid = buffers, grid
        self.arguments = dict(zip(self.kernel.parameters, arguments, strict=True))
        numbers = np.arange(int(np.prod(grid)))
        self.counts = Counts(programs=numbers.size)
        self.random = np.random.default_rng(order if isinstance(order, int) else 0)
        if isinstance(order, int):
            self.random.shuffle(numbers)
        with np.errstate(all="ignore"):
            for first in range(0, numbers.size, AT_ONCE):
                self._run_programs(numbers[first : first + AT_ONCE], order)
        self.counts.read = sum(2 * int((b.reading != NOBODY).sum()) for b in buffers)
        self.counts.written = sum(2 * int(b.stored.sum()) for b in buffers)

    def _run_programs(self, numbers: np.ndarray, order) -> None:
        t, n = self.threads, self.threads * numbers.size
        self.n, self.lane = n, np.arange(n)
        self.program = numbers.repeat(t)
        self.of_program = self.lane % t
        self.thread = self.program * t + self.of_program
        self.epoch = np.zeros(n, int)
        x, y, _ = self.grid
        place = (self.program % x, self.program // x % y, self.program // (x * y))
        special = {"%tid.x": self.of_program, "%tid.y": 0, "%tid.z": 0, "%ntid.x": t, "%laneid": self.lane % 32}
        special |= {f"%ctaid.{axis}": where for axis, where in zip("xyz", place, strict=True)}
        special |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", self.grid, strict=True)}
        self.special = {name: np.atleast_1d(value).astype(np.uint32) for name, value in special.items()}
        data = np.zeros(self.shared_bytes * numbers.size, np.uint8)
        nothing = np.zeros(data.size // 2, bool)
        self.shared = Buffer(data, "shared memory", written=nothing, shared=True)
        garbage = self.random.integers(0, 2**63, 1, np.uint64)
        start = {size: garbage.astype(kind) for size, kind in UNSIGNED.items()}
        self.registers = [start[size] for size in self.kernel.sizes] + self.constants
        turn = self._turns(numbers.size, order)
        self.next = np.zeros(n, int)
        self.waiting = np.full(n, -1)  # the block whose barrier a lane waits at
        while True:
            ready = np.where(self.waiting < 0, self.next, DONE)
            if turn is not None and (ready < DONE).any():
                ready = np.where(turn == turn[ready < DONE].min(), ready, DONE)
            self.block = int(ready.min())
            if self.block < DONE:
                active = ready == self.block
                mask = None if active.all() else active
                self._go(mask, self.block + 1 if self.block + 1 < len(self.code) else DONE)
                threads = self.n if mask is None else int(mask.sum())
                self.counts.instructions += threads * len(self.code[self.block])
                for step in self.code[self.block]:
                    step(mask)
            elif (self.waiting >= 0).any():
                self._release()
            else:
                return

    def _turns(self, programs: int, order) -> np.ndarray | None:
        """Whose turn it is, the lowest first: of each lane."""
        warps = self.threads // 32
        if order is None:
            return None
        if isinstance(order, int):
            turns = np.concatenate([self.random.permutation(warps) for _ in range(programs)])
        else:
            turns = np.tile(np.argsort([warp for warp in order if warp < warps]), programs)
        return turns.repeat(32)

    def _go(self, mask, block: int) -> None:
        self.next[slice(None) if mask is None else mask] = block

    def _release(self) -> None:
        """Lets go on who waits at a barrier, with all the rest of the program."""
        for lanes in self.lane.reshape(-1, self.threads):
            waiting, left = self.waiting[lanes], self.next[lanes] < DONE
            at = np.unique(waiting[waiting >= 0])
            if at.size > 1 or (at.size and (left & (waiting < 0)).any()):
                self.report(memory.BARRIER, lanes[0], "", self.kernel.blocks[at[-1]][-1])
        waits = (self.waiting >= 0).reshape(-1, self.threads).any(1)
        self.counts.barriers += int(waits.sum())
        self.epoch[self.waiting >= 0] += 1
        self.waiting[:] = -1

    def report(self, kind: str, lane: int, example: str, i: Instruction) -> None:
        where = f"program {self.program[lane]}, thread {self.of_program[lane]}"
        example = ": ".join(filter(None, (where, example)))
        fault = Fault(kind, self.kernel.name, i.places, i.text, example)
        self.faults.setdefault(fault[:4], fault)

    # ------------------------------------------------------------------------------------ instructions

    def _step(self, i: Instruction) -> Step:
        special = {"bra": self._branch, "ret": self._return, "exit": self._return, "bar": self._barrier}
        special |= {"ld": self._load, "st": self._store, "mov": self._move, "cvta": self._move}
        special |= {"shfl": self._shuffle, "redux": self._reduce, "vote": self._vote}
        if i.op[0] in special:
            if i.guard is not None and i.op[0] in ("bar", "shfl", "redux", "vote"):
                raise UnknownInstruction(i.text)
            return special[i.op[0]](i)
        compute, kinds = function_of(i)
        destination, *sources = i.operands
        types = [dtype_of(kind) for kind in kinds]
        places = [self._place(s, 0 if t.kind == "b" else t.itemsize) for s, t in zip(sources, types, strict=True)]

        def step(mask):
            values = []
            for place, t in zip(places, types, strict=True):
                x = self.registers[place]
                if x.itemsize != t.itemsize:  # a register wider than what is read of it
                    x = x.astype(UNSIGNED[t.itemsize])
                values.append(x.view(t))
            self._write(destination, compute(*values), self._guarded(i, mask))

        return step

    def _place(self, operand, size: int) -> int:
        """Where an operand's value is among the registers; constants get places of their own."""
        if isinstance(operand, Register):
            return operand.index
        if not isinstance(operand, Constant):
            raise UnknownInstruction(operand)
        value = operand.value & ((1 << 8 * max(size, 1)) - 1)
        self.constants.append(np.array([value], UNSIGNED[size]))
        return len(self.kernel.sizes) + len(self.constants) - 1

    def _write(self, register, value, mask) -> None:
        if isinstance(register, Vector):
            for one, part in zip(register.items, value, strict=True):
                self._write(one, part, mask)
            return
        if isinstance(register, Symbol):  # "_", which nothing reads
            return
        if register.size:
            if value.itemsize != register.size:  # signed and unsigned numbers widen as they are
                value = value.astype(f"{value.dtype.kind}{register.size}")
            value = value.view(UNSIGNED[register.size])
        if mask is not None:
            value = np.where(mask, value, self.registers[register.index])
        self.registers[register.index] = value

    def _guarded(self, i: Instruction, mask):
        if i.guard is None:
            return mask
        guard = np.broadcast_to(self.registers[i.guard.index] ^ i.negated, self.n)
        return guard if mask is None else mask & guard

    def _branch(self, i: Instruction) -> Step:
        target = i.operands[0].name
        return lambda mask: self._go(self._guarded(i, mask), self.kernel.labels[target])

    def _return(self, i: Instruction) -> Step:
        return lambda mask: self._go(self._guarded(i, mask), DONE)

    def _barrier(self, i: Instruction) -> Step:
        if i.op[1:] == ["warp", "sync"]:  # a warp's lanes go together anyway
            return lambda mask: None
        if i.op[1:] != ["sync"] or i.operands != [Constant(0)]:
            raise UnknownInstruction(i.text)

        def step(mask):
            self.waiting[slice(None) if mask is None else mask] = self.block

        return step

    def _move(self, i: Instruction) -> Step:
        destination, source = i.operands
        size = dtype_of(i.op[-1]).itemsize
        if isinstance(source, Symbol) and source.name.startswith("%"):
            return lambda mask: self._write(destination, self.special[source.name], mask)
        if isinstance(source, Symbol):  # the start of shared memory
            return lambda mask: self._write(destination, np.zeros(1, UNSIGNED[size]), mask)
        if isinstance(destination, Vector):  # taken apart, lowest first
            place, part = self._place(source, size), UNSIGNED[size // len(destination.items)]

            def split(mask):
                whole = np.ascontiguousarray(self.registers[place]).view(part)
                self._write(destination, whole.reshape(-1, len(destination.items)).T.copy(), mask)

            return split
        if isinstance(source, Vector):
            places = [self._place(x, size // len(source.items)) for x in source.items]

            def join(mask):
                parts = np.broadcast_arrays(*[self.registers[p] for p in places])
                self._write(destination, np.stack(parts, -1).view(UNSIGNED[size])[:, 0], mask)

            return join
        place = self._place(source, size if i.op[-1] != "pred" else 0)
        return lambda mask: self._write(destination, self.registers[place], self._guarded(i, mask))

    # -------------------------------------------------------------------------------- loads and stores

    def _parts(self, i: Instruction) -> tuple[str, int, str]:
        """(memory space, number of words, type of a word) of a load or store."""
        space = next((s for s in ("param", "global", "shared") if s in i.op), None)
        count = next((int(p[1:]) for p in i.op if p in ("v2", "v4", "v8")), 1)
        known = HINTS | {space, f"v{count}"}
        if space is None or any(p not in known and p[:4] not in ("L1::", "L2::") for p in i.op[1:-1]):
            raise UnknownInstruction(i.text)
        return space, count, i.op[-1]

    def _accesses(self, i: Instruction, space: str, address: Address, mask, width: int, count: int):
        """The lanes' accesses, buffer by buffer, as (numbers of the lanes, `Access`)."""
        lanes = self.lane if mask is None else np.flatnonzero(mask)
        if not lanes.size:
            return
        at = np.full(1, address.offset)
        if isinstance(address.base, Register):
            at = at + self.registers[address.base.index].astype(np.int64)
        at = np.broadcast_to(at, self.n)[lanes]
        report = lambda kind, lane, example: self.report(kind, lane, example, i)  # noqa: E731
        rest = report, width, count, self.threads // 32
        if space == "shared":
            outside = (at < 0) | (at + width * count > self.shared_bytes)
            if outside.any():
                report(memory.OUT_OF_BOUNDS, lanes[outside][0], "shared memory")
                lanes, at = lanes[~outside], at[~outside]
            at = at + lanes // self.threads * self.shared_bytes + GUARD
            yield self._access(self.shared, lanes, at, *rest)
            return
        self.counts.accesses[i.op[0], width * count] += lanes.size
        number = (at + GUARD) // SPAN - 1
        for n in np.unique(number):
            chosen = number == n
            mine, offset = lanes[chosen], at[chosen] - (n + 1) * SPAN + GUARD
            size = self.buffers[n].bytes.size if 0 <= n < len(self.buffers) else 0
            wild = (offset < 0) | (offset + width * count > size)
            if wild.any():
                name = self.buffers[n].name if size else "any buffer"
                report(memory.OUT_OF_BOUNDS, mine[wild][0], f"far outside {name}")
            if size:
                yield self._access(self.buffers[n], mine[~wild], offset[~wild], *rest)

    def _access(self, buffer, lanes, offset, report, width, count, warps) -> Access:
        threads = Threads(lanes, self.thread[lanes], self.program[lanes], self.epoch[lanes])
        return Access(report, buffer, threads, offset, width, count, warps)

    def _load(self, i: Instruction) -> Step:
        space, count, kind = self._parts(i)
        destination, address = i.operands
        slots = destination.items if isinstance(destination, Vector) else [destination]
        word = dtype_of(kind)
        if space == "param":

            def parameter(mask):
                bits = np.array([self.arguments[address.base.name]], np.uint64).view(np.uint8)
                value = bits[address.offset : address.offset + word.itemsize].view(word)
                self._write(destination, value, mask)

            return parameter

        def step(mask):
            mask = self._guarded(i, mask)
            new = [np.array(np.broadcast_to(self.registers[s.index], self.n)) for s in slots]
            for access in self._accesses(i, space, address, mask, word.itemsize, count):
                words = access.load().view(word)
                for n, slot in enumerate(slots):
                    value = words[:, n].astype(f"{word.kind}{slot.size}")
                    new[n][access.threads.lane] = value.view(UNSIGNED[slot.size])
            for slot, value in zip(slots, new, strict=True):
                self.registers[slot.index] = value

        return step

    def _store(self, i: Instruction) -> Step:
        space, count, kind = self._parts(i)
        address, source = i.operands
        width = dtype_of(kind).itemsize
        items = source.items if isinstance(source, Vector) else [source]
        places = [self._place(item, width) for item in items]

        def step(mask):
            mask = self._guarded(i, mask)
            values = np.stack([np.broadcast_to(self.registers[p], self.n) for p in places], -1)
            values = values.astype(UNSIGNED[width])
            for access in self._accesses(i, space, address, mask, width, count):
                access.store(values[access.threads.lane])

        return step

    # ------------------------------------------------------------------------------------- whole warps

    def _of_warps(self, i: Instruction, place: int, mask) -> np.ndarray:
        """A register's values, [warps, 32]. All lanes of a warp must be there."""
        members = i.operands[-1]
        if isinstance(members, Register):
            named = np.broadcast_to(self.registers[members.index], self.n)
            whole = (named if mask is None else named[mask]) == 0xFFFFFFFF
        else:
            whole = np.array(members.value in (-1, 0xFFFFFFFF))
        there = np.ones(1) if mask is None else mask.reshape(-1, 32).mean(1)
        if not whole.all() or ((there > 0) & (there < 1)).any():
            self.report(memory.SHUFFLE, 0 if mask is None else int(mask.argmax()), "", i)
        return np.broadcast_to(self.registers[place], self.n).reshape(-1, 32)

    def _shuffle(self, i: Instruction) -> Step:
        mode = i.op[2]
        destination, source, by, clamp, _ = i.operands
        if clamp.value != (0 if mode == "up" else 31) or mode not in ("bfly", "idx", "up", "down"):
            raise UnknownInstruction(i.text)
        place, distance = self._place(source, 4), self._place(by, 4)

        def step(mask):
            values = self._of_warps(i, place, mask)
            lane = self.lane % 32
            by = self.registers[distance].astype(int)
            at = {"bfly": lane ^ by, "idx": by + 0 * lane, "up": lane - by, "down": lane + by}[mode]
            inside = (at >= 0) & (at < 32)
            moved = values.reshape(-1)[np.where(inside, at, lane) + self.lane // 32 * 32]
            pair = isinstance(destination, Vector)
            self._write(destination, (moved, inside) if pair else moved, mask)

        return step

    def _reduce(self, i: Instruction) -> Step:
        _, _, name, *modes, kind = i.op
        destination, source, _ = i.operands
        place, word, reduction = self._place(source, 4), dtype_of(kind), REDUCTIONS[name]
        if kind == "f32" and "NaN" not in modes:
            reduction = {"max": np.fmax, "min": np.fmin}[name]
        if set(modes) - {"NaN"}:
            raise UnknownInstruction(i.text)

        def step(mask):
            values = self._of_warps(i, place, mask).view(word)
            self._write(destination, reduction.reduce(values, 1, dtype=word).repeat(32), mask)

        return step

    def _vote(self, i: Instruction) -> Step:
        _, _, mode, kind = i.op
        destination, source, _ = i.operands
        if (mode, kind) not in (("any", "pred"), ("all", "pred"), ("ballot", "b32")):
            raise UnknownInstruction(i.text)
        place = self._place(source, 0)

        def step(mask):
            values = self._of_warps(i, place, mask)
            if mode == "ballot":
                value = np.packbits(values, axis=1, bitorder="little").view(np.uint32)[:, 0]
            else:
                value = values.any(1) if mode == "any" else values.all(1)
            self._write(destination, value.repeat(32), mask)

        return step
