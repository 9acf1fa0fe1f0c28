"""The build of the native kernels: optional, explained where it failed, fatal on request.

Each test builds from a copy of the sources in a temporary folder.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import fastsdpo
from fastsdpo import _native
from fastsdpo.ops import backend
from tests.pages import NAMES, ROOT, commands

SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "kernels", "fastsdpo"]
TEXTS = ["README.md", "LICENSE"]


@pytest.fixture
def sources(tmp_path) -> Path:
    """The repository's sources without anything that was built."""
    target = tmp_path / "sources"
    target.mkdir()
    built = shutil.ignore_patterns("*.so", "*.dylib", "*.dll", "__pycache__", "native_build_*")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=built)
        else:
            shutil.copy(ROOT / name, target)
    for name in TEXTS:
        (target / name).write_text("text\n")
    return target


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def wheel(sources: Path, *options: str, isolated=False, **environment: str):
    pytest.importorskip("pip")
    more = [*options, *([] if isolated else ["--no-build-isolation"])]
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", "dist", *more]
    return run(*command, cwd=sources, **environment)


def unpack(sources: Path) -> Path:
    (file,) = (sources / "dist").glob("*.whl")
    assert "-py3-none-" in file.name  # the library has no Python in it
    site = sources.parent / "site"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(site)
    return site


def quick_compiler(folder: Path) -> str:
    """A real one, without the minutes of optimization."""
    compiler = folder / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    return str(compiler)


USE = """
import warnings
import torch, fastsdpo
z, y = torch.randn(2, 9), torch.tensor([1, 2])
assert fastsdpo.__file__.startswith({site!r}), fastsdpo.__file__
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        fastsdpo.token_logps(z, y)
    fastsdpo.sdpo_loss(z, z, y, mode="full")
for warning in seen:
    print("warned:", warning.message)
print(fastsdpo.available_backends()["native"])
try:
    fastsdpo.token_logps(z, y, backend="native")
except ImportError as error:
    print(error)
"""


def use(site: Path) -> str:
    """What a fresh process that imports the package from ``site`` says."""
    result = run(sys.executable, "-c", USE.format(site=str(site)), cwd=site, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_source_distribution_holds_the_sources_of_the_kernels(sources):
    """A wheel that is made from it has the kernels: `python -m build`, and pip where no wheel fits."""
    made = run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=sources)
    assert made.returncode == 0, made.stderr
    (file,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels/cpu").iterdir()}
    assert len(wanted) > 5 and held >= {*wanted, "CMakeLists.txt", "setup.py", "fastsdpo/data/demo.jsonl"}
    assert not any(name.endswith((".so", ".dylib")) for name in held)


def test_broken_compiler_still_installs_and_explains_itself(sources):
    (sources / "fastsdpo" / "libfastsdpo.so").write_bytes(b"of an earlier build")
    built = wheel(sources, "-v", CXX="/bin/false")
    assert built.returncode == 0, built.stderr
    assert "THE NATIVE CPU KERNELS WERE NOT BUILT" in built.stdout + built.stderr
    site = unpack(sources)
    assert not list(site.glob("fastsdpo/libfastsdpo*"))
    text = use(site)
    assert "its build failed at install" in text
    assert "/bin/false" in text
    assert "FASTSDPO_REQUIRE_NATIVE=1" in text
    # Once, though four losses were computed, and before anybody asked.
    assert text.count("warned: losses are computed by the reference (eager PyTorch), slowly: ") == 1
    assert text.startswith("warned: ")
    assert "its build failed at install); `fastsdpo doctor` says why" in text.splitlines()[0]


def test_broken_compiler_is_fatal_on_request(sources):
    built = wheel(sources, CXX="/bin/false", FASTSDPO_REQUIRE_NATIVE="1")
    assert built.returncode != 0
    assert "is not able to compile a simple test program" in built.stdout + built.stderr


@pytest.mark.parametrize("isolated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_second_build_from_the_same_checkout_has_the_library(isolated, sources, tmp_path):
    """pip builds in another environment each time, and the first one's CMake and ninja are gone.

    Without pip's environments a ninja that is gone stands for them. What the kernels are does not matter here: they
    are empty, and compile at once.
    """
    for source in (sources / "kernels/cpu").glob("*.cpp"):
        source.write_text("")
    programs, tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", tmp_path / "tools"
    ninja = shutil.which("ninja", path=programs)
    tools.mkdir()
    if ninja is not None:
        shutil.copy(ninja, tools)
    for path in (f"{tools}{os.pathsep}{programs}", programs):
        shutil.rmtree(sources / "dist", ignore_errors=True)
        built = wheel(sources, isolated=isolated, PATH=path)
        shutil.rmtree(tools, ignore_errors=True)
        if "No matching distribution found" in built.stderr:
            pytest.skip("no package index to build the isolated environment from")
        assert built.returncode == 0, built.stderr
        (file,) = (sources / "dist").glob("*.whl")
        names = zipfile.ZipFile(file).namelist()
        assert "fastsdpo/libfastsdpo.so" in names
        assert "fastsdpo/native_build_failed.txt" not in names


def install(sources: Path) -> Path:
    """The program `fastsdpo` of the wheel, in an environment that has the dependencies but not this checkout."""
    environment = sources.parent / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=sources).returncode == 0
    programs = environment / ("Scripts" if os.name == "nt" else "bin")
    (file,) = (sources / "dist").glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--no-deps", "--no-index")
    installed = run(*pip, str(file), cwd=sources)
    assert installed.returncode == 0, installed.stderr
    (site,) = {path.parents[1] for path in environment.rglob("fastsdpo/__init__.py")}
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # its own .pth files are not read
    return programs / "fastsdpo"


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False], ids=["native", "pure"])
def test_an_installed_wheel_runs_the_readme(native, sources, tiny, tmp_path):
    """With and without the library: the README's four commands, from an empty folder."""
    compiler, required = (quick_compiler(tmp_path), "1") if native else ("/bin/false", "0")
    built = wheel(sources, CXX=compiler, FASTSDPO_REQUIRE_NATIVE=required)
    assert built.returncode == 0, built.stderr
    site = unpack(sources)
    assert [path.name for path in site.glob("fastsdpo/libfastsdpo*")] == ["libfastsdpo.so"] * native
    assert not list(site.glob("kernels*"))
    assert (use(site).strip() == "available") == native
    fastsdpo, empty = install(sources), tmp_path / "empty"
    empty.mkdir()
    job = [argv for argv in commands(ROOT / "README.md") if argv[0] in ("demo-data", "prepare", "train", "signal")]
    assert len(job) == 4
    for argv in job:
        argv = [str(tiny) if word in NAMES else word for word in argv]
        done = run(str(fastsdpo), *argv, cwd=empty, PYTHONPATH="")
        assert done.returncode == 0, done.stderr[-2000:]
        if argv[0] == "train":
            said = "computed by the native kernels" if native else "by the reference (eager PyTorch), slowly: "
            assert said in done.stdout
    assert (empty / "runs/first/model/README.md").exists() and (empty / "signal.html").exists()


def test_missing_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "_file", lambda: tmp_path / "libfastsdpo.so")
    _native._load.cache_clear()
    try:
        available, reason = _native.native_available()
        assert not available
        assert "was not built" in reason
        with pytest.raises(ImportError, match="backend='native' is not available"):
            _native.library()
        (tmp_path / "libfastsdpo.so").write_bytes(b"no library")
        _native._load.cache_clear()
        assert "cannot be loaded" in _native.native_available()[1]
    finally:
        monkeypatch.undo()
        _native._load.cache_clear()


def test_the_fallback_is_said_once_also_under_compile(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "_file", lambda: tmp_path / "libfastsdpo.so")
    monkeypatch.setattr(backend, "_told", set())
    _native._load.cache_clear()
    torch._dynamo.reset()
    z, y = torch.randn(2, 9), torch.tensor([1, 2])

    @torch.compile(fullgraph=True, backend="eager")
    def loss(z, y):
        return fastsdpo.token_logps(z, y)

    try:
        with pytest.warns(UserWarning, match="computed by the reference .*libfastsdpo.so was not"):
            loss(z, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastsdpo.token_logps(z, y)
        # Who was told in words is not warned.
        backend._told.clear()
        assert "no native kernels" in backend.describe_backend("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastsdpo.token_logps(z, y)
    finally:
        monkeypatch.undo()
        _native._load.cache_clear()
        torch._dynamo.reset()


needs_native = pytest.mark.skipif(
    not _native.native_available()[0], reason=f"native kernels: {_native.native_available()[1]}"
)


@pytest.mark.slow
@needs_native
def test_without_openmp_the_kernels_have_one_thread(sources):
    """As with Apple's compiler: what is built says so, and computes the same."""
    off = f"-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON -DFASTSDPO_WERROR=ON -DFASTSDPO_OUTPUT_DIRECTORY={sources}/fastsdpo"
    configured = run("cmake", "-S", ".", "-B", "build", *off.split(), cwd=sources)
    assert "the kernels will have one thread" in configured.stderr
    built = run("cmake", "--build", "build", "--target", "fastsdpo_library", cwd=sources)
    assert built.returncode == 0, built.stdout[-2000:]
    code = """
import torch, fastsdpo
from fastsdpo import _native
print(_native.native_available()[1])
z = torch.randn(1, 2, 100_000, generator=torch.Generator().manual_seed(0))
logps = [fastsdpo.token_logps(z, torch.tensor([[1, 2]]), backend=name) for name in ("native", "reference")]
torch.testing.assert_close(logps[0], logps[1], rtol=1e-6, atol=1e-6)
"""
    tried = run(sys.executable, "-c", code, cwd=sources, PYTHONPATH=str(sources))
    assert tried.returncode == 0, tried.stderr[-2000:]
    assert "one thread: it was built without OpenMP" in tried.stdout


@needs_native
@pytest.mark.slow
def test_instruction_set_is_chosen_by_the_environment():
    code = "from fastsdpo import _native; print(_native.native_available())"
    worst = _native.instruction_sets()[-1]
    chosen = run(sys.executable, "-c", code, cwd=ROOT, FASTSDPO_ISA=worst)
    assert f"instruction set {worst}" in chosen.stdout, chosen.stderr
    unknown = run(sys.executable, "-c", code, cwd=ROOT, FASTSDPO_ISA="x86-64-v9")
    assert "FASTSDPO_ISA must be one of" in unknown.stderr


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """The kernels run on the threads that PyTorch has, not on a second pool."""
    code = """
import torch
from fastsdpo.ops import _native
from fastsdpo.ops.rows import LossOptions
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)
z = torch.randn(1, 64, 5000)
_native.token_forward(z, torch.zeros(64, dtype=torch.long), LossOptions())
files = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
print(sorted(files))
assert len([file for file in files if "libgomp" in file or "libiomp" in file]) == 1, files
"""
    result = run(sys.executable, "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_native
def test_no_instruction_set_leaks_between_builds():
    """No weak function: the linker would keep one instruction set's copy for all of them."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    symbols = run(nm, "--defined-only", str(_native._file()), cwd=ROOT).stdout.splitlines()
    shared = [line for line in symbols if line.split()[-2] in ("W", "V", "u")]
    assert not shared
