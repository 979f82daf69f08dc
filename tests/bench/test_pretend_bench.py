"""The kernel benchmark on the pretended machine (tests/pretend): captures, events and launches as on CUDA."""

from __future__ import annotations

from collections.abc import Iterator

import pretend
import pytest
import torch
from pretend import guard

from ssd_bench import ceiling, contender, gpu, kernel, ours, timing
from ssd_bench.point import Point
from ssd_kernels import CachePlan, HeadSpec, backends

pytestmark = pytest.mark.skipif(guard.unsupported() is not None, reason=f"no machine to pretend: {guard.unsupported()}")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pretend.Machine]:
    monkeypatch.setattr(contender, "COLD_BYTES", 2**16)
    monkeypatch.setattr(ceiling, "LARGE_ON_GPU", 2**16)
    monkeypatch.setattr(timing, "WARMUP_CALLS", 1)
    with pretend.pretended() as made:
        yield made


def test_contenders_run_and_are_counted(machine: pretend.Machine) -> None:
    point = Point.of_lengths(2, 4, 32, "float32", mean=20, full=64)
    options = kernel.Options(torch.device("cuda", 0), only=("ssd_kernels", "SDPA full", "two bmm"), repetitions=1,
                             trials=1, patience=0)
    records = {line["contender"]["name"]: line for line in kernel.measure(point, options, lambda name: None)}
    assert {name: line["status"] for name, line in records.items()} == dict.fromkeys(records, "ok")
    names = [name for name in ("triton", "cuda") if backends.available()[name] is None]
    found = [line for name, line in records.items() if name.startswith("ssd_kernels")]
    assert len(found) == 4 * len(names) > 0 and all(line["launches"] == 1 for line in found)
    assert records["SDPA full cache"]["launches"] > 1
    assert machine.empty_graphs == 0 and len(machine.graphs) >= len(records)
    assert not [event for event in machine.of_kind("to_host") if event.captured]


def test_the_extension_is_looked_for(machine: pretend.Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step of `make gpu`: whether one has to be built."""
    with pytest.MonkeyPatch.context() as patch:  # undone before the machine puts back what it replaced
        patch.setattr(type(backends.get("cuda")), "unavailable", lambda self: None)
        gpu.extension()
        assert capsys.readouterr().out == "the extension loads, and the cuda backend can run\n"
        patch.setattr(type(backends.get("cuda")), "unavailable", lambda self: "no CUDALayer")
        with pytest.raises(SystemExit, match="the cuda backend cannot run here: no CUDALayer"):
            gpu.extension()


def test_a_device_that_is_not_the_current_one_is_timed() -> None:
    """Where torch's own stream for captures would record nothing."""
    with pretend.pretended(devices=2) as machine:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # which is of cuda:0 from now on
            torch.ones(1, device="cuda:0")
        machine.graphs.clear()
        machine.events.clear()
        there = torch.zeros(4, device="cuda:1")
        timing.stopwatch(timing.Work([lambda: there.add_(1)]), there.device)(2)
        (graph,) = machine.graphs
        assert len(graph.operations) == timing.GRAPH_CALLS and graph.replays == 2
        assert machine.empty_graphs == 0 and machine.events == {1} and torch.cuda.current_device() == 0


@pytest.mark.parametrize("row_buffer", [0, 3])
def test_ours_start_over_before_every_repetition(machine: pretend.Machine, row_buffer: int) -> None:
    """A graph holds many calls, and yet the caches hardly grow while they are timed."""
    start, plan = 21, CachePlan([[HeadSpec.full(), HeadSpec.heavy(5)]], row_buffer=row_buffer)
    point = Point.of_plan(plan, 0, "one head of two kept", 2, 32, "bfloat16", 4, start, 40)
    steady = ours.Steady(point, "triton", plan, 4, start, torch.device("cuda", 0))
    timing.cuda_stopwatch(steady.built().work)(5)
    [graph] = machine.graphs
    calls = sum("decode" in operation.name for operation in graph.operations)
    assert graph.replays == 5 and calls == steady.layers * steady.passes >= timing.GRAPH_CALLS
    for layer, state in enumerate(steady.cache._layers):
        begun = start + steady.phase(layer)
        assert {begun + steady.passes, begun + 2 * steady.passes} & set(state.cursors[:, 1].tolist())
        assert int(state.cursors[:, 1].max()) <= begun + 2 * steady.passes
