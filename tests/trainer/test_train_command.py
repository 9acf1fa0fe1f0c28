"""`fastsdpo train` on a small saved model: what it writes, refuses, and how it stops."""

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fastsdpo.commands import run
from fastsdpo.data.locks import locked
from fastsdpo.train import main
from fastsdpo.trainer import by_time
from tests.servers import serving
from tests.trainer.conftest import command, report_of


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    return lab.make_place(tmp_path_factory.mktemp("train"))


def arguments(place, output, *more):
    return command(place, output, "--learning-rate", "1e-3", *more)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_dry_run_counts_and_leaves_nothing(place, tmp_path, capsys):
    assert main(arguments(place, tmp_path / "out", "--dry-run", "--show", "1")) == 0
    printed = capsys.readouterr().out
    for pattern in ("12 interactions of 6 conversations; 4 held out", "3 optimizer steps of 4", r"\d+\.\d+ GB at the"):
        assert re.search(pattern, printed), pattern
    row = json.loads((place / "data.jsonl").read_text().splitlines()[0])
    followup, answer = row["user_response"]["content"], row["completion"]["content"].split()
    shown = re.search(r"\{\+(.*)\+\}.*\[(.*)\]$", printed, re.MULTILINE)
    assert followup in shown[1] and shown[2].replace("|", " ").split() == [*answer, "<end>"], printed
    assert not any((tmp_path / "out").glob("*"))


def test_run_report_and_reload(place, tmp_path, capsys):
    output, signals = tmp_path / "out", (signal.SIGINT, signal.SIGTERM)
    handlers = list(map(signal.getsignal, signals))
    assert main(arguments(place, output)) == 0
    assert list(map(signal.getsignal, signals)) == handlers
    assert "step 3/3  loss " in capsys.readouterr().err
    report = report_of(output)
    assert (report["interactions"], report["left_out"], report["steps"]) == (12, [], 3)
    assert report["sharing"] == "conversation" and report["settings"]["learning_rate"] == 1e-3
    assert report["before"]["eval_loss"] != report["after"]["eval_loss"]
    assert len([entry for entry in report["history"] if "loss" in entry]) == 3
    for key in ("log_ratio_mean", "log_ratio_std", "log_ratio_p05", "student_logp", "teacher_logp", "eos_log_ratio"):
        assert f"sdpo/{key}" in report["history"][1] and f"eval_sdpo/{key}" in report["before"], key
    for key in ("sdpo/tokens_per_second", "sdpo/sequence_tokens_per_second"):
        assert key in report["history"][1], key

    after, before = loaded(output / "model"), loaded(place / "model")
    moved = [float((new - old).detach().abs().max()) for new, old in zip(after.parameters(), before.parameters())]
    assert 0 < max(moved) < 0.01
    prompt = AutoTokenizer.from_pretrained(output / "model")("<user> w1 <end> <assistant>", return_tensors="pt")
    assert after.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]

    # The card, and nothing that loads as code; others may read the weights.
    card = (output / "model" / "README.md").read_text()
    for line in (
        "| training | 12 interactions of 6 conversations |",
        "| held out | 4 interactions of 2 conversations |",
        f"| loss | {report['before']['eval_loss']:.4f} | {report['after']['eval_loss']:.4f} |",
        "| learning_rate | `0.001` |",
    ):
        assert line in card, card
    assert "base_model" not in card and str(place) not in card  # a local folder, and whose
    files = {path.name: path.stat().st_mode & 0o777 for path in (output / "model").iterdir()}
    assert "training_args.bin" not in files and len(set(files.values())) == 1, files

    # The same run again, from the file that it left.
    again = ["--config", str(output / "run.yaml"), "-o", str(tmp_path / "again"), "--quiet"]
    assert main(again) == 0
    repeated = loaded(tmp_path / "again" / "model").state_dict()
    assert all(torch.equal(value, repeated[name]) for name, value in after.state_dict().items())

    # A second run into the same folder is refused, and the first one's files stay.
    text = (output / "report.json").read_text()
    assert main(arguments(place, output)) == 1
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error
    assert (output / "report.json").read_text() == text
    assert main(arguments(place, output, "--overwrite", "--quiet", "--max-steps", "1")) == 0
    assert capsys.readouterr().out == ""
    assert report_of(output)["steps"] == 1


STREAM = "--stream --max-steps 4"
MISSING = next(name for name in INTEGRATION_TO_CALLBACK if name not in get_available_reporting_integrations())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--alpha 1.5", r"--alpha must be in \[0, 1\], got 1.5"),
        ("--topk 5", "--topk must be given with --mode topk, and only there, got 5"),
        ("--mode topk", "--topk must be given with --mode topk, and only there, got None"),
        ("--mode sampled_token --alpha 0", "--alpha must be 1 with --mode sampled_token, got 0"),
        ("--set nonsense=1", "--set must be NAME=VALUE with a field of SDPOConfig, got 'nonsense=1'"),
        ("--set teacher", "--set must be NAME=VALUE with a field of SDPOConfig, got 'teacher'"),
        ("--set teacher=other", "--teacher must be one of live, ema, frozen, trust_region, got 'other'"),
        ("--ema-rate 0", r"--ema-rate must be in \(0, 1\], got 0"),
        ("--ema-rate 0.1", "--ema-rate needs --teacher ema, got --teacher live"),
        ("--set add_tail=false", "--set add_tail needs --mode topk, got --mode full"),
        ("--set push_to_hub=true", "--set push_to_hub: to upload the model give --push-to-hub OWNER/NAME"),
        ("--lora-alpha 8", "--lora-alpha needs an adapter: add --lora RANK"),
        ("--reference-kl -1", "--reference-kl must be >= 0, got -1"),
        ("--ignore-first-k -1", "--ignore-first-k must be >= 0, got -1"),
        ("--max-tokens-per-pack 0", "--max-tokens-per-pack must be at least 1 or None, got 0"),
        (f"--report-to {MISSING}", f"--report-to {MISSING}: .*[Ii]nstall"),
        (f"--set report_to={MISSING}", f"--report-to {MISSING}: .*[Ii]nstall"),
        ("--max-steps 0", "--max-steps must be at least 1, or -1 where the epochs decide, got 0"),
        ("--epochs -1", "--epochs must be > 0, got -1"),
        ("--learning-rate -1", "--learning-rate must be >= 0, got -1"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--lora -4", "--lora must be at least 0, got -4"),
        ("--report-to nobody", "--report-to must be of azure_ml, .*, got 'nobody'"),
        ("--template nosuch", "--template must be one of offline-v1, .*got 'nosuch'"),
        ("--eval-data nosuch.jsonl", "no such file: nosuch.jsonl"),
        ("", "--model: no such file or folder: /nowhere/model"),
        ("--dry-run --card much", "--card must be a size like 80GB or 79.1GiB, got 'much'"),
        ("--dry-run --processes 4 --ulysses 3", r"--ulysses must divide the number of processes \(4\), got 3"),
        ("--dry-run --processes 0", "--processes must be at least 1, got 0"),
        ("--card 80GB", "--card describes the machine of a forecast"),
        ("--strategy fsdp", "--strategy describes the machine of a forecast"),
        ("--stream --max-steps -1", "--stream needs --max-steps: how long its data is, is not known"),
        (f"{STREAM} --dry-run", "--dry-run goes without --stream"),
        (f"{STREAM} --token-cache here", "--token-cache goes without --stream"),
        (f"{STREAM} --set dataloader_num_workers=2", "--set dataloader_num_workers goes without --stream"),
        (f"{STREAM} --show 65", "--show must be at most 64 with --stream, got 65"),
        ("--resume nosuch", "--resume must name a checkpoint's folder, such as RUN/checkpoint-100, got 'nosuch'"),
        ("--shuffle-buffer 8", "--shuffle-buffer needs --stream"),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(place, tmp_path, capsys, more, message):
    assert main(arguments(place, tmp_path / "out", "--model", "/nowhere/model", *more.split())) == 1
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(f"^fastsdpo train: .*{message}", error), error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file: "),
        ("", "bad.jsonl: the file is empty"),
        ('{"prompt": [{"role": "user", "con', "bad.jsonl:1: not JSON"),
        ('{"prompt": "x", "completion": "y"}\n', "bad.jsonl:1: an interaction row must have 'user_response'"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "run `fastsdpo prepare`"),
        ('[{"from": "human", "value": "x"}]\n', "run `fastsdpo prepare`"),
    ],
)
def test_bad_data_is_said_before_a_model_is_loaded(place, tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "bad.jsonl").write_text(text)
    rest = arguments(place, tmp_path / "out", "--model", "/nowhere/model")[1:]
    assert main([str(tmp_path / "bad.jsonl"), *rest]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "output", "message"),
    [
        ("data.jsonl", "taken", "--output must be a folder, but .*taken is a file"),
        ("data.jsonl", "taken/runs/first", "--output must be a folder, but .*taken is a file"),
        ("empty", "run", "folder empty holds no file that ends in"),
    ],
)
def test_files_and_folders_in_each_others_place(place, tmp_path, capsys, monkeypatch, data, output, message):
    """It is said before anything is loaded: there is no such model."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    for name in ("taken", "data.jsonl"):
        shutil.copy(place / "data.jsonl", name)
    assert main([data, "--model", "nosuch", "-o", output, "--cpu"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_lora_without_peft(place, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    assert main(arguments(place, tmp_path / "out", "--model", "/nowhere", "--lora", "4")) == 1
    assert "pip install peft" in capsys.readouterr().err


def test_a_damaged_model_is_one_sentence(place, tmp_path, capsys, monkeypatch):
    shutil.copytree(place / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    argv = arguments(place, tmp_path / "out", "--model", str(tmp_path / "model"))
    assert main(argv) == 1
    assert re.search("^fastsdpo train: the model in folder .* cannot be read", capsys.readouterr().err, re.MULTILINE)
    monkeypatch.setenv("FASTSDPO_TRACEBACK", "1")
    with pytest.raises(OSError, match="cannot be read"):
        main(argv)


def test_a_mistyped_folder_costs_one_request(place, tmp_path, capsys, monkeypatch):
    """Offline at once, and in one line: what other packages log is theirs to show."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("", "fastsdpo"):  # as without pytest's own handlers
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    started = time.perf_counter()
    monkeypatch.chdir(place)
    assert main(arguments(place, tmp_path / "out", "--model", "modle")) == 1
    assert time.perf_counter() - started < 20  # a minute, with the loaders' retries
    (line,) = capsys.readouterr().err.splitlines()
    assert "'modle' is no local folder or file" in line and "the hub cannot be reached" in line
    assert line.endswith("did you mean the folder 'model'?")
    assert logging.getLogger().handlers == []


def test_evaluations_and_checkpoints_by_the_clock(place, tmp_path, monkeypatch):
    """After the first minutes, where no steps are given for them."""
    monkeypatch.setattr(by_time, "MOST", float("inf"))  # however long an evaluation takes
    monkeypatch.setattr(run, "ByTime", lambda evaluate, save: by_time.ByTime(evaluate, save, first=0, every=3600))
    assert main(arguments(place, tmp_path, "--set", "save_strategy=steps", "--quiet")) == 0
    history = report_of(tmp_path)["history"]
    assert [row["step"] for row in history if "eval_loss" in row] == [0, 1, 3]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


def test_push_to_hub(place, tmp_path, monkeypatch, capsys):
    """The repository is made, private, before training; model and card are uploaded after it."""
    asked = []

    def answer(path, body):
        asked.append((path, body))
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        url = "https://huggingface.co/me/mine"
        return 200, {"url": url, "commitUrl": f"{url}/commit/0", "commitOid": "0"}

    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with serving(answer) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        argv = arguments(place, tmp_path, "--lora", "2", "--max-steps", "1", "--push-to-hub", "me/mine")
        assert main(argv) == 0, capsys.readouterr().err
    made = json.loads(asked[0][1])
    assert asked[0][0] == "/api/repos/create" and made["name"] == "mine" and made["visibility"] == "private"
    commit = next(body for path, body in asked if "/commit/" in path)
    sent = {row["value"]["path"] for row in map(json.loads, commit.splitlines()) if row["key"] == "file"}
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"} <= sent
    # transformers has an argument of that name, which uploads the output folder with what users said
    assert "answers.json" not in sent and [path for path, _ in asked].count("/api/repos/create") == 1
    assert "uploaded to me/mine" in capsys.readouterr().out


def test_resuming_with_another_adapter_is_one_sentence(place, tmp_path, capsys):
    saved = ["--set", "save_strategy=steps", "--save-steps", "1", "--set", "teacher_check=0"]
    saved += ["--set", "measure_interactions=0", "--set", "measure_answers=0"]
    argv = arguments(place, tmp_path / "out", *saved, "--max-steps", "1")
    assert main([*argv, "--lora", "2"]) == 0
    for other in (["--lora", "4"], []):
        assert main([*argv, "--max-steps", "2", *other, "--resume"]) == 1
        (error,) = capsys.readouterr().err.splitlines()[-1:]
        assert "checkpoint-1 is of another model or adapter; go on with the --model and --lora" in error


def test_a_short_run_with_an_adapter(place, tmp_path, capsys):
    """Its last step is logged, and a learning rate that was made for all weights is named."""
    more = ("--lora", "2", "--set", "teacher_check=0", "--logging-steps", "10")
    argv = command(place, tmp_path / "out", *more)
    rate = argv.index("--learning-rate")
    assert main(argv[:rate] + argv[rate + 2 :]) == 0
    logged = [entry["step"] for entry in report_of(tmp_path / "out")["history"] if "loss" in entry]
    assert logged == [1, 3]
    assert (
        "learning rate 2e-06, made for all weights: an adapter takes about ten times more" in capsys.readouterr().out
    )


def test_two_runs_into_one_folder(place, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    with locked(output / ".lock", wait=False):
        assert main(arguments(place, output)) == 1
    assert f"another run is training into {output}" in capsys.readouterr().err
    assert main(arguments(place, output)) == 0
    assert not (output / ".lock").exists()
