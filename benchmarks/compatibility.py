"""Which versions work: each combination in a virtual environment of its own, with the tests that matter.

    python -m benchmarks.compatibility                   # all of it (`make compatibility`)
    python -m benchmarks.compatibility --only oldest     # rows whose name matches; the others stay

The package is built once, as a wheel, and installed from it; what a combination does not name is what pip
chooses. Then `fastsdpo doctor` compares every kernel with float64, and `TESTS` run (warnings are no
errors here: they are other packages' and change with every version). Versions of Triton are put beside
this environment's torch: the kernels run in its interpreter and are compiled for `TARGETS`.

Written to benchmarks/results/compatibility_cpu.json, of which `python -m benchmarks.reliability` makes the tables. A
combination that does not install is a row that says so. Exit status 1 where one that installs has a failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, read_junit
from fastsdpo.timing import markdown_table

# The lowest versions are those of pyproject.toml, which a test compares.
OLDEST = {"torch": "2.6", "transformers": "5.0", "accelerate": "1.3", "triton": "3.2"}
OLDEST_PINS = [f"{name}=={OLDEST[name]}.0" for name in ("torch", "transformers", "accelerate")]
COMBINATIONS: dict[str, tuple[str, list[str]]] = {
    "oldest of all": ("3.10", OLDEST_PINS),
    "oldest torch, newest transformers": ("3.10", OLDEST_PINS[:1]),
    "newest torch, oldest transformers": ("3.13", OLDEST_PINS[1:2]),
    "newest of all": ("3.13", []),
    "as in constraints.txt": ("3.11", ["-c", str(ROOT / "constraints.txt")]),
}
TOOLS = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "pyarrow>=15", "zstandard", "psutil"]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "numpy")
TRITONS = ["3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", ""]  # "": the newest
TARGETS = ("sm_80", "sm_90", "gfx942")
VARIANTS = "^(logps|reverse KL|JSD|top-k JSD): "

# Stands in for ROCm's linker, which older versions of Triton (3.4, not 3.6) take from the system: there
# gfx942 is compiled to machine code all the same, and not linked.
LINKER = '#!/bin/sh\nif [ "$1" = --version ]; then echo none; else cp "$4" "$6"; fi\n'

# What touches the other packages: autograd, torch.library, compile, attention masks and hooks of
# models, Trainer, accelerate's processes, checkpoints, generation.
TESTS = [
    "tests/ops/test_weights.py",
    "tests/ops/test_reference.py",
    "tests/ops/test_native.py",
    "tests/ops/test_library.py",
    "tests/prefix/test_pack.py",
    "tests/prefix/test_forward.py",
    "tests/prefix/test_refusals.py",
    "tests/prefix/test_distributed.py",
    "tests/data/test_interactions.py",
    "tests/data/test_prepare.py",
    "tests/trainer/test_resume.py",
    "tests/trainer/test_two_processes.py",
    "tests/online/test_online.py",
    "tests/integrations/test_transformers.py",
]
# What a version cannot do, and is refused by name: (package, its versions, pattern of tests, why).
GPT2 = "GPT-2 passes its attention nothing, so its prefixes are not shared"
REFUSED = [
    ("transformers", "5.0.", "gpt2", GPT2),
    ("transformers", "5.0.", "active_dropout", GPT2),
    ("torch", "2.6.", "fsdp2", "its FSDP2 does not run on a CPU"),
]
INTERPRETED = ["tests/ops/test_triton.py", "-m", "interpreted and not slow"]
INTERPRETED_NAMES = "(ignored or nothing or slice)"
# The interpreters before Triton 3.7 make a scalar of an array of one element, which numpy 2.4 refuses.
OLD_INTERPRETERS, OLD_NUMPY = ("3.2.", "3.3.", "3.4.", "3.5.", "3.6."), "numpy==2.3.*"
# What a version's interpreter cannot do, as REFUSED above.
NO_FALSE = "its interpreter has no False, which the renormalized top-k loss takes"
NOT_INTERPRETED = [
    ("3.2.", "renorm", NO_FALSE),
    ("3.3.", "renorm", NO_FALSE),
    ("3.9.", "topk", "its interpreter takes no `&` of two comparisons as a mask, as top-k has it"),
]


def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess:
    """With what it says kept, standard error with standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= options.pop("environment", {})
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **options,
    )


def build(folder: Path) -> Path:
    """A wheel of the working tree's tracked files, and the tests without the package beside it."""
    source = folder / "source"
    listed = run(["git", "-C", ROOT, "ls-files", "-z"]).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    done = run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source],
        environment={"PATH": path_with(Path(sys.executable).parent), "FASTSDPO_REQUIRE_NATIVE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"the wheel was not built:\n{done.stdout}")
    for name in ("tests", "pyproject.toml", "benchmarks"):
        place = folder / "work" / name
        (shutil.copytree if (source / name).is_dir() else shutil.copyfile)(source / name, place)
    (wheel,) = folder.glob("fastsdpo-*.whl")
    return wheel


def path_with(first: Path) -> str:
    return f"{first}{os.pathsep}{os.environ.get('PATH', '')}"


def find_python(version: str) -> str | None:
    """An interpreter of that version which starts."""
    for name in (sys.executable, f"python{version}"):
        program = shutil.which(name)
        if program and run([program, "-V"]).stdout.startswith(f"Python {version}."):
            return program
    return None


def versions(python: Path, environment: dict[str, str] | None = None) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform\n"
        "found = {'python': platform.python_version()}\n"
        f"for name in {PACKAGES}:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: found[name] = None\n"
        "print(json.dumps(found))"
    )
    done = run([python, "-c", code], environment=environment or {})
    return json.loads(done.stdout.splitlines()[-1])


def pytest(python: Path, work: Path, tests: list[str], *options: str, **environment: str) -> dict:
    report = work / "tests.xml"
    report.unlink(missing_ok=True)
    done = run(
        [python, "-m", "pytest", "-q", "-o", "filterwarnings=default", f"--junitxml={report}", *options, *tests],
        cwd=work,
        environment=environment,
    )
    if not report.exists():
        return {"passed": 0, "skipped": 0, "failed": {"pytest": done.stdout[-2000:]}}
    return read_junit(report)


def doctor(python: Path, work: Path) -> dict[str, Any]:
    done = run([python, "-m", "fastsdpo", "doctor", "--json"], cwd=work)
    try:
        found = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        return {"checked": 0, "wrong": 1, "problem": done.stdout[-2000:]}
    return {"checked": found["checked"], "wrong": found["wrong"]}


def try_combination(name: str, wheel: Path, folder: Path) -> dict[str, Any]:
    version, wanted = COMBINATIONS[name]
    row: dict[str, Any] = {"name": name, "kind": "combination", "wanted": [w for w in wanted if "/" not in w]}
    python = find_python(version)
    if python is None:
        return {**row, "installed": False, "problem": f"no Python {version} here"}
    place = folder / "venv"
    shutil.rmtree(place, ignore_errors=True)
    run([python, "-m", "venv", place])
    inside = place / "bin" / "python"
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    started = time.monotonic()
    done = run([*pip, f"fastsdpo[train,peft,online] @ {wheel.as_uri()}", *TOOLS, *wanted])
    if done.returncode:
        return {**row, "installed": False, "problem": done.stdout[-1000:]}
    row |= {"installed": True, "versions": versions(inside), "install_seconds": time.monotonic() - started}
    work = folder / "work"
    started = time.monotonic()
    row["doctor"] = doctor(inside, work)
    refused = [entry for entry in REFUSED if row["versions"][entry[0]].startswith(entry[1])]
    row["refused"] = [f"{package} {version}x: {why}" for package, version, _, why in refused]
    names = " and ".join(f"not {pattern}" for _, _, pattern, _ in refused)
    row["tests"] = pytest(inside, work, TESTS, "--timeout", "300", "-k", names)
    row["seconds"] = time.monotonic() - started
    shutil.rmtree(place)
    return row


def try_triton(version: str, folder: Path) -> dict[str, Any]:
    """A version of Triton before this environment's own on the path."""
    row: dict[str, Any] = {"name": f"Triton {version or 'newest'}", "kind": "triton"}
    place = folder / "triton"
    shutil.rmtree(place, ignore_errors=True)
    wanted = [f"triton=={version}" if version else "triton"]
    if version.startswith(OLD_INTERPRETERS):
        wanted.append(OLD_NUMPY)
    done = run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, *wanted])
    if done.returncode:
        return {**row, "installed": False, "problem": done.stdout[-1000:]}
    python, work = Path(sys.executable), folder / "work"
    beside = {"PYTHONPATH": str(place)}
    row |= {"installed": True, "versions": versions(python, beside)}
    started = time.monotonic()
    refused = [entry for entry in NOT_INTERPRETED if row["versions"]["triton"].startswith(entry[0])]
    row["refused"] = [f"Triton {start}x: {why}" for start, _, why in refused]
    names = " and ".join([INTERPRETED_NAMES, *(f"not {pattern}" for _, pattern, _ in refused)])
    row["tests"] = pytest(python, work, INTERPRETED, "-k", names, "--timeout", "300", TRITON_INTERPRET="1", **beside)
    linker = folder / "linker"
    linker.write_text(LINKER)
    linker.chmod(0o755)
    cache = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_HIP_LLD_PATH": str(linker)}
    shutil.rmtree(folder / "cache", ignore_errors=True)
    done = run([python, "-m", "benchmarks.compatibility", "--compile"], cwd=work, environment={**beside, **cache})
    try:
        row["compiled"] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        row["compiled"] = {"tried": 1, "failed": {"all": done.stdout[-1000:]}}
    row["seconds"] = time.monotonic() - started
    return row


def compile_some() -> dict[str, Any]:
    """Some kernels for every target, each loaded with 16 bytes at a time as the launchers do."""
    from benchmarks import compile_matrix

    tried, failed = 0, {}
    for target in TARGETS:
        for variant in compile_matrix.variants("bf16", amd=not target.startswith("sm_")):
            if not re.search(VARIANTS, variant.name):
                continue
            tried += 1
            try:
                compile_matrix.compile_variant(variant, target)
            except Exception as problem:  # the row shows it
                failed[f"{variant.name} / {target}"] = f"{type(problem).__name__}: {problem}"[:500]
    return {"tried": tried, "failed": failed}


def bad(row: dict[str, Any]) -> bool:
    if not row["installed"]:
        return False
    return bool(row["tests"]["failed"] or row.get("doctor", {}).get("wrong") or row.get("compiled", {}).get("failed"))


def tests_of(row: dict[str, Any]) -> str:
    found = row["tests"]
    return f"{found['passed']} passed, {found['skipped']} skipped, {len(found['failed'])} failed"


def table(rows: list[dict[str, Any]]) -> str:
    """Both tables, as Markdown."""
    combinations, tritons, refused = [], [], []
    for row in rows:
        if not row["installed"]:
            why = " ".join(row["problem"].split())[-160:].replace("|", "/")
            line = [row["name"], f"does not install here: {why}"]
            (combinations if row["kind"] == "combination" else tritons).append(line)
            continue
        refused += [f"\n- Left out of the tests: {text}." for text in row.get("refused", [])]
        found = row["versions"]
        if row["kind"] == "combination":
            names = [str(found[n] or "none") for n in ("python", "torch", "transformers", "accelerate", "triton")]
            right = f"{row['doctor']['checked'] - row['doctor']['wrong']} of {row['doctor']['checked']}"
            combinations.append([row["name"], *names, right, tests_of(row)])
        else:
            compiled = row["compiled"]
            right = f"{compiled['tried'] - len(compiled['failed'])} of {compiled['tried']} kernels"
            tritons.append([found["triton"], found["torch"], tests_of(row), right])
    header = ["combination", "Python", "torch", "transformers", "accelerate", "Triton", "kernels right", "tests"]
    text = markdown_table(header, combinations)
    header = ["Triton", "torch", "interpreted kernels", f"compiled for {', '.join(TARGETS)}"]
    return f"{text}\n{markdown_table(header, tritons)}{''.join(dict.fromkeys(refused))}\n"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line for each row, in the order in which they are run."""
    order = [*COMBINATIONS, *(f"Triton {version or 'newest'}" for version in TRITONS)]
    rows = sorted(rows, key=lambda row: order.index(row["name"]))
    path.write_text('{"rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n", "utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.compile:
        print(json.dumps(compile_some()))
        return 0
    path = options.output / "compatibility_cpu.json"
    rows = {}
    if path.exists():
        rows = {row["name"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}
    with tempfile.TemporaryDirectory(prefix="compatibility-") as name:
        folder = Path(name)
        wheel = build(folder)
        jobs: dict[str, Any] = {
            combination: lambda name=combination: try_combination(name, wheel, folder) for combination in COMBINATIONS
        }
        jobs |= {
            f"Triton {version or 'newest'}": lambda version=version: try_triton(version, folder) for version in TRITONS
        }
        for job, call in jobs.items():
            if not re.search(options.only, job):
                continue
            print(job, flush=True)
            rows[job] = {**call(), "date": str(datetime.date.today())}
            write(path, list(rows.values()))
            row = rows[job]
            print(
                f"  {row['problem'][-500:]}"
                if not row["installed"]
                else f"  {row['tests']['passed']} passed, {len(row['tests']['failed'])} failed, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )
    return int(any(bad(row) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
