"""`fastsdpo train` on a small saved model: what it prints, writes, refuses, and how it stops."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fastsdpo.train import main


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    """A folder with ``model/``, ``data.jsonl`` (12 interactions) and ``data.eval.jsonl`` (4)."""
    folder = tmp_path_factory.mktemp("train")
    lab.make_model().save_pretrained(folder / "model")
    lab.make_tokenizer().save_pretrained(folder / "model")
    lab.write_rows(folder / "data.jsonl", lab.make_interactions())
    lab.write_rows(folder / "data.eval.jsonl", lab.make_interactions(2, seed=9))
    return folder


def arguments(place, output, *more, data="data.jsonl"):
    return [
        str(place / data),
        "--model",
        str(place / "model"),
        "-o",
        str(output),
        "--cpu",
        "--template",
        " note {o}",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--logging-steps",
        "1",
        "--learning-rate",
        "1e-3",
        "--set",
        "save_strategy=no",
        "--set",
        "dataloader_pin_memory=false",
        *more,
    ]


def test_dry_run(place, tmp_path, capsys):
    assert main(arguments(place, tmp_path / "out", "--dry-run")) == 0
    printed = capsys.readouterr().out
    for pattern in (
        r"\Alosses are computed by the (native kernels|reference \(eager PyTorch\), slowly: no native)",
        r"model .*model: [\d,]+ of [\d,]+ weights are trained",
        r"student's prompt +\d+ +\d+ +\d+ +\d+",
        r"teacher's prompt +\d+",
        r"answer +\d+",
        r"12 interactions of 6 conversations; 4 held out; 0 left out",
        r"sharing conversation: [\d,]+ of [\d,]+ tokens are computed per epoch",
        r"3 optimizer steps of 4 interactions, 1 epoch\n",
        r"memory per process, an estimate: \d+\.\d+ GB at the peak \(weights",
        r"smaller with: .*--lora RANK",
        r"teacher check: log-probability of the answer's tokens",
        r"mean absolute value +\d\.\d+ +\d\.\d+",
    ):
        assert re.search(pattern, printed), pattern
    assert not any((tmp_path / "out").glob("*"))


def test_run_report_and_reload(place, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(arguments(place, output)) == 0
    printed = capsys.readouterr()
    assert "held-out loss before training: " in printed.out
    assert re.search(r"held-out loss: \d\.\d+ before, \d\.\d+ after", printed.out)
    assert re.search(r"step 3/3  loss \d\.\d+  signal \d\.\d+  tok/s \d+  left 0:00", printed.err)

    report = json.loads((output / "report.json").read_text())
    assert report["interactions"] == 12
    assert report["left_out"] == []
    assert report["steps"] == 3
    assert report["sharing"] == "conversation"
    assert report["before"]["eval_loss"] != report["after"]["eval_loss"]
    assert report["settings"]["learning_rate"] == 1e-3
    losses = [entry["loss"] for entry in report["history"] if "loss" in entry]
    assert len(losses) == 3
    for key in (
        "sdpo/log_ratio_mean",
        "sdpo/log_ratio_std",
        "sdpo/log_ratio_p05",
        "sdpo/student_logp",
        "sdpo/teacher_logp",
        "sdpo/eos_log_ratio",
        "sdpo/tokens_per_second",
        "sdpo/sequence_tokens_per_second",
    ):
        assert key in report["history"][1], key
        if "per_second" not in key:
            assert f"eval_{key}" in report["before"]

    reloaded = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    moved = [float((new - old).detach().abs().max()) for new, old in zip(reloaded.parameters(), before.parameters())]
    assert 0 < max(moved) < 0.01
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    prompt = tokenizer("<user> w1 <end> <assistant>", return_tensors="pt")
    answer = reloaded.generate(**prompt, max_new_tokens=3, do_sample=False, use_cache=True)
    assert answer.shape[1] > prompt["input_ids"].shape[1]

    # A second run into the same folder is refused, and the first one's files stay.
    text = (output / "report.json").read_text()
    assert main(arguments(place, output)) == 1
    assert "holds a run; pass --resume to go on with it, or --overwrite" in capsys.readouterr().err
    assert (output / "report.json").read_text() == text
    assert main(arguments(place, output, "--overwrite", "--quiet", "--max-steps", "1")) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((output / "report.json").read_text())["steps"] == 1


def test_lora_run(place, tmp_path):
    pytest.importorskip("peft")
    output = tmp_path / "out"
    assert main(arguments(place, output, "--lora", "4", "--teacher", "frozen", "--quiet")) == 0
    assert (output / "model" / "adapter_config.json").exists()
    base = LlamaForCausalLM.from_pretrained(place / "model")
    from peft import PeftModel

    PeftModel.from_pretrained(base, output / "model")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--alpha", "1.5"], r"SDPOConfig: alpha must be in \[0, 1\], got 1.5"),
        (["--topk", "5"], "SDPOConfig: topk must be given with mode='topk', and only there, got 5"),
        (["--mode", "topk"], "SDPOConfig: topk must be given with mode='topk', and only there, got None"),
        (["--mode", "sampled_token", "--alpha", "0"], "alpha must be 1 with mode='sampled_token', got 0"),
        (["--set", "nonsense=1"], "--set must be NAME=VALUE with a field of SDPOConfig, got 'nonsense=1'"),
        (["--set", "teacher"], "--set must be NAME=VALUE with a field of SDPOConfig, got 'teacher'"),
        (["--set", "teacher=other"], "teacher must be one of live, ema, frozen, trust_region, got 'other'"),
        (["--ema-rate", "0"], r"ema_rate must be in \(0, 1\], got 0"),
        (["--reference-kl", "-1"], "reference_kl must be >= 0, got -1"),
        (["--ignore-first-k", "-1"], "ignore_first_k must be >= 0, got -1"),
        (["--max-tokens-per-pack", "0"], "max_tokens_per_pack must be at least 1 or None, got 0"),
        (["--template", "no place"], "HindsightTemplate: name must be one of offline-v1, .*got 'no place'"),
        (["--model", "/nowhere/model"], "no such file or folder: /nowhere/model"),
        (["--eval-data", "/nowhere/eval.jsonl"], "/nowhere/eval.jsonl"),
        (
            ["--set", "weight_update=stochastic_rounding", "--set", "optim=sgd"],
            "optim must be one of adamw_torch, .* with weight_update='stochastic_rounding', got 'sgd'",
        ),
    ],
)
def test_bad_settings(place, tmp_path, capsys, more, message):
    assert main(arguments(place, tmp_path / "out", *more)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastsdpo train: ")
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file: "),
        ("", "bad.jsonl: the file is empty"),
        ('{"prompt": [{"role": "user", "con', "bad.jsonl:1: not JSON"),
        ('{"prompt": "x", "completion": "y"}\n', "bad.jsonl:1: an interaction row must have 'user_response'"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "run `fastsdpo prepare` on the file first"),
        ('[{"from": "human", "value": "x"}]\n', "run `fastsdpo prepare` on the file first"),
    ],
)
def test_bad_data(place, tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "bad.jsonl").write_text(text)
    command = arguments(place, tmp_path / "out")
    for more in ((), ("--model", "/nowhere/model")):  # said before a model is looked for
        assert main([str(tmp_path / "bad.jsonl"), *command[1:], *more]) == 1
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "Traceback" not in error


MISSING = next(name for name in INTEGRATION_TO_CALLBACK if name not in get_available_reporting_integrations())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--report-to", MISSING], rf"--report-to {MISSING}: .*[Ii]nstall"),
        (["--set", f"report_to={MISSING}"], rf"--report-to {MISSING}: .*[Ii]nstall"),
        (["--report-to", "nobody"], "--report-to must be of azure_ml, .*, got 'nobody'"),
        (["--template", "nosuch"], "HindsightTemplate: name must be one of .*, got 'nosuch'"),
        (["--eval-data", "nosuch.jsonl"], "no such file: nosuch.jsonl"),
    ],
)
def test_mistakes_are_said_before_the_model_is_loaded(place, tmp_path, capsys, more, message):
    assert main(arguments(place, tmp_path / "out", "--model", "/nowhere/model", *more)) == 1
    assert re.search(rf"^fastsdpo train: {message}", capsys.readouterr().err)


def test_lora_without_peft(place, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "peft" else find(name, *more),
    )
    assert main(arguments(place, tmp_path / "out", "--model", "/nowhere", "--lora", "4")) == 1
    assert "install it with: pip install peft, or train all weights" in capsys.readouterr().err


def test_a_damaged_model_is_one_sentence(place, tmp_path, capsys, monkeypatch):
    shutil.copytree(place / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    command = arguments(place, tmp_path / "out", "--model", str(tmp_path / "model"))
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"^fastsdpo train: .*the model in folder .* cannot be read: Error while", error)
    monkeypatch.setenv("FASTSDPO_TRACEBACK", "1")
    with pytest.raises(OSError, match="cannot be read"):
        main(command)


def test_a_mistyped_folder_costs_one_request(place, tmp_path, capsys, monkeypatch):
    """Offline at once, and in one line: what other packages log is theirs to show."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("", "fastsdpo"):  # as without pytest's own handlers
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    started = time.perf_counter()
    assert main(arguments(place, tmp_path / "out", "--model", "mode")) == 1
    assert time.perf_counter() - started < 20  # a minute, with the loaders' retries
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastsdpo train: load_model_and_tokenizer: 'mode' is no local folder or file")
    assert "the hub cannot be reached" in line
    assert logging.getLogger().handlers == []


def test_options_that_do_not_exist(place, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments(place, tmp_path / "out", "--teecher", "live"))
    assert stop.value.code == 2
    assert "unrecognized arguments: --teecher live" in capsys.readouterr().err


# ------------------------------------------------------------------------------- not finite


POISON = "w59"


@pytest.fixture
def poisoned(place, tmp_path, lab):
    """A model whose embedding of one word is not finite, which one interaction holds."""
    interactions = [
        type(item)(
            [{**m, "content": m["content"].replace(POISON, "w0")} for m in item.prompt],
            item.completion.replace(POISON, "w0"),
            item.followup.replace(POISON, "w0"),
            item.id,
            item.conversation_id,
        )
        for item in lab.make_interactions(turns=1)
    ]
    bad = interactions[3]
    interactions[3] = type(bad)([{"role": "user", "content": f"w1 {POISON}"}], "w2 w3", "w4", "the-bad-one", "c3")
    model = lab.make_model(tie_word_embeddings=False)
    number = lab.make_tokenizer().convert_tokens_to_ids(POISON)
    with torch.no_grad():
        model.get_input_embeddings().weight[number] = float("nan")
    model.save_pretrained(tmp_path / "model")
    lab.make_tokenizer().save_pretrained(tmp_path / "model")
    lab.write_rows(tmp_path / "data.jsonl", interactions)
    return tmp_path


def test_a_loss_that_is_not_finite_stops(poisoned, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(arguments(poisoned, poisoned / "out", "--batch-size", "2")) == 3
    error = capsys.readouterr().err
    assert re.search(r"step [123]: the loss is not finite; interactions: 'the-bad-one'", error)
    assert not (poisoned / "out" / "model").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_loss_that_is_not_finite_is_skipped(poisoned, capsys, caplog):
    more = ("--batch-size", "2", "--set", "non_finite=skip")
    assert main(arguments(poisoned, poisoned / "out", *more)) == 0
    assert "the loss is not finite; interactions: 'the-bad-one'" in caplog.text
    report = json.loads((poisoned / "out" / "report.json").read_text())
    assert report["steps"] == 3
    assert report["history"][-2]["sdpo/skipped_steps"] == 1
    before = AutoModelForCausalLM.from_pretrained(poisoned / "model", dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(poisoned / "out" / "model", dtype=torch.float32)
    for name, new in after.named_parameters():
        if "embed_tokens" not in name:
            assert new.isfinite().all(), name
    # One NaN row before, and the same one after.
    rows = [m.get_input_embeddings().weight.isnan().any(1).sum() for m in (before, after)]
    assert rows == [1, 1]
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)


# ----------------------------------------------------------------------------------- signals


def test_sigterm_saves_a_checkpoint_and_resume_goes_on(place, tmp_path):
    output = tmp_path / "out"
    steps = 4000
    command = [sys.executable, "-m", "fastsdpo.train", *arguments(place, output, "--max-steps", str(steps))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        for line in process.stderr:
            if line.startswith(f"step 2/{steps}"):
                break
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "stopping after this step, with a checkpoint" in err
    found = re.search(rf"stopped at step (\d+) of {steps}; the same command with --resume", out)
    assert found, out
    step = int(found[1])
    assert (output / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert not (output / "report.json").exists()

    more = ("--max-steps", str(step + 2), "--resume", "--quiet")
    assert main(arguments(place, output, *more)) == 0
    assert json.loads((output / "report.json").read_text())["steps"] == step + 2
