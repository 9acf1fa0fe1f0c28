"""What the attention of every layer is told of one shared pass, and what the layers leave in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsdpo.prefix.plan import Plan

KeysValues = dict[int, tuple[Tensor, Tensor]]  # by layer: [1, G, tokens, E] and [1, G, tokens, F]


class SharedPass:
    """One pass over the packed tokens ``[first, stop)`` of a plan.

    It reaches the attention through the model's keyword arguments. Gradient checkpointing keeps these, so a
    layer that runs again in the backward pass finds the same object.

    It is not a dataclass on purpose: FSDP and DDP take dataclasses apart and rebuild them, and what the
    layers put into such a copy would be lost.

    Args:
        plan: which token attends to which.
        first, stop: the tokens of this pass.
        backend: a name of `BACKENDS` or "auto".
        windows: the sliding window of each layer in tokens, or None.
        keep: the layers keep their keys and values, until `take_keys_values`.
        before: the keys and values of the tokens ``[0, first)``; needed where ``first > 0``.
        tables: what `cached` finds already (`fastsdpo.prefix.attention.tables`).

    Attributes:
        runs: the plan's runs in ``[first, stop)``.
        layers: the indices of the layers that have called the attention.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        first: int,
        stop: int,
        backend: str,
        windows: dict[int, int | None],
        keep: bool = False,
        before: KeysValues | None = None,
        tables: dict[Any, Any] | None = None,
    ):
        self.plan = plan
        self.first, self.stop = first, stop
        self.backend = backend
        self.windows = windows
        self.before = before
        self.kept: KeysValues | None = {} if keep else None
        self.runs = [run for run in plan.runs if first <= run.start < stop]
        self.layers: set[int] = set()
        self.own_implementation: str | None = None  # of the layer that is being called
        self._cache: dict[Any, Any] = dict(tables or {})

    def take_keys_values(self) -> KeysValues:
        """Hands over what the layers have kept; layers that run again in the backward pass keep nothing."""
        kept, self.kept = self.kept, None
        return {} if kept is None else kept

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Masks and indices: the first layer that needs one makes it for all."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]
