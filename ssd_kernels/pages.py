"""Large pages of memory for what is read from front to back, where the system offers them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch

__all__ = ["in_huge_pages", "zeros_in_huge_pages"]

HUGE = 2**21  # bytes; Linux's on x86-64, and on ARM with pages of 4 KB
ADVISE_HUGE_PAGES, COLLAPSE = 14, 25  # madvise(2); the second since Linux 6.1


def in_huge_pages(tensor: torch.Tensor) -> bool:
    """Ask Linux to move the memory of a contiguous tensor on the CPU into huge pages, where it is, without a change.

    A processor then looks up few addresses, and its prefetchers, which stop at the end of a page, seldom stop. It is
    done at once: the first time it takes as long as copying the tensor does.

    Returns:
        Whether the system did so for all whole huge pages of the tensor, of which there is at least one.
    """
    return _advise(tensor, ADVISE_HUGE_PAGES) and _advise(tensor, COLLAPSE)


def zeros_in_huge_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.zeros, on a CPU in huge pages as far as the system has them.

    Memory that is new gets them as zeros are written, which takes no longer; what the process has used before moves.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    _advise(tensor, ADVISE_HUGE_PAGES)
    tensor.zero_()
    in_huge_pages(tensor)
    return tensor


def _advise(tensor: torch.Tensor, advice: int) -> bool:
    """madvise(2) of the whole huge pages in a tensor; False where there are none, and where it is refused."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < HUGE:
        return False
    first = -(-tensor.data_ptr() // HUGE) * HUGE
    size = (tensor.data_ptr() + tensor.nbytes - first) // HUGE * HUGE
    if size <= 0:
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return bool(madvise(first, size, advice) == 0)
