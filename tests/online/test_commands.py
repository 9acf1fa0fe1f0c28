"""`fastsdpo online`, `chat` and `eval` from the command line, on a tiny model."""

import gzip
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsdpo.cli import main
from fastsdpo.commands import screen
from fastsdpo.online import OnlineSDPOConfig, PromptDataset, RuleUser, terminal
from fastsdpo.online import chat as chat_module
from fastsdpo.online.chat import ChatLearner
from fastsdpo.online.rules import parse_rule
from fastsdpo.online.users import UNRELATED
from fastsdpo.online.winrate import WinRate, compare_by_judge, compare_by_rules, read_verdict, wilson
from fastsdpo.trainer import NonFiniteError

TEMPLATE = " note {o}"
SETTINGS = ["--template", TEMPLATE, "--max-new-tokens", "6", "--cpu"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"w{i} w{i + 1}\n" for i in range(8)))
    return str(file)


def online(prompts, saved, output, *more):
    steps = ["--batch-size", "4", "--max-steps", "2", "--learning-rate", "1e-3"]
    return main(["online", prompts, "--model", saved, "-o", str(output), *SETTINGS, *steps, *more])


def chat(saved, output, *more):
    return main(["chat", "--model", saved, "-o", str(output), *SETTINGS, "--learning-rate", "1e-2", *more])


def evaluate(prompts, model, base, *more):
    return main(["eval", prompts, "--model", model, "--base", base, "--max-new-tokens", "6", *more])


def talk(monkeypatch, lines):
    """Types the lines, then ends the input."""
    lines = iter(lines)

    def read(question=""):
        print(question, end="")  # as input does
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


@pytest.fixture
def said_in_chat(saved, tmp_path, monkeypatch, capsys):
    """said_in_chat(lines, *options): what a chat prints in which these lines are typed, in tmp_path / "chat"."""

    def run(lines, *more, model=saved, status=0):
        talk(monkeypatch, lines)
        assert chat(model, tmp_path / "chat", "--lora", "0", *more) == status
        return capsys.readouterr()

    return run


def rows_of(output):
    file = output / "interactions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def followups(output):
    return [row["user_response"]["content"] for row in rows_of(output)]


def checkpoints(output):
    return sorted(path.name for path in output.glob("checkpoint-*"))


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_online_trains_reports_and_saves(prompts, saved, tmp_path, capsys, caplog):
    output = tmp_path / "run"
    user = ("--rule", "max_words=2", "--wish", "w5")
    assert online(prompts, saved, output, *user, "--eval-prompts", prompts) == 0
    assert "held-out prompts are trained on too" in caplog.text
    report = json.loads((output / "report.json").read_text())
    assert (report["steps"], report["interactions"], len(rows_of(output))) == (2, 8, 8)
    assert report["user"] == {"rule": ["max_words=2"], "wish": "w5"}
    assert 0 <= report["before"]["eval_satisfaction"] <= 1 and 0 <= report["after"]["eval_satisfaction"] <= 1
    after = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    assert not same(after, AutoModelForCausalLM.from_pretrained(saved).state_dict())
    assert online(prompts, saved, output, *user) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_online_and_eval_put_a_system_prompt_first(prompts, saved, tmp_path, capsys):
    (tmp_path / "system.txt").write_text("w9 w8\n")
    system = ("--system", f"@{tmp_path / 'system.txt'}")
    user = ("--wish", "w5", "--eval-prompts", prompts, "--quiet", "--max-steps", "1")
    assert online(prompts, saved, tmp_path / "run", *system, *user) == 0
    for row in rows_of(tmp_path / "run"):
        assert [m["role"] for m in row["prompt"]] == ["system", "user"] and row["prompt"][0]["content"] == "w9 w8"
    answers = [json.loads(line) for line in (tmp_path / "run" / "eval_answers.jsonl").read_text().splitlines()]
    assert answers and json.loads((tmp_path / "run" / "report.json").read_text())["system"] == system[1]
    rows = str(tmp_path / "run" / "interactions.jsonl")  # their system prompt is the same one
    judged = ("--rule", "max_words=2", "--quiet", "--limit", "2")
    assert evaluate(rows, saved, saved, *judged, *system) == 0
    assert evaluate(rows, saved, saved, *judged, "--system", "w1") == 1
    assert f"{rows}:1: prompt must have no other system prompt" in capsys.readouterr().err
    assert online(prompts, saved, tmp_path / "other", "--system", " ", *user) == 1
    assert "system must be some text" in capsys.readouterr().err


def test_headroom_control_and_the_personal_preset(prompts, saved, tmp_path, capsys):
    """Held-out answers with the wish in the prompt; remarks about something else; an adapter by default."""
    output = tmp_path / "run"
    told = ("--rule", "max_words=2", "--wish", "w5 w6", "--eval-prompts", prompts, "--headroom")
    assert online(prompts, saved, output, *told, "--control", "--preset", "personal", "--seed", "3") == 0
    report = json.loads((output / "report.json").read_text())
    assert (report["settings"]["teacher"], report["settings"]["guidance"]) == ("frozen", 2.0)
    assert (output / "model" / "adapter_config.json").exists()
    before, wish = report["before"], report["headroom"]["wish in the prompt"]
    assert {"eval_new_keywords", "eval_nothing_new", "eval_refusals"} <= set(before)
    answers = [json.loads(line) for line in (output / "eval_answers.jsonl").read_text().splitlines()]
    first = [row for row in answers if row["step"] == 0]
    assert [row["told"] for row in first] == ["w5 w6"] * 8 + [UNRELATED[0]] * 8 + [None] * 8
    words = [len(row["response"].split()) for row in first]
    assert wish["eval_response_words"] == sum(words[:8]) / 8 != before["eval_response_words"] == sum(words[16:]) / 8
    assert set(followups(output)) - {""} <= set(UNRELATED) and any(followups(output))
    assert "wish in the prompt: " in capsys.readouterr().out


def test_online_flips_the_preference(prompts, saved, tmp_path):
    flip = ("--wish", "w5", "--flip-at", "4", "--then-wish", "w6")
    assert online(prompts, saved, tmp_path / "run", *flip, "--quiet") == 0
    assert followups(tmp_path / "run") == ["w5"] * 4 + ["w6"] * 4


def test_a_local_model_plays_the_user(prompts, saved, tmp_path):
    user = ("--persona", "w1 w2", "--user-local", saved)
    assert online(prompts, saved, tmp_path / "run", *user, "--quiet", "--max-steps", "1") == 0
    assert all(followups(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "name one user"),
        ("--rule max_words=2 --terminal", "name one user"),
        ("--rule max_word=2", "a rule must be NAME=VALUE"),
        ("--rule max_words=2 --flip-at 4", "--flip-at needs --then-rule"),
        ("--rule max_words=2 --then-wish x", "they need --flip-at"),
        ("--persona x", "--user-url with --user-model"),
        ("--wish x --control", "--control needs a user of rules"),
        ("--rule max_words=2 --headroom", "--headroom needs --eval-prompts"),
        ("--persona x --user-url http://localhost:1/v1", "needs --user-model"),
        ("--wish x --user-url http://localhost:1/v1", "--user-url needs --persona"),
        ("--terminal --praise Good", "--praise needs a user of rules"),
        ("--wish x --eval-max-new-tokens 5", "--eval-max-new-tokens needs held-out prompts"),
        ("--rule max_words=2 --set spin=1", "field of OnlineSDPOConfig"),
        ("--rule max_words=2 --set num_generations=0", "--num-generations must"),
        ("--wish w5 --eval-prompts nosuch.txt", "no such file: nosuch.txt"),
    ],
)
def test_online_errors_come_before_a_model(options, message, prompts, tmp_path, capsys):
    assert online(prompts, "/no/such/model", tmp_path / "run", *options.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastsdpo online: ") and message in error
    assert not (tmp_path / "run" / "interactions.jsonl").exists()


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
    (tmp_path / "p.csv").write_text("prompt,system_prompt\nFirst,Be brief.\n")
    for source in (file, tmp_path / "p.csv"):
        (prompt,) = PromptDataset.from_source(source, "prompts").prompts
        assert [message["content"] for message in prompt] == ["Be brief.", "First"]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
TOOL = json.dumps({"prompt": [CALL, {"role": "user", "content": "It said: sunny"}]}).encode()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.csv", b"question,label\nFirst,1\n", ":2: prompt must have 'prompt'"),
        ("p.tsv", b"prompt\tlabel\nFirst\n", ":2: the row has 1 cells, the first one 2"),
        ("p.yaml", b"- First\n", "got a name that ends in .yaml"),
        ("p.parquet", b"PAR1\xff\xfe", "not a whole Parquet file"),
        ("prompts", b"PAR1\xff\xfe", "must be UTF-8 text, got other bytes at 4"),
        ("p.txt", "Caf\xe9".encode("latin-1"), "must be UTF-8 text, got other bytes at 3"),
        ("p.txt", "First".encode("utf-16"), "must be UTF-8 text, got other bytes at 0"),
        ("p.txt", "First".encode("utf-16-le"), "must be UTF-8 text, got a NUL character"),
        ("prompts", b'{"question": "First"}\n', ":1: prompt must have 'prompt'"),
        ("prompts", b'[\n{"prompt": "First"},\n{"prompt": ', "element 1 (line 3): cut off"),
        ("p.jsonl", TOOL, ":1: prompt: prompt[0]: must"),
    ],
)
def test_files_that_are_no_prompts(name, data, said, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    file, nosuch = str(tmp_path / name), "/no/such/model"
    assert online(file, nosuch, tmp_path / "run", "--wish", "w5") == 1
    assert evaluate(file, nosuch, nosuch, "--rule", "max_words=3") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"fastsdpo {name}: {file}") for line, name in zip(lines, ("online", "eval"))] == [True] * 2
    assert all(said in line for line in lines)


def test_no_bar_stands_beside_a_question(prompts, saved, tmp_path, monkeypatch, capsys):
    """Standard error is a terminal, where training has a bar that is drawn anew over and over."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    talk(monkeypatch, ["w1"] * 8)
    assert online(prompts, saved, tmp_path / "run", "--terminal", "--logging-steps", "1") == 0
    shown = capsys.readouterr().err
    assert "step 1/2  loss" in shown and "step/s" not in shown


def test_a_person_at_the_terminal(prompts, saved, tmp_path, monkeypatch, capsys):
    talk(monkeypatch, ["w5", "", "\u200b", "w6 w7"])
    assert online(prompts, saved, tmp_path / "run", "--terminal", "--max-steps", "1") == 0
    assert followups(tmp_path / "run") == ["w5", "", "", "w6 w7"]
    assert capsys.readouterr().out.count("assistant  ") == 4


@pytest.mark.parametrize("key", ["Ctrl-C", "Ctrl-D"])
def test_a_person_stops_at_the_question(key, prompts, saved, tmp_path, monkeypatch):
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
    assert len(asked) == 2  # nothing more is asked, neither for the rest of the step nor later
    assert followups(output) == ["w5", "w5", "", ""]
    assert checkpoints(output) == ["checkpoint-1"]


def test_the_rules_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["online", "--list-rules"])
    assert stopped.value.code == 0 and "max_words=20" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["max_steps=3", "eval_steps=1", "ppo_clip=0.2", "save_total_limit=2"])
def test_chat_refuses_settings_that_it_does_not_read(setting, tmp_path, capsys):
    assert chat("/no/such/model", tmp_path / "chat", "--set", setting) == 1
    assert f"--set {setting.split('=')[0]}: a chat " in capsys.readouterr().err


@pytest.mark.parametrize("lora", ["0", "4"])
def test_chat_learns_saves_and_undoes(lora, said_in_chat, tmp_path):
    if lora != "0":
        pytest.importorskip("peft")
    output = tmp_path / "chat"
    lines = ["w1 w2", "/teach w3 w4", "/teach w5", "/undo", "w6", "/new", "w7", "/help", "/quit", "w8"]
    said = said_in_chat(lines, "--lora", lora)
    assert said.out.count("model > ") == 5
    assert "update 1" in said.err and "update 2" in said.err and "/teach [TEXT] " in said.err
    assert checkpoints(output) == ["checkpoint-0", "checkpoint-1"]
    assert followups(output) == ["w3 w4"]
    assert rows_of(output)[0]["prompt"] == [{"role": "user", "content": "w1 w2"}]

    said = said_in_chat(["/undo", "/undo"], "--lora", lora)  # goes on in the same folder, and back to the start
    assert "there is no update to take back" in said.err
    assert checkpoints(output) == ["checkpoint-0"] and followups(output) == []


def test_chat_learns_from_nothing_unless_told(said_in_chat, tmp_path):
    """A next question, thanks, mistyped commands, a text that nobody can see."""
    refused = {"/Undo": "/undo", "/teech w4": "/teach", "/rety": "/retry", "/zzz": None}
    misused = ["/learn", "/learn on", "/save", "/undo now"]
    unseen = ["\u200b", " \ufeff", "/teach \u2060"]
    lines = ["/teach", "/teach w1", "/retry", "/show w1", "w1 w2", "w3", *unseen, *refused, *misused, " /w5", "/exit"]
    said = said_in_chat(lines)
    assert said.out.count("model > ") == 3  # w1 w2, w3 and /w5
    assert "update" not in said.err
    for text, meant in refused.items():
        hint = f"did you mean {meant}?" if meant else "/help lists the commands."
        assert f"there is no command '{text}'; {hint}" in said.err
    assert said.err.count(": the command is ") == 3 and "/undo: nothing may follow it" in said.err
    assert said.err.count("/teach: ") == 3
    assert checkpoints(tmp_path / "chat") == ["checkpoint-0"] and rows_of(tmp_path / "chat") == []


def test_chat_learns_from_the_message_before(said_in_chat, tmp_path):
    lines = ["w1 w2", "w3", "/teach", "/teach", "/undo", "/teach", "w4", "/new", "/teach"]
    said = said_in_chat(lines, "--system", "w9")
    assert said.out.count("model > ") == 3
    assert "your last message was learned from in update 1" in said.err
    assert "there is no answer that this would be a reaction to" in said.err
    (row,) = rows_of(tmp_path / "chat")
    assert [message["content"] for message in row["prompt"]] == ["w9", "w1 w2"]
    assert row["user_response"]["content"] == "w3"
    assert said.out.startswith(f"model > {row['completion']['content']}\n")


def said_in(output):
    """What the conversation of a chat's folder holds."""
    return [message["content"] for message in json.loads((output / "conversation.json").read_text())["messages"]]


def test_chat_goes_on_with_the_conversation(said_in_chat, tmp_path, monkeypatch, capsys):
    """Restarted, retried, undone: what is in the folder is what was said and what was learned."""
    output = tmp_path / "chat"
    shown = said_in_chat(["/system w9", "w1 w2", "/retry", "/show w3", "/status"])
    first, again = (line.removeprefix("model > ") for line in shown.out.splitlines())
    assert first != again and said_in(output) == ["w9", "w1 w2", again]
    assert rows_of(output) == [] and "conversation   3 messages" in shown.err and "system prompt  w9" in shown.err
    assert re.search(r"\[Knowing the reply|\[The reply hardly", shown.err)

    # The same options again, from the file that the chat left.
    talk(monkeypatch, ["/teach w3", "w4"])
    assert main(["chat", "--config", str(output / "run.yaml")]) == 0
    shown = capsys.readouterr()
    assert "goes on after 2 messages (/new begins another); the last ones:]\n" in shown.err
    assert f"[you > w1 w2]\n[model > {again}]" in shown.err
    compared = re.search(r"before > (.*)\]\n\[after  > (.*)\]", shown.err)
    assert compared[1] == again != compared[2]
    assert len(said_in(output)) == 7 and rows_of(output)[0]["completion"]["content"] == again

    said_in_chat(["/new", "w5", "/undo"])  # of another conversation: this one stays
    assert said_in(output)[:2] == ["w9", "w5"] and rows_of(output) == []
    before = said_in(output)
    shown = said_in_chat(["/teach w6", "w7", "/undo"])
    assert said_in(output) == before and "(4 messages)" in shown.err

    (output / "conversation.json").write_text("{")
    shown = said_in_chat([], status=1)
    assert f"{output / 'conversation.json'} holds no conversation" in shown.err


def test_chat_at_a_terminal(saved, tmp_path, monkeypatch, capsys):
    """Keys go in, a paste is one message, Ctrl-C drops what is typed, the answer is streamed."""
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setattr(screen, "is_terminal", lambda: True)
    output = tmp_path / "chat"
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        paste, begin_line, ctrl_c = "\x1b[200~w1\nw2\x1b[201~\r", "\x1b\r", "\x03"
        lines = [paste, f"/teach w3{begin_line}w4\r", f"w9{ctrl_c}w5\r", ctrl_c, "/teech x\r", "\x04"]
        typed = iter(lines)
        read = terminal.MessageReader.read
        monkeypatch.setattr(terminal.MessageReader, "read", lambda *a: keys.send_text(next(typed)) or read(*a))
        assert chat(saved, output, "--lora", "0") == 0
    users = [m["content"] for m in json.loads((output / "conversation.json").read_text())["messages"][::2]]
    assert users == ["w1\nw2", "w3\nw4", "w5"]
    assert followups(output) == ["w3\nw4"]
    shown = capsys.readouterr().out
    assert shown.count("model > ") == 3 and shown.count("after  > ") == 1
    assert "Ctrl-D or /quit ends the chat" in shown and "did you mean /teach?" in shown


def test_chat_learns_from_every_message_on_request(said_in_chat, tmp_path):
    lines = ["w1", "w2", "\u200b", "/learn told", "w3", "/learn always", "w4", "/new", "w5"]
    said_in_chat(lines, "--learn", "always")
    assert followups(tmp_path / "chat") == ["w2", "w4"]


@pytest.fixture
def deaf():
    """A handler of Ctrl-C that does nothing, as a library may have left it."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


@pytest.mark.usefixtures("deaf")
def test_ctrl_c_cancels_an_answer_and_no_update(said_in_chat, saved, tmp_path, monkeypatch):
    """In an answer, and in an update: that is then whole, and its message is not answered."""
    calls = []
    generate, run_pass = chat_module.generate, chat_module.SDPOTrainer.run_pass

    def answer(*arguments, **options):
        calls.append("answer")
        if calls.count("answer") == 2:
            signal.raise_signal(signal.SIGINT)
        return generate(*arguments, **options)

    def update(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return run_pass(*arguments, **options)

    monkeypatch.setattr(chat_module, "generate", answer)
    monkeypatch.setattr(chat_module.SDPOTrainer, "run_pass", update)
    output = tmp_path / "chat"
    said = said_in_chat(["w1", "w2", "/teach w3", "/teach w4", "w5"])
    assert said.out.count("model > ") == 2  # w1 and w5
    assert said.err.count("[cancelled") == 3
    assert checkpoints(output) == ["checkpoint-0", "checkpoint-1", "checkpoint-2"]
    assert [len(row["prompt"]) for row in rows_of(output)] == [1, 1]  # w2 is in no history

    def stop(question=""):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", stop)
    assert chat(saved, output, "--lora", "0") == 130


# Only the module that reads: a process that imports torch takes seconds to start.
READER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("terminal", sys.argv[1])
terminal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(terminal)
reader = terminal.MessageReader()
while (text := reader.read("you > ")) is not None:
    print(f"read {text!r}", flush=True)
"""


@pytest.fixture
def at_terminal():
    """at_terminal(script): runs it on a pseudo-terminal; gives type_and_wait(keys, *texts), which returns what was
    shown until the last of the texts."""
    if not hasattr(os, "openpty"):
        pytest.skip("needs a pseudo-terminal")
    master, slave = os.openpty()
    seen, running = "", []

    def start(script):
        command = [sys.executable, "-c", script, str(Path(terminal.__file__))]
        files, environment = dict.fromkeys(("stdin", "stdout", "stderr"), slave), {**os.environ, "TERM": "xterm"}
        running.append(subprocess.Popen(command, **files, env=environment, start_new_session=True))
        os.close(slave)
        return type_and_wait

    def type_and_wait(keys, *texts):
        nonlocal seen
        os.write(master, keys)
        shown = ""
        for text in texts:
            until = time.monotonic() + 60
            while text not in seen:
                assert select.select([master], [], [], max(0, until - time.monotonic()))[0], seen
                seen += os.read(master, 4096).decode(errors="replace")
            before, _, seen = seen.partition(text)
            shown += before + text
        return shown

    yield start
    os.write(master, b"\x04")
    try:
        assert running[0].wait(60) == 0
    finally:
        running[0].kill()
        os.close(master)


def test_keys_typed_too_early_wait_for_the_question(at_terminal):
    """They are not shown in the middle of what is printed, as the terminal itself would."""
    type_and_wait = at_terminal(
        READER.replace("while", """
with terminal.unechoed():
    print("busy", flush=True)
    time.sleep(0.5)
    print("done", flush=True)
while""").replace("sys\n", "sys, time\n", 1)
    )  # fmt: skip
    type_and_wait(b"", "busy")
    assert "w1" not in type_and_wait(b"w1", "done")
    assert "w1" in type_and_wait(b"", "you > ", "w1")
    type_and_wait(b"\r", "read 'w1'", "you > ")


def test_a_paste_is_one_message(at_terminal):
    """On a real terminal: marked by the terminal as a paste, or only as fast as one."""
    type_and_wait = at_terminal(READER)
    type_and_wait(b"", "you > ")
    type_and_wait(b"w1\r", "read 'w1'", "you > ")
    type_and_wait(b"\x1b[200~w2 w3\nw4\n/undo\x1b[201~\r", r"read 'w2 w3\nw4\n/undo'", "you > ")
    type_and_wait(b"w5\nw6\nw7\n", "w7")
    time.sleep(2 * terminal.PASTE_SECONDS)
    type_and_wait(b"\r", r"read 'w5\nw6\nw7\n'", "you > ")
    type_and_wait(b"w8\nw9", "w9")
    time.sleep(2 * terminal.PASTE_SECONDS)
    type_and_wait(b"\r", r"read 'w8\nw9'", "you > ")
    type_and_wait(b"\x1b[A", "w9")  # the arrow brings the last message back
    type_and_wait(b"\r", r"read 'w8\nw9'", "you > ")


def learner(lab, folder, **changes):
    settings = {"use_cpu": True, "report_to": [], "learning_rate": 1e-2, "save_total_limit": 3}
    settings |= {"output_dir": str(folder), "template": TEMPLATE, "max_new_tokens": 6, **changes}
    return ChatLearner(lab.model(), OnlineSDPOConfig(**settings), lab.tokenizer())


def step(one, followup="w9"):
    messages = [{"role": "user", "content": "w1 w2"}]
    _, answer = one.answer(messages)
    return one.learn(messages, answer.completion_ids, followup)


def test_a_restarted_chat_takes_the_learning_rate_that_it_is_given(lab, tmp_path):
    """Not the one in its checkpoint: one step at another rate moves the weights by another amount."""
    step(learner(lab, tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = []
    for folder, rate in (("a", 1e-2), ("b", 1e-4)):
        one = learner(lab, tmp_path / folder, learning_rate=rate)
        before = weights(one.model)
        step(one)
        moved.append(max(float((value - before[name]).abs().max()) for name, value in weights(one.model).items()))
    assert moved[0] > 20 * moved[1] > 0


@pytest.mark.parametrize("teacher", ["live", "ema", "frozen"])
def test_undo_and_restart_restore_everything(teacher, lab, tmp_path):
    one = learner(lab, tmp_path, teacher=teacher)
    step(one)
    step(one)
    kept = weights(one.model)
    figures = step(one)
    after = weights(one.model)
    assert one.undo() == 2 and same(weights(one.model), kept)
    one.answers -= 1  # the same draw again
    assert step(one) == figures and same(weights(one.model), after)
    again = learner(lab, tmp_path, teacher=teacher)
    assert again.updates == 3 and same(weights(again.model), after)


def test_undo_as_far_as_checkpoints_are_kept(lab, tmp_path):
    one = learner(lab, tmp_path)
    for _ in range(4):
        step(one)
    assert one.checkpoints() == [2, 3, 4]
    assert (one.undo(), one.undo()) == (3, 2)
    with pytest.raises(ValueError, match="not kept any more"):
        one.undo()


def test_a_step_that_is_not_finite_changes_nothing(lab, tmp_path):
    one = learner(lab, tmp_path)
    before, run_pass = weights(one.model), one.trainer.run_pass

    def broken(*arguments, **options):
        loss, statistics = run_pass(*arguments, **options)
        return loss * math.nan, statistics._replace(sequence_loss=statistics.sequence_loss * math.nan)

    one.trainer.run_pass = broken
    with pytest.raises(NonFiniteError, match="update 1"):
        step(one)
    assert one.updates == 0 and same(weights(one.model), before)


@pytest.fixture
def adapter(saved, tmp_path):
    """Folders of an adapter of rank 4 that changes the model much, and of the two merged."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 1, "target_modules": "all-linear", "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved), config)
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
    assert distance(tmp_path / "start", adapter[0]) == 0 < distance(tmp_path / "end", adapter[0]) < 0.01

    talk(monkeypatch, [f"/save {tmp_path}/again", "/undo", f"/save {tmp_path}/undone"])
    assert chat(adapter[0], output, "--learning-rate", "1e-4") == 0
    assert distance(tmp_path / "again", tmp_path / "end") == 0 == distance(tmp_path / "undone", adapter[0])

    for rank in ("0", "16"):
        assert chat(adapter[0], tmp_path / "other", "--lora", rank) == 1
        assert f"got {rank}: it is a LoRA adapter with r=4" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_online_goes_on_with_an_adapter(adapter, prompts, tmp_path):
    more = ("--rule", "max_words=2", "--teacher", "frozen", "--quiet", "--learning-rate", "1e-4")
    assert online(prompts, adapter[0], tmp_path / "run", *more) == 0
    assert 0 < distance(tmp_path / "run" / "model", adapter[0]) < 0.01


def test_eval_answers_with_the_adapter(adapter, prompts, saved, tmp_path):
    report = tmp_path / "win.json"
    for base, alike in ((adapter[1], True), (saved, False)):
        assert evaluate(prompts, adapter[0], base, "--rule", "max_words=3", "--quiet", "-o", str(report)) == 0
        found = json.loads(report.read_text())
        assert all(row["model"] == row["base"] for row in found["answers"]) is alike
        if alike:
            assert (found["wins"], found["ties"], found["losses"], len(found["answers"])) == (0, 8, 0, 8)


def test_signal_is_that_of_the_adapter(adapter, saved, tmp_path):
    found = []
    texts = ["--prompt", "w1", "--completion", "w2 w3", "--followup", "w4", "--quiet"]
    for model in (*adapter, saved):
        assert main(["signal", "--model", model, *texts, "--json", str(tmp_path / "signal.json")]) == 0
        found.append(json.loads((tmp_path / "signal.json").read_text())["real"]["log_ratio"])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] != pytest.approx(found[2], abs=1e-2)


def test_eval_by_a_local_judge(prompts, saved, capsys):
    assert evaluate(prompts, saved, saved, "--judge-local", saved, "--persona", "w1", "--limit", "3") == 0
    assert "3 left out" in capsys.readouterr().out  # this judge speaks in w's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "name either --rule, or a judge"),
        ("--rule max_words=3 --judge-local x", "name either --rule, or a judge"),
        ("--judge-url http://localhost:1/v1", "--judge-url needs --judge-model"),
        ("--rule max_words=3 --limit 0", "--limit must be at least 1"),
        ("--rule max_words=3 -o {folder}", "--output must be a file, but {folder} is a folder"),
        ("--rule max_words=3 -o {prompts}", "--output must be another file than what is read"),
        ("--rule max_words=3 --base /no/such/folder", "no such file or folder: /no/such/folder"),
        ("--rule max_words=3 --model /nor/this", "no such file or folder: /nor/this"),
    ],
)
def test_eval_errors(options, message, prompts, saved, capsys):
    places = {"folder": Path(prompts).parent, "prompts": prompts}
    assert evaluate(prompts, saved, saved, *options.format(**places).split()) == 1
    assert message.format(**places) in capsys.readouterr().err


def test_rules_compare_answer_by_answer():
    rules = [parse_rule("max_words=2"), parse_rule("case=lower")]
    answers, base = ["a b", "a b c", "A", "a"], ["a b c", "a b", "a b c", "b"]
    assert compare_by_rules(rules, answers, base) == [1, 0, 0.5, 0.5]


def test_a_judge_is_asked_in_both_orders():
    """Wins only count in both orders; a judge that always says A sees ties."""
    seen = []

    def judged(verdict, *persona):
        def replies(conversations):
            seen.extend(c[-1]["content"] for c in conversations)
            return [verdict(c[-1]["content"]) for c in conversations]

        prompts = [[{"role": "user", "content": "{first} question"}]] * 2
        answers, base = ["good {second}", "bad"], ["bad", "good"]
        return compare_by_judge(SimpleNamespace(replies=replies), prompts, answers, base, *persona)

    assert judged(lambda text: "A" if "Answer A:\ngood" in text else "Answer: B.", "p") == [1.0, 0.0]
    assert len(seen) == 4 and all("{" not in text for text in seen)
    assert judged(lambda _: "A") == judged(lambda _: "C") == [0.5, 0.5]
    assert judged(lambda _: None) == [None, None]


def test_read_verdict():
    replies = {"A": "A", "B.": "B", "**C**": "C", "Answer B is better than A": "B", "Both": None, "": None, None: None}
    assert {reply: read_verdict(reply) for reply in replies} == replies


def test_win_rate_and_its_interval():
    found = WinRate.of([1.0, 1.0, 0.5, 0.0, None])
    assert (found.wins, found.ties, found.losses, found.left_out, found.rate) == (2, 1, 1, 1, 0.625)
    # 8 of 10: the interval as published, e.g. in Agresti and Coull (1998), to 4 digits
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson(1.0, 5)[1] == 1.0
    nothing = WinRate.of([None])
    assert math.isnan(nothing.rate) and (nothing.low, nothing.high) == (0.0, 1.0)


def test_a_rule_user_says_its_wishes():
    words, case = "Please answer in at most 1 words.", "Please write everything in lower case."
    user = RuleUser(["max_words=1", "case=lower"])
    assert user.feedback([], ["A b", "a b", "a"]) == [f"{words} {case}", words, ""]
