"""A driver for Triton whose device executes PTX on CPU tensors, and the library as on a GPU that has it."""

import contextlib
import ctypes
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from fastsdpo.ops import _triton, _triton_kernels, backend

from .machine import SPAN, Counts, Machine
from .memory import Buffer, Fault
from .parse import parse

UNWRITTEN_HALF = np.uint16(0xFFA5)  # of each half-word of a float: a NaN of every dtype
_PLANTED: list[str] = []  # what `planted` put into kernels: they are compiled and kept apart


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    counts: Counts
    ptx: str


class Executor:
    """Executes launches. ``faults``: what was found, each place once. ``launches``: what ran."""

    def __init__(self, order: int | Sequence[int] | None):
        self.order = order
        self.faults: list[Fault] = []
        self.launches: list[Launch] = []

    def launch(self, machine: Machine, grid: tuple[int, int, int], arguments: list[tuple[str, Any]]) -> None:
        """``arguments``: (Triton's type, value) of the kernel's parameters."""
        bits: list[int] = []
        buffers: dict[int, Buffer] = {}  # by the address of a tensor's storage
        for n, (kind, value) in enumerate(arguments):
            if kind[0] == "*":
                storage = value.untyped_storage().data_ptr()
                if storage not in buffers:
                    buffers[storage] = buffer_of(value, f"the storage of argument {n}")
                start = (list(buffers).index(storage) + 1) * SPAN + storage % 64
                bits.append(start + value.data_ptr() - storage)
            elif kind == "fp32":
                bits.append(int.from_bytes(struct.pack("<f", value), "little"))
            else:
                bits.append(int(value) & (2**64 - 1))
        scratch = len(machine.kernel.parameters) - len(bits)  # memory, of which none is used
        bits += [0] * scratch
        machine.faults = {}
        machine.run(grid, bits, list(buffers.values()), self.order)
        for storage, buffer in buffers.items():
            memory_at(storage, buffer.size)[:] = buffer.data
        self.faults += machine.faults.values()
        kernel = machine.kernel
        self.launches.append(Launch(kernel.name, grid, machine.counts, kernel.text))


def memory_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def buffer_of(tensor: torch.Tensor, name: str) -> Buffer:
    """The tensor's whole storage. Floats that `unwritten` left were never written."""
    storage = tensor.untyped_storage()
    data = memory_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else np.zeros(0, np.uint8)
    written = None
    if tensor.is_floating_point():
        size = tensor.element_size()
        words = data[: data.size // size * size].view(f"u{size}")
        written = (words != np.full(size // 2, UNWRITTEN_HALF).view(words.dtype)).repeat(size // 2)
    return Buffer(data, name, storage.data_ptr() % 64, written)


class PTXBackend(CUDABackend):
    """Triton's compiler for NVIDIA as far as PTX, with entries of its own in Triton's cache: one set for each
    checkout, because the PTX names the files it was compiled from."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, *args) -> None:
        super().add_stages(stages, *args)
        del stages["cubin"]

    def hash(self) -> str:
        return f"executed PTX {triton.__version__} {self.target.arch} {Path(__file__).parent}"


def load(name: str, ptx: bytes, shared: int, device: str) -> tuple:
    """(module, function, registers, spills, threads of a program at most) of a kernel."""
    return name, Machine(parse(ptx.decode()), shared), 0, 0, 1024


class Driver:
    """What Triton asks of a driver. Kernels that were loaded stay with Triton under this device's name, which
    no other driver has."""

    def __init__(self, executor: Executor, arch: int):
        self.executor, self.arch = executor, arch
        self.device = " ".join([f"PTX sm_{arch}", *_PLANTED])
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448}, load_binary=load)

    def launcher_cls(self, source, metadata):
        kinds = list(source.signature.values())

        def run(x, y, z, stream, machine, packed, info, enter, leave, *values):
            given = [(k, v) for k, v in zip(kinds, values, strict=True) if k != "constexpr"]
            driver.active.executor.launch(machine, (x, y, z), given)

        return run

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def unwritten(make):
    """``make`` (a torch.empty) whose floats are NaN of bits that no arithmetic gives."""

    def made(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.is_floating_point():
            storage = tensor.untyped_storage()
            memory_at(storage.data_ptr(), storage.nbytes() // 2 * 2).view(np.uint16)[:] = UNWRITTEN_HALF
        return tensor

    return made


@contextlib.contextmanager
def executing(arch: int = 90, order: int | Sequence[int] | None = None) -> Iterator[Executor]:
    """``backend="triton"`` takes CPU tensors and executes the PTX for ``arch`` (80, 90, 100).

    Args:
        order: None runs all warps together. A sequence of a program's warps (8) runs each by itself as far as
            the next barrier, in this order. A number is the seed of a random one, and of one of the programs.
    """
    assert _triton.FAST, "the kernels were imported with TRITON_INTERPRET=1"
    executor = Executor(order)
    before = driver._active
    with contextlib.ExitStack() as stack:
        enter = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        nvidia = Backend(PTXBackend, backends["nvidia"].driver)
        stack.enter_context(mock.patch.dict(backends, nvidia=nvidia))
        stack.callback(driver.set_active, before)
        driver.set_active(Driver(executor, arch))
        enter(backend, "triton_interpreted", lambda: True)  # else CPU tensors are refused
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            enter(owner, name, unwritten(getattr(owner, name)))
        yield executor


@contextlib.contextmanager
def planted(function, right: str, wrong: str) -> Iterator[None]:
    """``function`` (of `triton.jit`) with another text in its source, which has it once."""
    source = function.src
    assert source.count(right) == 1, f"{function.__name__} has no or several {right!r}"

    def change(text: str) -> None:
        function._unsafe_update_src(text)
        for other in vars(_triton_kernels).values():  # whoever calls it
            if isinstance(other, triton.JITFunction):
                other.hash = None

    change(source.replace(right, wrong))
    _PLANTED.append(f"{function.__name__}: {wrong} for {right}")
    try:
        yield
    finally:
        _PLANTED.pop()
        change(source)
