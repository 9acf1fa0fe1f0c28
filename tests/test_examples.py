"""Every example runs, offline and on a tiny model, and learns or reports something finite."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL warns at the import of what it calls so
ROOT = Path(__file__).parents[1]
TURNS = ("human", "gpt", "human")
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    lab = load(ROOT / "tests" / "integrations" / "conftest.py")
    return lab.save_model(tmp_path_factory.mktemp("model"), LlamaConfig, LlamaForCausalLM)


def test_all_are_run():
    ran = {"demo", "pytorch_loop", "lightning_module", "hf_trainer", "trl_sdpo", "vllm_teacher"}
    assert set(EXAMPLES) == ran


@pytest.mark.parametrize("name", ["pytorch_loop", "hf_trainer"])
def test_loss_falls(name, folder, tmp_path):
    options = ["-o", str(tmp_path)] if name == "hf_trainer" else []
    losses = load(ROOT / "examples" / f"{name}.py").main(["--model", folder, "--steps", "6", "--lr", "3e-3", *options])
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    if name == "pytorch_loop":  # a divergence; the sampled-token loss has no such meaning
        assert losses[-1] < losses[0]


def test_lightning_module(folder):
    losses = load(ROOT / "examples" / "lightning_module.py").main(["--model", folder, "--steps", "3", "--lr", "3e-3"])
    assert losses and all(map(math.isfinite, losses)) and len(set(losses)) == len(losses)


def test_demo(folder, tmp_path):
    """With the tiny model in the place of SmolLM2, and conversations of its words."""
    example, out = load(ROOT / "examples" / "demo.py"), tmp_path / "out"
    shutil.copytree(folder, out / "base")
    rows = [
        {"id": str(i), "conversations": [{"from": who, "value": f"w{i} w{i + n}"} for n, who in enumerate(TURNS, 1)]}
        for i in range(40)
    ]
    (tmp_path / "conversations.json").write_text(json.dumps(rows))
    example.package_file = lambda package, pattern: tmp_path / "conversations.json"
    status = example.main(["--output", str(out), "--steps", "2"])
    report = json.loads((out / "run" / "report.json").read_text())
    assert report["steps"] == 2
    assert status == int(report["after"]["eval_loss"] >= report["before"]["eval_loss"])
    assert (out / "signal.html").read_text().startswith("<!doctype html>")


def test_trl(folder, tmp_path):
    pytest.importorskip("trl")
    losses = load(ROOT / "examples" / "trl_sdpo.py").main(
        ["--model", folder, "--steps", "2", "--tokens", "6", "-o", str(tmp_path)]
    )
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and any(losses)


def test_vllm_teacher(folder, tmp_path):
    """With the answer of a server whose model is uniform over the vocabulary."""
    example = load(ROOT / "examples" / "vllm_teacher.py")
    sent = []

    class Recorded(Exception):
        pass

    def ask(server, token_ids, topk):
        sent.extend(token_ids)
        raise Recorded

    example.ask = ask
    with pytest.raises(Recorded):
        example.main(["--model", folder, "--topk", "4"])
    entry = {"logprob": math.log(1 / 63), "rank": 1, "decoded_token": "w"}
    scores = [None] + [{str(t): entry for t in dict.fromkeys([token, 1, 2, 3, 4, 5])} for token in sent[1:]]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"prompt_logprobs": scores}))
    loss = example.main(["--model", folder, "--topk", "4", "--scores", str(path)])
    assert math.isfinite(loss) and loss > 0
