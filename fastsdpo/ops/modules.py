"""`torch.nn.Module` forms of the losses: options in the constructor, tensors in ``forward``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor, nn

from fastsdpo.ops.divergence import SDPOLossOutput, sdpo_loss
from fastsdpo.ops.linear import linear_sdpo_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TokenTensors(TypedDict, total=False):
    """The tensors of a call that have a value for each token, as of `sdpo_loss`."""

    weights: Tensor | None
    teacher_logps: Tensor | None
    teacher_topk: tuple[Tensor, Tensor] | None
    old_logps: Tensor | None
    ce_weights: Tensor | None


class LinearTensors(TokenTensors, total=False):
    """And the other tensors of `linear_sdpo_loss`."""

    bias: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None


class _Loss(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        for tensor in TokenTensors.__annotations__:
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
        **tensors: Unpack[TokenTensors],
    ) -> SDPOLossOutput:
        return sdpo_loss(student_logits, teacher_logits, target_ids, **tensors, **self.options)


class LinearSDPOLoss(_Loss):
    """`linear_sdpo_loss` as a module: the options are given once, the tensors in each call.

        loss_fn = LinearSDPOLoss(mode="full", alpha=1.0)
        out = loss_fn(student_hidden, teacher_hidden, lm_head.weight, target_ids, weights=weights)

    As `SDPOLoss`, with the options ``logit_scale``, ``chunk_size`` and ``tile_dtype`` beside those there.
    """

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor | None,
        weight: Tensor,
        target_ids: Tensor,
        **tensors: Unpack[LinearTensors],
    ) -> SDPOLossOutput:
        return linear_sdpo_loss(student_hidden, teacher_hidden, weight, target_ids, **tensors, **self.options)
