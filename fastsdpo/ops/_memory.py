"""Large buffers on a CPU: logit tiles kept from call to call, huge pages.

The system takes back an allocation of this size when it is freed, and maps a new one page by page when it
is first used. That is most of the time that a loss from hidden states takes beside its GEMMs. On a GPU,
PyTorch's caching allocator avoids it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsdpo.ops._operators import is_real

_kept: list[torch.UntypedStorage] = []  # at most one, not in use
_LARGEST_KEPT = 2**29  # bytes; two float32 tiles of 256 tokens and 262,144 words
_HUGE = 2**21  # bytes of a huge page


# What tensors without memory stand for, the innermost `meta_stands_for` last.
_stand_for: list[tuple[str, torch.dtype | None]] = [("cuda", None)]


def kind_of(device: torch.device) -> str:
    """The type of a device; of ``meta`` that which its tensors stand for: a GPU, or as `meta_stands_for` says."""
    return _stand_for[-1][0] if device.type == "meta" else device.type


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast where it is on; for ``meta``, which has none, as `meta_stands_for` says."""
    if device.type == "meta":
        return _stand_for[-1][1]
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextmanager
def meta_stands_for(kind: str, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Losses of tensors without memory allocate what those on a device of type ``kind`` would."""
    kept = _kept[:]
    _kept.clear()
    _stand_for.append((kind, autocast))
    try:
        yield
    finally:
        _stand_for.pop()
        _kept[:] = kept


def _on_cpu(tensor: Tensor) -> bool:
    return kind_of(tensor.device) == "cpu" and is_real(tensor)


def _advise_huge_pages(tensor: Tensor) -> Tensor:
    """Asks Linux for huge pages under a new tensor and returns the tensor; Linux may ignore the advice.

    Only for memory that is kept: for tensors that are freed each time (the head's gradient) it saved no time.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    size = tensor.numel() * tensor.element_size()
    if advice is not None and size >= 2 * _HUGE and _on_cpu(tensor) and not tensor.is_meta:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))
    return tensor


def _stride(vocabulary: int) -> int:
    """Elements from row to row: a multiple of 64 (see `ops.head`)."""
    return -(-vocabulary // 64) * 64


def padded(like: Tensor, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized ``(rows, vocabulary)`` whose rows begin at multiples of 64 elements."""
    return like.new_empty(rows, _stride(vocabulary), dtype=dtype)[:, :vocabulary]


def borrow_tiles(like: Tensor, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """`padded` tiles for one call; on a CPU in the memory of the last call's tiles, if that is large enough."""
    if _on_cpu(like):
        try:
            storage = _kept.pop()  # atomic: no other thread can get it
        except IndexError:
            pass
        else:
            stride = _stride(vocabulary)
            if storage.nbytes() >= rows * stride * dtype.itemsize:
                return like.new_empty(0, dtype=dtype).set_(storage, 0, (rows, vocabulary), (stride, 1))
            del storage  # free it before a larger one is allocated
    return _advise_huge_pages(padded(like, rows, vocabulary, dtype))


def return_tiles(tiles: Tensor) -> None:
    """Keeps the memory of a finished call's tiles; that of a call that raised is freed as usual."""
    if _on_cpu(tiles):
        storage = tiles.untyped_storage()
        if storage.nbytes() <= _LARGEST_KEPT:
            _kept.append(storage)
            del _kept[1:]


def release_tiles() -> None:
    """Frees the CPU memory that the losses from hidden states keep for their next call."""
    _kept.clear()
