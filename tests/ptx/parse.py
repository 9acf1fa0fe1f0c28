"""Reads the PTX text of one kernel: parameters, registers, and basic blocks of instructions.

Covers what Triton's compiler writes: one `.entry`, registers in flat lists, and inline assembly with
registers of its own in braces. The language: NVIDIA, "Parallel Thread Execution ISA".
"""

import linecache
import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

BYTES = {"pred": 0} | {f"{letter}{8 * size}": size for letter in "busf" for size in (1, 2, 4, 8)}
ENDS_BLOCK = ("bra", "ret", "exit", "bar")


class UnknownInstruction(NotImplementedError):
    """PTX that the executor does not know: nothing is guessed."""


class Register(NamedTuple):
    index: int  # its place in the machine's list
    size: int  # bytes; 0 for a predicate


class Constant(NamedTuple):
    value: int  # an integer, or the bits of a float


class Symbol(NamedTuple):
    name: str  # a label, a parameter, a special register, shared memory


class Address(NamedTuple):
    base: Register | Symbol | Constant
    offset: int


class Vector(NamedTuple):
    items: list


class Place(NamedTuple):
    """A line of the Triton source. The compiler gives no folder: several files may have the name."""

    name: str
    line: int
    paths: tuple[str, ...]

    def text(self) -> str:
        return " | ".join(linecache.getline(path, self.line).strip() for path in self.paths)

    def __str__(self) -> str:
        return f"{self.name}:{self.line}"


@dataclass
class Instruction:
    op: list[str]  # "ld.global.v4.b32" in pieces
    operands: list
    guard: Register | None  # executed where this predicate is true (false: ``negated``)
    negated: bool
    places: tuple[Place, ...]  # where it comes from: its own line first, then its callers'
    text: str


@dataclass
class Kernel:
    name: str
    parameters: list[str]
    threads: int  # of a program
    text: str
    sizes: list[int] = field(default_factory=list)  # of each register, in bytes
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # block numbers


def parse(text: str) -> Kernel:
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.S)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head[3])
    parameters = re.findall(r"\.param\s+\.\w+.*?(\w+)\s*(?:,|$)", head[2], re.M)
    kernel = Kernel(head[1], parameters, int(threads[1]), text)
    body = text[head.end() : text.index("$L__func_end0:")]
    _Parser(kernel, _files(text), body).run()
    return kernel


def _files(text: str) -> dict[str, tuple[str, ...]]:
    """Paths of the source files, by their last part: that is how comments name them."""
    files: dict[str, tuple[str, ...]] = {}
    for folder, path in re.findall(r'^\s*\.file\s+\d+\s+(?:"([^"]*)"\s+)?"([^"]*)"', text, re.M):
        name = path.rpartition("/")[2]
        files[name] = (*files.get(name, ()), f"{folder}/{path}" if folder else path)
    return files


class _Parser:
    def __init__(self, kernel: Kernel, files: dict[str, tuple[str, ...]], body: str):
        self.kernel, self.files, self.body = kernel, files, body
        # Other labels than branches' targets are for debuggers.
        self.targets = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", body))
        self.scopes: list[dict[str, Register]] = [{}]
        self.block: list[Instruction] = []
        self.places: tuple[Place, ...] = ()

    def run(self) -> None:
        for line in self.body.splitlines():
            code, _, comment = line.partition("//")
            code = code.strip()
            if code.startswith(".loc"):
                # file:line:column, then its callers' in brackets
                found = re.findall(r"([\w.<>-]+):(\d+):\d+", comment)
                self.places = tuple(Place(f, int(n), self.files.get(f, ())) for f, n in found)
                continue
            label = re.fullmatch(r"(\$?\w+):", code)
            if label is None:
                self.statements(code)
            elif label[1] in self.targets:
                self.close()
                self.kernel.labels[label[1]] = len(self.kernel.blocks)
        self.close()

    def close(self) -> None:
        if self.block:
            self.kernel.blocks.append(self.block)
        self.block = []

    def statements(self, code: str) -> None:
        while code:
            if code[0] in "{}":  # inline assembly
                self.scopes.append({}) if code[0] == "{" else self.scopes.pop()
                code = code[1:].strip()
                continue
            statement, _, code = code.partition(";")
            statement, code = statement.strip(), code.strip()
            declared = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)
            if declared:
                self.declare(declared[1], declared[2])
            elif statement.startswith(".") and not statement.startswith(".pragma"):
                raise UnknownInstruction(statement)
            elif statement and statement[0] != ".":
                self.instruction(statement)

    def declare(self, kind: str, names: str) -> None:
        for one in names.split(","):
            name, _, count = one.strip().rstrip(">").partition("<")
            for register in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                self.scopes[-1][register] = Register(len(self.kernel.sizes), BYTES[kind])
                self.kernel.sizes.append(BYTES[kind])

    def instruction(self, statement: str) -> None:
        sign, guard, op, rest = re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", statement, re.S).groups()
        operands = [self.operand(t) for t in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        pieces, guard = re.split(r"(?<!:)\.(?!:)", op), self.operand(guard) if guard else None
        self.block.append(Instruction(pieces, operands, guard, sign == "!", self.places, statement))
        if op.split(".")[0] in ENDS_BLOCK and not op.startswith("bar.warp"):
            self.close()

    def operand(self, text: str):
        text = text.strip()
        if text[0] == "{":
            return Vector([self.operand(t) for t in text.strip("{} ").split(",")])
        if text[0] == "[":
            base, _, offset = text.strip("[] ").partition("+")
            return Address(self.operand(base), int(offset.strip() or "0", 0))
        if "|" in text:
            return Vector([self.operand(t) for t in text.split("|")])
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return Constant(int(text[2:], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Constant(int(text.rstrip("U"), 0))
        if re.fullmatch(r"-?\d+\.\d+", text):
            return Constant(struct.unpack("<I", struct.pack("<f", float(text)))[0])
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        return Symbol(text)
