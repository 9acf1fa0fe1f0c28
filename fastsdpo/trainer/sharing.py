"""Which prefixes a run computes once, and the packs of interactions that follow from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import check_sharing, model_device, sharing_limit
from fastsdpo.prefix.attention import BackendError, automatic_backends
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.model import PositionTable, position_table
from fastsdpo.trainer.packs import Item, longest_sequence, pack_sharing, split_packs
from fastsdpo.trainer.processes import agreed

logger = logging.getLogger("fastsdpo.trainer")


class PrefixSharing:
    """The sharing of a run: as `SDPOConfig.sharing` asks for, or as the model allows.

    Args:
        noisy: a module that is noisy in training mode, or None.
        datasets: what is trained on and held out; a sharing asked for by name must fit all of it.
        one_pass: a micro-batch is one pack, whatever its size (DeepSpeed).
        in_step: the processes gather weights in each pass (FSDP, ZeRO-3), and have to make equally many.
        around: the context in which the model trains (autocast), for the check.

    Attributes:
        level: "conversation", "interaction" or "off".
        attention: the backend of the shared attention: the one asked for; "auto", or where what that stands for
            does not work here, the first that does.
        longest: sequences of more tokens are not shared; None: all are.

    Raises:
        NotImplementedError: the sharing asked for by name is not possible; or ZeRO-3 in several processes would
            have to run sequences alone.
        ValueError: a sequence is longer than the model's table of positions.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SDPOConfig,
        noisy: str | None,
        datasets: Iterable[Any],
        *,
        one_pass: bool,
        in_step: bool = False,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        datasets = [dataset for dataset in datasets if dataset is not None]
        known = [dataset for dataset in datasets if isinstance(dataset, InteractionDataset)]
        self.positions = position_table(model)
        for dataset in known:
            if self.positions is not None and len(dataset):
                _check_positions(self.positions, dataset.longest())
        self.max_tokens = None if one_pass else args.max_tokens_per_pack
        self.one_pass = one_pass
        self.level, self.attention = _choose(
            model, args, noisy, around, _longest(args, known if len(known) == len(datasets) else [])
        )
        # Without sharing each sequence is a pass: one interaction a pack makes equally many in all processes.
        self.alone = in_step and self.level == "off"
        if self.alone and one_pass and args.world_size > 1:
            raise NotImplementedError(
                "SDPOTrainer: sharing='off' is not possible under DeepSpeed ZeRO-3 with several processes, which "
                "would run the model unequally often and wait for each other; use FSDP2 or ZeRO-2"
            )
        self.limit = None if self.level == "off" else sharing_limit(model)
        self.longest = None if self.limit is None else self.limit.positions
        self.reason = (
            None
            if self.limit is None
            else (
                f"interactions with a sequence of more than {self.limit.positions} tokens run alone, and "
                f"their prefixes are not shared: the model's {self.limit.change} there"
            )
        )
        self.asked = None if args.sharing == "auto" else args.sharing
        self.all_alike = one_pass and in_step and args.world_size > 1
        for dataset in known:
            self.check(dataset)

    def check(self, dataset: InteractionDataset) -> None:
        """What the constructor finds out about its datasets, of one that comes later (a stream's).

        Raises:
            NotImplementedError, ValueError: as there.
        """
        if self.positions is not None and len(dataset):
            _check_positions(self.positions, dataset.longest())
        longer = 0 if self.limit is None else int((dataset.longest() > self.limit.positions).sum())
        if longer and self.all_alike:
            raise NotImplementedError(
                f"SDPOTrainer: {longer:,} of {len(dataset):,} interactions would run alone ({self.limit}), which "
                "is not possible under DeepSpeed ZeRO-3 with several processes; use FSDP2 or ZeRO-2, or a lower "
                "max_prompt_length (max_completion_length)"
            )
        if longer and self.asked is not None:
            raise NotImplementedError(
                f"SDPOTrainer: sharing={self.asked!r} is not possible for {longer:,} of "
                f"{len(dataset):,} interactions: {self.limit}; set sharing='auto', which shares the "
                "prefixes of the others, or a lower max_prompt_length (max_completion_length)"
            )

    def backend(self, device: torch.device) -> str:
        """The backend's name on a device: what "auto" stands for there."""
        return automatic_backends(device)[0] if self.attention == "auto" else self.attention

    def of(self, pack: Sequence[TokenizedInteraction]) -> Any:
        """The sharing of a pack: "off" where a sequence is too long to be shared."""
        level = pack_sharing(pack, self.level, self.longest)
        if level != self.level and self.reason is not None:
            logger.warning("%s", self.reason)
            self.reason = None  # once is enough
        return level

    def packs(self, interactions: Sequence[Item]) -> list[list[Item]]:
        """A micro-batch in packs; each is one forward pass of the student and one of the teacher.

        Raises:
            ValueError: a sequence is longer than the model's table of positions.
        """
        if self.positions is not None and interactions:
            _check_positions(self.positions, torch.tensor([longest_sequence(item) for item in interactions]))
        if self.alone and not self.one_pass:
            return [[item] for item in interactions]
        return split_packs(interactions, self.max_tokens, self.level, None if self.one_pass else self.longest)


def _check_positions(table: PositionTable, lengths: Tensor) -> None:
    longer = int((lengths > table.positions).sum())
    if longer:
        raise ValueError(
            f"SDPOTrainer: sequences must have at most {table.positions:,} tokens, as the model's table of positions "
            f"({table.name}), but {longer:,} of {len(lengths):,} interactions have up to {int(lengths.max()):,}; "
            "set a lower max_prompt_length (max_followup_length, max_completion_length): the longest sequence is the "
            "history, the follow-up and the answer together"
        )


def _longest(args: SDPOConfig, datasets: Sequence[InteractionDataset]) -> int:
    """Tokens of the longest sequence that is trained, as the data or the settings say."""
    if datasets and all(map(len, datasets)):
        return max(int(dataset.longest().max()) for dataset in datasets)
    lengths = (args.max_prompt_length, args.max_followup_length, args.max_completion_length)
    return sum(2048 if length is None else length for length in lengths)


def _choose(
    model: nn.Module, args: SDPOConfig, noisy: str | None, around: Callable[[], AbstractContextManager], longest: int
) -> tuple[str, str]:
    """The level of the sharing and the backend of the attention."""
    if args.sharing == "off":
        return "off", args.attention
    device = model_device(model)
    named = args.attention != "auto" or device.type == "meta"
    backends = (args.attention,) if named else automatic_backends(device)
    good, reason, backend = False, "", backends[0]
    for backend in backends:
        good, reason = agreed(_check(model, backend, around, named, longest))
        if good or backend == backends[-1]:
            break
        following = backends[backends.index(backend) + 1]
        if reason:
            logger.warning("attention backend %r does not work here, %r is tried next: %s", backend, following, reason)
    if noisy is not None:
        good, reason = False, f"branches would share the noise of {noisy} in training mode"
    if not named and backend == backends[0]:
        backend = "auto"
    if good:
        return "conversation" if args.sharing == "auto" else args.sharing, backend
    if args.sharing != "auto":
        raise NotImplementedError(f"SDPOTrainer: sharing={args.sharing!r} is not possible: {reason}")
    logger.warning("prefixes are not shared (sharing='off'): %s", reason)
    return "off", backend


def _check(
    model: nn.Module, backend: str, around: Callable[[], AbstractContextManager], named: bool, longest: int
) -> tuple[bool, str]:
    """`check_sharing` as the model trains; any failure of a backend that nobody asked for is a reason."""
    try:
        with around():
            return check_sharing(model, attention=backend, longest=longest)
    except BackendError as error:
        if named:
            raise
        logger.info("%s", error)
        return False, ""  # not for this device or dtype
    except Exception as error:  # compilers and kernels fail in many ways, when they run first
        if named:
            raise
        first = (str(error).strip().splitlines() or ["without a message"])[0]
        return False, f"{type(error).__name__}: {first[:300]}"
