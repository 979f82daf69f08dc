"""Timing on a machine that is never quiet: interleaved trials, minimum and median."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all repetitions of all trials."""

    best: float
    median: float


def time_interleaved(calls: Mapping[str, Callable[[], object]], repetitions: int = 50, trials: int = 3,
                     warmup: int = 10, clock: Callable[[], float] = time.perf_counter) -> dict[str, Timing]:
    """Time several calls against each other.

    Every trial runs each call in turn, so that a disturbance of the machine hits all of them alike.

    Args:
        calls: name -> function to time.
        repetitions: timed runs per trial and call.
        trials: rounds over all calls.
        warmup: untimed runs before each call's timed ones.
        clock: seconds, monotonic.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(trials):
        for name, call in calls.items():
            for _ in range(warmup):
                call()
            for _ in range(repetitions):
                start = clock()
                call()
                seconds[name].append(clock() - start)
    return {name: Timing(min(values), statistics.median(values)) for name, values in seconds.items()}


def machine() -> dict[str, object]:
    """What a reader needs to judge a number: processor, cores, threads, load, versions."""
    import platform

    import torch

    import ssd_kernels

    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0], "torch": torch.__version__, "ssd_kernels": ssd_kernels.__version__,
            "instruction_set": ssd_kernels.info()["extension"].get("instruction_set")}
