"""The personalization experiment on a tiny model: every condition runs, and an interrupted run goes on."""

import json

import pytest
import torch

from benchmarks import harness
from benchmarks.personalization import experiment, ifeval, report
from benchmarks.personalization.data import COUNTS, Data, read_data
from benchmarks.personalization.experiment import CONDITIONS, Baseline, Experiment, make_trainer
from benchmarks.personalization.users import KindUser
from fastsdpo.online.users import UNRELATED, ConstantUser
from tests.plain import answer_logps

pytest.importorskip("peft")
LONG, OTHER = " ".join(f"w{i}" for i in range(30)), "w1 w2 w3"
DATA = Data([f"w{i} w{i + 1} w{i + 2}" for i in range(12)], ["w1 w2"], ["w3 w4", "w5 w6"], [])
TINY = {"template": " note {o}", "max_new_tokens": 6, "eval_max_new_tokens": 6, "neutral_followup": "w9"}
TINY |= {"global_batch_size": 4, "per_device_train_batch_size": 4}


@pytest.fixture
def lab_of(saved, lab, monkeypatch):
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    monkeypatch.setattr(experiment, "ROUNDS", 2)
    given = {"model_file": saved, "data": DATA._replace(ordinary=[talk]), "settings": TINY}
    return lambda folder: Experiment(folder / "personalization_tiny.json", folder / "work", **given)


def without_seconds(path):
    return [{**row, "seconds": None, "run": None} for row in harness.read(path)]


@pytest.mark.parametrize("moment", ["in a round", "after the last round"])
def test_an_interrupted_run_goes_on_to_the_same_row(moment, lab_of, tmp_path, monkeypatch, capsys):
    whole, cut = lab_of(tmp_path / "whole"), lab_of(tmp_path / "cut")
    whole.measure_run("personal", 1)
    # The user is asked in the rounds, and satisfied in the last answers too.
    name = "feedback" if moment == "in a round" else "satisfied"
    asked = getattr(experiment.RuleUser, name)
    checkpoint = "checkpoint-1" if moment == "in a round" else "checkpoint-2"

    def killed(user, prompts, responses):
        if (cut.work / "personal-1" / checkpoint).exists():
            raise RuntimeError("killed")
        return asked(user, prompts, responses)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.RuleUser, name, killed)
        with pytest.raises(RuntimeError, match="killed"):
            cut.measure_run("personal", 1)
    cut.measure_run("personal", 1)
    assert without_seconds(cut.results) == without_seconds(whole.results)
    said = capsys.readouterr().out
    cut.measure_run("personal", 1)
    assert said and not capsys.readouterr().out, "what is in the results file is not run again"


@pytest.mark.parametrize("name", ["paper", "unlikely tokens", "kind, shuffled", "flip", "persona"])
def test_conditions_run_and_are_reported(name, lab_of, tmp_path, capsys):
    tiny = lab_of(tmp_path)
    tiny.measure_run(name, 1)
    (row,) = [row for row in harness.read(tiny.results) if row["case"] == {"condition": name, "seed": 1}]
    assert len(row["satisfaction by round"]) == (4 if name == "flip" else 2)
    capsys.readouterr()
    assert report.main([str(tiny.results)]) == 0
    assert f"| {CONDITIONS[name].about} |" in capsys.readouterr().out


def test_sft_is_the_gradient_of_the_answers_likelihood(lab_of, saved, tmp_path):
    """Beside -log p of the answers' tokens, mean over each answer and then over answers, by autograd."""
    trainer = make_trainer(CONDITIONS["sft"], tmp_path, 1, 1, saved, DATA, **TINY)
    assert isinstance(trainer, Baseline)
    trainer.user = ConstantUser("w3")
    prompts = [(index, [{"role": "user", "content": text}]) for index, text in enumerate((LONG, OTHER))]
    (items,) = trainer.roll_out([prompts], 0)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    loss, _ = trainer.run_pass(trainer.model, items, len(items))
    got = torch.autograd.grad(loss, weights)
    plain = torch.zeros(())
    for item in items:
        plain = plain - answer_logps(trainer.model, item.prompt_ids, item.completion_ids).mean() / len(items)
    wanted = torch.autograd.grad(plain, weights)
    for left, right in zip(got, wanted):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_users_speak_of_the_answer():
    prompts = [[{"role": "user", "content": text}] for text in ("How do I bake?", "What is flour?", "How so now?")]
    answers = ["1. Mix.\n2. Bake.", LONG + ".", "Just bake."]
    user = KindUser()
    assert user.satisfied(prompts, answers) == [True, False, False]
    said = user.feedback(prompts, answers)
    assert said[0] == "" and "one short sentence" in said[1] and "numbered list" in said[2]
    shuffled = {tuple(KindUser(shuffled=True).feedback(prompts[1:] * 4, answers[1:] * 4)) for _ in range(2)}
    assert len(shuffled) == 1 and sorted(shuffled.pop()) == sorted(said[1:] * 4) != said[1:] * 4
    control = experiment.UnrelatedUser(user)
    assert [text in UNRELATED for text in control.feedback(prompts, answers)] == [False, True, True]


def test_questions_are_apart(tmp_path):
    rows = [f'{{"messages": [{{"role": "user", "content": "What may the number {i:03} be?"}}, '
            f'{{"role": "assistant", "content": "It is {i}."}}]}}' for i in range(120)]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text("\n".join(rows))
    data = read_data(tmp_path / "talks.jsonl")
    parts = [set(data.train), set(data.choose), set(data.test)]
    assert [len(part) for part in parts] == [60, 24, 36] and not (parts[0] | parts[1]) & parts[2]
    assert max(data.train + data.choose) < min(data.test), "the test takes later questions"


def test_three_seeds_have_a_mean_and_an_interval(lab_of, tmp_path, capsys):
    tiny = lab_of(tmp_path)
    base = {"case": {"condition": "before", "wish": "short"}, **dict.fromkeys(COUNTS, 0.5)}
    runs = []
    for seed, share in ((1, 0.7), (2, 0.8), (3, 0.9)):
        run = {"case": {"condition": "control", "seed": seed}, "after": dict.fromkeys(COUNTS, share)}
        runs.append({**run, "perplexity_change": 0.1, "satisfaction by round": []})
    for row in (base, *runs[:2]):
        tiny.keep(row)
    tiny.summarize("control")
    assert len(harness.read(tiny.results)) == 3, "no interval of two"
    tiny.keep(runs[2])
    tiny.summarize("control")
    (row,) = [row for row in harness.read(tiny.results) if "summary" in row["case"]]
    half = 4.303 * 0.1 / 3**0.5  # Student's t of 2 degrees of freedom; the standard deviation is 0.1
    assert row["seeds"] == [1, 2, 3] and row["after"]["satisfied"] == pytest.approx([0.8, half], rel=1e-4)
    assert report.main([str(tiny.results)]) == 0
    shown = capsys.readouterr().out
    assert "| 70 / 80 / 90% |" in shown and "| mean \u00b1 interval of 3 seeds | 80 \u00b1 25% |" in shown


def test_ifeval_before_and_after_the_demo(saved, tmp_path):
    pytest.importorskip("if_verifiable")
    (tmp_path / "demo/run").mkdir(parents=True)
    for folder in ("base", "run/model"):
        (tmp_path / "demo" / folder).symlink_to(saved)
    prompts = tmp_path / "input_data.jsonl"
    names = ["punctuation:no_comma", "length_constraints:number_words"]
    kwargs = [{}, {"relation": "at least", "num_words": 300}]
    rows = [{"key": n, "prompt": f"w{n}", "instruction_id_list": names, "kwargs": kwargs} for n in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [prompts, "--demo", tmp_path / "demo", "--limit", "2", "--max-new-tokens", "3", "--results", tmp_path]
    assert ifeval.main([*map(str, argv), "--machine", "here"]) == 0
    before, after, change = harness.read(tmp_path / "ifeval_here.json")
    assert [row["case"]["model"] for row in (before, after, change)] == ["before", "after", "after - before"]
    assert before["prompts"] == 2 and before["prompt_loose"][0] == 0 and before["instruction_loose"][0] == 0.5
    assert before["followed and asked loosely, by kind"] == {"length_constraints": [0, 2], "punctuation": [2, 2]}
    assert before["prompts followed loosely"] == [0, 0] and change["prompt_loose"] == [0, 0]
    (tmp_path / "demo/base").unlink()
    assert ifeval.main([*map(str, argv), "--machine", "here"]) == 0, "what is in the file is not run again"
