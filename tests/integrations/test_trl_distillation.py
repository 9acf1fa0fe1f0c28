"""TRL's DistillationTrainer patched against unpatched, and its divergence function case by case."""

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from fastsdpo.integrations.trl import chunked_divergence_loss, patch_trl
from tests.integrations.conftest import RUN

ours, theirs = chunked_divergence_loss, distillation_trainer._chunked_divergence_loss


def run(student, teacher, output, **options):
    settings = {**RUN, "per_device_train_batch_size": 2, "max_completion_length": 6, "max_steps": 3}
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(output_dir=str(output), **settings, **options),
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]}),
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
    return {
        "student_hidden_states": torch.randn(2, 5, 8, requires_grad=True),
        "teacher_hidden_states": torch.randn(2, 5, 12),
        "student_lm_head_weight": torch.randn(33, 8, requires_grad=True),
        "teacher_lm_head_weight": torch.randn(33, 12),
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


BIASES = {"student_lm_head_bias": torch.linspace(-1, 1, 33).requires_grad_()}
BIASES["teacher_lm_head_bias"] = torch.linspace(1, -1, 33)
SOFTCAPS = {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 3.0}
# All but two tokens of each policy have the probability exp(-120), and the two are not the same.
UNDERFLOWS = {
    "student_hidden_states": torch.ones(2, 5, 8).requires_grad_(),
    "teacher_hidden_states": torch.ones(2, 5, 12),
    "student_lm_head_weight": torch.full((33, 8), -15.0).index_fill_(0, torch.tensor([0, 1]), 0.0),
    "teacher_lm_head_weight": torch.full((33, 12), -10.0).index_fill_(0, torch.tensor([1, 2]), 0.0),
}
CASES = {
    "plain": {},
    "forward": {"beta": 0.0},
    "reverse": {"beta": 1.0},
    "temperature": {"temperature": 2.5},
    "items": {"num_items_in_batch": torch.tensor(11.5)},
    "items int": {"num_items_in_batch": 9},
    "bias": BIASES,
    "scales": {**BIASES, "student_logit_scale": 0.5, "teacher_logit_scale": 1.5},
    "softcap": SOFTCAPS,
    "softcap and scales": {**SOFTCAPS, "student_logit_scale": 0.25, "teacher_logit_scale": 2.0},
    "two softcaps": {**SOFTCAPS, "teacher_final_logit_softcapping": 2.0},
    "negative scale": {"student_logit_scale": -1.0},
    "nothing counts": {**BIASES, "completion_mask": torch.zeros(2, 5, dtype=torch.long)},
    "tool mask": {"completion_mask": torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 1]])},
    "frozen head": {"student_lm_head_weight": torch.linspace(-1, 1, 33 * 8).view(33, 8)},
    "underflow": UNDERFLOWS,
}


@pytest.mark.parametrize("name", CASES)
def test_divergence(name):
    given = inputs(**CASES[name])
    want, found = result(theirs, given), result(ours, given)
    # Without tokens zeros reach every parameter: the processes of a data-parallel run would wait otherwise.
    assert (want["student_lm_head_weight"] is None) == (name in ("frozen head", "underflow"))
    for key, value in want.items():
        if value is None:
            assert found[key] is None
            continue
        assert value.isfinite().all()
        torch.testing.assert_close(found[key], value, rtol=2e-5, atol=2e-6, msg=f"{name} {key}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("which", ["all", "autocast", "hidden states"])
def test_gradients_in_half_precision(dtype, beta, which):
    """As TRL's from float32 copies: with a wide spread, half-precision logits would spoil the gradient."""
    # Products of float32 weights are rounded: at a spread of 30 that alone moves the loss by 1e-5.
    spread = 3.0 if which == "hidden states" else 10.0 if beta == 0.5 else 30.0
    heads = {f"{who}_lm_head_weight": torch.randn(33, 64) * spread / 8 for who in ("student", "teacher")}
    states = {f"{who}_hidden_states": torch.randn(2, 5, 64) for who in ("student", "teacher")}
    given = inputs(beta=beta, **states, **heads, **BIASES)
    rounded = [
        key for key in given if key.endswith("_states") or (key.endswith("_weight") and which != "hidden states")
    ]
    leaves = ["student_hidden_states", "student_lm_head_weight", "student_lm_head_bias"]

    def arguments(kept):
        chosen = {**given, **{key: given[key].to(dtype).to(kept) for key in rounded}}
        return {**chosen, **{key: chosen[key].detach().clone().requires_grad_() for key in leaves}}

    found = arguments(torch.float32 if which == "autocast" else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=which == "autocast"):
        loss, entropy, _ = ours(**found)
    loss.backward()
    wanted = arguments(torch.float32)
    want_loss, want_entropy, _ = theirs(**wanted)
    want_loss.backward()
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-5, atol=1e-5)
    for key in leaves:
        a, b = found[key].grad.float(), wanted[key].grad
        assert (a - b).abs().max() < 0.01 * b.abs().max(), key


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
