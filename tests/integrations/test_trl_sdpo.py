"""TRL's SDPO trainer patched against unpatched: losses, metrics and weights of whole runs."""

import contextlib
import importlib
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from transformers import CohereConfig, CohereForCausalLM, MiniCPM3Config, MiniCPM3ForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.trainer import distillation_trainer

from fastsdpo.integrations.trl import FastSDPOTrainer, patch_trl, unpatch_trl
from tests.integrations.conftest import RUN
from tests.words import SHAPE

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]


def reward(prompts, completions, **_):
    """Half the answers succeed, so that some sequences have a teacher and others do not."""
    return [1.0 if len(c.split()) % 2 else 0.0 for c in completions]


def make_trainer(folder, output, *, model=None, kind=SDPOTrainer, steps=3, peft_config=None, source=None, **options):
    data = Dataset.from_dict({"prompt": PROMPTS, "privileged_context": ["w11 w12", "w13", "w14 w15 w16", "w17"]})
    defaults = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6, "max_steps": steps}
    defaults |= {"include_environment_feedback": True, **RUN}
    args = SDPOConfig(output_dir=str(output), **{**defaults, **options})
    given = {"processing_class": PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")}
    given |= {"reward_funcs": reward, "train_dataset": data, "peft_config": peft_config}
    return kind(model=model or folder, args=args, **given, **({} if source is None else {"source": source}))


def without_times(metrics):
    return {k: v for k, v in metrics.items() if "runtime" not in k and "per_second" not in k}


def run(trainer):
    set_seed(7)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return [without_times(entry) for entry in trainer.state.log_history], weights


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


def assert_patched_runs_as_unpatched(folder, output, sources=("hidden",), **options):
    want = run(make_trainer(folder, output, **options))
    for source in sources:
        with patch_trl(source):
            assert_same_run(run(make_trainer(folder, output, **options)), want)


TOPK = {"distillation_mode": "topk_logits", "distillation_topk": 7}
MODES = {
    "sampled": {"distillation_mode": "sampled_token"},
    "full-reverse": {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    "full-forward": {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    "full-jsd": {"distillation_mode": "full_logits", "distillation_alpha": 0.3},
    "topk": TOPK,
    "topk-tail-forward": {**TOPK, "distillation_add_tail": True, "distillation_alpha": 0.0},
    "topk-tail-jsd": {**TOPK, "distillation_add_tail": True, "distillation_alpha": 0.5},
}


@pytest.mark.parametrize("mode", MODES)
def test_run_in_every_mode(mode, llama_folder, tmp_path):
    options = {**MODES[mode], "temperature": 0.8}
    assert_patched_runs_as_unpatched(llama_folder, tmp_path, ("hidden", "logits"), **options)


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_teacher_kinds(kind, tmp_path, qwen2_folder):
    """With an importance ratio that is not 1: three optimizer steps on each generated batch age the log-probs."""
    options = {"teacher_model_kind": kind, "teacher_update_rate": 0.3, **MODES["full-reverse"]}
    options |= {"num_iterations": 3, "distillation_is_clip": 1.2, "steps": 4}
    assert_patched_runs_as_unpatched(qwen2_folder, tmp_path, **options)


# An EMA teacher and LoRA on the head: TRL sets the base head to zero, and every loss is 0.
ADAPTED = [("base", "q_proj"), ("ema", "q_proj"), ("live", "lm_head")]
ADAPTED += [pytest.param(*case, marks=pytest.mark.slow) for case in (("live", "q_proj"), ("base", "lm_head"))]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(("kind", "target"), ADAPTED)
def test_adapters(kind, target, tmp_path, qwen2_folder):
    """LoRA, in the attention and on the head: the base teacher is the model without it."""
    init = "gaussian" if target == "q_proj" else True
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=init)
    options = {"teacher_model_kind": kind, "learning_rate": 0.5, "peft_config": lora, **MODES["full-jsd"]}
    assert_patched_runs_as_unpatched(qwen2_folder, tmp_path, **options)


@pytest.mark.parametrize(("weight", "loss_type"), [(0.0, "grpo"), (0.4, "bnpo"), (0.4, "dr_grpo"), (0.4, "dapo")])
def test_convex_policy_loss(weight, loss_type, tmp_path, llama_folder):
    options = {
        "distillation_weight": weight,
        "loss_type": loss_type,
        "importance_sampling_level": "sequence" if loss_type == "grpo" else "token",
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        **MODES["topk-tail-jsd"],
    }
    assert_patched_runs_as_unpatched(llama_folder, tmp_path, ("hidden", "logits"), **options)


def test_trainer_class_and_defaults(tmp_path, llama_folder):
    """TRL's defaults: sampled token, EMA teacher, gradient checkpointing. And the evaluation."""
    options = {"gradient_checkpointing": True, "optim": "adamw_torch", "learning_rate": 1e-4}
    options |= {"per_device_eval_batch_size": 4}
    found = []
    for kind, source in ((SDPOTrainer, None), (FastSDPOTrainer, "hidden")):
        trainer = make_trainer(llama_folder, tmp_path, kind=kind, source=source, **options)
        logs, weights = run(trainer)
        set_seed(5)
        found.append(([*logs, without_times(trainer.evaluate(trainer.train_dataset))], weights))
    assert found[0][0][-1]["eval_loss"] != 0
    assert_same_run(found[1], found[0])


def batch(chosen=(1.0, 0.0)):
    """Two sequences, ragged, the second without a teacher."""
    return {
        "prompt_ids": torch.tensor([[10, 11], [0, 13]]),
        "prompt_mask": torch.tensor([[1, 1], [0, 1]]),
        "completion_ids": torch.tensor([[14, 15, 16], [17, 18, 1]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "teacher_input_ids": torch.tensor([[20, 21, 22, 14, 15, 16], [0, 24, 25, 17, 18, 1]]),
        "teacher_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]),
        "self_distillation_mask": torch.tensor(chosen),
        "old_per_token_logps": torch.full((2, 3), -3.0),
        "advantages": torch.tensor([0.5, -1.0]),
    }


@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_nothing_to_distill(source, tmp_path, llama_folder):
    """No sequence has a teacher: a zero loss that is attached to the graph."""
    trainer = make_trainer(llama_folder, tmp_path, kind=FastSDPOTrainer, source=source, **MODES["topk"])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch((0.0, 0.0)))
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in trainer.model.parameters())
    assert trainer._metrics["train"]["self_distillation/distillation_loss"] == [0.0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tail_bound(alpha, tmp_path, llama_folder):
    """A student so sharp that its top-k tail is below TRL's bound of 1e-7, and a teacher whose tail is not."""
    options = {**MODES["topk-tail-forward"], "distillation_alpha": alpha, "distillation_topk": 2}
    found = []
    for kind in (SDPOTrainer, FastSDPOTrainer):
        trainer = make_trainer(llama_folder, tmp_path, kind=kind, **options)
        with torch.no_grad():
            trainer.model.model.norm.weight.mul_(12.0)
        loss = trainer.compute_loss(trainer.model, batch((1.0, 1.0)))
        loss.backward()
        found.append((loss.detach(), trainer.model.model.norm.weight.grad))
    (want, want_grad), (got, got_grad) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got_grad, want_grad, rtol=2e-3, atol=1e-5 * want_grad.abs().max())


def test_no_logits(tmp_path, llama_folder, monkeypatch):
    """The heads' own forward never runs; TRL's forms (B, T, V) for student and teacher."""
    trainer = make_trainer(llama_folder, tmp_path, kind=FastSDPOTrainer, **MODES["full-reverse"])
    trainer.compute_loss(trainer.model, batch()).backward()  # the head is checked once
    forward, called = torch.nn.Linear.forward, []

    def spied(layer, hidden):
        called.append(layer)
        return forward(layer, hidden)

    monkeypatch.setattr(torch.nn.Linear, "forward", spied)
    trainer.compute_loss(trainer.model, batch()).backward()
    heads = [trainer.model.lm_head, trainer.teacher_model.lm_head]
    assert called and not any(layer is head for layer in called for head in heads)


def test_banned_tokens_are_no_nan(tmp_path, llama_folder):
    """TRL multiplies 0 by infinity where both policies rule a token out; the limit is finite."""
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
    p, q = (x[..., [0, 1, 2, 4]].log_softmax(-1) for x in (logits, given.teacher_logits))
    kl = (p.exp() * (p - q)).sum(-1) * given.loss_mask
    torch.testing.assert_close(loss, (kl.sum(-1) / given.loss_mask.sum(-1)).mean())
    assert given.student_logits.grad.isfinite().all()


def minicpm3():
    """It scales its decoder's states before the head."""
    more = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = MiniCPM3Config(vocab_size=63, **{**SHAPE, "num_key_value_heads": 4}, dim_model_base=8, **more)
    return MiniCPM3ForCausalLM(config)


def cohere():
    return CohereForCausalLM(CohereConfig(vocab_size=63, logit_scale=-0.5, **SHAPE))


@pytest.mark.parametrize(("make", "reason"), [(minicpm3, ""), (cohere, "logit scale must be above 0, got -0.5")])
def test_heads_of_other_models(make, reason, tmp_path, llama_folder, caplog):
    """A live teacher: the student reads the other context."""
    options = {**MODES["full-reverse"], "teacher_model_kind": "live"}
    found = []
    for kind in (SDPOTrainer, FastSDPOTrainer):
        torch.manual_seed(0)
        trainer = make_trainer(llama_folder, tmp_path, kind=kind, model=make(), **options)
        trainer.model.eval()
        loss = trainer.compute_loss(trainer.model, batch((1.0, 1.0)))
        loss.backward()
        found.append((loss.detach(), *(p.grad for p in trainer.model.parameters())))
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    assert reason in caplog.text and ("from logits" in caplog.text) == bool(reason)


class OwnLoss(SDPOTrainer):
    """Somebody's subclass: its loss works on logits."""

    def _compute_self_distillation_loss(self, model, inputs, distillation_logits):
        return distillation_logits.student_logits[..., 0].mean()


class ScaledHead(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden):
        return hidden @ self.weight.T * 0.5


def own_loss(make):
    return make(kind=OwnLoss), batch()


def own_method(make):
    """Set on the trainer itself."""
    trainer = make()
    theirs = trainer._forward_logits
    trainer._forward_logits = lambda *args, **given: 0.5 * theirs(*args, **given)
    return trainer, batch()


class OtherWeights(SDPOTrainer):
    """Somebody's subclass: the teacher is the model with other weights for a while."""

    @contextlib.contextmanager
    def _get_teacher_context_for_self_distillation(self):
        with torch.no_grad():
            self.model.lm_head.weight *= 0.9
        yield
        with torch.no_grad():
            self.model.lm_head.weight /= 0.9


def own_teacher_context(make):
    return make(kind=OtherWeights, teacher_model_kind="live", **MODES["full-reverse"]), batch()


def unusual_head(make):
    trainer = make(teacher_model_kind="live")
    trainer.model.lm_head = ScaledHead(trainer.model.lm_head)
    return trainer, batch()


def served_teacher(make):
    """TRL's own code, also with masked and ragged rows."""
    scores = {"actual_logprobs": [[], [[-1.1], [-0.4]]], "logprobs": [[], [[-1.1, -1.5], [-0.4, -0.9]]]}
    scores["logprob_token_ids"] = [[], [[14, 15], [16, 17]]]
    trainer = make(**{**MODES["topk-tail-jsd"], "distillation_topk": 2})
    trainer.use_teacher_server = True
    trainer.teacher_client = SimpleNamespace(get_sequence_logprobs=lambda **_: scores)
    given = batch((1.0, 1.0))
    given["completion_mask"] = torch.tensor([[0, 0, 0], [1, 1, 0]])
    given["teacher_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]])
    return trainer, given


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (own_loss, "OwnLoss has its own _compute_self_distillation_loss"),
        (own_method, "SDPOTrainer has its own _forward_logits"),
        (own_teacher_context, "OtherWeights has its own _get_teacher_context_for_self_distillation"),
        (unusual_head, "the model's head: head_parameters: the head must be a torch.nn.Linear"),
        (served_teacher, "the teacher's log-probs come from a server"),
    ],
)
def test_logits_remain_where_they_must(case, reason, tmp_path, llama_folder, caplog):
    trainer, given = case(partial(make_trainer, llama_folder, tmp_path))
    want = trainer.compute_loss(trainer.model, given).item()
    with patch_trl():
        assert trainer.compute_loss(trainer.model, given).item() == pytest.approx(want, rel=1e-5)
    assert reason in caplog.text
    with patch_trl("hidden"), pytest.raises(NotImplementedError, match=re.escape(reason)):
        trainer.compute_loss(trainer.model, given)


def test_everything_is_restored():
    def attributes():
        return {**vars(SDPOTrainer), "divergence": distillation_trainer._chunked_divergence_loss}

    before = attributes()

    def fail():
        with patch_trl():
            changed = {name for name, value in attributes().items() if before.get(name) is not value}
            assert {"compute_loss", "_forward_logits", "fastsdpo_source", "divergence"} <= changed
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
    assert attributes() == before
    patch_trl()
    unpatch_trl()
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
