"""The recipes of the paper: every command of every file, with --tiny, on the model of random weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.signal.conftest import folder, model, tokenizer  # noqa: F401  the tiny chat model, saved

ROOT = Path(__file__).parents[1]
LEFT = {
    "wildfeedback": ("interactions.jsonl", "run/model/model.safetensors", "run/report.json"),
    "wildchat": ("interactions.jsonl", "run/model/model.safetensors", "run/report.json"),
    "sft": ("run/model/model.safetensors",),
    "personas": ("run/interactions.jsonl", "curve.json"),
    "flip": ("curve-concise-casual-beginner.json", "curve-detailed-professional-expert.json"),
    "sequence": ("curve-no-emojis.json", "curve-no-filler-praise.json", "curve-direct.json"),
    "oracle": ("oracle.json",),
    "benchmarks": ("ifeval.json", "alpaca_eval.json", "arena_hard.jsonl"),
    "signal": ("heatmap.png", "signal.json"),
}


def test_every_recipe_is_run_here():
    names = {path.stem for path in (ROOT / "recipes").glob("*.sh")} - {"common", "prompts"}
    table = (ROOT / "docs/recipes.md").read_text()
    assert names == set(LEFT) and all(f"| `{name}.sh` |" in table for name in names)


@pytest.mark.parametrize(
    "name", [name if name == "signal" else pytest.param(name, marks=pytest.mark.slow) for name in LEFT]
)
def test_a_recipe_runs(name, folder, tmp_path):  # noqa: F811
    if name == "sft":
        pytest.importorskip("trl")
    if name == "benchmarks":
        pytest.importorskip("if_verifiable")
    path = os.pathsep.join([str(ROOT), *sys.path])
    own = {"PYTHON": sys.executable, "TINY_MODEL": str(folder), "OUT": str(tmp_path), "PYTHONPATH": path}
    own |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = ["bash", str(ROOT / "recipes" / f"{name}.sh"), "--tiny"]
    given = {"env": {**os.environ, **own}, "cwd": tmp_path, "timeout": 550}  # pytest ends a test after 600
    done = subprocess.run(command, capture_output=True, text=True, **given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for left in LEFT[name]:
        assert (tmp_path / left).stat().st_size > 0, left
    if name == "signal":
        cases = json.loads((tmp_path / "signal.json").read_text())
        assert [case["case"] for case in cases] == ["shorter", "formal"]
        assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    if name == "benchmarks":
        answer = json.loads((tmp_path / "arena_hard.jsonl").read_text())
        assert answer["uid"] == "u1" and answer["messages"][1]["role"] == "assistant"
        assert json.loads((tmp_path / "alpaca_eval.json").read_text())[0]["generator"] == "mine"
        if importlib.util.find_spec("lm_eval"):
            (found,) = tmp_path.glob("lm_eval/*/results_*.json")
            assert 0 <= json.loads(found.read_text())["results"]["tiny_choice"]["acc,none"] <= 1
        else:
            assert "lm-eval is not installed" in done.stdout
    if name == "sequence":
        assert json.loads((tmp_path / "run/interactions.jsonl").read_text().splitlines()[0])["user_response"]
