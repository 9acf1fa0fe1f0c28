"""TRL's DistillationTrainer patched against unpatched, and its divergence function case by case."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from fastsdpo.integrations.trl import chunked_divergence_loss, patch_trl

ours, theirs = chunked_divergence_loss, distillation_trainer._chunked_divergence_loss


def run(student, teacher, output, **options):
    data = Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]})
    args = DistillationConfig(
        output_dir=str(output),
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        max_completion_length=6,
        max_steps=5,
        logging_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=3,
        disable_tqdm=True,
        **options,
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast.from_pretrained(student, padding_side="left"),
    )
    set_seed(7)
    trainer.train()
    logs = [{k: e[k] for k in ("loss", "grad_norm", "entropy") if k in e} for e in trainer.state.log_history]
    return logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_runs(beta, llama_folder, qwen2_folder, tmp_path):
    """Another model as the teacher, with a head of its own; accumulation over two micro-batches."""
    options = {"beta": beta, "temperature": 0.9, "gradient_accumulation_steps": 2}
    want_logs, want = run(llama_folder, qwen2_folder, tmp_path, **options)
    with patch_trl():
        logs, weights = run(llama_folder, qwen2_folder, tmp_path, **options)
    assert want_logs[0]["loss"] > 0 and want_logs[0]["entropy"] > 0
    for got, wanted in zip(logs, want_logs):
        assert got == pytest.approx(wanted, rel=2e-5, abs=2e-6)
    start = AutoModelForCausalLM.from_pretrained(llama_folder).state_dict()
    assert any(not torch.equal(start[name], weight) for name, weight in want.items())
    for name, weight in want.items():
        torch.testing.assert_close(weights[name], weight, rtol=2e-5, atol=2e-6, msg=name)


def inputs(**changes):
    torch.manual_seed(1)
    V, Ds, Dt = 33, 8, 12
    return {
        "student_hidden_states": torch.randn(2, 5, Ds, requires_grad=True),
        "teacher_hidden_states": torch.randn(2, 5, Dt),
        "student_lm_head_weight": torch.randn(V, Ds, requires_grad=True),
        "teacher_lm_head_weight": torch.randn(V, Dt),
        "completion_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        "beta": 0.5,
        **changes,
    }


def result(function, given):
    given = {
        k: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in given.items()
    }
    loss, entropy, count = function(**given)
    loss.backward()
    leaves = ("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias")
    grads = {k: given[k].grad for k in leaves if k in given}
    return {"loss": loss.detach(), "entropy": entropy, "count": count, **grads}


CASES = {
    "plain": {},
    "forward": {"beta": 0.0},
    "reverse": {"beta": 1.0},
    "temperature": {"temperature": 2.5},
    "items": {"num_items_in_batch": torch.tensor(11.5)},
    "items int": {"num_items_in_batch": 9},
    "bias": {
        "student_lm_head_bias": torch.linspace(-1, 1, 33).requires_grad_(),
        "teacher_lm_head_bias": torch.linspace(1, -1, 33),
    },
    "scales": {
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 1.5,
        "teacher_lm_head_bias": torch.linspace(1, -1, 33),
    },
    "softcap": {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 3.0},
    "softcap and scales": {
        "student_final_logit_softcapping": 3.0,
        "teacher_final_logit_softcapping": 3.0,
        "student_logit_scale": 0.25,
        "teacher_logit_scale": 2.0,
    },
    "two softcaps": {
        "student_final_logit_softcapping": 3.0,
        "teacher_final_logit_softcapping": 2.0,
    },
    "negative scale": {"student_logit_scale": -1.0},
    "nothing counts": {"completion_mask": torch.zeros(2, 5, dtype=torch.long)},
    "tool mask": {"completion_mask": torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 1]])},
    "frozen head": {"student_lm_head_weight": torch.linspace(-1, 1, 33 * 8).view(33, 8)},
}


@pytest.mark.parametrize("name", CASES)
def test_divergence(name):
    given = inputs(**CASES[name])
    want, found = result(theirs, given), result(ours, given)
    for key, value in want.items():
        if value is None:
            assert found[key] is None
            continue
        torch.testing.assert_close(found[key], value, rtol=2e-5, atol=2e-6, msg=f"{name} {key}")


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_properties(beta):
    """Zero for equal distributions, positive otherwise, symmetric at 1/2, whatever the vocabulary."""
    given = inputs(beta=beta)
    same = {
        **given,
        "teacher_hidden_states": given["student_hidden_states"].detach(),
        "teacher_lm_head_weight": given["student_lm_head_weight"].detach(),
    }
    assert ours(**same)[0].abs() < 1e-6
    assert ours(**given)[0] > 0
    if beta == 0.5:
        swapped = {
            **given,
            "student_hidden_states": given["teacher_hidden_states"],
            "teacher_hidden_states": given["student_hidden_states"].detach(),
            "student_lm_head_weight": given["teacher_lm_head_weight"],
            "teacher_lm_head_weight": given["student_lm_head_weight"].detach(),
        }
        torch.testing.assert_close(ours(**swapped)[0], ours(**given)[0].detach())


def exact(given):
    """Loss and entropy sum from whole float32 logits of the operands as they are given."""

    def log_probs(role):
        logits = (
            given[f"{role}_hidden_states"].float() @ given[f"{role}_lm_head_weight"].float().mT
            + given[f"{role}_lm_head_bias"].float()
        )
        return logits.log_softmax(-1)

    s, t, a = log_probs("student"), log_probs("teacher"), given["beta"]
    if a in (0.0, 1.0):
        p, q = (t, s) if a == 0.0 else (s, t)
        per_token = (p.exp() * (p - q)).sum(-1)
    else:
        weights = torch.tensor([1 - a, a]).log()
        m = torch.stack([s + weights[0], t + weights[1]]).logsumexp(0)
        per_token = ((1 - a) * s.exp() * (s - m) + a * t.exp() * (t - m)).sum(-1)
    mask = given["completion_mask"]
    entropy = -(s.exp() * s).sum(-1)
    return (per_token * mask).sum() / mask.sum(), (entropy * mask).sum().detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_half_precision(dtype, beta, autocast):
    """The logits stay float32: with a wide spread, half-precision ones would spoil the gradient."""
    spread = 10.0 if beta == 0.5 else 30.0
    given = inputs(
        beta=beta,
        student_hidden_states=torch.randn(2, 5, 64),
        teacher_hidden_states=torch.randn(2, 5, 64),
        student_lm_head_weight=torch.randn(33, 64) * spread / 8,
        teacher_lm_head_weight=torch.randn(33, 64) * spread / 8,
        student_lm_head_bias=torch.linspace(-1, 1, 33),
        teacher_lm_head_bias=torch.linspace(1, -1, 33),
    )
    operands = [key for key in given if key.endswith(("_states", "_weight"))]
    leaves = ["student_hidden_states", "student_lm_head_weight", "student_lm_head_bias"]

    def arguments(kept):
        cast = {key: given[key].to(dtype).to(kept) for key in operands}
        chosen = {**given, **cast}
        return {**chosen, **{key: chosen[key].clone().requires_grad_() for key in leaves}}

    found = arguments(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss, entropy, _ = ours(**found)
    loss.backward()
    wanted = arguments(torch.float32)
    exact_loss, exact_entropy = exact(wanted)
    exact_loss.backward()
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, exact_entropy, rtol=1e-5, atol=1e-5)
    for key in leaves:
        a, b = found[key].grad.float(), wanted[key].grad
        assert (a - b).abs().max() < 0.01 * b.abs().max(), key


def test_mixed_dtypes():
    given = inputs(student_lm_head_bias=torch.zeros(33), teacher_lm_head_bias=torch.zeros(33))
    half = {
        **given,
        "student_hidden_states": given["student_hidden_states"].bfloat16(),
        "teacher_hidden_states": given["teacher_hidden_states"].bfloat16(),
    }
    torch.testing.assert_close(ours(**half)[0], exact(half)[0], rtol=1e-5, atol=1e-6)


def test_probabilities_that_underflow():
    """All but two tokens have probability exp(-120), and student and teacher prefer different ones."""
    heads = torch.full((2, 2053, 1), -120.0)
    heads[0, :2, 0], heads[1, :2, 0] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    given = inputs(
        student_hidden_states=torch.ones(1, 3, 1, requires_grad=True),
        beta=0.5,
        teacher_hidden_states=torch.ones(1, 3, 1),
        student_lm_head_weight=heads[0],
        teacher_lm_head_weight=heads[1],
        completion_mask=torch.tensor([[1, 1, 0]]),
        student_lm_head_bias=torch.zeros(2053),
        teacher_lm_head_bias=torch.zeros(2053),
    )
    loss, entropy, _ = ours(**given)
    torch.testing.assert_close(loss, exact(given)[0])
    loss.backward()
    assert entropy.isfinite()
    assert given["student_hidden_states"].grad.isfinite().all()


def test_masked_tokens_change_nothing():
    given = inputs()
    loss, entropy, count = ours(**given)
    loss.backward()
    masked = given["completion_mask"] == 0
    assert (given["student_hidden_states"].grad[masked] == 0).all()
    assert (given["student_hidden_states"].grad[~masked].abs().sum(-1) > 0).all()
    other = {**given}
    for key in ("student_hidden_states", "teacher_hidden_states"):
        other[key] = torch.where(masked[..., None], torch.nan, given[key].detach())
    for a, b in zip(ours(**other), (loss, entropy, count)):
        assert torch.equal(a, b)


def test_a_batch_without_tokens_reaches_every_parameter():
    """Else the processes of a data-parallel run would wait for each other."""
    given = inputs(
        completion_mask=torch.zeros(2, 5),
        student_lm_head_bias=torch.zeros(33, requires_grad=True),
        teacher_lm_head_bias=torch.zeros(33),
    )
    loss, _, count = ours(**given)
    loss.backward()
    assert count == 0
    for key in ("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias"):
        assert torch.count_nonzero(given[key].grad) == 0
