"""The benchmark scripts on tiny inputs, and `make bench` around them."""

from __future__ import annotations

import argparse
import itertools
import json
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import bench_data, bench_models, bench_processes, run_all
from fastsdpo import bench

pytestmark = pytest.mark.filterwarnings("ignore")
ENVIRONMENT = {
    "device": "d",
    "native": "n",
    "python": "3",
    "versions": {"torch": "2"},
    "commit": "c",
    "command": "python -m x",
    "date": "2026-01-01",
}


@pytest.fixture
def tokenizer():
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>"]
    words = [*special, *(f"w{n}" for n in range(9)), "Please"]
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return tokenizer


@pytest.fixture
def source(tmp_path):
    """Four conversations, of which one has no turns and one too few messages."""

    def talk(*texts):
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}

    rows = [
        talk("w1", "w2 w3", "w4"),
        talk("w1", "w2"),
        talk("w1", "w2", "w3", "w4", "w5 w6"),
        {"messages": [{"role": "user", "content": "w1"}] * 3},
    ]
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(source):
    return argparse.Namespace(source=str(source), conversations=9, tokenized=9, rounds=1, seconds=0)


def test_data_preparation_against_rivals_that_give_the_same(source, tokenizer):
    rows = bench_data.measure(options(source), tokenizer)
    found = {(row["stage"], row["who"]): row for row in rows}
    assert len(found) == 11
    assert {row["interactions"] for row in rows} == {3}
    assert {row["conversations"] for row in rows} == {2}
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in rows)
    page = bench_data.markdown(rows)
    assert page.count("| tokenize |") == 4
    assert "2 real conversations" in page


def test_a_rival_with_other_rows_is_not_timed(source, tokenizer, monkeypatch):
    monkeypatch.setattr(bench_data, "plain_prepare", lambda source, output: output.write_text(""))
    with pytest.raises(SystemExit, match="plain loop gives other interactions"):
        bench_data.measure(options(source), tokenizer)


def test_interactions_of_drawn_lengths():
    items = bench_processes.make_interactions(40, 100, 2)
    assert len(items) == 40
    assert items == bench_processes.make_interactions(40, 100, 2)
    answers = sorted(len(i.completion_ids) for i in items)
    assert answers[0] < 60 < answers[-1]
    for one, two in itertools.pairwise(items):
        if one.conversation_id == two.conversation_id:  # the history goes on, so prefixes are shared
            assert two.prompt_ids[: len(one.prompt_ids)] == one.prompt_ids


def test_efficiency_of_processes():
    rows = [
        {
            "processes": p,
            "threads": t,
            "batch": 16,
            "steps": 3,
            "shape": "s",
            "parameters": 10**6,
            "tokens": 1000,
            "seconds": s,
            "fastest": s,
            "slowest": s,
            "cpus": 2,
            "environment": ENVIRONMENT,
        }
        for p, t, s in ((1, 1, 4.0), (2, 1, 2.5), (1, 2, 3.2))
    ]
    page = bench_processes.markdown(rows)
    assert "| 2 | 1 | 2.50 | 2.50 | 2.50 | 400 | 1.60 | 0.80 |" in page
    assert "| 1 | 2 | 3.20 | 3.20 | 3.20 | 312 | 1.25 | 0.62 |" in page


def test_shapes_of_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "MODELS", {"m": bench.Shape(300, 16, 3.0)})
    arguments = "x --logits m --hidden m --hidden-modes reverse_kl --tokens 4 --rounds 1 --record models"
    arguments += f" --without torch.compile CCE --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    monkeypatch.setattr(bench, "copy_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(bench, "gemm_flops", lambda **_: 1e9)
    bench_models.main()
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [(r["question"], r["mode"], r["softcap"]) for r in rows] == [
        ("hidden", "reverse_kl", 3.0),
        ("logits", "reverse_kl", 3.0),
    ]
    assert "| hidden | m | 4 x 300 x 16 | 3 | reverse_kl | fastsdpo |" in (tmp_path / "models.md").read_text()


# ------------------------------------------------------------------------------------- make bench


THEMES = [
    run_all.Theme("good_cpu", "what works", ["json.tool --help", "calendar 2026 1"], ["this"]),
    run_all.Theme("bad_cpu", "what fails", ["no_such_module", "calendar 2026 1"], ["no_such_module"]),
]


def test_every_theme_is_run_and_on_the_page_also_after_one_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "THEMES", THEMES[::-1])
    assert run_all.main(["--output", str(tmp_path)]) == 1
    page = (tmp_path / "index.md").read_text()
    assert "| what fails | [.log](bad_cpu.log) |" in page
    assert "| what works | [.log](good_cpu.log) |" in page
    assert page.count("**failed**") == 1
    assert "January 2026" in (tmp_path / "good_cpu.log").read_text()
    assert "January 2026" not in (tmp_path / "bad_cpu.log").read_text()
    assert "failed: bad_cpu" in capsys.readouterr().out


def test_themes_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "THEMES", THEMES)
    assert run_all.main(["--output", str(tmp_path), "--quick", "--only", "good"]) == 0
    assert "tiny sizes" in (tmp_path / "index.md").read_text()
    with pytest.raises(SystemExit):
        run_all.main(["--output", str(tmp_path), "--only", "none"])
    with pytest.raises(SystemExit):
        run_all.main(["--record", "--quick"])


def test_a_quick_run_leaves_the_results_of_a_full_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "THEMES", THEMES[:1])
    monkeypatch.chdir(tmp_path)
    assert run_all.main([]) == 0
    assert run_all.main(["--quick"]) == 0
    assert "January 2026" in (tmp_path / "bench_output" / "good_cpu.log").read_text()
    assert "tiny sizes" in (tmp_path / "bench_output" / "quick" / "index.md").read_text()


def test_a_recording_goes_on_from_the_newest_file(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all.compare, "RESULTS", tmp_path)
    (tmp_path / "a_cpu_2026-01-01.json").write_text("1")
    (tmp_path / "a_cpu_2026-02-01.json").write_text("2")
    run_all.go_on_from_newest("a_cpu", tmp_path / "a_cpu_2026-03-01.json")
    assert (tmp_path / "a_cpu_2026-03-01.json").read_text() == "2"
    (tmp_path / "a_cpu_2026-03-01.json").write_text("3")
    run_all.go_on_from_newest("a_cpu", tmp_path / "a_cpu_2026-03-01.json")
    assert (tmp_path / "a_cpu_2026-03-01.json").read_text() == "3"
    run_all.go_on_from_newest("b_cpu", tmp_path / "b_cpu_2026-03-01.json")
    assert not (tmp_path / "b_cpu_2026-03-01.json").exists()


@pytest.mark.parametrize("theme", run_all.THEMES, ids=lambda theme: theme.name)
def test_the_scripts_know_their_arguments(theme, tmp_path, monkeypatch):
    """Every command of `make bench` up to where the script would begin to work."""
    import importlib

    class Parsed(Exception):
        pass

    plain = argparse.ArgumentParser.parse_args

    def parse(self, *arguments):
        plain(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for command in theme.full + theme.quick:
        module, *arguments = run_all.words(command, "name", tmp_path)
        if module == "pytest":
            continue
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            importlib.import_module(module).main()
