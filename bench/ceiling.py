"""What memory gives at best: reading loops of our own in the instruction set in use, torch's sum, a copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from ssd_kernels import native
from ssd_kernels.pages import zeros_in_huge_pages

from .contender import copies_of, fill, part_of
from .timing import Timing, Work

LARGE, LARGE_ON_GPU = 2**27, 2**30  # bytes of a read or copy in which starting it counts for nothing
READ, READ_LARGE, COPY_LARGE = "read the kept bytes once", "large read", "large copy"
LOOP = "best reading loop"
STREAMS = (1, 4, 8)  # places that a thread reads in at once; which is best depends on the processor and its neighbours


def works(nbytes: int, device: torch.device) -> dict[str, Work]:
    """Plain reads of ``nbytes`` by torch and, on a CPU, by `loops`; larger reads and copies by torch."""
    source, target = (torch.empty(large_bytes(device) // 4, device=device) for _ in range(2))
    fill(source)
    buffers = cold(nbytes, device)
    found = loops(buffers) if device.type == "cpu" else {}
    return {**found, READ: Work([one.sum for one in buffers], part=part_of(nbytes)),
            READ_LARGE: Work([one.sum for one in cold(large_bytes(device), device)], part=1),
            COPY_LARGE: Work([lambda: target.copy_(source)])}


def cold(nbytes: int, device: torch.device) -> list[torch.Tensor]:
    """float32 tensors of ``nbytes``, in huge pages as slabs are, so many that each is cold when its turn comes."""
    buffers = [zeros_in_huge_pages((max(nbytes // 4, 1),), torch.float32, device) for _ in range(copies_of(nbytes))]
    for one in buffers:
        fill(one)
    return buffers


def loops(buffers: list[torch.Tensor]) -> dict[str, Work]:
    """Reading loops over CPU tensors of equal size, by the number of `STREAMS`; none without the extension."""
    if native.missing():
        return {}
    largest = native.extension().largest

    def call(one: torch.Tensor, streams: int) -> Callable[[], float]:
        return lambda: largest(one.data_ptr(), one.numel(), streams, torch.get_num_threads())

    return {f"{LOOP}, {streams} at once": Work([call(one, streams) for one in buffers], part=part_of(buffers[0].nbytes))
            for streams in STREAMS}


def names(listed: Collection[str]) -> list[str]:
    """Of works, those that the ceiling is the best of: the loops, or torch's large read where there are none."""
    return [name for name in listed if name.startswith(LOOP)] or [READ_LARGE]


def rates(timings: Mapping[str, Timing], nbytes: int, device: torch.device) -> dict[str, float]:
    """Bytes per second: ``read`` by torch, ``copy``, and ``loop`` where there are loops; each one's best."""
    large = large_bytes(device)
    found = {"read": max(large / timings[READ_LARGE].best, nbytes / timings[READ].best),
             "copy": 2 * large / timings[COPY_LARGE].best}
    best = min((timings[name].best for name in timings if name.startswith(LOOP)), default=None)
    return found if best is None else found | {"loop": nbytes / best}


def large_bytes(device: torch.device) -> int:
    """Bytes of the large read and of the large copy."""
    return LARGE_ON_GPU if device.type == "cuda" else LARGE
