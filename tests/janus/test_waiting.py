"""Commands choose how threads wait; a user of the library is told when they wait badly."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from ssd_attach.cache import DecoderCache, Generation
from ssd_janus import waiting
from ssd_janus.engine import Engine
from ssd_kernels import CachePlan, HeadSpec

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def slow(steps: Iterable[tuple[float, float]]) -> Callable[[], tuple[float, float]]:
    """A clock that moves by these seconds, on the wall and of CPU time, at every second look."""
    times = [(0.0, 0.0)]
    for wall, cpu in steps:
        times += [(times[-1][0] + wall, times[-1][1] + cpu), (times[-1][0] + wall + 100, times[-1][1] + cpu + 50)]
    return iter(times).__next__


@pytest.fixture
def spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that spin, and nobody told yet."""
    monkeypatch.setattr(waiting, "_told", False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("ssd_kernels.process.spins", lambda: True)
    monkeypatch.setattr("ssd_kernels.process.usable_cpus", lambda: 2)


def told(steps: list[tuple[float, float]], caplog: pytest.LogCaptureFixture) -> list[str]:
    done: list[int] = []
    step = waiting.watched(lambda: done.append(1), slow(steps))
    with caplog.at_level(logging.WARNING, "ssd_janus"):
        for _ in steps:
            step()
    assert len(done) == len(steps)
    return caplog.messages


@pytest.mark.usefixtures("spinning")
def test_slow_steps_are_told_once_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    """Spinning costs CPU time, too: one step that was left in peace shows what they need."""
    messages = told([(0.6, 0.2)] * 5 + [(0.01, 0.01)] + [(0.6, 0.2)] * 58, caplog)
    assert len(messages) == 1 and "export OMP_WAIT_POLICY=passive" in messages[0]
    assert "0.6 s" in messages[0] and "0.01 s of CPU" in messages[0]


@pytest.mark.usefixtures("spinning")
@pytest.mark.parametrize("steps", [
    [(0.01, 0.02)] * 64, [(0.09, 0.01)] * 64, [(0.01, 0.01)] * 9 + [(3600.0, 0.02)] * 7 + [(0.01, 0.01)] * 48,
    [(9.0, 0.01)] * 15], ids=["two threads", "a busy machine", "pauses", "too few to tell"])
def test_other_steps_are_not(steps: list[tuple[float, float]], caplog: pytest.LogCaptureFixture) -> None:
    assert told(steps, caplog) == []


@pytest.mark.usefixtures("spinning")
@pytest.mark.parametrize(("threads", "spins"), [(1, True), (2, False)])
def test_nothing_is_told_where_nothing_helps(threads: int, spins: bool, monkeypatch: pytest.MonkeyPatch,
                                             caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("ssd_kernels.process.spins", lambda: spins)
    assert told([(0.6, 0.01)] * 64, caplog) == []


def test_remedies() -> None:
    assert waiting.remedy(2, 2, False) is None and waiting.remedy(1, 1, True) is None
    assert "OMP_NUM_THREADS=2" in (waiting.remedy(64, 2, False) or "")
    both = waiting.remedy(64, 2, True) or ""
    assert "OMP_WAIT_POLICY=passive" in both and "OMP_NUM_THREADS=2" in both


def test_the_engine_watches_its_steps(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def watched(step: Callable[[], object]) -> Callable[[], None]:
        return lambda: counted.append(step())

    monkeypatch.setattr(waiting, "watched", watched)
    fresh.model.vision_model.to("meta")  # steps run where the language model is
    Engine(fresh).generate([[5, 6, 7]], steps=9)
    assert len(counted) == 8, "the first token is the prompt's"


@pytest.mark.usefixtures("spinning")
def test_transformers_loop_is_watched_from_step_to_step(caplog: pytest.LogCaptureFixture) -> None:
    """Layers of one step are one step; the first interval is the prompt's."""
    watch = waiting.StepWatch(iter([(0.6 * step, 0.01 * step) for step in range(80)]).__next__)
    cache = DecoderCache(Generation(CachePlan.uniform(HeadSpec.full(), 2, 2), 40, watch=watch))
    with caplog.at_level(logging.WARNING, "ssd_janus"):
        for step in range(18):
            for layer in cache.layers:
                layer.update(*torch.ones(2, 1, 2, 1 if step else 7, 8))
    assert len(caplog.messages) == 1 and "export OMP_WAIT_POLICY=passive" in caplog.messages[0]


def run(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          env=clean | environment).stdout


def test_info_says_how_a_command_waits() -> None:
    facts = json.loads(run("import sys; sys.argv[1:] = ['info', '--json']; from ssd_janus.cli import app; app()"))
    assert facts["waiting"] == "sleep (OMP_WAIT_POLICY=passive)"
    assert facts["threads"] <= facts["cpus"] and len(facts["openmp"]) == 1


# Prints how threads are to wait when torch is about to load, or when a command ends without it.
START = """
import os, runpy, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise SystemExit
sys.meta_path.insert(0, Torch())
sys.argv[1:] = ["--help"]
try:
    COMMAND
finally:
    print("policy", os.environ.get("OMP_WAIT_POLICY"))
"""
COMMANDS = {
    "ssd-janus": "from ssd_janus.cli import app; app(['info'], standalone_mode=False)",
    "ssd-bench": "from ssd_bench.cli import app; app(['kernel'], standalone_mode=False)",
    **{name: f"runpy.run_module('ssd_shapes.{name}', run_name='__main__')"
       for name in ("train", "vq", "export", "suite")},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prepares_before_torch_loads(command: str) -> None:
    assert "policy passive" in run(START.replace("COMMAND", COMMANDS[command]))


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_commands_leave_what_the_user_chose(name: str) -> None:
    chosen = run(START.replace("COMMAND", COMMANDS["ssd-janus"]), **{name: "infinite"})
    assert f"policy {'infinite' if name == 'OMP_WAIT_POLICY' else None}" in chosen


def test_importing_changes_no_settings() -> None:
    code = "import os; before = dict(os.environ); import ssd_janus.cli, ssd_bench.cli, ssd_shapes.world; "
    run(code + "assert dict(os.environ) == before")
