"""What the attention of every layer is told of one shared pass, and what the layers leave in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastsdpo.prefix.attention.windows import Window
from fastsdpo.prefix.plan import Plan

# By layer and number of the call: [1, G, tokens, E] and [1, G, tokens, F]. Attention of a model's own names its keys.
KeysValues = dict[Any, tuple[Tensor, ...]]


class Scoring(NamedTuple):
    """How a layer weighs keys.

    Attributes:
        window: which of the keys before it a query sees.
        scale: of the products of queries and keys.
        sinks: ``[H]``, each query has one more key with this score and the value 0.
        softcap: scores are ``softcap * tanh(score / softcap)``.
    """

    window: Window
    scale: float
    sinks: Tensor | None = None
    softcap: float | None = None

    @property
    def are_plain(self) -> bool:
        return self.sinks is None and self.softcap is None


class Kept(NamedTuple):
    """What the layers of one pass keep for the pass after it.

    Attributes:
        keys_values: of the attention layers.
        states: of the recurrent mixers (`fastsdpo.prefix.recurrent.MixerStates`).
    """

    keys_values: KeysValues
    states: dict[nn.Module, Any]


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
        windows: the sliding window of each layer in tokens, its chunk, or None.
        keep: the layers keep their keys and values, and their states, until `take_kept`.
        before: what the layers have kept of the tokens ``[0, first)``; needed where ``first > 0``.
        tables: what `cached` finds already (`fastsdpo.prefix.attention.tables`).
        ulysses: the processes among which the tokens are divided (`fastsdpo.prefix.ulysses.Ulysses`), or None.

    Attributes:
        runs: the plan's runs in ``[first, stop)``.
        calls: how often each layer has called the attention, by its index.
        mixers: the recurrent mixers that have run.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        first: int,
        stop: int,
        backend: str,
        windows: dict[int, Window],
        keep: bool = False,
        before: Kept | None = None,
        tables: dict[Any, Any] | None = None,
        ulysses: Any = None,
    ):
        self.plan = plan
        self.first, self.stop = first, stop
        self.backend = backend
        self.windows = windows
        self.ulysses = ulysses
        self.before = None if before is None else before.keys_values
        self.states_before: dict[nn.Module, Any] = {} if before is None else before.states
        self.kept: KeysValues | None = {} if keep else None
        self.states_kept: dict[nn.Module, Any] | None = {} if keep else None
        self.runs = [run for run in plan.runs if first <= run.start < stop]
        self.calls: Counter[int] = Counter()
        self.mixers: set[nn.Module] = set()
        self.own_implementation: str | None = None  # of the layer that is being called
        self._cache: dict[Any, Any] = dict(tables or {})

    def take_kept(self) -> Kept:
        """Hands over what the layers have kept; layers that run again in the backward pass keep nothing."""
        kept = Kept(self.kept or {}, self.states_kept or {})
        self.kept = self.states_kept = None
        return kept

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Masks and indices: the first layer that needs one makes it for all."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]
