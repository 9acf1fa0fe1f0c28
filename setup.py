"""Builds the native CPU kernels (CMakeLists.txt); everything else is in pyproject.toml.

The kernels are optional: without CMake or a compiler the package installs all the same and leaves the
reason in ``fastsdpo/native_build_failed.txt``. pip shows the warning with ``-v`` only; the first loss on
a CPU, `fastsdpo train` and `fastsdpo doctor` show it again.
``FASTSDPO_REQUIRE_NATIVE=1`` makes a failed build fatal.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
LIBRARY = {"win32": "fastsdpo.dll", "darwin": "libfastsdpo.dylib"}.get(sys.platform, "libfastsdpo.so")
FAILURE = "native_build_failed.txt"
REQUIRED = os.environ.get("FASTSDPO_REQUIRE_NATIVE", "0") == "1"


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except FileNotFoundError as error:
        raise CompileError(f"{command[0]} was not found") from error
    except subprocess.CalledProcessError as error:
        output = error.stdout.decode(errors="replace").strip()
        raise CompileError(f"{' '.join(command)} failed:\n{output[-4000:]}") from error


class BuildNative(build_ext):
    """Runs CMake, and puts the library (or why there is none) next to the package's modules."""

    def run(self) -> None:
        into_sources = self.inplace
        try:
            super().run()
            error = None
        except CompileError as caught:
            error = caught
        folders = [Path(self.build_lib) / "fastsdpo"]
        if into_sources:
            folders.append(ROOT / "fastsdpo")
        for folder in folders:
            (folder / FAILURE).unlink(missing_ok=True)
        if error is None:
            return
        if REQUIRED:
            raise error
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LIBRARY).unlink(missing_ok=True)  # of an earlier build
            (folder / FAILURE).write_text(f"{error}\n", encoding="utf-8")
        self.warn(f"THE NATIVE CPU KERNELS WERE NOT BUILT, the losses will be slower on a CPU: {error}")

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "native"
        # pip builds each time in another environment, and the cache of CMake names the tools of the last one.
        shutil.rmtree(build, ignore_errors=True)
        cmake = shutil.which("cmake") or "cmake"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        _run(
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            *generator,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFASTSDPO_OUTPUT_DIRECTORY={output}",
        )
        _run(cmake, "--build", str(build), "--config", "Release", "--target", "fastsdpo_library")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))


class Wheel(bdist_wheel):
    """The library has no Python in it: one wheel per platform serves every version of Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fastsdpo.libfastsdpo", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
