"""`torch.nn.Module` forms of the losses: options in the constructor, tensors in ``forward``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastsdpo.ops.divergence import SDPOLossOutput, sdpo_loss
from fastsdpo.ops.linear import linear_sdpo_loss

_TOKEN_TENSORS = ("weights", "teacher_logps", "teacher_topk", "old_logps", "ce_weights")


class _Loss(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        for tensor in _TOKEN_TENSORS:
            if tensor in options:
                raise TypeError(
                    f"{type(self).__name__}: {tensor} must be passed to forward, got it in the constructor"
                )
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SDPOLoss(_Loss):
    """`sdpo_loss` as a module: the options are given once, the tensors in each call.

        loss_fn = SDPOLoss(mode="full", alpha=1.0)
        out = loss_fn(student_logits, teacher_logits, target_ids, weights=weights)

    Args:
        options: the keyword arguments of `sdpo_loss` that are not tensors (``mode``, ``alpha``,
            ``topk``, ``add_tail``, ``is_clip``, ``ce_temperature``, ``vocab_size``, ``temperature``, ``softcap``,
            ``ignore_index``, ``inplace_grad``, ``backend``).

    Returns (of a call):
        `SDPOLossOutput`.

    Raises:
        TypeError: a tensor was given to the constructor. A call raises what `sdpo_loss` does.
    """

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target_ids: Tensor,
        *,
        weights: Tensor | None = None,
        teacher_logps: Tensor | None = None,
        teacher_topk: tuple[Tensor, Tensor] | None = None,
        old_logps: Tensor | None = None,
        ce_weights: Tensor | None = None,
    ) -> SDPOLossOutput:
        return sdpo_loss(
            student_logits,
            teacher_logits,
            target_ids,
            weights=weights,
            teacher_logps=teacher_logps,
            teacher_topk=teacher_topk,
            old_logps=old_logps,
            ce_weights=ce_weights,
            **self.options,
        )


class LinearSDPOLoss(_Loss):
    """`linear_sdpo_loss` as a module: the options are given once, the tensors in each call.

        loss_fn = LinearSDPOLoss(mode="full", alpha=1.0)
        out = loss_fn(student_hidden, teacher_hidden, lm_head.weight, target_ids, weights=weights)

    Args:
        options: the keyword arguments of `linear_sdpo_loss` that are not tensors (those of `SDPOLoss`, and
            ``logit_scale``, ``chunk_size``, ``tile_dtype``).

    Returns (of a call):
        `SDPOLossOutput`.

    Raises:
        TypeError: a tensor was given to the constructor. A call raises what `linear_sdpo_loss` does.
    """

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor | None,
        weight: Tensor,
        target_ids: Tensor,
        *,
        bias: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        weights: Tensor | None = None,
        teacher_logps: Tensor | None = None,
        teacher_topk: tuple[Tensor, Tensor] | None = None,
        old_logps: Tensor | None = None,
        ce_weights: Tensor | None = None,
    ) -> SDPOLossOutput:
        return linear_sdpo_loss(
            student_hidden,
            teacher_hidden,
            weight,
            target_ids,
            bias=bias,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            weights=weights,
            teacher_logps=teacher_logps,
            teacher_topk=teacher_topk,
            old_logps=old_logps,
            ce_weights=ce_weights,
            **self.options,
        )
