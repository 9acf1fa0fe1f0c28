"""`fastsdpo eval` on benchmarks: IFEval with the published checkers, answer files, checkpoints, a judge's wording."""

import json
import math
import shutil

import pytest

from fastsdpo.cli import main
from fastsdpo.commands import eval_run
from fastsdpo.online import ifeval

WORDS = {"relation": "at least", "num_words": 3}
SAMPLES = [
    (["punctuation:no_comma"], [{}]),
    (["change_case:english_lowercase", "length_constraints:number_words"], [{}, WORDS]),
    (["startend:quotation", "detectable_format:title"], [None, {"num_words": None}]),
    (["length_constraints:number_sentences"], [{"relation": "less than", "num_sentences": 3}]),
]
GOOD = ["no comma here", "all of it is lower case", '"<<a title>> and text"', "One."]


@pytest.fixture
def samples(tmp_path):
    file = tmp_path / "input_data.jsonl"
    rows = [
        {"key": 1000 + number, "prompt": f"w{number} w{number + 1}", "instruction_id_list": names, "kwargs": kwargs}
        for number, (names, kwargs) in enumerate(SAMPLES)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_published_checkers_and_the_four_figures(samples):
    pytest.importorskip("if_verifiable")
    known, missing = ifeval.checkable(ifeval.read_samples(samples))
    assert missing in ([], ["length_constraints:number_sentences"]) and len(known) == 4 - len(missing)
    known = known[:3]
    assert [ifeval.check(sample, text) for sample, text in zip(known, GOOD)] == [[(True, True)] * n for n in (1, 2, 2)]
    # Loose: the first line does not count.
    assert ifeval.check(known[0], "Sure, here:\nno comma") == [(False, True)]
    found = ifeval.scores([[(True, True)], [(True, True), (False, True)], [(False, False), (False, True)]])
    assert (found.prompts, found.instructions) == (3, 5)
    assert (found.prompt_strict.value, found.prompt_loose.value) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (found.instruction_strict.value, found.instruction_loose.value) == (0.4, 0.8)
    assert found.prompt_strict.error == pytest.approx(math.sqrt(2 / 9 / 2))  # of a mean: s / sqrt(n)


def test_eval_on_ifeval(samples, saved, tmp_path, capsys):
    pytest.importorskip("if_verifiable")
    report = tmp_path / "ifeval.json"
    command = ["eval", str(samples), "--benchmark", "ifeval", "--model", saved, "--max-new-tokens", "4"]
    assert main([*command, "--base", saved, "--limit", "2", "-o", str(report)]) == 0
    said = capsys.readouterr().out
    assert "2 prompts, " in said and "prompts loose, model - base: +0.0% (se 0.0%, paired)" in said
    found = json.loads(report.read_text())
    assert found["model"]["answers"] == found["base"]["answers"] and len(found["keys"]) == 2
    samples.write_text('{"key": 1}\n')
    assert main(command) == 1 and f"{samples}:1: no prompt of IFEval" in capsys.readouterr().err
    samples.unlink()
    assert main(command) == 1 and ifeval.ADDRESS in capsys.readouterr().err
    assert main([*command, "--rule", "max_words=2"]) == 1
    assert "--rule does not go with --benchmark" in capsys.readouterr().err


def test_answers_for_other_judges(saved, tmp_path, capsys):
    questions, output = tmp_path / "questions.json", tmp_path / "answers.json"
    questions.write_text(json.dumps([{"instruction": "w1 w2", "dataset": "helpful_base"}, {"instruction": "w3"}]))
    command = ["eval", str(questions), "--model", saved, "--max-new-tokens", "3", "-o", str(output)]
    assert main([*command, "--write", "alpaca_eval", "--generator", "mine"]) == 0
    first, second = json.loads(output.read_text())
    assert {*first} == {"dataset", "instruction", "output", "generator"} and first["generator"] == "mine"
    assert second["instruction"] == "w3" and isinstance(second["output"], str)
    assert main([*command, "--write", "arena_hard"]) == 1
    assert "question 1 must have 'prompt' for --write arena_hard" in capsys.readouterr().err
    questions.write_text('{"uid": "a", "prompt": "w1", "category": "hard_prompt"}\n')
    assert main([*command, "--write", "arena_hard"]) == 0
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["uid"] == "a" and row["messages"][0] == {"role": "user", "content": "w1"}
    assert row["messages"][1]["role"] == "assistant" and isinstance(row["messages"][1]["content"]["answer"], str)


def test_a_model_without_tokenizer_is_found_before_any_answer(saved, tmp_path, capsys):
    prompts, bare = tmp_path / "prompts.txt", tmp_path / "bare"
    prompts.write_text("w1 w2\n")
    shutil.copytree(saved, bare, ignore=shutil.ignore_patterns("*token*", "*vocab*"))
    assert main(["eval", str(prompts), "--model", str(bare), "--base", saved, "--rule", "max_words=3"]) == 1
    said = capsys.readouterr()
    assert f"folder {bare} holds no tokenizer" in said.err and said.out == ""


def test_a_curve_over_checkpoints_and_the_base_told(saved, tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2\nw3\n")
    run = ["online", str(prompts), "--model", saved, "-o", str(tmp_path / "run"), "--template", " note {o}", "--cpu"]
    run += ["--wish", "w5", "--max-steps", "2", "--batch-size", "2", "--max-new-tokens", "3", "--quiet"]
    assert main([*run, "--save-steps", "1", "--set", "save_total_limit=5"]) == 0
    report = tmp_path / "curve.json"
    judged = ["eval", str(prompts), "--base", saved, "--rule", "max_words=3", "--max-new-tokens", "3"]
    judged += ["-o", str(report)]
    assert main([*judged, "--checkpoints", str(tmp_path / "run"), "--base-system", "w9"]) == 0
    said = capsys.readouterr().out
    names = ["checkpoint-1", "checkpoint-2", "model"]
    assert [line.split(":")[0] for line in said.splitlines() if "win rate" in line] == names and "without ties" in said
    curve = json.loads(report.read_text())
    assert [row["model"].rpartition("/")[2] for row in curve] == names
    assert curve[1]["answers"] == curve[2]["answers"]

    def stopped_at_the_end(name, *arguments):
        if name == str(tmp_path / "run" / "model"):
            raise KeyboardInterrupt
        return answers_of(name, *arguments)

    answers_of = eval_run.answers_of
    with monkeypatch.context() as patch:
        patch.setattr(eval_run, "answers_of", stopped_at_the_end)
        assert main([*judged, "--checkpoints", str(tmp_path / "run"), "--base-system", "w9"]) == 130
    assert json.loads(report.read_text()) == curve[:2]
    capsys.readouterr()
    assert main([*judged, "--checkpoints", str(tmp_path)]) == 1 and "no checkpoint there" in capsys.readouterr().err
    wording = tmp_path / "judge.txt"
    wording.write_text("{history} {first}")
    judged = ["eval", str(prompts), "--model", saved, "--base", saved, "--judge-local", saved, "--max-new-tokens", "3"]
    capsys.readouterr()
    assert main([*judged, "--judge-prompt", str(wording)]) == 1
    said = capsys.readouterr()
    assert "--judge-prompt must contain {second} exactly once" in said.err and said.out == ""
    wording.write_text("{persona} {history}: {first} or {second}?")
    assert main([*judged, "--judge-prompt", str(wording), "--persona", "w4"]) == 0
