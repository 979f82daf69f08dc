"""How threads wait for each other. OpenMP's spin unless told otherwise: on a machine with other work they then keep
those they wait for from running, and seconds turn into minutes.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 16  # whose median is looked at
TIMES = 10.0

_logger = logging.getLogger("ssd_janus")
_told = False


def prepare() -> None:
    """What a command does before torch loads: `ssd_kernels.process.settings`. Nothing once torch is there."""
    if "torch" not in sys.modules:
        process = _process_module()
        os.environ.update(process["settings"](os.environ, process["allowed_cpus"](), process["usable_cpus"]()))


def _process_module() -> dict[str, Any]:
    """The contents of `ssd_kernels.process`, without its package, which would load torch."""
    package = importlib.util.find_spec("ssd_kernels")
    assert package is not None and package.origin is not None
    return runpy.run_path(str(Path(package.origin).with_name("process.py")))


class StepWatch:
    """Says once per process, with the remedy, that steps take ten times as long as the CPU time that they need, where
    spinning threads or too many of them can be why.

    CPU time grows with spinning, so what a step needs is the least that any step has taken. A few slow steps, as when
    the machine slept, say nothing: the median counts.
    """

    def __init__(self, clock: Callable[[], tuple[float, float]] | None = None) -> None:
        """
        Args:
            clock: seconds on the wall, and of the process's CPU time.
        """
        self._clock = clock or (lambda: (time.perf_counter(), time.process_time()))
        self._began: tuple[float, float] | None = None
        self._walls: list[float] = []
        self._needed = math.inf

    def begin(self) -> None:
        """A step begins."""
        self._began = self._clock()

    def end(self) -> None:
        """The step that began last is over; nothing if none is under way."""
        if self._began is None:
            return
        wall, cpu = (now - began for now, began in zip(self._clock(), self._began, strict=True))
        self._began = None
        self._walls.append(wall)
        self._needed = min(self._needed, cpu)
        if len(self._walls) == STEPS:
            typical = statistics.median(self._walls)
            self._walls.clear()
            if typical > TIMES * self._needed:
                _tell(typical, self._needed)


def watched(step: Callable[[], Any], clock: Callable[[], tuple[float, float]] | None = None) -> Callable[[], None]:
    """``step`` under a `StepWatch`."""
    watch = StepWatch(clock)

    def run() -> None:
        watch.begin()
        step()
        watch.end()

    return run


def remedy(threads: int, usable: int, spins: bool) -> str | None:
    """What makes such steps faster, or None: fewer threads, waiting without spinning."""
    remedies = []
    if spins and threads > 1:
        remedies.append("let threads sleep while they wait: export OMP_WAIT_POLICY=passive before Python starts")
    if threads > usable:
        remedies.append(f"use no more threads than the {usable} CPUs that this process may use: export "
                        f"OMP_NUM_THREADS={usable} or call torch.set_num_threads({usable}), now {threads}")
    return "; ".join(remedies) or None


def _tell(wall: float, cpu: float) -> None:
    global _told
    import torch

    from ssd_kernels import process

    advice = remedy(torch.get_num_threads(), process.usable_cpus(), process.spins())
    if advice is not None and not _told:
        _told = True
        _logger.warning("a step takes %.3g s and needs %.2g s of CPU time: other work uses the CPUs. To be faster, %s",
                        wall, cpu, advice)
