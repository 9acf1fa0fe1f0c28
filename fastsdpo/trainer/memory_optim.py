"""The memory of an optimizer from shapes: its states, and what its step needs for a moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.optim import ADAMW, TORCHAO, AdamWBF16, choose_update

BLOCK = 256  # values of an 8-bit state that have one scale
SMALLEST = 4096  # values of the smallest weight whose states have 8 bits


class ShapeOptimizer:
    """States and temporaries of an optimizer whose own step cannot run without memory.

    Args:
        states: bytes of a weight's states.
        passing: bytes that the step of one weight takes for a moment.
        together: all weights' steps are one, so that what they take for a moment adds up.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        states: Callable[[Tensor], int],
        passing: Callable[[Tensor], int],
        *,
        together: bool = False,
    ):
        self.parameters, self.states, self.passing, self.together = list(parameters), states, passing, together
        self.state: dict[nn.Parameter, dict[str, Any]] = {}

    def step(self) -> None:
        moment = []
        for parameter in self.parameters:
            if parameter not in self.state:
                self.state[parameter] = {"states": _bytes(self.states(parameter))}
            moment.append(_bytes(self.passing(parameter)))
            if not self.together:
                moment.clear()


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


def make_shape_optimizer(
    args: SDPOConfig,
    parameters: Sequence[nn.Parameter],
    kind: str,
    embeddings: frozenset[nn.Parameter],
    dtypes: set[torch.dtype],
) -> AdamWBF16 | ShapeOptimizer:
    """The optimizer of the settings for weights without memory.

    Args:
        kind: the type of device that it would run on.
        dtypes: of the model's trained weights, by which the optimizer is chosen.
        embeddings: weights whose states bitsandbytes keeps in float32, since transformers asks for it.

    Raises:
        NotImplementedError: what this optimizer keeps is not known here.
        ValueError: as `choose_update`.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    update = choose_update(args.weight_update, optim, dtypes)
    if optim in ADAMW and update != "plain":
        return AdamWBF16(parameters, rounding=update)
    if optim == "adamw_torch_fused":
        return ShapeOptimizer(parameters, lambda p: 2 * p.nbytes, lambda p: 0)
    if optim == "adamw_torch":
        foreach = kind != "cpu"
        return ShapeOptimizer(
            parameters, lambda p: 2 * p.nbytes, lambda p: (1 if foreach else 2) * p.nbytes, together=foreach
        )
    if optim in TORCHAO:
        bits, block = (8, 256) if optim == "adamw_torch_8bit" else (4, 128)

        def packed(p: Tensor) -> int:
            if p.numel() < SMALLEST or p.numel() % block:
                return 2 * p.nbytes
            return 2 * (p.numel() * bits // 8 + 4 * p.numel() // block)

        # Its compiled step works in float32: the weight and two states.
        return ShapeOptimizer(parameters, packed, lambda p: 12 * p.numel())
    if optim == "sgd":
        return ShapeOptimizer(parameters, lambda p: 0, lambda p: 0)
    if optim == "adafactor":
        return ShapeOptimizer(
            parameters, lambda p: 4 * (p.numel() if p.dim() < 2 else sum(p.shape)), lambda p: 12 * p.numel()
        )
    words = optim.removeprefix("paged_").split("_")
    if words[0] in ("adamw", "lion", "rmsprop") and (words[-1] in ("8bit", "32bit") or "bnb" in words):
        count = 2 if words[0] == "adamw" else 1
        small = words[-1] == "8bit"

        def quantized(p: Tensor) -> int:
            if not small or p.numel() < SMALLEST or p in embeddings:
                return 4 * count * p.numel()
            return count * (p.numel() + 4 * p.numel() // BLOCK)

        return ShapeOptimizer(parameters, quantized, lambda p: 0)
    raise NotImplementedError(f"no forecast for optim={optim!r}: what it keeps is not known")
