"""What users of `transformers.Trainer` set and pass: it is followed, or refused by name."""

from __future__ import annotations

import re
import shutil
import sys
import types

import pytest
import torch
from datasets import Dataset, DatasetDict

from fastsdpo.online import OnlineSDPOConfig
from fastsdpo.trainer.requests import TIMES
from tests.trainer.conftest import row

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
# What nothing would follow: refused with a reason.
UNREAD = {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"}
UNREAD |= {"label_smoothing_factor": 0.1, "label_names": ["labels"], "auto_find_batch_size": True}
UNREAD |= {"average_tokens_across_devices": False, "train_sampling_strategy": "group_by_length"}
UNREAD |= {"include_num_input_tokens_seen": True, "include_for_metrics": ["inputs"], "batch_eval_metrics": True}
UNREAD |= {"bf16_full_eval": True, "fp16_full_eval": True, "neftune_noise_alpha": 5}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(({k: v}, rf"{k} must be .*: .{{15,}}, got {re.escape(repr(v))}$") for k, v in UNREAD.items()),
        # transformers takes these, and never saves, or evaluates at each step
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps must be > 0 .*='no' turns it off"),
        ({"eval_strategy": "steps", "eval_steps": -2}, "eval_steps must be > 0 .*='no' turns it off"),
        ({"logging_steps": -1}, "logging_steps must be > 0 .*='no' turns it off"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be >= 0 or None"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches of accelerator_config must be False"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last must be False: the last step"),
        ({"dataloader_in_order": False}, "dataloader_in_order must be True: group_by_conversation and data_seed"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter must be False"),
        ({"eval_accumulation_steps": 4}, "eval_accumulation_steps must be None"),
        ({"debug": "underflow_overflow"}, "debug must be '': non_finite"),
        ({"resume_from_checkpoint": "run"}, "resume_from_checkpoint must be None: .*--resume"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint must be False: .*callbacks.StopOnSignal does"),
        ({"mode": "topk", "topk": 1, "add_tail": False}, "topk must be at least 2 without add_tail"),
        ({"fp16": True}, "fp16 must be False on a CPU"),
        ({"fsdp_config": {"version": 2}}, "fsdp_config must be None without fsdp"),
        ({"liger_kernel_config": {"swiglu": True}}, "liger_kernel_config must be None without use_liger_kernel"),
        ({"ddp_backend": "gloo"}, "ddp_backend must be None in one process"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches of accelerator_config must be None"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches of accelerator_config must be True"),
        # transformers would take these micro-batches beside those of global_batch_size
        (
            {"global_batch_size": 4, "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "gradient_accumulation_kwargs of accelerator_config must .* got num_steps",
        ),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0: weights would grow"),
        ({"adam_beta1": 2.0}, r"adam_beta1 must be in \[0, 1\)"),
        ({"adam_epsilon": 0.0}, "adam_epsilon must be > 0"),
        ({"optim_args": "foo=1"}, "optim_args must be None with optim='adamw_torch_fused'"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args must be NAME=VALUE"),
        ({"optim_target_modules": ["q_proj"]}, "optim_target_modules must be None with optim="),
        ({"optim": "muon"}, "optim must be one of adamw_torch, .* got 'muon'"),
        ({"lr_scheduler_type": "foo"}, "lr_scheduler_type must be one of linear, .* got 'foo'"),
        ({"log_level": "loud"}, "log_level must be one of .* got 'loud'"),
        ({"dtype": "half"}, "dtype must be auto, float32, .* got 'half'"),
        ({"warmup_steps": 9}, "warmup_steps needs a schedule that warms up: lr_scheduler_type=constant_with_warmup"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 1.5}, "warmup_steps must be a whole number, or below 1"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "lr_scheduler_kwargs must be None with lr_scheduler_type='const"),
        ({"seed": -1}, "seed must be >= 0"),
        # Of types, which Python would take for others: 2 of 3 tokens, and a true text.
        ({"ignore_first_k": 1.5}, "ignore_first_k must be a whole number, got 1.5"),
        ({"max_steps": 2.5}, "max_steps must be a whole number"),
        ({"add_tail": "no"}, "add_tail must be True or False, got 'no'"),
        ({"use_cpu": "false"}, "use_cpu must be True or False"),
        ({"learning_rate": True}, "learning_rate must be a number, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        (
            {**EACH_STEP, "load_best_model_at_end": True, "save_only_model": True, "teacher": "ema"},
            "save_only_model must be False with load_best_model_at_end",
        ),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_settings_that_would_do_nothing_or_something_else(tmp_path, lab, given, said):
    with pytest.raises(ValueError, match=f"SDPOConfig: {said}"):
        lab.make_config(tmp_path, **given)


@pytest.mark.parametrize("name", ["teacher_check", "measure_interactions", "tokenizer_workers"])
def test_settings_of_logged_interactions_are_not_of_online_training(tmp_path, name):
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    assert OnlineSDPOConfig(**settings).measure_interactions == 0
    with pytest.raises(ValueError, match=f"{name} must be .* logged interactions .*got 3"):
        OnlineSDPOConfig(**settings, **{name: 3})
    with pytest.raises(ValueError, match="metric_for_best_model must name a figure of held-out answers"):
        OnlineSDPOConfig(**settings, **EACH_STEP, load_best_model_at_end=True)


def test_numbers_in_other_clothes(tmp_path, lab):
    """YAML's 1e-5 is a text, JSON's 1e3 no integer; None for no clipping."""
    made = lab.make_config(
        tmp_path, learning_rate="1e-5", max_steps=1e3, max_grad_norm=None, dtype=torch.bfloat16, accelerator_config={}
    )
    assert (made.learning_rate, made.max_steps, made.max_grad_norm, made.dtype) == (1e-5, 1000, 0.0, "bfloat16")
    assert lab.make_config(tmp_path, save_strategy="no", save_steps=0).save_steps == 0


def test_a_warm_up_longer_than_the_run_is_told(tmp_path, lab, caplog):
    """With one step the learning rate is 0."""
    trainer = lab.make_trainer(tmp_path, lr_scheduler_type="cosine", warmup_steps=0.05, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0
    assert "the warm-up takes 1 steps and the run 1: the learning rate does not reach 0.01" in caplog.text


def test_held_out_sets_of_the_call(tmp_path, lab):
    """Loaders with workers that stay are not those of another set; predict() takes what evaluate() does."""
    one, two = lab.make_interactions(2, seed=7), lab.make_interactions(3, seed=9)
    trainer = lab.make_trainer(
        tmp_path, eval_dataset=one, dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    found = [trainer.evaluate(data)["eval_loss"] for data in (None, two, None)]
    assert found[0] == found[2] != found[1]
    assert trainer.predict(two).metrics["test_loss"] == pytest.approx(found[1], rel=1e-6)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*other\.jsonl"):
        trainer.evaluate(str(tmp_path / "other.jsonl"))


def test_one_set_is_trained_on(tmp_path, lab):
    rows = Dataset.from_list([row(item) for item in lab.make_interactions(2)])
    with pytest.raises(TypeError, match="train_dataset must be a path or a collection of interactions, got DatasetD"):
        lab.make_trainer(tmp_path, interactions=DatasetDict({"train": rows}))


def test_optimizers_of_other_weights(tmp_path, lab, caplog):
    peft = pytest.importorskip("peft")
    model = lab.make_model()
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = peft.LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match="optimizers must hold weights that the model trains, got SGD of 20 others"):
        lab.make_trainer(tmp_path, model=model, peft_config=adapter, optimizers=(before, None))
    model = lab.make_model()
    some = torch.optim.SGD(model.model.layers.parameters(), lr=0.1)
    lab.make_trainer(tmp_path, model=model, optimizers=(some, None))
    assert "2 of 20 trained weights are not in it, and stay as they are" in caplog.text


@pytest.mark.parametrize(
    ("optim", "given", "said"),
    [
        ("sgd", "momentum=0.9,nestrov=true", "names that optim='sgd' reads, got 'nestrov'"),
        ("grokadamw", "rank=4", "names that optim='grokadamw' reads, got 'rank'"),
        ("sgd", "momentum=much", "optim_args='momentum=much' cannot be read by optim='sgd': could not convert"),
    ],
)
def test_arguments_that_the_optimizer_does_not_read(tmp_path, lab, monkeypatch, optim, given, said):
    class GrokAdamW:
        """In the place of the package's."""

    monkeypatch.setattr("transformers.trainer_optimizer.is_grokadamw_available", lambda: True)
    monkeypatch.setitem(sys.modules, "grokadamw", types.SimpleNamespace(GrokAdamW=GrokAdamW))
    with pytest.raises(ValueError, match=f"SDPOTrainer: .*{said}"):
        lab.make_trainer(tmp_path, optim=optim, optim_args=given)
    if optim == "sgd":
        trainer = lab.make_trainer(tmp_path, optim="sgd", optim_args="momentum=0.5, nesterov=true", max_steps=1)
        trainer.train()
        assert trainer.optimizer.param_groups[0]["momentum"] == 0.5
        assert trainer.optimizer.param_groups[0]["nesterov"]


@pytest.mark.parametrize("best", ["accuracy", "loss", "one_headroom", "eval_one_measures/headroom"])
def test_the_best_by_a_figure_that_no_evaluation_has(tmp_path, lab, best):
    """Before the first step and not after the first evaluation; the last is that of a set without next answers."""
    single, settings = lab.make_interactions(3, turns=1, seed=7), {"metric_for_best_model": best, **EACH_STEP}
    held_out = {"one": single, "two": lab.make_conversations(2)}
    trainer = lab.make_trainer(tmp_path, eval_dataset=held_out, max_steps=1, **settings)
    with pytest.raises(ValueError, match=r"must be a figure of the held-out data \(one_loss, .*two_.*, got '"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("by", ["eval_two_loss", "one_sdpo/log_ratio_p95", "two_measures/headroom_share"])
def test_the_best_by_any_figure_of_an_evaluation(tmp_path, lab, by):
    held_out = {"one": lab.make_interactions(3, turns=1, seed=7), "two": lab.make_conversations(2)}
    settings = {**EACH_STEP, "load_best_model_at_end": True, "metric_for_best_model": by, "reference_kl": 0.1}
    trainer = lab.make_trainer(tmp_path, eval_dataset=held_out, max_steps=1, **settings)
    trainer.train()
    assert trainer.state.best_metric is not None
    (found,) = (row for row in trainer.state.log_history if "eval_one_loss" in row)
    known = trainer.figures_of(trainer.eval_dataset["one"])
    assert {name.removeprefix("eval_one_") for name in found} - {*known, *TIMES} == {"epoch", "step"}


def test_other_loaders_and_trials(tmp_path, lab):
    """What `transformers.Trainer` takes from subclasses and in calls."""
    trainer = lab.make_trainer(tmp_path)
    with pytest.raises(NotImplementedError, match=r"hyperparameter_search\(\) and trials .* a trainer for each trial"):
        trainer.hyperparameter_search(n_trials=2)
    with pytest.raises(NotImplementedError, match="a trainer for each trial"):
        trainer.train(trial={"learning_rate": 1.0})
    for collate, got in ((list, "list"), (lambda items: {"input_ids": items}, "one with input_ids")):
        trainer = lab.make_trainer(tmp_path)
        trainer.data_collator = collate
        with pytest.raises(TypeError, match=f"as the trainer's data_collator makes them, .* interactions, got {got}"):
            trainer.train()


def test_models_and_tokenizers_that_are_wrapped(tmp_path, lab):
    with pytest.raises(ValueError, match=r"model must be what torch\.compile was given"):
        lab.make_trainer(tmp_path, model=torch.compile(lab.make_model(), backend="eager"))
    processor = type("Processor", (), {"tokenizer": lab.make_tokenizer()})()
    with pytest.raises(TypeError, match=r"processing_class must be a tokenizer, got Processor \(pass its tokenizer\)"):
        lab.make_trainer(tmp_path, tokenizer=processor)


def test_the_best_model_has_its_own_teacher(tmp_path, lab):
    """The held-out loss of a moving average is that of the step whose weights were the best."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    settings = {**EACH_STEP, **best, "teacher": "ema", "ema_rate": 0.5, "optim": "sgd", "learning_rate": 0.5}
    trainer = lab.make_trainer(tmp_path, eval_dataset=lab.make_interactions(2, seed=7), max_steps=3, **settings)
    trainer.train()
    losses = [item["eval_loss"] for item in trainer.state.log_history if "eval_loss" in item]
    assert max(losses) == losses[0] > 1.1 * losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)


def test_the_best_model_of_a_folder_that_was_moved(tmp_path, lab):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    settings = {
        **EACH_STEP,
        **best,
        "learning_rate": 0.1,
        "max_steps": 2,
        "eval_dataset": lab.make_interactions(2, seed=7),
    }
    wanted = lab.make_trainer(tmp_path / "old", **settings)
    wanted.train()
    assert wanted.state.best_global_step == 1
    (tmp_path / "old").rename(tmp_path / "new")
    moved = lab.make_trainer(tmp_path / "new", **settings)
    moved.train(resume_from_checkpoint=True)
    assert lab.largest_difference(lab.weights_of(moved), lab.weights_of(wanted)) == 0
    shutil.rmtree(tmp_path / "new" / "checkpoint-1")
    with pytest.raises(FileNotFoundError, match="the best checkpoint, checkpoint-1, is not there any more"):
        lab.make_trainer(tmp_path / "new", **settings).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone_is_nothing_to_go_on_from(tmp_path, lab, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    lab.make_trainer(tmp_path, max_steps=2, **settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds the model alone \(save_only_model\)"):
        lab.make_trainer(tmp_path, max_steps=3, **settings).train(resume_from_checkpoint=True)
