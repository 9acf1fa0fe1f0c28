"""Checkpoints and teachers: a resumed run equals an uninterrupted one, and teachers move as told."""

import re
import shutil

import pytest
import torch
import transformers.utils.chat_template_utils
from transformers import TrainerCallback

import fastsdpo.trainer.template_date

pytest.importorskip("peft")
from peft import LoraConfig

from tests.plain import answer_log_probs, answer_logps
from tests.trainer.conftest import StopAt, clock


@pytest.fixture
def today(monkeypatch):
    """set(day): what the clock says from now on, a day of January."""

    def set_clock(day):
        for module in (fastsdpo.trainer.template_date, transformers.utils.chat_template_utils):
            monkeypatch.setattr(module, "datetime", clock(day), raising=False)

    return set_clock


class Record(TrainerCallback):
    """Weights after every step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])


def adapter():
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])


def train(lab, folder, *, stop_at=None, resume=None, lora=False, callbacks=(), **changes):
    callbacks = [*callbacks, *([StopAt(stop_at)] if stop_at else [])]
    settings = {"num_train_epochs": 2, "lr_scheduler_type": "cosine", "learning_rate": 3e-3, "ema_rate": 0.3}
    settings |= {"save_strategy": "steps", "save_steps": 1000, "peft_config": adapter() if lora else None}
    trainer = lab.make_trainer(folder, callbacks=callbacks, **{**settings, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_another_size_of_a_step_is_another_place_in_the_data(tmp_path, lab):
    """As of two processes and then one, without a global batch; data and steps would be those of another run."""
    train(lab, tmp_path, stop_at=2)
    with pytest.raises(ValueError, match=r"steps of 4 rows, got 2; .*global_batch_size=4 keeps them"):
        train(lab, tmp_path, resume=True, per_device_train_batch_size=2)
    settings = {"per_device_train_batch_size": 2, "global_batch_size": 4}
    assert train(lab, tmp_path, resume=True, **settings).state.global_step == 6
    settings = {"per_device_train_batch_size": 2, "ignore_data_skip": True}
    assert train(lab, tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings).state.global_step == 12


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 2}, "data_seed must be 1, .* got 2"),
        ({"group_by_conversation": False}, "group_by_conversation must be True, .* got False"),
        ({"interactions": 5}, "the number of interactions must be 12, .* got 10"),
    ],
)
def test_another_order_of_the_data_is_refused(tmp_path, lab, changes, text):
    """The same place in another order: some rows would be trained on twice, others never."""
    if "interactions" in changes:
        changes = {"interactions": lab.make_interactions(changes["interactions"])}
    train(lab, tmp_path, stop_at=1)
    with pytest.raises(ValueError, match=text):
        train(lab, tmp_path, resume=True, **changes)
    anew = train(lab, tmp_path, resume=True, ignore_data_skip=True, max_steps=2, **changes)
    assert anew.state.global_step == 2


def test_a_resumed_run_has_its_own_optimizer_settings(tmp_path, lab, caplog):
    """The learning rate that is given, and not that of the checkpoint's run, without a word."""
    train(lab, tmp_path, stop_at=2, lr_scheduler_type="constant", adam_beta1=0.8)
    changes = {"learning_rate": 1e-4, "weight_decay": 0.1, "lr_scheduler_type": "constant", "adam_beta1": 0.8}
    with caplog.at_level("INFO", logger="fastsdpo"):
        resumed = train(lab, tmp_path, resume=True, max_steps=4, **changes)
    logged = [row["learning_rate"] for row in resumed.state.log_history if "loss" in row]
    assert logged == [3e-3, 3e-3, 1e-4, 1e-4]
    (group, *_) = resumed.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.8, 0.999))
    assert "learning rate was 0.003, training goes on with 0.0001" in caplog.text
    assert "weight_decay was 0.0, training goes on with 0.1" in caplog.text and "betas" not in caplog.text


@pytest.mark.parametrize(
    ("copied", "missing"),
    [
        ((), r"trainer_state\.json is missing"),
        (("checksums.json",), "is missing"),
        (("data.json", "model.safetensors"), r"checksums\.json is missing"),
    ],
)
def test_a_checkpoint_that_was_copied_in_part(tmp_path, lab, caplog, copied, missing):
    """It is passed over, whatever of it is there."""
    train(lab, tmp_path, stop_at=2)
    part = tmp_path / "checkpoint-3"
    part.mkdir()
    for name in copied:
        shutil.copy(tmp_path / "checkpoint-2" / name, part)
    assert train(lab, tmp_path, resume=True, max_steps=3).state.global_step == 3
    assert re.search(rf"checkpoint-3 is damaged: .*{missing}; going on from .*checkpoint-2", caplog.text)
    # Another trainer's, without sums: what is missing would begin anew without a word.
    for name in ("checksums.json", "data.json", "optimizer.pt"):
        (tmp_path / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds the model alone .* or was copied in part"):
        train(lab, tmp_path, resume=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_that_is_written_again_is_there_at_any_time(tmp_path, lab, monkeypatch):
    """As at a signal at the end of an epoch; the old one is deleted when the new one has its name."""
    trainer = train(lab, tmp_path, stop_at=2, save_total_limit=1)

    def killed(folder, **options):
        if str(folder).endswith(".old") and folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("fastsdpo.trainer.checkpoint_folders.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint(trainer.model)
    assert trainer.find_checkpoint() == str(tmp_path / "checkpoint-2")


def test_a_run_that_goes_on_is_not_looked_at_again(tmp_path, lab, caplog):
    """Nor one that is refused: the look at what follow-ups do takes passes through the model, and was taken."""
    caplog.set_level("INFO", logger="fastsdpo.trainer")
    train(lab, tmp_path, stop_at=1, teacher_check=4)
    assert caplog.text.count("teacher check") == 1
    with pytest.raises(ValueError, match="the number of interactions must be 12"):
        train(lab, tmp_path, resume=True, interactions=lab.make_interactions(5), teacher_check=4)
    train(lab, tmp_path, resume=True, max_steps=2, teacher_check=4)
    assert caplog.text.count("teacher check") == 1


BF16 = {"dtype": torch.bfloat16}


# 12 interactions in batches of 4: three steps an epoch; 2 is within the first, 3 at its end, 4 within
# the second.
@pytest.mark.parametrize(
    ("stop_at", "settings"),
    [
        (3, {}),
        (4, {"teacher": "ema"}),
        (4, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        (4, {"teacher": "trust_region", "reference_kl": 0.1}),
        (4, {"teacher": "frozen", "lora": True}),
        (4, {"weight_update": "float32_master", **BF16}),
        (4, {"weight_update": "stochastic_rounding", **BF16}),
        *(pytest.param(step, {"teacher": "ema"}, marks=pytest.mark.slow) for step in (2, 3)),
        *(pytest.param(step, {}, marks=pytest.mark.slow) for step in (2, 4)),
        pytest.param(4, {"teacher": "frozen"}, marks=pytest.mark.slow),
        pytest.param(4, {"teacher": "ema", "lora": True}, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path, lab, stop_at, settings):
    settings = dict(settings)
    dtype, teacher = settings.pop("dtype", torch.float32), settings.get("teacher")

    def run(folder, seed=0, **more):
        return train(lab, tmp_path / folder, model=lab.make_model(seed=seed, dtype=dtype), **settings, **more)

    whole, part = run("whole"), run("part", stop_at=stop_at)
    checkpoint = tmp_path / "part" / f"checkpoint-{stop_at}"
    assert (checkpoint / "teacher_ema.safetensors").exists() == (teacher == "ema")
    assert lab.largest_difference(lab.weights_of(part), lab.weights_of(whole)) > 1e-4
    # From another model's weights: everything has to come from the checkpoint, but the base of an adapter.
    resumed = run("part", seed=0 if "lora" in settings else 5, resume=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 6
    most = 1e-6 if dtype == torch.float32 else 0
    assert lab.largest_difference(lab.weights_of(resumed), lab.weights_of(whole)) <= most
    if teacher == "ema":
        assert lab.largest_difference(resumed.learner.copies["ema"].values, whole.learner.copies["ema"].values) < 1e-6
        assert lab.largest_difference(whole.learner.copies["ema"].values, lab.weights_of(whole)) > 1e-3
    assert lab.losses_of(whole) == pytest.approx(lab.losses_of(resumed), rel=1e-5)


def test_a_finished_run_takes_no_further_step(tmp_path, lab):
    """5 steps end within the second epoch: from their checkpoint there is nothing left to do."""
    whole = train(lab, tmp_path, max_steps=5, save_steps=5)
    again = train(lab, tmp_path, max_steps=5, resume=True)
    assert again.state.global_step == whole.state.global_step == 5
    assert lab.largest_difference(lab.weights_of(again), lab.weights_of(whole)) == 0


def test_the_date_in_the_chat_template_is_the_runs(tmp_path, lab, today):
    """A run that goes on the next day reads the day it began; another folder has to be told."""
    tokenizer, day = lab.make_clock_tokenizer(), [f"w{number}" for number in range(32)]

    def days(trainer):
        found = set()
        for item in [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]:
            for ids in (item.prompt_ids, item.teacher_prompt_ids):
                found.add(tokenizer.convert_ids_to_tokens(ids)[1])
        (word,) = found
        return day.index(word)

    today(3)
    train(lab, tmp_path / "part", tokenizer=tokenizer, stop_at=2)
    today(4)
    whole = train(lab, tmp_path / "whole", tokenizer=tokenizer, chat_template_date="2025-06-03")
    resumed = train(lab, tmp_path / "part", tokenizer=tokenizer, resume=True)
    assert days(whole) == days(resumed) == 3
    assert lab.largest_difference(lab.weights_of(resumed), lab.weights_of(whole)) < 1e-6
    elsewhere = {"tokenizer": tokenizer, "resume": str(tmp_path / "part" / "checkpoint-2")}
    with pytest.raises(ValueError, match="chat_template_date must be '2026-01-03T00:00:00'"):
        train(lab, tmp_path / "other", **elsewhere)
    told = train(lab, tmp_path / "other", chat_template_date="2026-01-03T00:00:00", **elsewhere)
    assert days(told) == 3
    assert days(lab.make_trainer(tmp_path / "new", tokenizer=tokenizer)) == 4
    with pytest.raises(ValueError, match="chat_template_date must be a date like 2026-01-31"):
        lab.make_config(tmp_path, chat_template_date="today")
    assert not list((tmp_path / "new").glob("chat_template_date*"))  # written when training begins


def test_a_checkpoint_without_the_teacher_is_refused(tmp_path, lab):
    train(lab, tmp_path, stop_at=2)
    with pytest.raises(FileNotFoundError, match="was it written with another teacher"):
        train(lab, tmp_path, teacher="ema", resume=True)


def test_ema_is_the_average_of_the_weights(tmp_path, lab):
    record, initial = Record(), [p.detach().clone() for p in lab.make_model().parameters()]
    trainer = train(lab, tmp_path, teacher="ema", callbacks=[record])
    wanted = initial
    for weights in record.weights:
        wanted = [w + 0.3 * (s - w) for w, s in zip(wanted, weights)]
    for value, want in zip(trainer.learner.copies["ema"].values.values(), wanted):
        assert (value - want).abs().max() < 1e-6


@pytest.mark.parametrize("lora", [False, True])
def test_teachers_see_their_own_weights(tmp_path, lab, lora):
    """After some steps: whose log-probabilities the loss compares with."""

    def teacher_logps(trainer):
        item = trainer.train_dataset[0]
        with torch.no_grad():
            _, statistics = trainer.run_pass(trainer.model, [item], 1)
        return statistics.teacher_logps

    def hindsight_logps(trainer):
        item = trainer.train_dataset[0]
        with torch.no_grad():
            return answer_logps(trainer.model, item.teacher_prompt_ids, item.completion_ids)

    fresh = lab.make_trainer(tmp_path, peft_config=adapter() if lora else None)
    initial = hindsight_logps(fresh)
    found, live = {}, {}
    for teacher in ("live", "ema", "frozen", "trust_region"):
        trainer = train(lab, tmp_path, teacher=teacher, lora=lora, save_strategy="no", max_steps=3)
        found[teacher], live[teacher] = teacher_logps(trainer), hindsight_logps(trainer)
        assert (live[teacher] - initial).abs().max() > 1e-3
    assert (found["live"] - live["live"]).abs().max() < 1e-5
    assert (found["frozen"] - initial).abs().max() < 1e-5
    for teacher in ("ema", "trust_region"):  # between the two: neither of them
        assert (found[teacher] - initial).abs().max() > 1e-4, teacher
        assert (found[teacher] - live[teacher]).abs().max() > 1e-4, teacher


def test_trust_region_mixes_log_probabilities(tmp_path, lab):
    """q proportional to exp((1-a) log frozen + a log live), against plain forward passes."""
    mix = 0.3
    settings = {"teacher": "trust_region", "trust_region_mix": mix, "mode": "sampled_token"}
    trainer = train(lab, tmp_path, save_strategy="no", **settings)
    item = trainer.train_dataset[1]
    with torch.no_grad():
        _, statistics = trainer.run_pass(trainer.model, [item], 1)
        logps = [
            answer_log_probs(model, item.teacher_prompt_ids, item.completion_ids)
            for model in (lab.make_model(), trainer.model)
        ]
    mixed = ((1 - mix) * logps[0] + mix * logps[1]).log_softmax(-1)
    wanted = mixed.gather(-1, torch.tensor(item.completion_ids)[:, None])[:, 0]
    assert (statistics.teacher_logps - wanted).abs().max() < 1e-4


def test_reference_kl_holds_the_model_back(tmp_path, lab):
    distances = []
    for beta in (0.0, 5.0):
        settings = {"optim": "sgd", "learning_rate": 0.05, "mode": "sampled_token", "save_strategy": "no"}
        trainer = train(lab, tmp_path, reference_kl=beta, **settings)
        distances.append(mean_kl(trainer, lab.make_model()))
        logged = [row for row in trainer.state.log_history if "sdpo/reference_kl" in row]
        assert bool(logged) == (beta > 0)
    # Zero at the first step, before the weights moved.
    assert logged[0]["sdpo/reference_kl"] == pytest.approx(0, abs=1e-6)
    assert logged[-1]["sdpo/reference_kl"] > 1e-6
    assert distances[1] < 0.7 * distances[0]


def mean_kl(trainer, reference):
    """KL(trained || initial) over the answers' positions, by plain passes."""
    total = []
    for index in range(len(trainer.train_dataset)):
        item = trainer.train_dataset[index]
        with torch.no_grad():
            p, q = (answer_log_probs(m, item.prompt_ids, item.completion_ids) for m in (trainer.model, reference))
        total.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(total).mean())


def test_the_seed_fixes_the_adapter(tmp_path, lab):
    runs = []
    for name in ("first", "second"):
        torch.manual_seed(len(name))  # whatever was drawn before
        runs.append(train(lab, tmp_path / name, lora=True, save_strategy="no"))
    first, second = map(lab.weights_of, runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_lora_trains_the_adapter_alone(tmp_path, lab):
    base = lab.make_model().state_dict()
    for teacher in ("frozen", "ema"):
        trainer = train(lab, tmp_path, teacher=teacher, lora=True, save_strategy="no")
        assert all("lora_" in name for name in lab.weights_of(trainer))
        assert "frozen" not in trainer.learner.copies  # the initial model is the adapter disabled
        assert ("ema" in trainer.learner.copies) == (teacher == "ema")
        state = trainer.model.get_base_model().state_dict()
        for name, value in state.items():
            if "lora_" not in name:
                assert torch.equal(value, base[name.replace(".base_layer", "")]), name
        moved = [v for n, v in lab.weights_of(trainer).items() if "lora_B" in n]
        assert all(value.abs().max() > 0 for value in moved)


def test_a_save_without_weights_raises(tmp_path, lab, monkeypatch):
    """Whatever the reason: transformers writes none where a state dict is sharded, and says nothing."""
    trainer = lab.make_trainer(tmp_path / "out", max_steps=1)
    trainer.save_model(str(tmp_path / "good"))
    monkeypatch.setattr(trainer, "_save", lambda *args, **kwargs: (tmp_path / "bad").mkdir())
    with pytest.raises(OSError, match=r"the model was not saved: .*bad holds no weights"):
        trainer.save_model(str(tmp_path / "bad"))
