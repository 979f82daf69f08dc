"""Records as ssd-bench writes them, with made-up numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ssd_bench.point import Point
from ssd_bench.records import Record, record

MACHINE = {"processor": "CPU", "cores": 2, "threads": 2, "memory_bytes": 2**34, "instruction_set": "avx2", "load": 0.5,
           "load_after": 0.6, "python": "3.11", "torch": "2.13", "ssd_kernels": "0.1", "commit": "abc", "device": "cpu",
           "command": "ssd-bench kernel <b>"}
OURS, RIVAL = "ssd_kernels cpu: heavy", "SDPA full cache"


@pytest.fixture
def make() -> Callable[..., Record]:
    """A kernel record; microseconds of its trials, the first of three being the fastest."""
    def build(name: str = OURS, trials: tuple[float, ...] = (90, 100, 110), status: str = "ok",
              machine: dict[str, Any] | None = None, **point: Any) -> Record:
        here = Point.of_lengths(**point)
        contender: dict[str, Any] = {"name": name, "does": "attend", "omits": "", "backend": None}
        if name == OURS:
            contender |= {"backend": "cpu", "scored": True, "row_buffer": 0}
        seconds = [1e-6 * trial for trial in trials]
        timing = {"median": sorted(seconds)[len(seconds) // 2], "best": min(seconds),
                  "spread": max(seconds) - min(seconds), "trials": seconds}
        size = {"useful": here.attend_bytes(), "read": here.attend_bytes(), "allocated": here.attend_bytes()}
        return record("kernel", MACHINE | (machine or {}), here.to_dict() | {"device": "cpu"}, contender, status=status,
                      seconds=timing if status == "ok" else None, ceiling={"read": 2e11, "copy": 1e11},
                      bytes=size if status == "ok" else None, launches=1)

    return build
