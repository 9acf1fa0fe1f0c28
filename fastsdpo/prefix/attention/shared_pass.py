"""What the layers of one shared pass are told, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsdpo.prefix.plan import Plan


class SharedPass:
    """One forward pass over ``runs`` of a plan, and the keys and values it leaves or finds.

    Handed to the attention through the model's keyword arguments, so a layer that gradient
    checkpointing runs again in the backward pass finds it again. Not a dataclass, on purpose:
    wrappers such as FSDP and DDP take dataclasses apart and rebuild them, and what the layers
    put into a copy would be lost.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        first: int,
        stop: int,
        backend: str,
        windows: dict[int, int | None],
        keys_values: dict[int, tuple[Tensor, Tensor]],
        capture: bool,
    ):
        """Tokens ``[first, stop)`` of ``plan``; ``keys_values`` of ``[0, first)`` by layer.

        ``backend`` is a backend's name or "auto"; ``windows`` gives each layer's sliding window;
        while ``capture`` is true the layers put their keys and values into ``keys_values``.
        """
        self.plan = plan
        self.first, self.stop = first, stop
        self.backend = backend
        self.windows = windows
        self.keys_values = keys_values
        self.capture = capture
        self.runs = [run for run in plan.runs if first <= run.start < stop]
        self.layers: set[int] = set()
        # Masks and indices, made by the first layer that needs them.
        self.cache: dict[Any, Any] = {}

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]
