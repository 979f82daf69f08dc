"""The steps of tools/gpu_first.py themselves, on a pretended GPU, and what its tests do where a device breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pretend import guard
from pretend.cuda import environment

from ssd_kernels import native

ROOT = Path(__file__).resolve().parents[2]
pretended = pytest.mark.skipif(guard.unsupported() is not None, reason=f"no pretended GPU: {guard.unsupported()}")
# Runs the program after its own options, as the real one does.
SANITIZER = """#!/bin/sh
while [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""


def first_contact(out: Path, *options: str, **variables: str) -> dict[str, Any]:
    """The summary of a run on a pretended GPU, with sizes for a CPU. Steps find no installed package of ours."""
    # The program itself pretends nothing, and so imports no torch, as it is meant to.
    code = (f"import os, runpy, sys; os.environ.update({environment()!r}); sys.argv[0] = 'tools/gpu_first.py'; "
            "sys.path.insert(0, 'tools'); runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run(
        [sys.executable, "-c", code, "--out", str(out), "--small", "--workers", "2", "--seconds", "5000", *options],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, (out / "log.txt").read_text()[-4000:] + done.stdout + done.stderr
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert summary["steps"] == lines
    assert done.stdout.endswith(f"\n{(out / 'summary.md').read_text()}\n")
    assert len(list(out.iterdir())) <= 8  # as many files as some machines give back
    return summary


@pretended
def test_kernels_and_engine_are_measured(tmp_path: Path) -> None:
    built = native.missing() is None and hasattr(native.extension(), "CUDALayer")
    steps = ("kernel cuda" if built else "kernel triton", "engine triton")
    summary = first_contact(tmp_path, *(word for step in steps for word in ("--step", step)))
    assert [(line["step"], line["status"]) for line in summary["steps"]] == [(name, "ok") for name in steps]
    rows = {row["what"]: row for row in summary["table"]}
    backend = "cuda" if built else "triton"
    for what in (f"ssd_kernels {backend}: the plan, 2 x 2 heads, everything kept",
                 "engine, full plan (triton), 2 at once", "engine, 20%, row buffer 24 (triton), 1 at once"):
        assert rows[what]["measured"] and rows[what]["goal"] and rows[what]["of_floor"].endswith("%"), what
    times = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert all(line["status"] == "ok" and line["machine"]["gpu"] for line in times)
    full, part = ({line["point"]["batch"]: line["useful_bytes"] for line in times
                   if line["kind"] == "step" and line["contender"]["budget"] == budget} for budget in (1, 0.2))
    assert full[2] > full[1] > part[1] and full[2] - full[1] > 2 * (part[2] - part[1])


@pretended
@pytest.mark.exhaustive
def test_every_step_runs(tmp_path: Path) -> None:
    """All of them, in real processes: about three minutes on two quiet cores."""
    (tmp_path / "bin").mkdir()
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    summary = first_contact(tmp_path / "out", PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
                            PYTHON=sys.executable)
    listed = subprocess.run([sys.executable, "tools/gpu_first.py", "--list"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout
    names = {name for line in listed.splitlines() for name in line.partition(" s  ")[2].split(", ")}
    assert {line["step"] for line in summary["steps"]} == names - {"build"}
    assert {line["status"] for line in summary["steps"]} == {"ok"}
    rows = {row["what"]: row["measured"] for row in summary["table"]}
    assert rows["smoke"] == "10 of 10 steps ok" and rows["graph"] == "3 of 3 steps ok"
    assert rows["memcheck"] == rows["racecheck"] == "2 of 2 steps ok"
    for backend in ("cuda", "triton"):
        assert rows[f"contract {backend}"].endswith(" passed") and "," not in rows[f"contract {backend}"]
    assert [what for what in rows if what.startswith("fastest rival")]


# Of torch, what conftest.py and the plugin need of it: nothing here computes, and every worker imports it.
TORCH = """
from types import SimpleNamespace

cuda = SimpleNamespace(is_available=lambda: False)
def set_num_threads(count): pass
def manual_seed(seed): pass
"""
BREAKS = """
import ctypes
import on_gpu
import pytest

state = []
on_gpu.broken = lambda: bool(state)

def test_before(): pass
def test_breaks():
    state.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after():
    assert not state, "this process has the broken device"
def test_hangs():
    lock = ctypes.pythonapi.PyThread_allocate_lock
    lock.restype = ctypes.c_void_p
    acquire = ctypes.CDLL(None).pthread_mutex_lock  # no signal gets it out of there
    mutex = (ctypes.c_char * 64)()
    acquire(mutex)
    acquire(mutex)
def test_last(): pass
"""


def test_a_broken_device_or_a_hanging_kernel_ends_one_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(BREAKS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "instead").mkdir()
    (tmp_path / "instead" / "torch.py").write_text(TORCH)
    path = os.pathsep.join((str(tmp_path / "instead"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # a worker's
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "1", "--timeout=10", "--timeout-method=thread", "-p",
         "no:cacheprovider", "--rootdir", tmp_path, tmp_path], capture_output=True, text=True, cwd=tmp_path,
        env={**inherited, "PYTHONPATH": path, "SSD_TEST_RECORD": str(tmp_path / "tests.jsonl")})
    found = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert {line["test"].rpartition("::")[2]: line["outcome"] for line in found} == {
        "test_before": "passed", "test_breaks": "failed", "test_after": "passed", "test_hangs": "failed",
        "test_last": "passed"}, done.stdout + done.stderr
    assert done.returncode == 1 and "illegal memory access was encountered; the device is broken" in done.stderr
    assert all("crashed" in line["error"] for line in found if line["outcome"] == "failed")
