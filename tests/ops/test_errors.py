"""Every error names the function and the argument, what came and what was wanted."""

import re

import pytest
import torch

import fastsdpo
from fastsdpo import linear_token_logps

Z = torch.randn(2, 3, 7)
Y = torch.zeros(2, 3, dtype=torch.long)
H = torch.randn(2, 3, 4)
W = torch.randn(7, 4)


def loss(student=Z, teacher=Z, y=Y, **kwargs):
    return fastsdpo.sdpo_loss(student, teacher, y, backend="reference", **kwargs)


def linear(student=H, teacher=H, weight=W, y=Y, **kwargs):
    return fastsdpo.linear_sdpo_loss(student, teacher, weight, y, backend="reference", **kwargs)


def tangent():
    with torch.autograd.forward_ad.dual_level():
        return fastsdpo.token_logps(torch.autograd.forward_ad.make_dual(Z, Z), Y)


ids = torch.zeros(2, 3, 2, dtype=torch.long)
PAIR, ONE = (ids, ids.float()), ids[..., :1]
TOPK = {"teacher": None, "mode": "topk"}
CASES = [
    (tangent, NotImplementedError, "token_logps: logits must have no tangent"),
    (lambda: loss(student=Z.to_sparse()), TypeError, "student_logits must be a dense tensor, got torch.sparse_coo"),
    (lambda: loss(ignore_index=0.5), TypeError, "sdpo_loss: ignore_index must be an integer, got 0.5"),
    (lambda: loss(y=Y[:, :2]), ValueError, "sdpo_loss: target_ids must have shape (2, 3), got (2, 2)"),
    (lambda: loss(y=Y.float()), TypeError, "sdpo_loss: target_ids must have an integer dtype"),
    (lambda: loss(y=Y.bool()), TypeError, "sdpo_loss: target_ids must have an integer dtype"),
    (lambda: loss(student=Z.long()), TypeError, "sdpo_loss: student_logits must be float16"),
    (lambda: loss(teacher=Z.long()), TypeError, "sdpo_loss: teacher_logits must be float16"),
    (lambda: loss(student=None), TypeError, "sdpo_loss: student_logits must be a torch.Tensor, got NoneType"),
    (lambda: loss(teacher=Z[..., :5]), ValueError, "teacher_logits must have student_logits' shape (2, 3, 7)"),
    (lambda: loss(student=Z[..., :0], teacher=Z[..., :0]), ValueError, "V >= 1"),
    (lambda: loss(mode="kl"), ValueError, "sdpo_loss: mode must be one of"),
    (lambda: loss(mode="full", alpha=1.5), ValueError, "sdpo_loss: alpha must lie in [0, 1], got 1.5"),
    (lambda: loss(alpha=0.5), ValueError, "sdpo_loss: alpha must be 1.0 for mode='sampled_token'"),
    (lambda: loss(alpha=float("nan")), ValueError, "alpha must lie in [0, 1]"),
    (lambda: loss(temperature=0.0), ValueError, "sdpo_loss: temperature must be > 0 and finite, got 0.0"),
    (lambda: loss(temperature=float("nan")), ValueError, "temperature must be > 0"),
    (lambda: loss(softcap=-1.0), ValueError, "sdpo_loss: softcap must be > 0"),
    (lambda: loss(mode="topk"), ValueError, "sdpo_loss: topk must be given"),
    (lambda: loss(mode="topk", topk=8), ValueError, "sdpo_loss: topk must be an integer in [1, V] = [1, 7], got 8"),
    (lambda: loss(mode="topk", topk=0), ValueError, "topk must be an integer in [1, V]"),
    (lambda: loss(topk=3), ValueError, "topk must be None unless mode='topk'"),
    (lambda: loss(is_clip=0.0), ValueError, "is_clip must be > 0"),
    (lambda: loss(weights=torch.ones(3)), ValueError, "weights must have shape (2, 3), got (3,)"),
    (lambda: loss(weights=Y), TypeError, "weights must have a floating dtype"),
    (lambda: loss(old_logps=torch.ones(2)), ValueError, "old_logps must have shape (2, 3)"),
    (lambda: loss(teacher=None), ValueError, "exactly one of teacher_logits, teacher_logps and teacher_topk"),
    (lambda: loss(teacher_logps=torch.ones(2, 3)), ValueError, "got teacher_logits and teacher_logps"),
    (lambda: loss(teacher=None, mode="full", teacher_logps=torch.ones(2, 3)), ValueError, "mode='sampled_token'"),
    (lambda: loss(teacher=None, teacher_topk=PAIR), ValueError, "teacher_topk must come with mode='topk'"),
    (lambda: loss(**TOPK, teacher_topk=PAIR), ValueError, "distinct"),
    (
        lambda: loss(**TOPK, teacher_topk=(ONE + 7, ONE.float())),
        ValueError,
        "teacher_topk ids must lie in [0, V) = [0, 7), got 7",
    ),
    (
        lambda: loss(**TOPK, teacher_topk=(ids, ONE.float())),
        ValueError,
        "teacher_topk logps must have shape (2, 3, 2)",
    ),
    (lambda: loss(**TOPK, topk=3, teacher_topk=PAIR), ValueError, "must equal teacher_topk's K = 2"),
    (
        lambda: loss(y=Y + 7),
        ValueError,
        "sdpo_loss: target_ids must lie in [0, V) = [0, 7) or be ignore_index = -100, got 7",
    ),
    (lambda: loss(y=Y - 1), ValueError, "got -1 at flattened position 0"),
    (lambda: linear(y=Y + 7), ValueError, "linear_sdpo_loss: target_ids must lie in [0, V)"),
    (
        lambda: linear(weight=W[:, :3]),
        ValueError,
        "linear_sdpo_loss: weight must have shape (V, D) with D = 4, got (7, 3)",
    ),
    (lambda: linear(weight=W[:0].reshape(0)), ValueError, "partitioned by DeepSpeed ZeRO-3"),
    (lambda: linear(weight=W.long()), TypeError, "weight must be floating"),
    (lambda: linear(student=H.long()), TypeError, "student_hidden must be float16, bfloat16, float32 or float64"),
    (lambda: linear(teacher=H[:1]), ValueError, "teacher_hidden must match student_hidden"),
    (lambda: linear(teacher=H[..., :2]), ValueError, "teacher_hidden must have D = 4 without a teacher_weight, got 2"),
    (lambda: linear(teacher=H[..., :2], teacher_weight=W[:6, :2]), ValueError, "teacher_weight must have V = 7 rows"),
    (lambda: linear(bias=torch.ones(3)), ValueError, "bias must have shape (7,), got (3,)"),
    (lambda: linear(teacher_bias=torch.ones(7)), ValueError, "teacher_bias must come with teacher_weight"),
    (lambda: linear(teacher_logits=Z), ValueError, "exactly one of teacher_hidden and teacher_logits"),
    (lambda: linear(teacher=None, teacher_logits=Z, softcap=3.0), ValueError, "softcap must be None with teacher_log"),
    (lambda: linear(teacher=None, teacher_logits=Z[..., :5]), ValueError, "teacher_logits must have shape (2, 3, 7)"),
    (lambda: linear(vocab_size=5, vocab_group=1), ValueError, "vocab_size must be None with vocab_group"),
    (lambda: loss(ce_weights=torch.ones(2)), ValueError, "sdpo_loss: ce_weights must have shape (2, 3), got (2,)"),
    (lambda: loss(ce_temperature=0.0), ValueError, "sdpo_loss: ce_temperature must be > 0"),
    (lambda: fastsdpo.token_logps(Z, Y, extra_ids=ids + 7), ValueError, "token_logps: extra_ids must lie in [0, V)"),
    (lambda: fastsdpo.token_logps(Z, Y, extra_ids=Y), ValueError, "extra_ids must have shape (2, 3, 3), got (2, 3)"),
    (lambda: fastsdpo.token_logps(Z, Y, entropy_grad=True), ValueError, "entropy_grad must come with return_entropy"),
    (lambda: linear(chunk_size=0), ValueError, "chunk_size must be a positive integer"),
    (lambda: linear(logit_scale=0.0), ValueError, "logit_scale must be > 0"),
    (lambda: linear(tile_dtype=torch.int8), ValueError, "tile_dtype must be None or torch.float32 on cpu"),
    (lambda: linear_token_logps(H, W, Y[:1]), ValueError, "linear_token_logps: target_ids must have shape (2, 3)"),
    (lambda: fastsdpo.token_logps(Z, Y + 9), ValueError, "token_logps: target_ids must lie in"),
    (lambda: fastsdpo.token_logps(Z, Y, backend="cuda"), ValueError, "token_logps: backend must be one of"),
    (lambda: fastsdpo.token_logps(Z.double(), Y, backend="triton"), TypeError, "got float64"),
    (lambda: fastsdpo.token_log_ratio(Z, Z[:1], Y), ValueError, "token_log_ratio: teacher_logits must have"),
    (lambda: fastsdpo.token_mean_weights(Z), TypeError, "token_mean_weights: mask must be bool or integer"),
    (lambda: fastsdpo.token_mean_weights(Y, num_items=0), ValueError, "num_items must be > 0 and finite, got 0"),
    (lambda: fastsdpo.sequence_mean_weights(Y[0]), ValueError, "mask must have shape (B, L), got (3,)"),
    (lambda: fastsdpo.SDPOLoss(weights=Z), TypeError, "SDPOLoss: weights must be passed to forward"),
]


@pytest.mark.parametrize(("call", "error", "text"), CASES, ids=[c[2][:40] for c in CASES])
def test_message(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("this machine can run Triton")
    with pytest.raises(ValueError, match="backend='triton' must have CUDA or ROCm tensors"):
        fastsdpo.sdpo_loss(Z, Z, Y, backend="triton")


def test_available_backends_gives_reasons():
    found = fastsdpo.available_backends()
    assert set(found) == {"triton", "native", "reference"}
    assert found["reference"] == "available"
    assert all(isinstance(reason, str) and reason for reason in found.values())
