"""Every example runs, offline and on a tiny model, and learns or reports something finite."""

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


@pytest.mark.parametrize(("name", "steps"), [("pytorch_loop", 6), ("hf_trainer", 6), ("lightning_module", 3)])
def test_losses(name, steps, folder, tmp_path):
    options = ["--model", folder, "--steps", str(steps), "--lr", "3e-3"]
    options += ["-o", str(tmp_path)] if name == "hf_trainer" else []
    losses = load(ROOT / "examples" / f"{name}.py").main(options)
    assert len(set(losses)) == len(losses) == steps and all(map(math.isfinite, losses))
    if name == "pytorch_loop":  # a divergence; the sampled-token loss has no such meaning
        assert losses[-1] < losses[0]


def test_verl_data_set(folder, tmp_path):
    """One row per interaction; the teacher's ids are those of the prompt with the follow-up in it."""
    parquet, transformers = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("transformers")
    say = lambda role, text: {"role": role, "content": text}  # noqa: E731
    row = {"prompt": [say("user", "w1 w2")], "completion": say("assistant", "w3"), "user_response": say("user", "w4")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    example = load(ROOT / "examples" / "verl" / "prepare.py")
    options = ["--model", folder, "--template", " w5 {o}", "-o", str(tmp_path / "train.parquet")]
    assert example.main([str(tmp_path / "rows.jsonl"), *options]) == 1
    (found,) = parquet.read_table(tmp_path / "train.parquet").to_pylist()
    text = transformers.AutoTokenizer.from_pretrained(folder).decode(found.pop("teacher_prompt_ids"))
    assert text == "<user> w1 w2 w5 w4 <end> <assistant>"
    assert found["prompt"] == row["prompt"] and found["extra_info"] == {"index": 0}


@pytest.fixture
def demo(folder, tmp_path):
    """The demo with the tiny model in the place of SmolLM2, and conversations of its words."""
    example, out = load(ROOT / "examples" / "demo.py"), tmp_path / "out"
    shutil.copytree(folder, out / "base")

    def words(i, n):
        return " ".join(f"w{(i * n + k) % 40}" for k in range(9)) + "?"

    rows = [
        {"id": str(i), "conversations": [{"from": who, "value": words(i, n)} for n, who in enumerate(TURNS, 1)]}
        for i in range(40)
    ]
    rows += [{**row, "conversations": row["conversations"][1:] * 2} for row in rows[:3]]
    rows[-1]["conversations"] = [{"from": who, "value": f"w{n} w3"} for n, who in enumerate(TURNS)]
    (tmp_path / "conversations.json").write_text(json.dumps(rows))
    example.package_file = lambda package, pattern: tmp_path / "conversations.json"
    return example, out


def test_demo(demo, capsys, tmp_path, monkeypatch):
    """All of it; the tiny model learns nothing, so the exit status is 1, and says why."""
    example, out = demo
    counted = {name: 0.25 for name in example.COUNTS}
    row = {"case": {"condition": "control", "seed": 1}, "after": counted, "perplexity_change": 0.5, "run": {}}
    example.harness.write(tmp_path / "personalization_here.json", [row])
    monkeypatch.setattr(example.harness, "RESULTS", tmp_path)
    assert example.main(["--output", str(out), "--steps", "1", "--questions", "6"]) == 1
    shown = capsys.readouterr()
    assert "failed: satisfied did not rise by two standard errors" in shown.err
    report = json.loads((out / "run" / "report.json").read_text())
    assert report["steps"] == 1 and set(report["headroom"]) == {"wish in the prompt", "unrelated remark in the prompt"}
    for row in ("before", "wish in the prompt", "unrelated note in the prompt", "after"):
        assert f"\n| {row}" in shown.out
    assert "control (not run here: personalization_here.json, seeds: 1) | 25% | 0.2 |" in shown.out
    assert json.loads((out / "logged" / "report.json").read_text())["steps"] == 1
    assert (out / "signal_3.html").read_text().startswith("<!doctype html>")


LITTLE = [1] + [0] * 11  # within two standard errors


@pytest.mark.parametrize(
    ("before", "after", "failed"), [([0] * 12, [1] * 8 + [0] * 4, 0), ([0] * 12, LITTLE, 1), ([1] * 12, [0] * 12, 1)]
)
def test_the_demo_fails_on_what_it_measures(demo, before, after, failed):
    example, _ = demo
    answers = [
        example.Answers([{"prompt": f"w{i}000?", "response": f"w{i}000", "satisfied": s} for i, s in enumerate(x)])
        for x in (before, after)
    ]
    assert len(example.failures(*answers)) == failed
    silent = example.Answers([{"prompt": q, "response": "This.", "satisfied": True} for q in answers[0].texts])
    assert any("keywords fell" in text for text in example.failures(answers[0], silent))


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
