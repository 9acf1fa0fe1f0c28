"""The native kernels as built for 64-bit ARM (NEON), in an emulator: no such CPU is needed.

Clang cross-compiles them (PyPI's ``ziglang``), Unicorn runs them (``unicorn``): one thread, and memory of
this process at its own addresses. Skipped where one of the two is missing. It says nothing of speed.
"""

import ctypes
import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fastsdpo import _native
from fastsdpo.testing import make_rows
from tests.ops import contract

pytestmark = pytest.mark.slow
if importlib.util.find_spec("ziglang") is None:
    pytest.skip("needs ziglang", allow_module_level=True)
unicorn = pytest.importorskip("unicorn")
arm64 = pytest.importorskip("unicorn.arm64_const")

KERNELS = Path(__file__).parents[2] / "kernels" / "cpu"
OPERATIONS = ("token_logps", "token_log_ratio", "sampled_token", "divergence", "topk", "support")
PAGE = 4096
STACK, STACK_BYTES, MAPPED, RETURN = 0x20_0000_0000, 8 << 20, 0x10_0000_0000, 0x3_0000_0000
PT_LOAD, SHT_SYMTAB, STB_GLOBAL = 1, 2, 1
AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_ENTRY, AT_RANDOM = 3, 4, 5, 6, 9, 25
IOCTL, WRITEV, EXIT, EXIT_GROUP, SET_TID, BRK, MUNMAP, MMAP = 29, 66, 93, 94, 96, 214, 215, 222


def whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Emulator:
    """A static aarch64 Linux program: runs its main, then any of its functions."""

    def __init__(self, program: Path):
        self.cpu = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.arguments = [getattr(arm64, f"UC_ARM64_REG_X{i}") for i in range(6)]
        self.output, self.status, self.borrowed, self.next_map = b"", None, set(), MAPPED
        image = program.read_bytes()
        entry, headers, sections = struct.unpack_from("<QQQ", image, 24)
        header_size, header_count, section_size, section_count = struct.unpack_from("<HHHH", image, 54)
        top = address_of_headers = 0
        for i in range(header_count):
            kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from(
                "<IIQQQQQQ", image, headers + i * header_size
            )
            if kind != PT_LOAD:
                continue
            begin, end = max(address // PAGE * PAGE, top), whole_pages(address + in_memory)
            if end > begin:
                self.cpu.mem_map(begin, end - begin)
            self.cpu.mem_write(address, image[offset : offset + in_file])
            top = max(top, end)
            if offset == 0:
                address_of_headers = address + headers
        self.symbols = self._symbols(image, sections, section_size, section_count)
        self.heap = self.heap_end = self.heap_mapped = top + (1 << 20)
        self.cpu.mem_map(STACK - STACK_BYTES, STACK_BYTES)
        self.cpu.mem_map(RETURN, PAGE)
        text = STACK - 2048
        self.cpu.mem_write(text, b"sixteen bytes..." + b"program\0")
        words = [1, text + 16, 0, 0]  # argc, argv, environment, then the auxiliary vector
        words += [AT_PHDR, address_of_headers, AT_PHENT, header_size, AT_PHNUM, header_count]
        words += [AT_PAGESZ, PAGE, AT_ENTRY, entry, AT_RANDOM, text, 0, 0]
        self.stack = (STACK - 4096 - 8 * len(words)) & ~15
        self.cpu.mem_write(self.stack, struct.pack(f"<{len(words)}Q", *words))
        self.cpu.reg_write(arm64.UC_ARM64_REG_SP, self.stack)
        self.cpu.reg_write(arm64.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point on
        self.cpu.hook_add(unicorn.UC_HOOK_INTR, self._system_call)
        missing = unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED
        self.cpu.hook_add(missing, self._borrow)
        self.cpu.emu_start(entry, 0)

    @staticmethod
    def _symbols(image: bytes, sections: int, size: int, count: int) -> dict[str, int]:
        def section(i: int) -> tuple[int, ...]:
            return struct.unpack_from("<IIQQQQIIQQ", image, sections + i * size)

        found = {}
        for i in range(count):
            _, kind, _, _, offset, length, link, *_ = section(i)
            if kind == SHT_SYMTAB:
                names = section(link)[4]
                for at in range(offset, offset + length, 24):
                    name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", image, at)
                    if info >> 4 == STB_GLOBAL:
                        text = image[names + name : image.index(b"\0", names + name)]
                        found[text.decode()] = value
        return found

    def _system_call(self, cpu, _number, _data) -> None:
        call = cpu.reg_read(arm64.UC_ARM64_REG_X8)
        first, second, third = (cpu.reg_read(register) for register in self.arguments[:3])
        result = 0
        if call in (EXIT, EXIT_GROUP):
            self.status = first
            cpu.emu_stop()
            return
        if call == WRITEV:
            for i in range(third):
                start, length = struct.unpack("<QQ", cpu.mem_read(second + 16 * i, 16))
                self.output += bytes(cpu.mem_read(start, length)) if length else b""
                result += length
        elif call == BRK:
            end = whole_pages(first)
            if end > self.heap_mapped:
                cpu.mem_map(self.heap_mapped, end - self.heap_mapped)
                self.heap_mapped = end
            self.heap_end = first if first >= self.heap else self.heap_end
            result = self.heap_end
        elif call == MMAP:
            result, self.next_map = self.next_map, self.next_map + whole_pages(second) + PAGE
            cpu.mem_map(result, whole_pages(second))
        elif call == MUNMAP:
            cpu.mem_unmap(first, whole_pages(second))
        elif call not in (SET_TID, IOCTL):
            result = -38  # not there
        cpu.reg_write(arm64.UC_ARM64_REG_X0, result & (2**64 - 1))

    def _borrow(self, cpu, _access, address, size, _value, _data) -> bool:
        """Lends the program a page of this process, at the same address."""
        if address < STACK:
            return False
        for page in range(address // PAGE * PAGE, address + size, PAGE):
            if page not in self.borrowed:
                cpu.mem_map_ptr(page, PAGE, unicorn.UC_PROT_ALL, ctypes.c_void_p(page))
                self.borrowed.add(page)
        return True

    def call(self, function: str, *arguments: int) -> int:
        for register, value in zip(self.arguments, arguments):
            self.cpu.reg_write(register, value)
        self.cpu.reg_write(arm64.UC_ARM64_REG_SP, self.stack)
        self.cpu.reg_write(arm64.UC_ARM64_REG_LR, RETURN)
        self.cpu.emu_start(self.symbols[function], RETURN)
        for page in self.borrowed:
            self.cpu.mem_unmap(page, PAGE)
        self.borrowed.clear()
        return ctypes.c_int32(self.cpu.reg_read(arm64.UC_ARM64_REG_X0) & 0xFFFFFFFF).value


class Library:
    """What `fastsdpo._native` calls, in the emulator."""

    def __init__(self, program: Path):
        self.emulator = Emulator(program)
        for operation in OPERATIONS:
            setattr(self, f"fastsdpo_{operation}", self._operation(f"fastsdpo_{operation}"))

    def _operation(self, function: str):
        return lambda call: self.emulator.call(function, ctypes.addressof(call))


def build(program: Path, main: Path) -> None:
    sources = [
        KERNELS / f"{name}.cpp" for name in ("token_logps", "divergence", "topk", "support", "math", "dispatch")
    ]
    # CMakeLists.txt's options; without OpenMP everything is one thread.
    options = "-target aarch64-linux-musl -static -std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast"
    options += " -fno-exceptions -fno-sanitize=undefined -Wall -Wextra -Werror -Wno-unknown-pragmas"
    options = [*options.split(), f"-I{KERNELS}", "-DFASTSDPO_ISA=native", '-DFASTSDPO_ISA_NAME="aarch64"']
    command = [sys.executable, "-m", "ziglang", "c++", *options, "-o", program, *sources, main]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neon")
    calls = "".join(f"fastsdpo_{operation}(0); " for operation in OPERATIONS)
    main = folder / "main.cpp"  # keeps the functions in the program
    body = f"if (n > 9) {{ {calls}}} return 0;"
    main.write_text(f'#include "fastsdpo.h"\nint main(int n, char**) {{ {body} }}\n')
    build(folder / "library", main)
    return Library(folder / "library")


@pytest.fixture
def neon(library, monkeypatch):
    monkeypatch.setattr(_native, "_load", lambda: (library, "instruction set aarch64, emulated"))
    return library


def test_the_driver_passes(tmp_path):
    """Every operation over sizes, dtypes and layouts: fused and separate passes agree (driver.cpp)."""
    build(tmp_path / "driver", KERNELS / "driver.cpp")
    driver = Emulator(tmp_path / "driver")
    assert driver.status == 0, driver.output
    assert driver.output.decode().splitlines() == ["aarch64: done", "ok"]


class TestValues(contract.Contract):
    """Vectors of four floats round in another order than those of eight and sixteen: twice the floor."""

    backend = "native"

    @contract.each_loss()
    @pytest.mark.parametrize("scale", contract.SCALES)
    @pytest.mark.usefixtures("neon")
    def test_losses_and_gradients_equal_the_formula(self, loss, dtype, scale):
        for vocabulary in (129, 2048 + 61):
            case = contract.without_ties(make_rows((2, 3), vocabulary, dtype=dtype), loss)
            self.check(case, plain=True, floor=8e-6, weights=case.weights, **loss, **contract.SCALES[scale])
