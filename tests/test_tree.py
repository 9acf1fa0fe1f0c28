"""The rules of the house that can be read off the source: imports, private names, sizes. CONTRIBUTING states them."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastsdpo", "benchmarks", "examples", "tests")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
LIBRARY = [path for path in FILES if path.parts[0] == "fastsdpo"]
KERNELS = "fastsdpo/ops/_triton_kernels.py"  # Triton has no structures; its compiled code depends on the source

# Functions with more positional arguments than `MOST_ARGUMENTS`.
MOST_ARGUMENTS = 12
MANY_ARGUMENTS = {
    "chunked_divergence_loss": "TRL calls it with these arguments, in place of its own function",
    "chunked_jsd_loss": "the same",
}
MOST_LINES = {"file": 450, "class": 350, "function": 60}  # of a function without its docstring
LONG_FILES = {KERNELS: "all kernels share their jitted functions, and recorded results name this source"}
LONG_FUNCTIONS = {
    "check_loss": "one check after the other of every argument of the losses, in the order of the documentation",
    "linear_sdpo_loss": "27 lines of options; its checks of pairs of tensors are used nowhere else",
}
# Private modules that another folder may import: the compiled library, the version, and for the programs that compile
# or execute the kernels, whose names are in recorded results.
SHARED_PRIVATE = ("fastsdpo._native", "fastsdpo._version", "fastsdpo.ops._triton", "fastsdpo.ops._triton_kernels")


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, *FUNCTION))]


def find(path: Path, kind) -> list:
    return [node for node in nodes_of(path) if isinstance(node, kind)]


def imports(path: Path):
    """``(module, name or None)`` of everything of this repository that a file imports, wherever in the file."""
    found = [(alias.name, None) for node in find(path, ast.Import) for alias in node.names]
    for node in find(path, ast.ImportFrom):
        base = ".".join(path.parts[: len(path.parts) - node.level]) if node.level else ""
        found += [(".".join(filter(None, (base, node.module))), alias.name) for alias in node.names]
    return [pair for pair in found if pair[0].split(".")[0] in FOLDERS]


@cache
def is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.with_suffix(".py").exists() or place.is_dir()


@cache
def room(module: str) -> str:
    """``ops`` of ``fastsdpo.ops.linear``, ``fastsdpo`` of the package itself, ``tests/ptx``, ``benchmarks``."""
    parts = module.split(".")
    if parts[:2] == ["tests", "ptx"]:
        return "tests/ptx"
    if parts[0] != "fastsdpo":
        return parts[0]
    return parts[1] if len(parts) > 1 and is_module(".".join(parts[:2])) else "fastsdpo"


def table():
    """The rooms of CONTRIBUTING, each with those that it may import, which stand above it: there is no circle."""
    (block,) = re.findall(r"```text\nroom +may import\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S)
    allowed: dict[str, set[str]] = {}
    for here, *lower in (line.replace(",", " ").split() for line in block.splitlines()):
        assert lower == ["all", "above"] or allowed.keys() >= set(lower), f"{here} imports upwards, by the table"
        allowed[here] = set(allowed if lower == ["all", "above"] else lower)
    return allowed


def test_imports_are_those_of_the_table_in_contributing():
    allowed, wrong = table(), []
    for path in FILES:
        here = room(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        for module, name in imports(path):
            there = room(f"{module}.{name}" if module == "fastsdpo" and name else module)
            if there != here and there not in allowed.get(here, ()):
                wrong.append(f"{path}: {here} imports {there}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_no_private_import_across_folders():
    wrong = []
    for path in FILES:
        for module, name in imports(path):
            if name and is_module(f"{module}.{name}"):
                module, name = f"{module}.{name}", None
            parts = module.split(".")
            private = any(part.startswith("_") for part in (*parts, name or ""))
            folder = tuple(parts[:-1]) if is_module(module) and not (ROOT / Path(*parts)).is_dir() else tuple(parts)
            same = folder == path.parts[:-1] or folder[1:] == path.parts[1:-1] != ()  # tests/ops may look into ops
            if private and not same and module not in SHARED_PRIVATE and not (name or "").startswith("__"):
                wrong.append(f"{path}: {module} {name or ''}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_few_positional_arguments():
    nodes = [node for path in FILES if path.as_posix() != KERNELS for node in find(path, FUNCTION)]
    found = {node.name for node in nodes if len(node.args.posonlyargs + node.args.args) > MOST_ARGUMENTS}
    assert found == set(MANY_ARGUMENTS)


def test_the_formatter_decides():
    assert sum((ROOT / path).read_text("utf-8").count("# fmt: " + "skip") for path in FILES) <= 60


def test_files_are_short():
    paths = [path for path in FILES if path.parts[0] in ("fastsdpo", "benchmarks")]
    lengths = {path.as_posix(): len((ROOT / path).read_text("utf-8").splitlines()) for path in paths}
    assert sorted(path for path, length in lengths.items() if length > MOST_LINES["file"]) == sorted(LONG_FILES)


def lines_of(node) -> int:
    found = node.end_lineno - node.lineno + 1
    if not isinstance(node, ast.ClassDef) and ast.get_docstring(node):
        found -= node.body[0].end_lineno - node.body[0].lineno + 1
    return found


@pytest.mark.parametrize(("kind", "exceptions"), [("class", ()), ("function", LONG_FUNCTIONS)])
def test_classes_and_functions_are_short(kind, exceptions):
    nodes = ast.ClassDef if kind == "class" else FUNCTION
    lengths = {(path, node.name): lines_of(node) for path in LIBRARY for node in find(path, nodes)}
    long = {key: length for key, length in lengths.items() if length > MOST_LINES[kind]}
    found = {name: f"{path}: {length}" for (path, name), length in long.items() if path.as_posix() != KERNELS}
    assert found.keys() == set(exceptions), found


def test_a_class_has_its_name_alone():
    found = defaultdict(list)
    for path in LIBRARY:
        for node in find(path, ast.ClassDef):
            found[node.name].append(path.as_posix())
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}
