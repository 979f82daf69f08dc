"""What was built, and what can run here."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import backends, process
from .native import build_info
from .version import __version__


def info() -> dict[str, Any]:
    """What was built, which backends can run here, and why not the others.

    Returns:
        A dict of plain values: ``version``, ``torch``, ``python``, ``machine``, ``threads`` (torch's intra-op
        threads), ``cpus`` (that this process may run on), ``cpu_quota`` (CPUs' worth of time that control groups leave
        it, or None), ``waiting`` (how OpenMP's threads wait), ``openmp`` (paths of the OpenMP runtimes in this
        process), ``extension`` (``built``, and either ``reason`` or the compiler, the CPU instruction sets compiled
        and the one in use, and whether CUDA was built) and ``backends`` (name -> ``available``, ``reason``).
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": process.allowed_cpus(),
        "cpu_quota": process.cpu_quota(),
        "waiting": process.waiting(),
        "openmp": process.openmp_runtimes(),
        "extension": build_info(),
        "backends": {name: {"available": reason is None, "reason": reason}
                     for name, reason in backends.available().items()},
    }
