"""The clockwork, on a fake clock: which runs are timed, in which turn, and what is made of them."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch

from ssd_bench.timing import Timing, Work, cpu_stopwatch, cuda_stopwatch, time_in_turn


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


def test_timing_of_trials():
    timing = Timing.of([[3, 9, 4], [5, 5, 50], [2, 8, 8]])
    assert (timing.median, timing.best, timing.spread, timing.trials) == (5, 2, 4, [4, 5, 8])


def test_trials_take_turns_and_warm_up_untimed():
    clock = Clock(1)
    works = {"slow": Work([clock.call("s")]), "pair": Work([clock.call("p")] * 5)}
    turns: list[str] = []
    found = time_in_turn({name: (cpu_stopwatch(work, clock), work) for name, work in works.items()}, repetitions=3,
                         trials=2, progress=turns.append)
    assert turns == ["slow", "pair"] * 2
    trial = "s" * (10 + 3) + "p" * (10 + 15)  # at least 10 calls come first
    assert "".join(clock.ran) == 2 * trial
    assert found["slow"].trials == [1.0, 1.0]


@pytest.mark.parametrize("warm", [1, 7])
def test_warm_up_is_not_in_the_result(warm: int):
    clock = Clock(*[50.0] * 10, *[float(warm)] * 2)
    work = Work([clock.call()])
    assert time_in_turn({"one": (cpu_stopwatch(work, clock), work)}, repetitions=2, trials=1)["one"].trials == [warm]


def test_the_first_run_on_a_gpu_waits_for_what_prepares_it(monkeypatch: pytest.MonkeyPatch):
    """It runs on a stream of its own, which CUDA orders after nothing else by itself."""
    order: list[str] = []

    class Stream:
        def wait_stream(self, other: str) -> None:
            order.append(f"wait for {other}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the current stream")
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    cuda_stopwatch(Work([lambda: order.append("call")], prepare=lambda: order.append("prepare"), capturable=False))
    assert order == ["prepare", "wait for the current stream", "call", "synchronize"]
