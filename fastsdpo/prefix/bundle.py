"""Objects that hold many small tensors, moved between processes and devices as one buffer."""

from __future__ import annotations

import io
import pickle
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNED = 16  # bytes


class _Place(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Bundle:
    """An object and its tensors, which lie in one buffer: one copy takes them all to a device.

    Args:
        value: anything that can be pickled, with tensors on the CPU.
    """

    def __init__(self, value: Any):
        stream, parts, places, end = io.BytesIO(), [], [], 0

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> int | None:
                nonlocal end
                if not isinstance(obj, Tensor):
                    return None
                places.append(_Place(end, tuple(obj.shape), obj.dtype))
                raw = obj.detach().contiguous().view(-1).view(torch.uint8)
                parts.append(raw)
                gap = -raw.numel() % ALIGNED
                if gap:
                    parts.append(torch.zeros(gap, dtype=torch.uint8))
                end += raw.numel() + gap
                return len(places) - 1

        Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
        self.frame, self.places = stream.getvalue(), places
        self.buffer = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)

    def pin_memory(self) -> Bundle:
        return self._with(self.buffer.pin_memory())

    def to(self, device: torch.device | str | int) -> Bundle:
        """On another device, without waiting for the copy; this bundle where it is there already."""
        buffer = self.buffer.to(device, non_blocking=True)
        return self if buffer is self.buffer else self._with(buffer)

    def _with(self, buffer: Tensor) -> Bundle:
        moved = object.__new__(Bundle)
        moved.frame, moved.places, moved.buffer = self.frame, self.places, buffer
        return moved

    def open(self) -> Any:
        """The object; its tensors are views of the buffer, where that is."""
        buffer, places = self.buffer, self.places

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: int) -> Tensor:
                start, shape, dtype = places[pid]
                size = torch.Size(shape).numel() * dtype.itemsize
                return buffer[start : start + size].view(dtype).view(shape)

        return Unpickler(io.BytesIO(self.frame)).load()
