"""The package itself: what importing needs, what is where."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastsdpo
from fastsdpo.cli import main

ROOT = Path(__file__).resolve().parent.parent

# One process for all that must be seen from a fresh start: starting torch takes seconds.
TORCH_ONLY = """
import runpy, sys
from importlib.machinery import PathFinder

ABSENT = {"numpy", "triton", "transformers", "accelerate", "datasets", "peft", "tqdm"}
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.split(".")[0] in ABSENT else find(name, *more)
)
import torch
import fastsdpo.cli

z, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
out = fastsdpo.sdpo_loss(z, t, torch.arange(4), mode="full", backend="reference")
out.loss.backward()
auto = fastsdpo.sdpo_loss(z, t, torch.arange(4), mode="full")
assert out.loss > 0 and z.grad.abs().sum() > 0 and abs(float(auto.loss - out.loss)) < 1e-5

GIVEN = {
    "train": "row.jsonl --model m -o o",
    "online": "row.jsonl --model m -o o --wish w",
    "chat": "--model m -o o",
    "eval": "row.jsonl --model m --base m --rule max_sentences=1",
    "signal": "--model m --prompt x --completion y --followup z",
}
for name, options in GIVEN.items():
    assert fastsdpo.cli.main([name, *options.split()]) != 0, name
sys.argv = ["fastsdpo", "--version"]
runpy.run_module("fastsdpo", run_name="__main__")
"""


def test_torch_is_enough_for_losses_and_commands_say_what_they_lack(tmp_path):
    message = {"role": "user", "content": "a"}
    row = {"prompt": [message], "completion": {"role": "assistant", "content": "b"}, "user_response": message}
    (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-W", "ignore", "-c", TORCH_ONLY]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"fastsdpo {fastsdpo.__version__}\n"
    said = done.stderr.splitlines()
    assert [line.split(":")[0].split()[1] for line in said] == ["train", "online", "chat", "eval", "signal"]
    assert all("install it with: pip install 'fastsdpo[train]'" in line for line in said)


LIGHT = """
import contextlib, io, sys
import fastsdpo.cli

for argv in (
    ["--help"], ["--version"], ["nosuch"], *([name, "--help"] for name in fastsdpo.cli.COMMANDS),
    *([name, "--nosuch"] for name in fastsdpo.cli.COMMANDS), ["eval", "p.txt"], ["online", "--list-rules"],
    ["demo-data"], ["prepare", "conversations.jsonl", "-o", "out/", "--eval-fraction", "0.1", "--quiet"],
):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        fastsdpo.cli.main(argv)
    assert "torch" not in sys.modules and "transformers" not in sys.modules, argv
fastsdpo.sdpo_loss, fastsdpo.linear_sdpo_loss, fastsdpo.SDPOLoss
assert "torch" in sys.modules and "torch._dynamo" not in sys.modules, "the compiler takes as long to import as torch"
"""


def test_help_and_prepare_start_without_torch(tmp_path):
    """And the losses start without its compiler: `import fastsdpo` costs no more than `import torch`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"interactions{end}" for end in (".jsonl", ".eval.jsonl", ".report.json")
    }


def test_command_line_lists_commands_and_refuses_others(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    assert {"prepare", "train", "signal", "bench", "doctor"} <= set(capsys.readouterr().out.split())
    assert main(["frobnicate"]) == 2 and main(["trian"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "unknown command 'frobnicate'" in said[0] and "did you mean 'train'?" in said[1]


def test_kernels_folder_holds_no_python():
    """transformers imports a package named `kernels`: a module here would shadow it."""
    assert (ROOT / "kernels").is_dir() and not list((ROOT / "kernels").rglob("*.py"))
    assert 'include = ["fastsdpo*"]' in (ROOT / "pyproject.toml").read_text()


def test_public_names_resolve():
    for name in fastsdpo.__all__:
        assert getattr(fastsdpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastsdpo.nothing


def test_packages_and_commands_are_imported_where_they_may_be():
    for path in (ROOT / "fastsdpo").rglob("*.py"):
        text, folder = path.read_text(), path.relative_to(ROOT / "fastsdpo").parts[0]
        at_top = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
        assert "triton" not in at_top or path.name in ("_triton.py", "_triton_kernels.py"), path
        assert folder not in ("ops", "data") or not {"transformers", "accelerate"} & set(at_top), path
