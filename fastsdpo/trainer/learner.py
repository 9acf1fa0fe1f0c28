"""What one step computes: packs of interactions, the passes of teacher and student, the loss.

Offline training, online training and chat take their steps with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import ForwardSession, ResponseStates, Ulysses, causal_lm, head_parameters, model_device
from fastsdpo.prefix.attention import attention_windows
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.loss import TokenStatistics, count_items, sdpo_step_loss, weigh
from fastsdpo.trainer.packs import Item, PackMaker, ReadyPack
from fastsdpo.trainer.sharing import PrefixSharing
from fastsdpo.trainer.teachers import Ahead, PackPasses, make_teachers
from fastsdpo.trainer.ulysses import check_divisible, share_rows, whole_statistics


class Learner:
    """A model's teacher, its way of sharing prefixes, and the loss of a pack.

    Args:
        model: the model, not wrapped yet.
        unwrapped: gives the model without a wrapper at any time.
        sharded: as `make_teachers`.
        ulysses: the processes among which the passes of a training step are divided, or None.

    Raises:
        NotImplementedError: see `make_teachers`; or the passes cannot be divided.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SDPOConfig,
        sharing: PrefixSharing,
        *,
        unwrapped: Callable[[], Any],
        sharded: Literal["fsdp2", "zero3"] | None,
        ulysses: Ulysses | None = None,
    ):
        self.args, self.sharing, self.sharded, self.ulysses = args, sharing, sharded, ulysses
        if ulysses is not None:
            check_divisible(model, args, sharing, ulysses.size)
        self.teacher, self.initial, self.copies = make_teachers(args, model, unwrapped, sharded)
        windows = {} if sharing.level == "off" else attention_windows(causal_lm(model).config.get_text_config())
        self.maker = PackMaker(
            sharing.packs,
            sharing.level,
            sharing.longest,
            self.teacher.context is None,
            sharing.backend(args.device),
            tuple(dict.fromkeys(windows.values())),
            args.normalization,
            args.ignore_first_k,
        )

    def count(self, interactions: Sequence[TokenizedInteraction]) -> int:
        """S (answers that count) or N (tokens that count), by which the loss is divided."""
        lengths = [len(item.completion_ids) for item in interactions]
        return count_items(lengths, self.args.normalization, self.args.ignore_first_k)

    def packs(self, interactions: Sequence[Item]) -> list[list[Item]]:
        """A micro-batch in packs of at most ``max_tokens_per_pack`` tokens."""
        return self.sharing.packs(interactions)

    def ready(self, batch: dict[str, Any], device: torch.device) -> list[ReadyPack]:
        """The packs of a micro-batch on a device: those that the data loader has made, or made here."""
        if "packs" not in batch:
            batch["packs"] = self.maker.packs(batch["interactions"])
        batch["packs"] = [pack.to(device) for pack in batch["packs"]]
        return batch["packs"]

    def run_pass(
        self,
        model: nn.Module,
        pack: Sequence[TokenizedInteraction],
        num_items: int | float | Tensor,
        *,
        divided: bool = False,
        **options: Any,
    ) -> tuple[Tensor, TokenStatistics]:
        """Loss and statistics of one pack.

        Between the student's pass and the teacher's, nothing is copied to the device and nothing waits for it.

        Args:
            model: as it is wrapped for training.
            pack: a `ReadyPack`; of other interactions one is made.
            num_items: S or N of the global batch (see `fastsdpo.trainer.loss`).
            divided: among the processes of ``ulysses``, where there are any: the loss is then this process's share
                of it, and the statistics the whole pack's.
            options: further arguments of `sdpo_step_loss`.
        """
        args, ulysses = self.args, self.ulysses if divided else None
        self.sharing.of(pack)  # says where it is another one
        ready = pack if isinstance(pack, ReadyPack) else self.maker.pack(pack)
        content = ready.to(model_device(model)).content
        passes = PackPasses(model, content.passes.sharing, self.sharing.attention, ulysses)
        weights, counts = weigh(content.shares, num_items), content.counts
        if ulysses is not None:
            weights, counts, options = share_rows(ulysses, weights, counts, options)

        # Before the student's pass, whose activations stay in memory until the backward pass.
        initial = None if self.initial is None else self.initial.states(passes, pack)
        ahead = Ahead(initial, self.teacher.unguided(passes, pack))

        def loss_fn(session: ForwardSession) -> tuple[Tensor, TokenStatistics]:
            # All heads are taken here, inside the head's own forward pass, where FSDP has gathered it.
            student, head = session.student(), head_parameters(model)
            teacher = self.teacher.states(model, session, head, ahead)
            reference = None
            if args.needs_reference:
                assert self.initial is not None and initial is not None
                reference = initial.student_hidden, self.initial.head(model)
            return sdpo_step_loss(
                ResponseStates(student, teacher.hidden, *session.labels),
                head,
                weights=weights,
                counts=counts,
                sequences=len(pack),
                teacher_head=teacher.head,
                reference=reference,
                reference_kl=args.reference_kl,
                **options,
                **self.loss_options(),
            )

        loss, statistics = passes.student(pack, self.teacher.context, loss_fn, content.passes)
        trained = content.passes.student_tokens if torch.is_grad_enabled() else 0
        if ulysses is None:
            return loss, statistics._replace(computed_tokens=passes.tokens, trained_tokens=trained)
        computed, trained = (-(-tokens // ulysses.size) for tokens in (passes.tokens, trained))
        whole = whole_statistics(ulysses, statistics, content.counts)
        return loss, whole._replace(computed_tokens=computed, trained_tokens=trained)

    def loss_options(self) -> dict[str, Any]:
        """Those arguments of `linear_sdpo_loss` that the settings give."""
        names = ("mode", "alpha", "topk", "add_tail", "temperature", "chunk_size", "backend")
        return {name: getattr(self.args, name) for name in names}

    def after_step(self) -> None:
        """The moving average follows the student; once after each optimizer step."""
        if "ema" in self.copies:
            self.copies["ema"].update(self.args.ema_rate)
