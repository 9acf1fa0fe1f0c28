"""`fastsdpo online`, `chat` and `eval` from the command line, on a tiny model."""

from __future__ import annotations

import gzip
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsdpo.cli import main
from fastsdpo.online import PromptDataset, RuleUser
from fastsdpo.online.chat import ChatLearner
from fastsdpo.online.rules import parse_rule
from fastsdpo.online.winrate import (
    WinRate,
    compare_by_judge,
    compare_by_rules,
    read_verdict,
    wilson,
)

TEMPLATE = " note {o}"


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"w{i} w{i + 1}\n" for i in range(8)))
    return str(file)


def online(prompts, saved, output, *more):
    return main(
        [
            "online",
            prompts,
            "--model",
            saved,
            "-o",
            str(output),
            "--template",
            TEMPLATE,
            "--max-new-tokens",
            "6",
            "--batch-size",
            "4",
            "--max-steps",
            "2",
            "--cpu",
            "--learning-rate",
            "1e-3",
            *more,
        ]
    )


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


# ------------------------------------------------------------------------------------------ online


def test_online_trains_reports_and_saves(prompts, saved, tmp_path, capsys):
    output = tmp_path / "run"
    status = online(prompts, saved, output, "--rule", "max_words=2", "--wish", "w5", "--eval-prompts", prompts)
    assert status == 0
    said = capsys.readouterr().out
    assert said.startswith("losses are computed by the ")
    assert "before   satisfied" in said
    assert "trained 2 steps" in said
    report = json.loads((output / "report.json").read_text())
    assert report["interactions"] == 8
    assert report["user"] == {"rule": ["max_words=2"], "wish": "w5"}
    assert 0 <= report["after"]["eval_satisfaction"] <= 1
    rows = [json.loads(line) for line in (output / "interactions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    before, after = weights(saved), weights(output / "model")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert online(prompts, saved, output, "--rule", "max_words=2") == 1
    assert "holds a run" in capsys.readouterr().err


def test_online_flips_the_preference(prompts, saved, tmp_path):
    status = online(prompts, saved, tmp_path / "run", "--wish", "w5", "--flip-at", "4", "--then-wish", "w6", "--quiet")
    assert status == 0
    rows = (tmp_path / "run" / "interactions.jsonl").read_text().splitlines()
    said = [json.loads(line)["user_response"]["content"] for line in rows]
    assert said == ["w5"] * 4 + ["w6"] * 4


def test_a_local_model_plays_the_user(prompts, saved, tmp_path):
    status = online(
        prompts, saved, tmp_path / "run", "--persona", "w1 w2", "--user-local", saved, "--quiet", "--max-steps", "1"
    )
    assert status == 0
    rows = (tmp_path / "run" / "interactions.jsonl").read_text().splitlines()
    assert all(json.loads(line)["user_response"]["content"] for line in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name one user"),
        (["--rule", "max_words=2", "--terminal"], "name one user"),
        (["--rule", "max_word=2"], "a rule must be NAME=VALUE"),
        (["--rule", "max_words=2", "--flip-at", "4"], "--flip-at needs --then-rule"),
        (["--rule", "max_words=2", "--then-wish", "x"], "they need --flip-at"),
        (["--persona", "x"], "--user-url with --user-model"),
        (["--persona", "x", "--user-url", "http://localhost:1/v1"], "needs --user-model"),
        (["--rule", "max_words=2", "--set", "spin=1"], "field of OnlineSDPOConfig"),
        (["--rule", "max_words=2", "--set", "num_generations=0"], "num_generations must"),
    ],
)
def test_online_errors(options, message, prompts, saved, tmp_path, capsys):
    assert online(prompts, saved, tmp_path / "run", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "interactions.jsonl").exists()


@pytest.mark.parametrize("option", ["prompts", "--eval-prompts"])
def test_prompts_are_looked_for_before_a_model(option, prompts, saved, tmp_path, capsys):
    files = {"prompts": prompts, option: "nosuch.txt"}
    more = [] if option == "prompts" else [option, files[option]]
    status = online(files["prompts"], "/no/such/model", tmp_path / "run", "--wish", "w5", *more)
    assert status == 1
    assert capsys.readouterr().err == "fastsdpo online: no such file: nosuch.txt\n"


ROW = '{"prompt": "First", "label": 1}\n'
LISTS = [{"prompt": [{"role": "user", "content": "First"}]}, {"prompt": "Second"}]


@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        ("p.txt", "\ufeffFirst\r\n\r\nSecond\r\n".encode(), ["First", "Second"]),
        ("p.txt", b'[sort] 3 1 2\n{x} as "set"?', ["[sort] 3 1 2", '{x} as "set"?']),
        ("p.txt", b"[3, 1, 2]\nsort it", ["[3, 1, 2]", "sort it"]),
        ("p.jsonl", ("\ufeff" + ROW).encode(), ["First"]),
        ("p.txt", ROW.encode(), ["First"]),
        ("prompts", ("\n" + ROW * 2).encode(), ["First", "First"]),
        ("prompts", json.dumps(LISTS, indent=1).encode(), ["First", "Second"]),
        ("p.json", json.dumps(LISTS).encode(), ["First", "Second"]),
        ("p.jsonl.gz", gzip.compress(ROW.encode(), mtime=0), ["First"]),
    ],
)
def test_files_of_prompts(tmp_path, name, data, texts):
    (tmp_path / name).write_bytes(data)
    prompts = PromptDataset.from_source(tmp_path / name, "prompts").prompts
    assert prompts == [[{"role": "user", "content": text}] for text in texts]


def test_prompts_in_parquet_with_a_system_prompt(tmp_path):
    pa, file = pytest.importorskip("pyarrow"), tmp_path / "p.parquet"
    table = pa.Table.from_pylist([{"prompt": "First", "system": "Be brief.", "label": 1}])
    pytest.importorskip("pyarrow.parquet").write_table(table, file)
    (prompt,) = PromptDataset.from_source(file, "prompts").prompts
    assert [message["content"] for message in prompt] == ["Be brief.", "First"]


@pytest.mark.parametrize("command", ["online", "eval"])
@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.csv", b"prompt,label\nFirst,1\n", "must be lines of text"),
        ("p.tsv", b"prompt\tlabel\nFirst\t1\n", "must be lines of text"),
        ("p.yaml", b"- First\n", "got a name that ends in .yaml"),
        ("p.parquet", b"PAR1\xff\xfe", "not a whole Parquet file"),
        ("prompts", b"PAR1\xff\xfe", "must be UTF-8 text, got other bytes at 4"),
        ("p.txt", "Caf\xe9".encode("latin-1"), "must be UTF-8 text, got other bytes at 3"),
        ("p.txt", "First".encode("utf-16"), "must be UTF-8 text, got other bytes at 0"),
        ("p.txt", "First".encode("utf-16-le"), "must be UTF-8 text, got a NUL character"),
        ("prompts", b'{"question": "First"}\n', ":1: OnlineSDPOTrainer: prompt must have 'prompt'"),
        ("prompts", b'[\n{"prompt": "First"},\n{"prompt": ', "element 1 (line 3): cut off"),
        (
            "p.jsonl",
            b'{"prompt": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, '
            b'{"role": "user", "content": "It said: sunny"}]}',
            ":1: OnlineSDPOTrainer: prompt: prompt[0]: must",
        ),
    ],
)
def test_files_that_are_no_prompts(command, name, data, said, prompts, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    file, nosuch = str(tmp_path / name), "/no/such/model"
    if command == "online":
        status = online(prompts, nosuch, tmp_path / "run", "--wish", "w5", "--eval-prompts", file)
    else:
        status = main(["eval", file, "--model", nosuch, "--base", nosuch, "--rule", "max_words=3"])
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastsdpo {command}: {file}") and said in error


def test_a_person_at_the_terminal(prompts, saved, tmp_path, monkeypatch, capsys):
    talk(monkeypatch, ["w5", "", "\u200b", "w6 w7"])
    assert online(prompts, saved, tmp_path / "run", "--terminal", "--max-steps", "1") == 0
    assert followups(tmp_path / "run") == ["w5", "", "", "w6 w7"]
    assert capsys.readouterr().out.count("assistant  ") == 4


@pytest.mark.parametrize("key", ["Ctrl-C", "Ctrl-D"])
def test_a_person_stops_at_the_question(key, prompts, saved, tmp_path, monkeypatch, capsys):
    def read(question=""):
        if len(asked) == 2:
            if key == "Ctrl-D":
                raise EOFError
            signal.raise_signal(signal.SIGINT)
        asked.append(question)
        return "w5"

    asked = []
    monkeypatch.setattr("builtins.input", read)
    output = tmp_path / "run"
    assert online(prompts, saved, output, "--terminal", "--set", "save_strategy=no") == 130
    assert asked == ["follow-up (empty: none) > "] * 2  # neither for the rest of the step nor later
    assert "stopped at step 1 of 2; the same command with --resume goes on" in capsys.readouterr().out
    assert followups(output) == ["w5", "w5", "", ""]
    assert (output / "checkpoint-1").is_dir()


def test_the_rules_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["online", "--list-rules"])
    assert stopped.value.code == 0
    assert "max_words=20" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- chat


def talk(monkeypatch, lines):
    lines = iter(lines)

    def read(question=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def chat(saved, output, *more):
    return main(
        [
            "chat",
            "--model",
            saved,
            "-o",
            str(output),
            "--template",
            TEMPLATE,
            "--cpu",
            "--max-new-tokens",
            "6",
            "--learning-rate",
            "1e-2",
            *more,
        ]
    )


def rows_of(output):
    file = output / "interactions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def followups(output):
    return [row["user_response"]["content"] for row in rows_of(output)]


def checkpoints(output):
    return sorted(path.name for path in output.glob("checkpoint-*"))


@pytest.mark.parametrize("lora", ["0", "4"])
def test_chat_learns_saves_and_undoes(lora, saved, tmp_path, monkeypatch, capsys):
    if lora != "0":
        pytest.importorskip("peft")
    output = tmp_path / "chat"
    talk(
        monkeypatch,
        ["w1 w2", "/teach w3 w4", "/teach w5", "/undo", "w6", f"/save {tmp_path}/now", "/new", "w7", "/help", "/quit"],
    )
    assert chat(saved, output, "--lora", lora) == 0
    said = capsys.readouterr()
    assert said.out.count("model > ") == 5
    assert "[losses are computed by the " in said.err
    assert "[update 1: learned from 'w3 w4' as your reaction to '" in said.err
    assert "[update 2 is taken back]" in said.err
    assert "/teach TEXT " in said.err
    assert checkpoints(output) == ["checkpoint-0", "checkpoint-1"]
    assert followups(output) == ["w3 w4"]
    assert rows_of(output)[0]["prompt"] == [{"role": "user", "content": "w1 w2"}]

    talk(monkeypatch, ["/undo", "/undo"])  # goes on in the same folder, and back to the start
    assert chat(saved, output, "--lora", lora) == 0
    said = capsys.readouterr().err
    assert "goes on after update 1" in said
    assert "there is no update to take back" in said
    assert (output / "interactions.jsonl").read_text() == ""


def test_chat_learns_from_nothing_unless_told(saved, tmp_path, monkeypatch, capsys):
    """A next question, thanks, mistyped commands, a text that nobody can see."""
    output = tmp_path / "chat"
    talk(
        monkeypatch,
        [
            "/teach",
            "/teach w1",
            "w1 w2",
            "w3",
            "\u200b",
            " \ufeff",
            "/teach \u2060",
            "/Undo",
            "/teech w4",
            "/learn",
            "/learn on",
            "/save",
            "/undo now",
            " /w5",
            "/exit",
        ],
    )
    assert chat(saved, output, "--lora", "0") == 0
    said = capsys.readouterr()
    assert said.out.count("model > ") == 3  # w1 w2, w3 and /w5
    assert "update" not in said.err
    for text in ("/Undo", "/teech w4", "/learn", "/learn on", "/save", "/undo now"):
        assert f"[there is no command '{text}' (/help lists them), and nothing was sent" in said.err
    assert said.err.count("/teach: there is no answer that this would be a reaction to") == 2
    assert "/teach: nobody can see anything in that text" in said.err
    assert checkpoints(output) == ["checkpoint-0"]
    assert rows_of(output) == []


def test_chat_learns_from_the_message_before(saved, tmp_path, monkeypatch, capsys):
    output = tmp_path / "chat"
    talk(monkeypatch, ["w1 w2", "w3", "/teach", "/teach", "/undo", "/teach", "w4", "/new", "/teach"])
    assert chat(saved, output, "--lora", "0", "--system", "w9") == 0
    said = capsys.readouterr()
    assert said.out.count("model > ") == 3
    assert "your last message was learned from in update 1" in said.err
    assert "there is no answer that this would be a reaction to" in said.err
    (row,) = rows_of(output)
    assert [message["content"] for message in row["prompt"]] == ["w9", "w1 w2"]
    assert row["user_response"]["content"] == "w3"
    assert said.out.startswith(f"model > {row['completion']['content']}\n")


def test_chat_learns_from_every_message_on_request(saved, tmp_path, monkeypatch, capsys):
    output = tmp_path / "chat"
    talk(
        monkeypatch,
        ["w1", "w2", "\u200b", "/learn told", "w3", "/learn always", "w4", "/new", "w5"],
    )
    assert chat(saved, output, "--lora", "0", "--learn", "always") == 0
    assert followups(output) == ["w2", "w4"]
    assert capsys.readouterr().out.count("model > ") == 5


@pytest.fixture
def deaf():
    """A handler of Ctrl-C that does nothing, as a library may have left it."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


@pytest.mark.usefixtures("deaf")
def test_ctrl_c_cancels_an_answer_and_no_update(saved, tmp_path, monkeypatch, capsys):
    """In an answer, and in an update: that is then whole, and its message is not answered."""
    from fastsdpo.online import chat as module

    calls = []
    generate, run_pass = module.generate, module.SDPOTrainer.run_pass

    def answer(*arguments, **options):
        calls.append("answer")
        if calls.count("answer") == 2:
            signal.raise_signal(signal.SIGINT)
        return generate(*arguments, **options)

    def update(*arguments):
        signal.raise_signal(signal.SIGINT)
        return run_pass(*arguments)

    monkeypatch.setattr(module, "generate", answer)
    monkeypatch.setattr(module.SDPOTrainer, "run_pass", update)
    output = tmp_path / "chat"
    talk(monkeypatch, ["w1", "w2", "/teach w3", "/teach w4", "w5"])
    assert chat(saved, output, "--lora", "0") == 0
    said = capsys.readouterr()
    assert said.out.count("model > ") == 2  # w1 and w5
    assert said.err.count("[cancelled; your message is left out of the conversation]") == 3
    assert "without a checkpoint" not in said.err
    assert checkpoints(output) == ["checkpoint-0", "checkpoint-1", "checkpoint-2"]
    assert [len(row["prompt"]) for row in rows_of(output)] == [1, 1]  # w2 is in no history

    def stop(question=""):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", stop)
    assert chat(saved, output, "--lora", "0") == 130
    assert f"[stopped; 2 updates are saved in {output}]" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_paste_is_one_message(saved, tmp_path):
    """On a real terminal: marked by the terminal as a paste, or only as fast as one."""
    output = tmp_path / "chat"
    command = [
        sys.executable,
        "-m",
        "fastsdpo",
        "chat",
        "--model",
        saved,
        "-o",
        str(output),
        "--cpu",
        "--lora",
        "0",
        "--template",
        TEMPLATE,
        "--max-new-tokens",
        "6",
        "--learn",
        "always",
    ]
    master, slave = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    seen = ""

    def type_and_wait(keys, *texts):
        nonlocal seen
        os.write(master, keys)
        for text in texts:
            until = time.monotonic() + 120
            while text not in seen:
                assert select.select([master], [], [], max(0, until - time.monotonic()))[0], seen
                seen += os.read(master, 4096).decode(errors="replace")
            seen = seen.partition(text)[2]

    try:
        type_and_wait(b"", "you > ")
        type_and_wait(b"w1\r", "model > ", "you > ")
        type_and_wait(b"\x1b[200~w2 w3\nw4\n/undo\x1b[201~\r", "model > ", "you > ")
        type_and_wait(b"w5\nw6\nw7\n", "model > ", "you > ")
        type_and_wait(b"w8\nw9", "w9")  # the last line waits for Enter
        type_and_wait(b"\r", "model > ", "you > ")
        os.write(master, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(master)
    assert followups(output) == ["w2 w3\nw4\n/undo", "w5\nw6\nw7", "w8\nw9"]


def learner(lab, folder, **changes):
    from fastsdpo.online import OnlineSDPOConfig

    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "learning_rate": 1e-2,
        "template": TEMPLATE,
        "max_new_tokens": 6,
        "save_total_limit": 3,
    }
    return ChatLearner(lab.model(), OnlineSDPOConfig(**{**settings, **changes}), lab.tokenizer())


def step(one, followup="w9"):
    messages = [{"role": "user", "content": "w1 w2"}]
    _, answer = one.answer(messages)
    return one.learn(messages, answer, followup)


@pytest.mark.parametrize("teacher", ["live", "ema", "frozen"])
def test_undo_and_restart_restore_everything(teacher, lab, tmp_path):
    one = learner(lab, tmp_path, teacher=teacher)
    step(one)
    step(one)
    kept = {name: value.clone() for name, value in one.model.state_dict().items()}
    figures = step(one)
    after = {name: value.clone() for name, value in one.model.state_dict().items()}
    assert one.undo() == 2
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, kept[name])
    one.answers -= 1  # the same draw again
    assert step(one) == figures
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, after[name])
    again = learner(lab, tmp_path, teacher=teacher)
    assert again.updates == 3
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, after[name])


def test_chat_learns_from_a_guided_teacher(lab, tmp_path):
    """A follow-up that is the neutral one says nothing: the teacher is then the student."""
    one = learner(lab, tmp_path, neutral_followup="w9", guidance=3.0)
    assert step(one, "w9")["signal"] == pytest.approx(0.0, abs=1e-6)
    assert step(one, "w8")["signal"] > 1e-3


def test_undo_as_far_as_checkpoints_are_kept(lab, tmp_path):
    one = learner(lab, tmp_path)
    for _ in range(4):
        step(one)
    assert one.checkpoints() == [2, 3, 4]
    assert one.undo() == 3
    assert one.undo() == 2
    with pytest.raises(ValueError, match="not kept any more"):
        one.undo()


def test_a_step_that_is_not_finite_changes_nothing(lab, tmp_path):
    from fastsdpo.trainer import NonFiniteError

    one = learner(lab, tmp_path)
    messages = [{"role": "user", "content": "w1 w2"}]
    _, answer = one.answer(messages)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    run_pass = one.trainer.run_pass

    def broken(*arguments):
        loss, statistics = run_pass(*arguments)
        return loss * math.nan, statistics._replace(sequence_loss=statistics.sequence_loss * math.nan)

    one.trainer.run_pass = broken
    with pytest.raises(NonFiniteError, match="update 1"):
        one.learn(messages, answer, "w9")
    assert one.updates == 0
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, before[name])


# ------------------------------------------------------------------------------- on an adapter


@pytest.fixture
def adapter(saved, tmp_path):
    """Folders of an adapter of rank 4 that changes the model much, and of the two merged."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(saved)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=1, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    folders = str(tmp_path / "adapter"), str(tmp_path / "merged")
    model.save_pretrained(folders[0])
    model.merge_and_unload().save_pretrained(folders[1])
    for folder in folders:
        AutoTokenizer.from_pretrained(saved).save_pretrained(folder)
    return folders


def distance(folder, other):
    """Between the weights of two adapters, relative; both of one set of names."""
    mine, base = (load_file(f"{place}/adapter_model.safetensors") for place in (folder, other))
    assert mine.keys() == base.keys()
    moved = sum(float((mine[name] - base[name]).square().sum()) for name in base)
    return math.sqrt(moved / sum(float(value.square().sum()) for value in base.values()))


def test_chat_goes_on_with_an_adapter(adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "chat"
    talk(monkeypatch, ["w1 w2", f"/save {tmp_path}/start", "/teach w3 w4", f"/save {tmp_path}/end"])
    assert chat(adapter[0], output, "--learning-rate", "1e-4") == 0
    assert "[update 1: learned from" in capsys.readouterr().err
    assert distance(tmp_path / "start", adapter[0]) == 0
    assert 0 < distance(tmp_path / "end", adapter[0]) < 0.01

    talk(monkeypatch, [f"/save {tmp_path}/again", "/undo", f"/save {tmp_path}/undone"])
    assert chat(adapter[0], output, "--learning-rate", "1e-4") == 0
    assert distance(tmp_path / "again", tmp_path / "end") == 0
    assert distance(tmp_path / "undone", adapter[0]) == 0

    for rank in ("0", "16"):
        assert chat(adapter[0], tmp_path / "other", "--lora", rank) == 1
        assert f"got {rank}: it is a LoRA adapter with r=4" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_online_goes_on_with_an_adapter(adapter, prompts, tmp_path):
    output = tmp_path / "run"
    status = online(
        prompts,
        adapter[0],
        output,
        "--rule",
        "max_words=2",
        "--learning-rate",
        "1e-4",
        "--teacher",
        "frozen",
        "--quiet",
    )
    assert status == 0
    assert 0 < distance(output / "model", adapter[0]) < 0.01


def test_eval_answers_with_the_adapter(adapter, prompts, saved, tmp_path):
    report = tmp_path / "win.json"
    for base, same in ((adapter[1], True), (saved, False)):
        assert (
            main(
                [
                    "eval",
                    prompts,
                    "--model",
                    adapter[0],
                    "--base",
                    base,
                    "--rule",
                    "max_words=3",
                    "--max-new-tokens",
                    "6",
                    "--quiet",
                    "-o",
                    str(report),
                ]
            )
            == 0
        )
        answers = json.loads(report.read_text())["answers"]
        assert all(row["model"] == row["base"] for row in answers) is same


def test_signal_is_that_of_the_adapter(adapter, saved, tmp_path):
    found = []
    for number, model in enumerate((adapter[0], adapter[1], saved)):
        file = tmp_path / f"{number}.json"
        assert (
            main(
                [
                    "signal",
                    "--model",
                    model,
                    "--prompt",
                    "w1",
                    "--completion",
                    "w2 w3",
                    "--followup",
                    "w4",
                    "--json",
                    str(file),
                    "--quiet",
                ]
            )
            == 0
        )
        found.append(json.loads(file.read_text())["real"]["log_ratio"])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] != pytest.approx(found[2], abs=1e-2)


# -------------------------------------------------------------------------------------------- eval


def test_eval_by_rule(prompts, saved, tmp_path, capsys):
    report = tmp_path / "win.json"
    status = main(
        [
            "eval",
            prompts,
            "--model",
            saved,
            "--base",
            saved,
            "--rule",
            "max_words=3",
            "--max-new-tokens",
            "6",
            "-o",
            str(report),
        ]
    )
    assert status == 0
    assert "win rate 50.0%" in capsys.readouterr().out  # against itself
    found = json.loads(report.read_text())
    assert (found["wins"], found["ties"], found["losses"]) == (0, 8, 0)
    assert len(found["answers"]) == 8


def test_eval_by_a_local_judge(prompts, saved, capsys):
    status = main(
        [
            "eval",
            prompts,
            "--model",
            saved,
            "--base",
            saved,
            "--judge-local",
            saved,
            "--max-new-tokens",
            "6",
            "--persona",
            "w1",
            "--limit",
            "3",
        ]
    )
    assert status == 0
    assert "3 left out" in capsys.readouterr().out  # this judge speaks in w's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name either --rule, or a judge"),
        (["--rule", "max_words=3", "--judge-local", "x"], "name either --rule, or a judge"),
        (["--judge-url", "http://localhost:1/v1"], "--judge-url needs --judge-model"),
        (["--rule", "max_words=3", "--limit", "0"], "--limit must be at least 1"),
        (["--rule", "max_words=3", "--base", "/no/such/folder"], "no such file or folder"),
        (["--rule", "max_words=3", "--model", "/nor/this"], "no such file or folder: /nor/this"),
    ],
)
def test_eval_errors(options, message, prompts, saved, capsys):
    given = [] if "--base" in options else ["--base", saved]
    assert main(["eval", prompts, "--model", saved, *given, *options]) == 1
    assert message in capsys.readouterr().err


def test_rules_compare_answer_by_answer():
    rules = [parse_rule("max_words=2"), parse_rule("case=lower")]
    answers, base = ["a b", "a b c", "A", "a"], ["a b c", "a b", "a b c", "b"]
    assert compare_by_rules(rules, answers, base) == [1, 0, 0.5, 0.5]


def test_a_judge_is_asked_in_both_orders():
    """Wins only count in both orders; a judge that always says A sees ties."""
    seen = []

    def judge_by(verdict):
        def replies(conversations):
            seen.extend(c[-1]["content"] for c in conversations)
            return [verdict(c[-1]["content"]) for c in conversations]

        return SimpleNamespace(replies=replies)

    prompts = [[{"role": "user", "content": "{first} question"}]] * 2
    answers, base = ["good {second}", "bad"], ["bad", "good"]

    def honest(text):
        return "A" if "Answer A:\ngood" in text else "Answer: B."

    assert compare_by_judge(judge_by(honest), prompts, answers, base, "p") == [1.0, 0.0]
    assert len(seen) == 4
    assert all("{" not in text for text in seen)
    assert compare_by_judge(judge_by(lambda _: "A"), prompts, answers, base) == [0.5, 0.5]
    assert compare_by_judge(judge_by(lambda _: "C"), prompts, answers, base) == [0.5, 0.5]
    assert compare_by_judge(judge_by(lambda _: None), prompts, answers, base) == [None, None]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("**C**", "C"),
        ("Answer B is better than A", "B"),
        ("Both", None),
        ("", None),
        (None, None),
    ],
)
def test_read_verdict(reply, verdict):
    assert read_verdict(reply) == verdict


def test_win_rate_and_its_interval():
    found = WinRate.of([1.0, 1.0, 0.5, 0.0, None])
    assert (found.wins, found.ties, found.losses, found.left_out) == (2, 1, 1, 1)
    assert found.rate == 0.625
    # 8 of 10: the interval as published, e.g. in Agresti and Coull (1998), to 4 digits
    low, high = wilson(0.8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(1.0, 5)[1] == 1.0
    nothing = WinRate.of([None])
    assert math.isnan(nothing.rate)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_a_rule_user_says_its_wishes():
    user = RuleUser(["max_words=1", "case=lower"])
    assert user.feedback([], ["A b", "a b", "a"]) == [
        "Please answer in at most 1 words. Please write everything in lower case.",
        "Please answer in at most 1 words.",
        "",
    ]
