"""Tensors without memory (device ``meta``): how many bytes they would take, and what for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastsdpo.prefix.attention import ShapeAttention


class Meter(TorchDispatchMode):
    """Counts the storages that are alive, and remembers the largest sum.

    Args:
        granule: sizes are rounded up to a multiple of it, as an allocator does.
        vocabulary: what has an axis of this size, or a few columns more, is the loss's.

    Attributes:
        live: bytes by purpose.
        peak: the most bytes at once; `at_peak`: them by purpose.
        purpose: of what is allocated next.
    """

    def __init__(self, granule: int, vocabulary: int):
        super().__init__()
        self.granule, self.vocabulary = granule, vocabulary
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.purpose = "activations"
        self._known: dict[int, tuple[Any, str, int]] = {}  # by storage: a reference to it, purpose, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # is this sequence unpadded, is it one? What trains here is
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.is_meta:
                self.see(value)
        return out

    def see(self, tensor: Tensor, purpose: str | None = None, *, share: float = 1.0) -> None:
        """Counts a tensor's storage from here on, or says what it is for.

        Args:
            purpose: None: the present one, for a storage that is not counted yet.
            share: the part of it that this process holds.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            if purpose is not None:
                reference, before, size = self._known[key]
                self._known[key] = reference, purpose, size
                self.live[before] -= size
                self.live[purpose] += size
            return
        size = int(-(-storage.nbytes() * share // self.granule)) * self.granule
        if purpose is None:
            wide = any(0 <= width - self.vocabulary < 64 for width in tensor.shape)
            purpose = "loss" if wide and self.purpose == "activations" else self.purpose
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), purpose, size
        self.add(purpose, size)

    def _forget(self, key: int) -> None:
        _, purpose, size = self._known.pop(key)
        self.remove(purpose, size)

    def add(self, purpose: str, size: int) -> None:
        """Bytes that no tensor stands for: of the processes' communication."""
        self.live[purpose] += size
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            self.at_peak = {name: value for name, value in self.live.items() if value}

    def remove(self, purpose: str, size: int) -> None:
        self.live[purpose] -= size
        self.total -= size

    @contextmanager
    def allocating(self, purpose: str) -> Iterator[None]:
        before, self.purpose = self.purpose, purpose
        try:
            yield
        finally:
            self.purpose = before


_MATRIX_PRODUCTS = {
    F.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}


class FusedOperators(TorchFunctionMode):
    """What a device does that tensors without memory do otherwise: fused attention, and autocast.

    Args:
        autocast: matrix products are in this dtype; weights are cast once in a forward pass, as torch does.
    """

    def __init__(self, autocast: torch.dtype | None):
        super().__init__()
        self.autocast = autocast
        self.keep = True
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return ShapeAttention.apply(*args[:3])
        if self.autocast is not None and func in _MATRIX_PRODUCTS and not kwargs.keys() & {"out", "out_dtype"}:
            args = tuple(self._lower(a) if isinstance(a, Tensor) else a for a in args)
        return func(*args, **kwargs)

    def forward_ends(self) -> None:
        """What autocast keeps is freed; layers that run again in the backward pass cast their weights anew."""
        self._cast.clear()
        self.keep = False

    def forward_begins(self) -> None:
        self.keep = True

    def _lower(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32 or not tensor.is_meta:
            return tensor
        kept = self.keep and tensor.requires_grad and tensor.is_leaf
        if kept and id(tensor) in self._cast:
            return self._cast[id(tensor)][1]
        with torch.enable_grad():
            lower = tensor.to(self.autocast)
        if kept:
            self._cast[id(tensor)] = tensor, lower
        return lower
