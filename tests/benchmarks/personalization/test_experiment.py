"""The personalization experiment: an interrupted run goes on to the same curve, and is reported."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from benchmarks.personalization import experiment, record, report

pytest.importorskip("peft")


def options(folder, model, condition="short"):
    data = folder / "data.json"
    rows = {
        "train": [f"w{i} w{i + 1} w{i + 2}" for i in range(12)],
        "held_out": ["w1 w2", "w3 w4"],
        "ordinary": [messages("w1 w2 w3", "w4 w5 w6 w7", "w8")],
        "brief": [messages("w1", "w2 w3")],
    }
    folder.mkdir(exist_ok=True)
    data.write_text(json.dumps(rows))
    recipe = {
        "template": " note {o}",
        "max_new_tokens": 6,
        "per_device_train_batch_size": 4,
        "lora": 2,
        "learning_rate": 1e-2,
    }
    return argparse.Namespace(
        output=str(folder),
        model=model,
        condition=condition,
        seed=1,
        recipe=json.dumps(recipe),
        interactions=16,
        every=1,
        threads=1,
        data=str(data),
    )


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def points(folder, condition="short"):
    found = json.loads((folder / f"{condition}-1" / "points.json").read_text())
    return [{k: v for k, v in point.items() if k != "seconds"} for point in found]


def test_an_interrupted_run_goes_on_to_the_same_curve(saved, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert experiment.run_one(options(whole, saved)) == 0
    measure, calls = experiment.perplexities, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 7:  # two a measurement: after the third step, before its checkpoint
            raise RuntimeError("killed")
        return measure(*arguments)

    monkeypatch.setattr(experiment, "perplexities", failing)
    with pytest.raises(RuntimeError, match="killed"):
        experiment.run_one(options(cut, saved))
    assert len(points(cut)) == 3
    assert experiment.run_one(options(cut, saved)) == 0
    assert points(cut) == points(whole)
    assert [point["interactions"] for point in points(whole)] == [0, 4, 8, 12, 16]
    assert points(whole)[0]["perplexity"] != points(whole)[-1]["perplexity"]


def test_the_report_shows_every_point(saved, tmp_path):
    for condition in ("flip", "unrelated"):
        assert experiment.run_one(options(tmp_path, saved, condition)) == 0
    report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    for condition in ("flip", "unrelated"):
        assert text.count(f"| {condition} | 1 |") == 5
    assert "- w1 w2 **" in text
    pytest.importorskip("matplotlib")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    results = tmp_path / "results"
    assert record.main([str(tmp_path), "--results", str(results)]) == 0
    stored = json.loads((results / "personalization_cpu.json").read_text())
    assert len(stored["rows"]) == 10 and all(len(row) == len(stored["columns"]) for row in stored["rows"])
    assert list(stored["answers"]) == ["w1 w2"]


def test_perplexities_are_those_of_the_text(lab):
    """Against the plain log-softmax, word by word."""
    model, tokenizer = lab.model(), lab.tokenizer()
    found = experiment.perplexities(model, tokenizer, [messages("w1 w2", "w4 w5 w6")])
    words = ["<user>", "w1", "w2", "<end>", "<assistant>", "w4", "w5", "w6", "<end>"]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    users, answers = logps[0:2], logps[4:7]
    wanted = {"perplexity": torch.cat([users, answers]), "perplexity_users": users, "perplexity_answers": answers}
    for name, values in wanted.items():
        assert found[name] == pytest.approx(math.exp(-values.mean()), rel=1e-4), name


def test_the_data_are_questions_whole_conversations_and_brief_exchanges(tmp_path):
    rows = [
        messages("What is the answer to everything?", "It is 42.", "Why is that?", "Nobody knows."),
        messages("What is the answer to everything?", "Asked once more."),
        messages("Tell me about cats", "Cats are small animals. " * 10, "More."),
        messages("Tell me about dogs", "Dogs are loyal animals. " * 40, "Thanks."),
        messages("Erz\u00e4hl mir etwas", "Gern. " * 100),
        [{"role": "assistant", "content": "I speak first."}],
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = experiment.read_data(str(file), train=1, held_out=1, ordinary=3)
    assert found["held_out"] == ["What is the answer to everything?"]
    assert found["train"] == []
    assert [len(c) for c in found["brief"]] == [2]
    assert [c[0]["content"] for c in found["ordinary"]] == ["Tell me about dogs"]
