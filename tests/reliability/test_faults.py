"""Kills, signals, full and read-only disks, damaged checkpoints, dying workers: nothing is lost."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastsdpo.trainer import NonFiniteError

NOT_ALLOWED = 77  # of runner.py: no mount namespace here
# Offline and online training save with the same code: `make fuzz` breaks both in every way, `make test` one.
ONLINE = ["online"] if os.environ.get("FASTSDPO_LONG") == "1" else []


@pytest.fixture(scope="module")
def undisturbed(runner, commands, outcome, tmp_path_factory):
    """undisturbed(name): what a command leaves, its seconds, and its number of events on files."""
    kept = {}

    def run(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp(f"whole-{name}")
            ended = runner(folder, commands[name], kill_at=0)
            assert ended.status == 0, ended.log
            kept[name] = (outcome(folder), ended.seconds, ended.events, folder)
        return kept[name]

    return run


def differences(found, wanted):
    """The files that are not as wanted."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


# In `make fuzz`: 16 + 17 + 17 = 50 kills.
@pytest.mark.parametrize(("name", "kills"), [("prepare", 16), ("train", 17), ("online", 17)])
def test_killed_and_run_again(name, kills, runner, commands, outcome, undisturbed, count, results, tmp_path):
    """SIGKILL at random events on files and at random times; the same command ends as if undisturbed."""
    wanted, seconds, events, _ = undisturbed(name)
    assert events > 20
    draw = random.Random(f"kills of {name}")
    done = cases = 0
    lost = []
    while done < count(1, kills):
        cases += 1
        folder = tmp_path / str(cases)
        for _ in range(draw.choice([1, 1, 2])):  # some are killed again on the way
            if cases % 2:
                ended = runner(folder, commands[name], kill_at=draw.randint(1, events))
            else:
                ended = runner(folder, commands[name], after=draw.uniform(0.1, seconds))
            assert ended.status in (0, -signal.SIGKILL), ended.log
            done += ended.status != 0
        ended = runner(folder, commands[name])
        found = outcome(folder) if ended.status == 0 else {}
        if ended.status != 0 or differences(found, wanted):
            lost.append((cases, ended.status, differences(found, wanted), ended.log[-500:]))
        shutil.rmtree(folder)
    results.add(f"SIGKILL during `{name}`", tried=cases, faults=done, lost=len(lost))
    assert not lost


@pytest.mark.parametrize("old", [False, True])
def test_prepare_is_killed_at_any_event(old, runner, outcome, tmp_path):
    """The output is whole or absent (or the old one); the same command comes to the same bytes."""
    chats = [[f"{n}.{turn} é日" for turn in range(3 + 2 * (n % 4))] for n in range(12)]
    rows = [[{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(chat)] for chat in chats]
    lines = "".join(json.dumps({"id": f"c{n}", "messages": row}) + "\n" for n, row in enumerate(rows)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows[6:], indent=1)[:-40])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines + b"damaged\n"))
    argv = ["prepare", *sorted(tmp_path.glob("?.json*")), "-o", "out.jsonl", "--quiet", "--eval-fraction", "0.2"]
    argv += ["--overwrite"] if old else []
    events, wanted = runner(tmp_path / "whole", argv, kill_at=0).events, outcome(tmp_path / "whole")
    assert events > 10 and sorted(wanted) == ["out.eval.jsonl", "out.jsonl", "out.report.json"]
    for point in (3, *range(events - 9, events + 1, 2)):  # the last ones put the files in their places
        folder = tmp_path / f"killed{point}"
        folder.mkdir()
        if old:
            (folder / "out.jsonl").write_text("old\n")
        assert runner(folder, argv, kill_at=point).status == -signal.SIGKILL
        left = outcome(folder)
        assert left.get("out.jsonl", b"old\n") in (b"old\n", wanted["out.jsonl"])
        assert left.get("out.eval.jsonl", wanted["out.eval.jsonl"]) == wanted["out.eval.jsonl"]
        again = runner(folder, argv)
        assert again.status == 0 and not differences(outcome(folder), wanted), again.log


@pytest.mark.parametrize("name", ["train", *ONLINE])
def test_sigterm_saves_and_exits(name, runner, commands, outcome, undisturbed, count, results, tmp_path):
    """Status 143 with a checkpoint, and the same end as if undisturbed."""
    wanted, seconds, events, _ = undisturbed(name)
    draw = random.Random(f"signals to {name}")
    stopped = outside = 0
    lost = []
    for case in range(count(1, 20)):
        folder = tmp_path / str(case)
        if case % 2:  # at any time: outside the steps the system ends it
            ended = runner(folder, commands[name], send=signal.SIGTERM, after=draw.uniform(0.1, 0.9) * seconds)
        else:
            at = draw.randint(events // 4, events // 2)
            ended = runner(folder, commands[name], kill_at=at, signal=signal.SIGTERM)
            assert ended.status == 128 + signal.SIGTERM, ended.log
        assert ended.status in (0, -signal.SIGTERM, 128 + signal.SIGTERM), ended.log
        if ended.status == 128 + signal.SIGTERM:
            stopped += 1
            step = re.search(r"stopped at step (\d+) of", ended.log)[1]
            assert (folder / "out" / f"checkpoint-{step}" / "checksums.json").exists()
            assert not (folder / "out" / "report.json").exists()
        outside += ended.status == -signal.SIGTERM
        again = runner(folder, commands[name])
        if again.status != 0 or differences(outcome(folder), wanted):
            lost.append((case, again.status, differences(outcome(folder), wanted), again.log[-500:]))
    figures = {"exit_status_143": stopped, "outside_the_steps": outside}
    results.add(f"SIGTERM to `{name}`", tried=case + 1, faults=stopped + outside, lost=len(lost), **figures)
    assert not lost


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


FILES = ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth", "scheduler.pt"]
FILES += ["teacher_ema.safetensors", "checksums.json"]
DAMAGES = {"flip": flip, "truncate": truncate, "delete": Path.unlink}


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    runner, commands, outcome, undisturbed, count, results, tmp_path
):
    wanted, _, _, whole = undisturbed("train")
    cases = [(file, damage) for file in FILES for damage in DAMAGES]
    cases = random.Random(3).sample(cases, count(2, len(cases)))
    lost = []
    for file, damage in cases:
        folder = tmp_path / f"{file}-{damage}"
        shutil.copytree(whole / "out", folder / "out")
        (folder / "out" / "report.json").unlink()
        shutil.rmtree(folder / "out" / "model")
        DAMAGES[damage](folder / "out" / "checkpoint-6" / file)
        ended = runner(folder, commands["train"])
        named = re.search(r"checkpoint out/checkpoint-6 is damaged: .*; going on from out/checkpoint-5", ended.log)
        if ended.status != 0 or not named or (file not in named[0] and file != "checksums.json"):
            lost.append((file, damage, ended.log[-500:]))
        elif differences(outcome(folder), wanted):
            lost.append((file, damage, differences(outcome(folder), wanted)))
    results.add("damaged newest checkpoint", tried=len(cases), faults=len(cases), lost=len(lost))
    assert not lost


def test_without_a_whole_checkpoint_nothing_is_begun_anew(runner, commands, undisturbed, tmp_path):
    _, _, _, whole = undisturbed("train")
    shutil.copytree(whole / "out", tmp_path / "out")
    for step in (5, 6):
        flip(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors")
    ended = runner(tmp_path, commands["train"])
    assert ended.status == 1
    assert "no checkpoint is whole: checkpoint out/checkpoint-6 is damaged: the content of" in ended.log
    assert "out/checkpoint-5" in ended.log
    ended = runner(tmp_path, [*commands["train"], "--resume", "out/checkpoint-5"])
    assert ended.status == 1
    assert "checkpoint out/checkpoint-5 is damaged: the content of model.safetensors" in ended.log


def mounted(ended):
    if ended.status == NOT_ALLOWED:
        pytest.skip("mounting a file system of one's own is not allowed here")
    return ended


@pytest.mark.parametrize("name", ["prepare", "train", *ONLINE])
def test_a_read_only_output_is_reported_before_any_work(name, runner, commands, tmp_path):
    argv = list(commands[name])
    argv[argv.index("-o") + 1] = "out/out.jsonl" if name == "prepare" else "out"
    ended = mounted(runner(tmp_path, argv, disk={"size": 2**20, "read_only": True}))
    assert ended.status == 1, ended.log
    assert "read-only file system" in ended.log.lower()
    assert "Traceback" not in ended.log
    assert "step 1/" not in ended.log


@pytest.mark.parametrize("name", ["train", *ONLINE])
def test_a_disk_without_room_is_reported_before_any_work(name, runner, commands, tmp_path):
    ended = mounted(runner(tmp_path, commands[name], disk={"size": 2**18, "read_only": False}))
    assert ended.status == 1, ended.log
    assert re.search(r"the output folder out (cannot be written|has \d+ MB free)", ended.log)
    assert "held-out" not in ended.log
    assert "step 1/" not in ended.log


@pytest.mark.parametrize("name", ["prepare", "train", *ONLINE])
def test_a_disk_that_fills_up_leaves_what_was_saved(
    name, runner, commands, outcome, undisturbed, count, results, tmp_path
):
    """On a file system of a few megabytes: a sentence, status 1; with more room the run goes on."""
    wanted, *_ = undisturbed(name)
    argv = list(commands[name])
    if name == "prepare":
        argv[argv.index("-o") + 1] = "out/out.jsonl"
        wanted = {f"out/{key}": value for key, value in wanted.items()}
        sizes = [300_000, 1_000_000, 2_000_000, 4_000_000]
    else:
        argv += ["--save-total-limit", 100]
        sizes = [1_200_000, 1_500_000, 1_900_000, 2_300_000]
        whole = runner(tmp_path / "whole", argv)
        assert whole.status == 0, whole.log
        wanted = outcome(tmp_path / "whole")
    sizes = sizes[1:2] if count(1, 4) == 1 else sizes
    failed, lost = 0, []
    for size in sizes:
        folder = tmp_path / str(size)
        ended = mounted(runner(folder, argv, disk={"size": size, "read_only": False}))
        if ended.status == 0:
            continue
        failed += 1
        clear = ended.status == 1 and "Traceback" not in ended.log
        clear = clear and ("no space left" in ended.log.lower() or "cannot be written" in ended.log)
        shutil.copytree(folder / "kept", folder / "out", dirs_exist_ok=True)
        if name != "prepare":
            found = [path.name for path in (folder / "out").glob("checkpoint*")]
            clear = clear and found and "checkpoint.part" not in found
        again = runner(folder, argv)
        if not clear or again.status != 0 or differences(outcome(folder), wanted):
            logs = (ended.log[-600:], again.log[-600:])
            lost.append((size, clear, again.status, differences(outcome(folder), wanted), *logs))
    figures = {"tried": len(sizes), "faults": failed, "lost": len(lost), "file_system": "tmpfs"}
    results.add(f"disk that fills up during `{name}`", **figures)
    assert failed and not lost


def test_a_file_that_cannot_grow_stands_in_for_a_full_disk(runner, commands, tmp_path):
    """RLIMIT_FSIZE, which needs no rights: no checkpoint rather than half of one."""
    ended = runner(tmp_path, commands["train"], file_limit=150_000)
    assert ended.status == 1, ended.log
    assert "cannot be written" in ended.log
    assert "Traceback" not in ended.log
    assert not [path.name for path in (tmp_path / "out").glob("checkpoint*")]


@pytest.fixture
def poisoned(commands, lab, tmp_path):
    """The arguments of `train` for a model that has NaN for a word, and the two interactions that hold the word."""
    word = lab.WORDS[-1]
    model = lab.make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[lab.make_tokenizer().convert_tokens_to_ids(word)] = float("nan")
    model.save_pretrained(tmp_path / "model")
    lab.make_tokenizer().save_pretrained(tmp_path / "model")
    text = Path(commands["train"][1]).read_text().replace(f'{word}"', 'w0"').replace(f"{word} ", "w0 ")
    rows = [json.loads(line) for line in text.splitlines()]
    for row in (rows[4], rows[9]):
        row["prompt"][-1]["content"] += f" {word}"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [part for part in commands["train"][2:] if "measure" not in str(part)]  # nothing is held out
    argv = ["train", tmp_path / "data.jsonl", *options, "--model", tmp_path / "model", "--epochs", 1]
    # One interaction a step, each by itself, so that good steps come before the bad one.
    return [*argv, "--batch-size", 1, "--set", "group_by_conversation=false"], [rows[i]["id"] for i in (4, 9)]


def test_a_loss_that_is_not_finite_stops_with_the_state(poisoned, runner, results, tmp_path):
    """It names the interaction and saves the state before the step; told to skip, it goes on from there."""
    argv, ids = poisoned
    wanted = runner(tmp_path / "skipped", [*argv, "--set", "non_finite=skip"])
    assert wanted.status == 0, wanted.log
    ended = runner(tmp_path / "stopped", argv)
    found = re.search(r"step (\d+): the loss is not finite; interactions: '([^']+)'", ended.log)
    assert ended.status == 3, ended.log
    assert found[2] in ids
    step = int(found[1]) - 1
    assert step > 0, "the first step is the bad one: nothing to save"
    assert f"The state before it is in out/checkpoint-{step}" in ended.log
    ended = runner(tmp_path / "stopped", [*argv, "--set", "non_finite=skip"])
    assert ended.status == 0, ended.log
    assert f"going on from out/checkpoint-{step}" in ended.log
    left, right = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "out/model").state_dict()
        for name in ("skipped", "stopped")
    )
    assert left["model.embed_tokens.weight"].isnan().any(1).sum() == 1  # the row that the model came with
    for name, value in left.items():
        assert torch.equal(value.nan_to_num(7.0), right[name].nan_to_num(7.0)), name
    results.add("loss that is not finite", tried=2, faults=2, stopped=1, skipped_and_counted=1)


@pytest.mark.parametrize("option", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_stops_with_the_state_or_is_skipped(option, lab, results, tmp_path):
    """The loss is finite; the third step changes nothing, and what was before it is in the checkpoint."""
    options = {"per_device_train_batch_size": 1, "group_by_conversation": False, "non_finite": option, "max_steps": 5}
    saving = {"save_strategy": "steps", "save_steps": 100}
    trainer = lab.make_trainer(tmp_path / "out", interactions=lab.make_interactions(5), **options, **saving)
    before, steps, step = {}, [], trainer.training_step

    def training_step(model, inputs, *arguments):
        steps.append(inputs["interactions"][0].id)
        if len(steps) == 3:
            before.update(lab.weights_of(trainer))
        return step(model, inputs, *arguments)

    def overflow(module, inputs, output):
        return lab.Overflow.apply(output) if len(steps) == 3 and output.requires_grad else output

    trainer.training_step = training_step
    trainer.model.model.embed_tokens.register_forward_hook(overflow)
    if option == "stop":
        with pytest.raises(NonFiniteError, match="step 3: the gradient is not finite") as caught:
            trainer.train()
        assert f"interactions: '{steps[2]}'" in str(caught.value)
        assert f"The state before it is in {tmp_path / 'out' / 'checkpoint-2'}" in str(caught.value)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
        for name, value in saved.named_parameters():
            assert torch.equal(value, before[name]), name
    else:
        trainer.train()
        assert trainer.state.global_step == 5
        assert trainer.state.log_history[-2]["sdpo/skipped_steps"] == 1.0
        assert all(value.isfinite().all() for value in lab.weights_of(trainer).values())
        assert lab.largest_difference(before, lab.weights_of(trainer)) > 0
    results.add(f"gradient that is not finite: {option}", tried=1, faults=1)


def torchrun(folder, how, argv):
    """`torchrun` with two processes, of which the second dies in step 2: its status, and what it printed."""
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0"
    command = [sys.executable, *torchrun.split(), str(Path(__file__).with_name("dying_worker.py")), how, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DYING_PIDS": str(folder)}
    with open(folder / "log", "w") as file:
        process = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            status = process.wait(timeout=240)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return status, (folder / "log").read_text()


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_worker_that_dies_ends_the_others_with_its_error(
    commands, runner, outcome, undisturbed, count, results, tmp_path
):
    """`make test` starts them as forks by torchrun's agent, `make fuzz` by its command."""
    argv = commands["train"]
    workers = [*map(str, argv[1:]), "--set", "ddp_backend=gloo"]
    ways = ["raise", "kill"][: count(1, 2)]
    for how in ways:
        folder = tmp_path / how
        folder.mkdir()
        if len(ways) == 2:
            status, log = torchrun(folder, how, workers)
        else:
            ended = runner(folder, [], dying=[how, *workers])
            status, log = ended.status, ended.log
        assert status == 1, log[-3000:]
        wanted = {"raise": "the memory of this worker is broken", "kill": "Signal 9 (SIGKILL)"}
        assert wanted[how] in log, log[-3000:]
        pids = [int(path.name[4:]) for path in folder.glob("pid-*")]
        assert len(pids) == 2
        assert not any(alive(pid) for pid in pids)
        assert (folder / "out" / "checkpoint-1" / "checksums.json").exists()
        assert not (folder / "out" / "report.json").exists()
        # One process goes on from there, with steps of as many interactions.
        again = runner(folder, argv)
        assert again.status == 1 and "--global-batch-size 8 keeps them" in again.log, again.log
        again = runner(folder, [*argv, "--global-batch-size", "8"])
        assert again.status == 0, again.log
        assert "going on from out/checkpoint-1" in again.log
        assert (folder / "out" / "report.json").exists()
    results.add("worker that dies in a run of two", tried=len(ways), faults=len(ways))
