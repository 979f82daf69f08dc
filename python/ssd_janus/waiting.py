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


def watched(step: Callable[[], Any],
            clock: Callable[[], tuple[float, float]] = lambda: (time.perf_counter(), time.process_time()),
            ) -> Callable[[], None]:
    """``step``, which says once per process, with the remedy, that its calls take ten times as long as the CPU time
    that they need, where spinning threads or too many of them can be why.

    CPU time grows with spinning, so what a call needs is the least that any call has taken. A few slow calls, as when
    the machine slept, say nothing: the median counts.

    Args:
        clock: seconds on the wall, and of the process's CPU time.
    """
    walls: list[float] = []
    needed = math.inf

    def run() -> None:
        nonlocal needed
        wall, cpu = clock()
        step()
        wall, cpu = (now - began for now, began in zip(clock(), (wall, cpu), strict=True))
        walls.append(wall)
        needed = min(needed, cpu)
        if len(walls) == STEPS:
            typical = statistics.median(walls)
            walls.clear()
            if typical > TIMES * needed:
                _tell(typical, needed)

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
