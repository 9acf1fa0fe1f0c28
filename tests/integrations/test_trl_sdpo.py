"""TRL's SDPO trainer patched against unpatched: losses, metrics and weights of whole runs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.trainer import distillation_trainer

from fastsdpo.integrations import trl as trl_integration
from fastsdpo.integrations.trl import FastSDPOTrainer, patch_trl

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]


def reward(prompts, completions, **_):
    """Half the answers succeed, so that some sequences have a teacher and others do not."""
    return [1.0 if len(c.split()) % 2 else 0.0 for c in completions]


def make_trainer(folder, output, *, kind=SDPOTrainer, steps=5, peft_config=None, source=None, **options):
    data = Dataset.from_dict({"prompt": PROMPTS, "privileged_context": ["w11 w12", "w13", "w14 w15 w16", "w17"]})
    args = SDPOConfig(
        output_dir=str(output),
        **{
            "learning_rate": 0.05,
            "optim": "sgd",  # a step in proportion to the gradient: rounding stays rounding
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 6,
            "max_steps": steps,
            "include_environment_feedback": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "seed": 3,
            "disable_tqdm": True,
            **options,
        },
    )
    more = {} if source is None else {"source": source}
    return kind(
        model=folder,
        reward_funcs=reward,
        args=args,
        train_dataset=data,
        peft_config=peft_config,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left"),
        **more,
    )


def run(trainer):
    set_seed(7)
    trainer.train()
    logs = [
        {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
        for entry in trainer.state.log_history
    ]
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_run(found, wanted, tolerance=2e-5):
    (logs, weights), (want_logs, want_weights) = found, wanted
    assert len(logs) == len(want_logs)
    for got, want in zip(logs, want_logs):
        assert got.keys() == want.keys()
        for key, value in want.items():
            if isinstance(value, float):
                assert got[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    for name, want in want_weights.items():
        torch.testing.assert_close(weights[name], want, rtol=tolerance, atol=tolerance, msg=name)
    assert any(entry.get("loss", 0) != 0 for entry in want_logs)


MODES = {
    "sampled": {"distillation_mode": "sampled_token"},
    "full-reverse": {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    "full-forward": {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    "full-jsd": {"distillation_mode": "full_logits", "distillation_alpha": 0.3},
    "topk": {"distillation_mode": "topk_logits", "distillation_topk": 7},
    "topk-tail-forward": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 7,
        "distillation_add_tail": True,
        "distillation_alpha": 0.0,
    },
    "topk-tail-jsd": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 7,
        "distillation_add_tail": True,
        "distillation_alpha": 0.5,
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_run_in_every_mode(mode, source, llama_folder, tmp_path):
    options = {**MODES[mode], "temperature": 0.8}
    want = run(make_trainer(llama_folder, tmp_path, **options))
    with patch_trl(source=source):
        found = run(make_trainer(llama_folder, tmp_path, **options))
    assert_same_run(found, want)


def test_teacher_kinds(tmp_path, qwen2_folder):
    """Base, live and EMA teachers, and an importance ratio that is not 1."""
    for kind in ("base", "live", "ema"):
        options = {
            "teacher_model_kind": kind,
            "teacher_update_rate": 0.3,
            **MODES["full-reverse"],
            # Three optimizer steps on each generated batch, so the old log-probs are old.
            "num_iterations": 3,
            "distillation_is_clip": 1.2,
        }
        want = run(make_trainer(qwen2_folder, tmp_path, **options))
        with patch_trl("hidden"):
            assert_same_run(run(make_trainer(qwen2_folder, tmp_path, **options)), want)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    ("kind", "target"),
    # An EMA teacher and LoRA on the head: TRL sets the base head to zero, and every loss is 0.
    [
        ("base", "q_proj"),
        ("live", "q_proj"),
        ("ema", "q_proj"),
        ("base", "lm_head"),
        ("live", "lm_head"),
    ],
)
def test_adapters(kind, target, tmp_path, qwen2_folder):
    """LoRA, in the attention and on the head: the base teacher is the model without it."""
    options = {
        "teacher_model_kind": kind,
        "learning_rate": 0.5,
        "steps": 3,
        "peft_config": LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=[target],
            task_type="CAUSAL_LM",
            init_lora_weights="gaussian" if target == "q_proj" else True,
        ),
        **MODES["full-jsd"],
    }
    want = run(make_trainer(qwen2_folder, tmp_path, **options))
    with patch_trl("hidden"):
        found = run(make_trainer(qwen2_folder, tmp_path, **options))
    assert_same_run(found, want)


@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_convex_policy_loss(weight, loss_type, tmp_path, llama_folder):
    options = {
        "distillation_weight": weight,
        "loss_type": loss_type,
        "importance_sampling_level": "sequence" if loss_type == "grpo" else "token",
        "num_iterations": 2,
        "steps": 4,
        "gradient_accumulation_steps": 2,
        **MODES["topk-tail-jsd"],
    }
    want = run(make_trainer(llama_folder, tmp_path, **options))
    for source in ("hidden", "logits"):
        with patch_trl(source):
            assert_same_run(run(make_trainer(llama_folder, tmp_path, **options)), want)


def test_trainer_class_and_defaults(tmp_path, llama_folder):
    """TRL's defaults: sampled token, EMA teacher, gradient checkpointing."""
    options = {"gradient_checkpointing": True, "optim": "adamw_torch", "learning_rate": 1e-4}
    want = run(make_trainer(llama_folder, tmp_path, **options))
    trainer = make_trainer(llama_folder, tmp_path, kind=FastSDPOTrainer, source="hidden", **options)
    assert_same_run(run(trainer), want)


def test_evaluation(tmp_path, llama_folder):
    def evaluate(trainer):
        set_seed(5)
        found = trainer.evaluate(trainer.train_dataset)
        return {k: v for k, v in found.items() if "runtime" not in k and "per_second" not in k}

    options = {"per_device_eval_batch_size": 4, **MODES["full-forward"]}
    want = evaluate(make_trainer(llama_folder, tmp_path, **options))
    found = evaluate(make_trainer(llama_folder, tmp_path, kind=FastSDPOTrainer, **options))
    assert found.keys() == want.keys() and want["eval_loss"] > 0
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key


def batch(trainer, mask=(1.0, 0.0)):
    """Two sequences, ragged, the second without a teacher."""
    return {
        "prompt_ids": torch.tensor([[10, 11], [0, 13]]),
        "prompt_mask": torch.tensor([[1, 1], [0, 1]]),
        "completion_ids": torch.tensor([[14, 15, 16], [17, 18, 1]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "teacher_input_ids": torch.tensor([[20, 21, 22, 14, 15, 16], [0, 24, 25, 17, 18, 1]]),
        "teacher_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]),
        "self_distillation_mask": torch.tensor(mask),
        "old_per_token_logps": torch.full((2, 3), -3.0),
        "advantages": torch.tensor([0.5, -1.0]),
    }


def test_nothing_to_distill(tmp_path, llama_folder):
    """No sequence has a teacher: a zero loss that is attached to the graph."""
    for kind, source in (
        (SDPOTrainer, None),
        (FastSDPOTrainer, "hidden"),
        (FastSDPOTrainer, "logits"),
    ):
        trainer = make_trainer(llama_folder, tmp_path, kind=kind, source=source, **MODES["topk"])
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(trainer.model, batch(trainer, (0.0, 0.0)))
        loss.backward()
        assert loss == 0
        assert all((p.grad == 0).all() for p in trainer.model.parameters())
        key = "self_distillation/distillation_loss"
        assert trainer._metrics["train"][key] == [0.0]


def peaked(trainer, factor):
    """Sharpens the model so far that every top-k tail is below TRL's bound of 1e-7."""
    with torch.no_grad():
        trainer.model.model.norm.weight.mul_(factor)
    return trainer


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tail_bound(alpha, tmp_path, llama_folder):
    """A student whose tail is below 1e-7 and a teacher whose tail is not: TRL's clamp decides."""
    options = {**MODES["topk-tail-forward"], "distillation_alpha": alpha, "distillation_topk": 2}
    found = []
    for kind in (SDPOTrainer, FastSDPOTrainer):
        trainer = peaked(make_trainer(llama_folder, tmp_path, kind=kind, **options), 12.0)
        loss = trainer.compute_loss(trainer.model, batch(trainer, (1.0, 1.0)))
        loss.backward()
        found.append((loss.detach(), trainer.model.model.norm.weight.grad))
    (want, want_grad), (got, got_grad) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got_grad, want_grad, rtol=2e-3, atol=1e-5 * want_grad.abs().max())


def test_no_logits(tmp_path, llama_folder, monkeypatch):
    """The heads' own forward never runs; TRL's forms (B, T, V) for student and teacher."""
    trainer = make_trainer(llama_folder, tmp_path, kind=FastSDPOTrainer, **MODES["full-reverse"])
    trainer.compute_loss(trainer.model, batch(trainer)).backward()  # the head is checked once
    forward, called = torch.nn.Linear.forward, []

    def spied(layer, hidden):
        called.append(layer)
        return forward(layer, hidden)

    monkeypatch.setattr(torch.nn.Linear, "forward", spied)
    trainer.compute_loss(trainer.model, batch(trainer)).backward()
    heads = [trainer.model.lm_head, trainer.teacher_model.lm_head]
    assert called and not any(layer is head for layer in called for head in heads)


def test_banned_tokens_are_no_nan(tmp_path, llama_folder):
    """TRL multiplies 0 by infinity where both policies rule a token out; the limit is finite."""
    with torch.no_grad():
        logits = torch.randn(2, 3, 5)
        logits[..., 3] = -torch.inf
    given = SimpleNamespace(
        student_logits=logits.clone().requires_grad_(),
        teacher_logits=logits + torch.randn(5),
        completion_ids=torch.tensor([[0, 1, 2], [2, 4, 0]]),
        loss_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
    )
    trainer = make_trainer(llama_folder, tmp_path, **MODES["full-reverse"])
    assert trainer._compute_self_distillation_loss(trainer.model, {}, given).isnan()
    with patch_trl():
        loss = trainer._compute_self_distillation_loss(trainer.model, {}, given)
    loss.backward()
    finite = [0, 1, 2, 4]
    p = torch.log_softmax(logits[..., finite], -1)
    q = torch.log_softmax(given.teacher_logits[..., finite], -1)
    kl = (p.exp() * (p - q)).sum(-1) * given.loss_mask
    torch.testing.assert_close(loss, (kl.sum(-1) / given.loss_mask.sum(-1)).mean())
    assert given.student_logits.grad.isfinite().all()


class OwnLoss(SDPOTrainer):
    """Somebody's subclass: its loss works on logits."""

    def _compute_self_distillation_loss(self, model, inputs, distillation_logits):
        return distillation_logits.student_logits[..., 0].mean()


def test_overridden_methods_keep_logits(tmp_path, llama_folder, caplog):
    trainer = make_trainer(llama_folder, tmp_path, kind=OwnLoss)
    want = trainer.compute_loss(trainer.model, batch(trainer))
    with patch_trl():
        assert trainer.compute_loss(trainer.model, batch(trainer)) == want
    assert "OwnLoss has its own _compute_self_distillation_loss" in caplog.text
    with patch_trl("hidden"), pytest.raises(NotImplementedError, match="OwnLoss has its own"):
        trainer.compute_loss(trainer.model, batch(trainer))


def test_unusual_head_keeps_logits(tmp_path, llama_folder, caplog):
    class Scaled(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.weight = head.weight

        def forward(self, hidden):
            return hidden @ self.weight.T * 0.5

    losses = []
    for kind in (SDPOTrainer, FastSDPOTrainer):
        trainer = make_trainer(llama_folder, tmp_path, kind=kind, teacher_model_kind="live")
        trainer.model.lm_head = Scaled(trainer.model.lm_head)
        losses.append(trainer.compute_loss(trainer.model, batch(trainer)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "the model's head: head_parameters: the head must be a torch.nn.Linear" in caplog.text


def test_server_teacher_is_left_to_trl(tmp_path, llama_folder, caplog):
    """A teacher behind a server: TRL's own code, also with masked and ragged rows."""

    class Client:
        def get_sequence_logprobs(self, **_):
            return {
                "actual_logprobs": [[], [[-1.1], [-0.4]]],
                "logprobs": [[], [[-1.1, -1.5], [-0.4, -0.9]]],
                "logprob_token_ids": [[], [[14, 15], [16, 17]]],
            }

    def loss(kind):
        trainer = make_trainer(
            llama_folder,
            tmp_path,
            kind=kind,
            distillation_mode="topk_logits",
            distillation_topk=2,
            distillation_alpha=0.5,
            distillation_add_tail=True,
        )
        trainer.use_teacher_server, trainer.teacher_client = True, Client()
        given = batch(trainer, (1.0, 1.0))
        given["completion_mask"] = torch.tensor([[0, 0, 0], [1, 1, 0]])
        given["teacher_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]])
        return trainer.compute_loss(trainer.model, given).item()

    assert loss(FastSDPOTrainer) == pytest.approx(loss(SDPOTrainer), rel=1e-5)
    assert "from a server" in caplog.text


def attributes():
    names = [*trl_integration._OURS, "fastsdpo_source"]
    found = {name: vars(SDPOTrainer).get(name) for name in names}
    return {**found, "divergence": distillation_trainer._chunked_divergence_loss}


def test_everything_is_restored():
    before = attributes()

    def fail():
        with patch_trl():
            assert attributes()["compute_loss"] is not before["compute_loss"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert attributes() == before
    first, second = patch_trl(), patch_trl("logits")
    assert SDPOTrainer.fastsdpo_source == "logits"
    first.unpatch()  # not the last one on: the other stays
    assert SDPOTrainer.fastsdpo_source == "logits"
    second.unpatch()
    second.unpatch()
    assert attributes() == before and not hasattr(SDPOTrainer, "fastsdpo_source")
    patch_trl()
    trl_integration.unpatch_trl()
    assert attributes() == before
    with pytest.raises(ValueError, match="patch_trl: source must be one of"):
        patch_trl("fast")


def import_anew(monkeypatch):
    """Imports the integration as a process does that has not imported it yet."""
    for name in [name for name in sys.modules if re.match(r"fastsdpo\.integrations\._?trl", name)]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("fastsdpo.integrations.trl")


def test_other_versions_are_refused(monkeypatch):
    """An old TRL by its version, a changed one by the signatures of what is replaced."""

    def changed(self, model, inputs, something_new):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(SDPOTrainer, "compute_loss", changed)
        with pytest.raises(ImportError, match=r"differs from 1\.16\.0.*compute_loss.*something_new"):
            import_anew(patch)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "1.15.2")
        with pytest.raises(ImportError, match=r"needs TRL >= 1\.16\.0, got 1\.15\.2"):
            import_anew(patch)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl", None)
        with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16\.0'"):
            import_anew(patch)


def test_import_is_lazy():
    code = (
        "import sys, fastsdpo; assert not [m for m in sys.modules if m.startswith(('fastsdpo.integrations', 'trl'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
