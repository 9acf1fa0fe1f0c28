"""What one step computes: packs of interactions, the passes of teacher and student, the loss.

Offline training, online training and chat take their steps with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import ForwardSession, ResponseStates, head_parameters
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.loss import TokenStatistics, count_items, sdpo_step_loss, token_weights
from fastsdpo.trainer.packs import Item
from fastsdpo.trainer.sharing import PrefixSharing
from fastsdpo.trainer.teachers import Ahead, PackPasses, make_teachers


class Learner:
    """A model's teacher, its way of sharing prefixes, and the loss of a pack.

    Args:
        model: the model, not wrapped yet.
        unwrapped: gives the model without a wrapper at any time.
        sharded: as `make_teachers`.

    Raises:
        NotImplementedError: see `make_teachers`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SDPOConfig,
        sharing: PrefixSharing,
        *,
        unwrapped: Callable[[], Any],
        sharded: Literal["fsdp2", "zero3"] | None,
    ):
        self.args, self.sharing = args, sharing
        self.teacher, self.initial, self.copies = make_teachers(args, model, unwrapped, sharded)

    def count(self, interactions: Sequence[TokenizedInteraction]) -> int:
        """S (answers that count) or N (tokens that count), by which the loss is divided."""
        lengths = [len(item.completion_ids) for item in interactions]
        return count_items(lengths, self.args.normalization, self.args.ignore_first_k)

    def packs(self, interactions: Sequence[Item]) -> list[list[Item]]:
        """A micro-batch in packs of at most ``max_tokens_per_pack`` tokens."""
        return self.sharing.packs(interactions)

    def run_pass(
        self,
        model: nn.Module,
        pack: Sequence[TokenizedInteraction],
        num_items: int | float | Tensor,
        **options: Any,
    ) -> tuple[Tensor, TokenStatistics]:
        """Loss and statistics of one pack.

        Args:
            model: as it is wrapped for training.
            num_items: S or N of the global batch (see `fastsdpo.trainer.loss`).
            options: further arguments of `sdpo_step_loss`.
        """
        args = self.args
        passes = PackPasses(model, self.sharing.of(pack), args.attention)
        lengths = [len(item.completion_ids) for item in pack]
        weights, counts = token_weights(lengths, args.normalization, args.ignore_first_k, num_items)
        weights, counts = weights.to(args.device), counts.to(args.device)

        # Before the student's pass, whose activations stay in memory until the backward pass.
        initial = None if self.initial is None else self.initial.states(passes, pack)
        ahead = Ahead(initial, self.teacher.unguided(passes, pack))

        def loss_fn(session: ForwardSession) -> tuple[Tensor, TokenStatistics]:
            # All heads are taken here, inside the head's own forward pass, where FSDP has gathered it.
            student, head = session.student(), head_parameters(model)
            teacher = self.teacher.states(model, session, head, ahead)
            reference = reference_head = None
            if args.needs_reference:
                assert self.initial is not None and initial is not None
                reference, reference_head = initial.student_hidden, self.initial.head(model)
            return sdpo_step_loss(
                ResponseStates(student, teacher.hidden, *session.labels),
                head,
                weights=weights,
                counts=counts,
                sequences=len(pack),
                teacher_head=teacher.head,
                reference_hidden=reference,
                reference_head=reference_head,
                reference_kl=args.reference_kl,
                **options,
                **self.loss_options(),
            )

        loss, statistics = passes.student(pack, self.teacher.context, loss_fn)
        return loss, statistics._replace(computed_tokens=passes.tokens)

    def loss_options(self) -> dict[str, Any]:
        """Those arguments of `linear_sdpo_loss` that the settings give."""
        names = ("mode", "alpha", "topk", "add_tail", "temperature", "chunk_size", "backend")
        return {name: getattr(self.args, name) for name in names}

    def after_step(self) -> None:
        """The moving average follows the student; once after each optimizer step."""
        if "ema" in self.copies:
            self.copies["ema"].update(self.args.ema_rate)
