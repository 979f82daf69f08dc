"""What a process may use and how its threads wait, told from made-up Linux files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_kernels import process


def root_with(folder: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.parametrize(("contents", "expected"), [
    ({}, None),
    ({"proc/self/cgroup": "0::/"}, None),
    ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
    ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
      "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"}, 1.5),
    ({"proc/self/cgroup": "0::/host/path", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/unified/cpu.max": "300000 100000\n"}, 3.0),
    ({"proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n0::/", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
      "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2.0),
    ({"proc/self/cgroup": "3:cpuset:/\n2:cpuacct,cpu:/x", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "25000\n",
      "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "50000\n"}, 0.5),
    ({"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "nonsense"}, None),
], ids=["no Linux", "no limit", "max", "outer", "container", "hybrid", "version 1", "version 1 inner", "unlimited",
        "damaged"])
def test_cpu_quota(tmp_path: Path, contents: dict[str, str], expected: float | None) -> None:
    root = root_with(tmp_path, contents)
    assert process.cpu_quota(root) == expected
    allowed = process.allowed_cpus()
    whole = allowed if expected is None else {0.5: 1, 1.5: 2}.get(expected, int(expected))
    assert process.usable_cpus(root) == min(allowed, whole)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity mask")
def test_the_affinity_mask_counts() -> None:
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert process.allowed_cpus() == process.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, mask)
    assert process.allowed_cpus() == len(mask)


@pytest.mark.parametrize(("environment", "spins"), [
    ({}, True), ({"OMP_WAIT_POLICY": "PASSIVE"}, False), ({"OMP_WAIT_POLICY": "active"}, True),
    ({"GOMP_SPINCOUNT": "0"}, False), ({"GOMP_SPINCOUNT": "infinite"}, True), ({"KMP_BLOCKTIME": "0"}, False),
    ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "100000"}, True)])
def test_waiting(environment: dict[str, str], spins: bool) -> None:
    assert process.spins(environment) == spins
    words = process.waiting(environment)
    assert words.startswith("spin (" if spins else "sleep (")
    assert all(f"{name}={value}" in words for name, value in environment.items())


@pytest.mark.parametrize(("environment", "allowed", "usable", "added"), [
    ({}, 8, 8, {"OMP_WAIT_POLICY": "passive"}),
    ({}, 8, 2, {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}),
    ({"OMP_NUM_THREADS": "5"}, 8, 2, {"OMP_WAIT_POLICY": "passive"}),
    *(({name: "1"}, 8, 8, {}) for name in process.WAITING)])
def test_settings_leave_what_the_user_chose(environment: dict[str, str], allowed: int, usable: int,
                                            added: dict[str, str]) -> None:
    assert process.settings(environment, allowed, usable) == added


def test_every_openmp_runtime_is_found(tmp_path: Path) -> None:
    names = ["torch/lib/libgomp.so.1", "libgomp-a34b3233.so.1.0.0", "llvm/libomp.so.5", "libiomp5.so", "libomp.so"]
    others = ["libcompute.so", "libomptarget.so.1", "libgomp.so.1/other.so", "libstdc++.so.6"]
    lines = [f"7f00-7f01 r-xp 00000000 08:01 1234    /a b/{name}" for name in [*names, *others, *names]]
    root = root_with(tmp_path, {"proc/self/maps": "\n".join([*lines, "7fff-8000 rw-p 0 00:00 0 [stack]", ""])})
    assert process.openmp_runtimes(root) == sorted(f"/a b/{name}" for name in names)
    assert process.openmp_runtimes(tmp_path / "elsewhere") == []


def test_needs_no_torch() -> None:
    """Commands run this file before torch loads."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, process.__file__], check=True)
