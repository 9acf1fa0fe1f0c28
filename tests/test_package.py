"""The package itself: what importing needs, what is where."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastsdpo

ROOT = Path(__file__).resolve().parent.parent

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "transformers", "accelerate", "datasets", "numpy.testing"}:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

import torch
for name in [n for n in sys.modules if n.split(".")[0] in ("triton", "transformers")]:
    del sys.modules[name]
sys.meta_path.insert(0, Block())
import fastsdpo
z, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
out = fastsdpo.sdpo_loss(z, t, torch.arange(4), mode="full", backend="reference")
out.loss.backward()
auto = fastsdpo.sdpo_loss(z, t, torch.arange(4), mode="full")
assert abs(float(auto.loss - out.loss)) < 1e-5
print(float(out.loss), bool(z.grad.abs().sum() > 0), sorted(
    n for n in sys.modules if n.split(".")[0] in ("transformers", "accelerate", "datasets")))
"""


def test_import_and_loss_need_torch_only():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", BLOCKED], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    loss, has_gradient, modules = run.stdout.strip().split(" ", 2)
    assert float(loss) > 0
    assert has_gradient == "True"
    assert modules == "[]"


TORCH_ONLY = """
from importlib.machinery import PathFinder

ABSENT = {"numpy", "transformers", "accelerate", "datasets", "peft", "tqdm"}
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.split(".")[0] in ABSENT else find(name, *more)
)
from fastsdpo.cli import COMMANDS, main
assert main(["--help"]) == main(["--version"]) == 0
interaction = ["--model", "m", "--prompt", "x", "--completion", "y", "--followup", "z"]
for name in COMMANDS:
    if name in ("prepare", "bench", "doctor"):
        continue  # they need torch only
    assert main([name, *(interaction if name == "signal" else [])]) != 0
"""


def test_commands_without_their_packages_say_what_to_install():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TORCH_ONLY], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert [line.split(":")[0] for line in said] == [
        f"fastsdpo {name}" for name in ("train", "online", "chat", "eval", "signal")
    ]
    assert all(line.endswith("install it with: pip install 'fastsdpo[train]'") for line in said)


def test_kernels_folder_holds_no_python():
    """transformers imports a package named `kernels`: a module here would shadow it."""
    assert (ROOT / "kernels").is_dir()
    assert not list((ROOT / "kernels").rglob("*.py"))
    text = (ROOT / "pyproject.toml").read_text()
    assert 'include = ["fastsdpo*"]' in text


def test_public_names_resolve():
    for name in fastsdpo.__all__:
        assert getattr(fastsdpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastsdpo.nothing


def test_triton_and_transformers_are_imported_where_they_may_be():
    for path in (ROOT / "fastsdpo").rglob("*.py"):
        text = path.read_text()
        lines = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        if path.name not in ("_triton.py", "_triton_kernels.py"):
            assert not any(line.split()[1].split(".")[0] == "triton" for line in lines), path
        upper = ("ops", "data")
        if path.relative_to(ROOT / "fastsdpo").parts[0] in upper:
            assert not any(line.split()[1].split(".")[0] in ("transformers", "accelerate") for line in lines), path


def run_cli(*args):
    return subprocess.run([sys.executable, "-m", "fastsdpo", *args], capture_output=True, text=True, cwd=ROOT)


def test_command_line_lists_commands_and_refuses_others():
    shown = run_cli("--help")
    assert shown.returncode == 0
    assert "prepare" in shown.stdout
    assert "train" in shown.stdout
    assert run_cli("--version").stdout.strip() == f"fastsdpo {fastsdpo.__version__}"
    unknown = run_cli("frobnicate")
    assert unknown.returncode == 2
    assert "unknown command 'frobnicate'" in unknown.stderr
