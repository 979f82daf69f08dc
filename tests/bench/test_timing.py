"""The clockwork, on a fake clock: which runs are timed, in which turn, and what is made of them."""

from __future__ import annotations

import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch

from ssd_bench.timing import GRAPH_CALLS, Protocol, Timing, Work, cpu_stopwatch, cuda_stopwatch, time_in_turn


class Clock:
    """Every call of `work` takes the next of its seconds; reading the clock takes none."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.seconds, self.ran = 100.0, itertools.cycle(seconds), []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str = "call"):
        def run() -> None:
            self.ran.append(name)
            self.now += next(self.seconds)

        return run


def test_seconds_are_per_call_and_leave_out_what_prepares():
    clock = Clock(1, 3)

    def prepare() -> None:
        clock.now += 1000

    watch = cpu_stopwatch(Work([clock.call("a"), clock.call("b")], passes=2, prepare=prepare), clock)
    assert watch(3) == [2.0, 2.0, 2.0]
    assert clock.ran == ["a", "b", "a", "b"] * 3


def test_a_part_of_the_copies_goes_on_in_turn():
    clock = Clock(1)
    watch = cpu_stopwatch(Work([clock.call(name) for name in "abc"], part=2), clock)
    assert watch(1) + watch(2) == [1.0] * 3
    assert "".join(clock.ran) == "abcabc"


def test_works_that_share_their_copies_are_apart():
    """The second finds cold what it reads, though the first has just read as much of the same."""
    clock = Clock(1)
    work = Work([clock.call(name) for name in "abcdefg"], part=2)
    watches = [cpu_stopwatch(work, clock, ahead) for ahead in range(5)]
    for watch in watches:
        watch(1)
    assert "".join(clock.ran) == "ab" + "cd" + "ef" + "ga" + "bc"


def test_timing_of_trials():
    timing = Timing.of([[3, 9, 4], [5, 5, 50], [2, 8, 8]])
    assert (timing.median, timing.best, timing.spread, timing.trials) == (5, 2, 4, [4, 5, 8])
    assert timing.bests == [3, 5, 2]


@pytest.mark.parametrize(("burst", "timed"), [(1, "spppppspppppsppppp"), (2, "ssppppppppppsppppp"),
                                              (3, "sssppppppppppppppp")])
def test_works_take_turns_within_a_trial_and_warm_up_untimed(burst: int, timed: str):
    clock = Clock(1)
    works = {"slow": Work([clock.call("s")]), "pair": Work([clock.call("p")] * 5)}
    turns: list[str] = []
    found, moved = time_in_turn({name: (cpu_stopwatch(work, clock), work) for name, work in works.items()},
                                Protocol(repetitions=3, trials=2, burst=burst), ["slow"], turns.append)
    assert turns == ["trial 1", "trial 2"]
    assert "".join(clock.ran) == 2 * ("s" * 10 + "p" * 10 + timed)  # at least 10 calls come first
    assert found["slow"].trials == [1.0, 1.0] and moved == 0


@pytest.mark.parametrize("warm", [1, 7])
def test_warm_up_is_not_in_the_result(warm: int):
    clock = Clock(*[50.0] * 10, *[float(warm)] * 2)
    work = Work([clock.call()])
    found, _ = time_in_turn({"one": (cpu_stopwatch(work, clock), work)}, Protocol(2, 1), ["one"])
    assert found["one"].trials == [warm]


def recorded(*trials: list[float]):
    """A stopwatch that gives what was recorded, a trial after the other; nothing is untimed."""
    times = iter(trials)

    def watch(repetitions: int) -> list[float]:
        return next(times) if repetitions == 2 else []

    return watch, Work([lambda: None])


def test_only_trials_count_in_which_the_ceiling_holds_still():
    """A neighbour comes and goes: two loops read in 1 s at best, then in 2. What ours did does not count for that, even
    if it was faster than any loop.
    """
    watches = {"loop": recorded([1, 2], [2.4, 2], [1.9, 9], [2.1, 2]), "other": recorded(*[[3.0, 4.0]] * 4),
               "ours": recorded([0.5, 2], [0.5, 8.5], [0.5, 6.5], [6, 7])}
    said: list[str] = []
    now = [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    found, moved = time_in_turn(watches, Protocol(2, 2, patience=10, burst=2), ["loop", "other"], said.append, clock)
    assert found["ours"].trials == [4.5, 3.5] and found["ours"].best == 0.5 and found["loop"].best == 1.9
    assert moved == pytest.approx(2 / 1.9 - 1)
    assert said == ["trial 1", "trial 2", "trial 3: the ceiling moves"]
    watches["loop"], watches["ours"] = recorded([1, 1], [2, 2], [1, 1]), recorded(*[[1.0, 1.0]] * 3)
    watches["other"] = recorded(*[[3.0, 4.0]] * 3)
    assert time_in_turn(watches, Protocol(2, 2, patience=0, burst=2), ["loop", "other"], said.append, clock)[1] == 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device on which replaying a graph takes a second and 1 for every call in it; returns what happened."""
    order: list[str] = []
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    class Graph:
        calls = 0

        def replay(self) -> None:
            now[0] += 1 + self.calls
            order.append(f"replay {self.calls} calls")

    class Stream:
        def wait_stream(self, other: str) -> None:
            order.append(f"wait for {other}")

    @contextmanager
    def capturing(graph: Graph, stream: Stream):
        before = order.count("call")
        yield
        graph.calls = order.count("call") - before
        order[:] = [what for what in order if what != "call"]

    for name, stand_in in {"Stream": Stream, "stream": nullcontext, "Event": Event, "CUDAGraph": Graph,
                           "graph": capturing, "current_stream": lambda: "the current stream",
                           "synchronize": lambda: order.append("synchronize")}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return order


def test_the_first_run_on_a_gpu_waits_for_what_prepares_it(device: list[str]):
    """It runs on a stream of its own, which CUDA orders after nothing else by itself."""
    cuda_stopwatch(Work([lambda: device.append("call")], prepare=lambda: device.append("prepare"), capturable=False))
    assert device == ["prepare", "wait for the current stream", "call", "synchronize"]


@pytest.mark.parametrize(("calls", "passes", "graph"), [(1, 1, GRAPH_CALLS), (3, 2, 18), (GRAPH_CALLS, 3, 48)])
def test_a_graph_holds_many_calls(device: list[str], calls: int, passes: int, graph: int):
    """Starting it counts for little then. Seconds are still per call."""
    watch = cuda_stopwatch(Work([lambda: device.append("call")] * calls, passes=passes))
    assert watch(2) == pytest.approx([(1 + graph) / graph] * 2)
    assert device.count(f"replay {graph} calls") == 2


def test_what_needs_preparing_is_not_repeated(device: list[str]):
    """Each call of it moves on; `ours.Steady` brings passes enough itself."""
    work = Work([lambda: device.append("call")] * 2, prepare=lambda: device.append("prepare"))
    assert cuda_stopwatch(work)(1) == pytest.approx([1.5]) and "replay 2 calls" in device
