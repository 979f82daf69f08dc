"""Large pages of memory for what is read from front to back, where the system offers them."""

from __future__ import annotations

import ctypes
import sys

import torch

__all__ = ["in_huge_pages"]

HUGE = 2**21  # bytes; Linux's on x86-64, and on ARM with pages of 4 KB
ADVISE_HUGE_PAGES, COLLAPSE = 14, 25  # madvise(2); the second since Linux 6.1


def in_huge_pages(tensor: torch.Tensor) -> bool:
    """Ask Linux to move the memory of a contiguous tensor on the CPU into huge pages, where it is, without a change.

    A processor then looks up few addresses, and its prefetchers, which stop at the end of a page, seldom stop. It is
    done at once: the first time it takes as long as copying the tensor does.

    Returns:
        Whether the system did so for all whole huge pages of the tensor, of which there is at least one.
    """
    first = -(-tensor.data_ptr() // HUGE) * HUGE
    size = (tensor.data_ptr() + tensor.nbytes - first) // HUGE * HUGE
    if sys.platform != "linux" or size <= 0:
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return all(madvise(first, size, advice) == 0 for advice in (ADVISE_HUGE_PAGES, COLLAPSE))
