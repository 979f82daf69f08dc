"""The pretended machine is as strict as CUDA, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pretend
import pytest
import torch
from pretend import guard

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(guard.unsupported() is not None, reason=f"no machine to pretend: {guard.unsupported()}")


@pytest.fixture
def machine() -> Iterator[pretend.Machine]:
    with pretend.pretended(devices=2) as made:
        yield made


def test_values_are_real(machine: pretend.Machine) -> None:
    x = torch.arange(6, device="cuda").view(2, 3)
    assert x.device == torch.device("cuda", 0) and x.is_cuda
    assert torch.equal((x * 2).cpu(), torch.tensor([[0, 2, 4], [6, 8, 10]]))
    assert x.sum().item() == 15 and x.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_devices_do_not_mix(machine: pretend.Machine, other: str) -> None:
    x, y = torch.ones(3, device="cuda:0"), torch.ones(3, device=other)
    for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: y @ x, lambda: y.index_select(0, x.long())):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]  # numbers may come from the host
    assert y.copy_(x).device == torch.device(other)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


READS = {
    "item": lambda x: x.sum().item(), "branch": lambda x: bool(x.any()), "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(), "to": lambda x: x.to("cpu", non_blocking=True), "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1], "equal": lambda x: torch.equal(x, x), "copy": lambda x: torch.empty(3).copy_(x),
}
COPIES = {
    "tensor": lambda x: torch.tensor([1, 2], device=x.device), "to": lambda x: torch.ones(3).to(x.device),
    "list index": lambda x: x[[0, 1]], "host index": lambda x: x[torch.tensor([0, 1])],
    "copy": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("what", READS)
def test_host_reads_are_logged_and_fail_in_a_capture(machine: pretend.Machine, what: str) -> None:
    _noticed(machine, READS[what], "to_host")


@pytest.mark.parametrize("what", COPIES)
def test_copies_from_the_host_are_logged_and_fail_in_a_capture(machine: pretend.Machine, what: str) -> None:
    _noticed(machine, COPIES[what], "to_device")


def test_waiting_is_logged_and_fails_in_a_capture(machine: pretend.Machine) -> None:
    _noticed(machine, lambda x: torch.cuda.synchronize(), "wait")


def _noticed(machine: pretend.Machine, action: Any, kind: str) -> None:
    x = torch.arange(3.0, device="cuda")
    machine.log.clear()
    action(x)
    assert len(machine.of_kind(kind)) == 1 and len(machine.of_kind("to_host", "to_device", "wait")) == 1
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            action(x)
        with pytest.raises(RuntimeError, match="previous error during capture"):
            graph.capture_end()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    assert not machine.graphs


def test_a_capture_does_nothing_until_it_is_replayed(machine: pretend.Machine) -> None:
    x, y = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(y)
        z = x * 3
        x[:1] = 7
    assert x.tolist() == [0, 0]
    graph.replay()
    assert (x.tolist(), z.tolist()) == ([7, 1], [3, 3])
    y.fill_(2)
    graph.replay()
    assert (x.tolist(), z.tolist()) == ([7, 3], [27, 9])
    assert [event.name for event in graph.operations] == ["add_", "mul", "fill_"] and graph.replays == 2


def test_a_capture_sees_only_its_own_stream(machine: pretend.Machine) -> None:
    """torch's own stream for captures belongs to the device that was current when it was made."""
    x, other = torch.zeros(2, device="cuda:0"), torch.zeros(2, device="cuda:1")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
    with torch.cuda.device(1), torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)
    assert machine.empty_graphs == 1 and other.tolist() == [1, 1]
    with torch.cuda.device(1), torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()):
        other.add_(1)
    assert len(graph.operations) == 1 and other.tolist() == [1, 1]


def test_random_numbers_in_a_capture(machine: pretend.Machine) -> None:
    """torch's own generator goes on with every replay; another must be made known to the graph."""
    x, generator = torch.zeros(4, device="cuda"), torch.Generator("cuda").manual_seed(3)
    assert generator.device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="generator"):
        x.exponential_(generator=torch.Generator())
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        x.exponential_()
    graph.replay()
    first = x.tolist()
    graph.replay()
    assert first != x.tolist()
    with pytest.raises(RuntimeError, match="previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.exponential_(generator=generator)
    with pytest.raises(RuntimeError, match="outside graph capture"):
        x.exponential_()
    own = torch.cuda.default_generators[0]
    own.graphsafe_set_state(own.clone_state())
    x.exponential_()


def test_streams_and_devices_belong_to_threads(machine: pretend.Machine) -> None:
    seen: list[Any] = []

    def other_thread() -> None:
        seen.append((torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream,
                     torch.ones(1, device="cuda").device.index))

    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream()):
        assert torch.ones(1, device="cuda").device.index == 1 and torch.cuda.current_stream().cuda_stream
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert seen == [(0, 0, 0)] and torch.cuda.current_device() == 0


def test_memory_is_counted_and_ends(machine: pretend.Machine) -> None:
    machine.memory = 1000
    x = torch.zeros(100, device="cuda")
    assert torch.cuda.memory_allocated() == 400 and torch.cuda.mem_get_info() == (600, 1000)
    view = x[:50]
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(200, device="cuda")
    torch.zeros(200, device="cuda:1")
    del x
    assert torch.cuda.memory_allocated() == 400
    del view
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (0, 400)


def test_events_of_two_devices_are_no_pair(machine: pretend.Machine) -> None:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    end.record()
    assert begin.elapsed_time(end) > 0
    with torch.cuda.device(1):
        end.record()
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        begin.elapsed_time(end)


def test_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: vars(torch.cuda).get(name) for name in ("is_available", "Stream", "CUDAGraph", "synchronize")}
    with pretend.pretended(devices=2):
        torch.cuda.set_device(1)
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    assert before == {name: vars(torch.cuda).get(name) for name in before}
    assert not torch.cuda.is_available() and torch.ones(2).device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device="cuda")
    with pretend.pretended():
        assert torch.cuda.current_device() == 0


def test_a_script_and_its_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys, torch\n"
        "print(torch.cuda.device_count(), (torch.ones(2, device='cuda:1') + 1).tolist(), *sys.argv[1:], flush=True)\n"
        "if len(sys.argv) > 1: sys.exit(subprocess.run([sys.executable, __file__]).returncode + 3)\n")
    done = subprocess.run([sys.executable, "-m", "tests.pretend", "--devices", "2", str(script), "an argument"],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout == "2 [2.0, 2.0] an argument\n2 [2.0, 2.0]\n" and done.returncode == 3, done.stderr
