"""What this process may use and how it waits: CPUs, limits of control groups, OpenMP.

Nothing but the standard library is imported here: commands run this file before torch loads (`ssd_janus.waiting`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path("/")
# Say how OpenMP's threads wait for work. They are read once, when the runtime loads, which is when torch does.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_at_import = {name: os.environ[name] for name in WAITING if name in os.environ}


def control_groups(controller: str, root: Path = ROOT) -> Iterator[tuple[int, Path]]:
    """Version (1 or 2) and folder of every Linux control group that may hold this process under a controller, such as
    ``"memory"`` or ``"cpu"``; inner groups first. Some folders do not exist.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            version, mounts = 2, [Path("sys/fs/cgroup"), Path("sys/fs/cgroup/unified")]
        elif controller in controllers.split(","):
            version, mounts = 1, [Path("sys/fs/cgroup", name) for name in dict.fromkeys((controller, controllers))]
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            # In a container the path may be the host's, and the group itself the root of the mount.
            for group in (inner, *inner.parents):
                yield version, root / mount / group


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that control groups leave this process, the least of all groups around it; None: no limit."""
    quotas = []
    for version, folder in control_groups("cpu", root):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)


def allowed_cpus() -> int:
    """CPUs that this process may run on: its affinity mask, where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process can keep busy: those of its affinity mask, or its quota rounded up if that is less."""
    quota = cpu_quota(root)
    return allowed_cpus() if quota is None else max(1, min(allowed_cpus(), math.ceil(quota)))


def spins(environment: Mapping[str, str] = _at_import) -> bool:
    """Whether OpenMP's threads spin while they wait, as they do unless the environment says otherwise."""
    policy = environment.get("OMP_WAIT_POLICY", "").strip().lower()
    counts = [environment[name].strip() for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME") if name in environment]
    return "0" not in counts and (policy != "passive" or bool(counts))


def waiting(environment: Mapping[str, str] = _at_import) -> str:
    """How OpenMP's threads wait, in words, with the variables that say so."""
    said = ", ".join(f"{name}={environment[name]}" for name in WAITING if name in environment)
    return f"{'spin' if spins(environment) else 'sleep'} ({said or 'default'})"


def settings(environment: Mapping[str, str], allowed: int, usable: int) -> dict[str, str]:
    """What to add to a command's environment before torch loads: OpenMP's threads sleep while they wait, and there are
    no more of them than a quota serves. Empty where the user has said so himself.

    Args:
        environment: of the process.
        allowed, usable: CPUs, of `allowed_cpus` and `usable_cpus`. Where they are equal torch chooses well on its own,
            a thread for every core of the affinity mask.
    """
    chosen = {}
    if not any(name in environment for name in WAITING):
        chosen["OMP_WAIT_POLICY"] = "passive"
    if usable < allowed and "OMP_NUM_THREADS" not in environment:
        chosen["OMP_NUM_THREADS"] = str(usable)
    return chosen


def openmp_runtimes(root: Path = ROOT) -> list[str]:
    """Paths of the OpenMP runtimes that are loaded, where Linux tells; there should be one, torch's."""
    try:
        maps = (root / "proc/self/maps").read_text(errors="replace")
    except OSError:
        return []
    return sorted(set(re.findall(r" (/.*/lib(?:gomp|i?omp5?)(?:[-.][^/\n]*)?\.so[^/\n]*)$", maps, re.MULTILINE)))
