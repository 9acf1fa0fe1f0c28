"""Liger's functions with fastsdpo's losses in them, and Liger's own tests over these.

    python -m tests.integrations.liger CHECKOUT [pytest's arguments]

CHECKOUT is a clone of https://github.com/linkedin/Liger-Kernel at the version that is installed. Liger's tests of the
fused linear JSD, the chunked JSD loss, the JSD and the KL divergence then run over our losses. What ours do not have
is left out by name: ``reduction="none"``, which is one number for each token and vocabulary entry.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastsdpo

TESTS = (
    "test/transformers/test_fused_linear_jsd.py",
    "test/transformers/test_jsd.py",
    "test/transformers/test_kl_div.py",
    "test/chunked_loss/test_jsd_loss.py",
)
BACKEND = os.environ.get("FASTSDPO_BACKEND", "auto")


def counted(labels: Tensor | None, like: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Targets with -100 where a row is ignored, and 1 / number of the others."""
    ids = torch.zeros(len(like), dtype=torch.long, device=like.device) if labels is None else labels.clone()
    ids[ids == ignore_index] = -100
    return ids, 1.0 / (ids != -100).sum().clamp(min=1)


class FusedLinearJSD:
    """``liger_kernel.ops.LigerFusedLinearJSDFunction``"""

    @staticmethod
    def apply(student, weight, teacher, head, labels=None, beta=0.5, ignore_index=-100, temperature=1.0, *rest):
        ids, share = counted(labels, student, ignore_index)
        options = {"mode": "full", "alpha": float(beta), "temperature": temperature, "backend": BACKEND}
        options |= {"teacher_weight": head, "weights": share.expand(len(ids))}
        return fastsdpo.linear_sdpo_loss(student, teacher, weight, ids, **options).loss


class JSD:
    """``LigerJSDFunction``, of log-probs: these are logits of their own softmax."""

    @staticmethod
    def apply(log_q, log_p, labels=None, beta=0.5, ignore_index=-100, *rest):
        ids, share = counted(labels, log_q, ignore_index)
        options = {"mode": "full", "alpha": float(beta), "weights": share.expand(len(ids)), "backend": BACKEND}
        return fastsdpo.sdpo_loss(log_q, log_p, ids, **options).loss.to(log_q.dtype)


class KLDiv:
    """``LigerKLDivLossFunction``"""

    @staticmethod
    def apply(y_pred, y_true, reduction="batchmean", log_target=False, eps=1e-10):
        if reduction == "none":
            pytest.skip("one number for each token and vocabulary entry")
        teacher = y_true if log_target else y_true.log()
        share = {"sum": 1.0, "batchmean": 1 / len(y_pred), "mean": 1 / y_pred.numel()}[reduction]
        ids = torch.zeros(len(y_pred), dtype=torch.long)
        options = {"mode": "full", "alpha": 0.0, "weights": torch.full((len(ids),), share), "backend": BACKEND}
        return fastsdpo.sdpo_loss(y_pred, teacher, ids, **options).loss.to(y_pred.dtype)


class ChunkedJSD:
    """``chunked_loss.jsd_loss.LigerFusedLinearJSDFunction``: with a cross entropy at temperature 1."""

    @staticmethod
    def apply(student, weight, teacher, head, labels, bias=None, teacher_bias=None, *rest):
        hard, soft, beta, ignore_index, temperature, *_ = (*rest, *(0.5, 0.5, 0.5, -100, 1.0)[len(rest) :])
        both = rest[7] if len(rest) > 7 else False
        ids, share = counted(labels, student, ignore_index)
        options = {"mode": "full", "alpha": float(beta), "temperature": temperature, "backend": BACKEND}
        options |= {"bias": bias, "teacher_weight": head, "teacher_bias": teacher_bias}
        weights, ce = (share * soft).expand(len(ids)), (share * hard).expand(len(ids))
        out = fastsdpo.linear_sdpo_loss(
            student, teacher, weight, ids, weights=weights, ce_weights=ce, ce_temperature=1.0, **options
        )
        if not both:
            return out.loss
        soft_loss = out.per_token_loss.sum() * share
        return out.loss, soft_loss, (out.loss.detach() - soft * soft_loss) / hard if hard else torch.zeros(())


def replace() -> None:
    """Puts the four in the places where Liger and its tests look for them."""
    import liger_kernel.chunked_loss.functional as chunked_functional
    import liger_kernel.chunked_loss.jsd_loss as chunked
    import liger_kernel.ops as ops
    import liger_kernel.transformers.functional as functional
    import liger_kernel.transformers.fused_linear_jsd as fused
    import liger_kernel.transformers.jsd as jsd
    import liger_kernel.transformers.kl_div as kl_div

    names = {"LigerFusedLinearJSDFunction": FusedLinearJSD, "LigerJSDFunction": JSD, "LigerKLDivLossFunction": KLDiv}
    for module in (ops, functional, fused, jsd, kl_div):
        for name, ours in names.items():
            if hasattr(module, name):
                setattr(module, name, ours)
    chunked.LigerFusedLinearJSDFunction = ChunkedJSD
    chunked_functional.liger_fused_linear_jsd = ChunkedJSD.apply


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / TESTS[0]).exists():
        print(f"usage: python -m tests.integrations.liger CHECKOUT, which has {TESTS[0]}", file=sys.stderr)
        return 2
    os.chdir(sys.argv[1])
    sys.path.insert(0, os.getcwd())
    replace()
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *TESTS, *sys.argv[2:]]))


if __name__ == "__main__":
    sys.exit(main())
