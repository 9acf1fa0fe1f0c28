"""Liger's functions with fastsdpo's losses in them, and Liger's own tests over these.

    python -m tests.integrations.liger CHECKOUT [pytest's arguments]

CHECKOUT is a clone of https://github.com/linkedin/Liger-Kernel at the version that is installed. Liger's tests of the
fused linear JSD, the fused linear KL divergence (where it has them) and the chunked JSD loss then run over our losses.
Its tests of the JSD and KL divergence of log-probs are left out: their gradient is one in log-probs, ours in logits.
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
    "test/transformers/test_fused_linear_kl_div.py",
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


class FusedLinearKLDiv:
    """``LigerFusedLinearKLDivFunction``: probabilities of the teacher beside the student's hidden states."""

    @staticmethod
    def apply(student, weight, target, labels=None, reduction="batchmean", ignore_index=-100, temperature=1.0, *rest):
        if reduction == "none":
            pytest.skip("one number for each token and vocabulary entry")
        ids, share = counted(labels, student, ignore_index)
        share = torch.ones(()) if reduction == "sum" else share / (len(weight) if reduction == "mean" else 1)
        options = {"mode": "full", "alpha": 0.0, "weights": share.expand(len(ids)), "backend": BACKEND}
        # The temperature is the student's alone: the teacher's are probabilities already.
        states, logits = student / temperature, target.log()
        return fastsdpo.linear_sdpo_loss(states, None, weight, ids, teacher_logits=logits, **options).loss


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
    import liger_kernel.transformers.fused_linear_kl_div as kl_div

    names = {"LigerFusedLinearJSDFunction": FusedLinearJSD, "LigerFusedLinearKLDivFunction": FusedLinearKLDiv}
    for module in (ops, functional, fused, kl_div):
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
    there = [test for test in TESTS if Path(test).exists()]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *there, *sys.argv[2:]]))


if __name__ == "__main__":
    sys.exit(main())
