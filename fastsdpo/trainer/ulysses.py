"""Training steps whose passes are divided among processes (``ulysses``): their group, rows, and what cannot be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.prefix import Ulysses, not_divisible
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.loss import TokenStatistics
from fastsdpo.trainer.sharing import PrefixSharing


def make_ulysses(args: SDPOConfig) -> Ulysses | None:
    """This process's group, of ``args.ulysses`` that follow each other; None: no division. All must call it."""
    if args.ulysses == 1:
        return None
    return Ulysses(torch.distributed.new_subgroups(group_size=args.ulysses)[0])


def check_divisible(model: nn.Module, args: SDPOConfig, sharing: PrefixSharing, size: int) -> None:
    """Raises NotImplementedError where the passes of this model cannot be divided among ``size`` processes."""
    reason = not_divisible(model, size)
    if sharing.one_pass:
        reason = "DeepSpeed's engine was not tried with it; use DDP or FSDP2"
    elif sharing.level == "off":
        reason = "passes are divided by the plan of their shared prefixes, and here none are shared (sharing='off')"
    elif getattr(args, "center_advantages", False):
        reason = "center_advantages needs all tokens of an answer in one process"
    if reason is not None:
        raise NotImplementedError(f"SDPOTrainer: ulysses={size} is not possible: {reason}")


def share_rows(
    ulysses: Ulysses, weights: Tensor, counts: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """This process's share of the weights, of which tokens count, and of the tensors among the options; ``[N]`` each.

    Shares are of one length; what fills them up counts nothing.
    """
    real = ulysses.is_row(len(counts))
    shared = {name: ulysses.share(value) if isinstance(value, Tensor) else value for name, value in options.items()}
    return ulysses.share(weights) * real.to(weights.device), ulysses.share(counts) & real.to(counts.device), shared


def whole_statistics(ulysses: Ulysses, share: TokenStatistics, counts: Tensor) -> TokenStatistics:
    """The statistics of a pack from the shares of all processes.

    Args:
        counts: ``[N]`` bool, of the pack.
    """
    per_token = ("per_token_loss", "log_ratio", "student_logps", "teacher_logps", "reference_kl")
    found = {name: getattr(share, name) for name in per_token}
    whole = {name: ulysses.whole(value, len(counts)) for name, value in found.items() if value is not None}
    counted = counts.to(share.counts.device)
    return share._replace(counts=counted, sequence_loss=ulysses.sum(share.sequence_loss), **whole)
