"""Timing on machines that are never quiet: contenders in turn, the best and the medians of trials whose ceiling holds
still, CUDA graphs on a GPU.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from .steady import movement, until_steady

REPETITIONS, TRIALS, WARMUP_CALLS = 50, 3, 10
PATIENCE = 30.0  # seconds
GRAPH_CALLS = 16  # in a CUDA graph at least: starting it, and the gaps around it, then count for little


def nothing() -> None:
    """The `Work.prepare` of work that needs none."""


@dataclass(frozen=True)
class Work:
    """Something to time: the same step on several separate copies of its data.

    Attributes:
        calls: one per copy; run in turn, so that each finds its data cold.
        passes: turns over all copies that make up one repetition.
        part: on a CPU, calls that make up one, where all are alike and slow; the next repetition goes on in turn.
        prepare: run before every repetition, outside the clock.
        capturable: whether a CUDA graph may hold the calls.
    """

    calls: Sequence[Callable[[], Any]]
    _: KW_ONLY
    passes: int = 1
    part: int | None = None
    prepare: Callable[[], None] = nothing
    capturable: bool = True

    @property
    def calls_per_repetition(self) -> int:
        return len(self.calls) * self.passes

    def run(self) -> None:
        """All calls of one whole repetition."""
        for _ in range(self.passes):
            for call in self.calls:
                call()


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        median: of the trials' medians.
        best: the fastest repetition.
        spread: the slowest trial's median less the fastest's; half of it, relative, is the noise of a comparison.
        trials: median of each trial. bests: the fastest repetition of each.
    """

    median: float
    best: float
    spread: float
    trials: list[float]
    bests: list[float]

    @classmethod
    def of(cls, trials: Sequence[Sequence[float]]) -> Timing:
        """From the seconds of every repetition of every trial."""
        medians = [statistics.median(seconds) for seconds in trials]
        bests = [min(seconds) for seconds in trials]
        return cls(statistics.median(medians), min(bests), max(medians) - min(medians), medians, bests)


Stopwatch = Callable[[int], list[float]]  # repetitions -> seconds per call of each


def cpu_stopwatch(work: Work, clock: Callable[[], float] = time.perf_counter, ahead: int = 0) -> Stopwatch:
    """Times repetitions of ``work`` by a clock in seconds.

    Args:
        ahead: repetitions to begin ahead of the first call. Works that take turns and read the same copies must be
            apart: what one has just read, the next would find in the cache.
    """
    count = work.part or work.calls_per_repetition
    turns = itertools.islice(itertools.cycle(work.calls), ahead * count % len(work.calls), None)

    def times(repetitions: int) -> list[float]:
        seconds = []
        for _ in range(repetitions):
            work.prepare()
            began = clock()
            for call in itertools.islice(turns, count):
                call()
            seconds.append((clock() - began) / count)
        return seconds

    return times


def cuda_stopwatch(work: Work) -> Stopwatch:
    """Times repetitions of ``work`` on the current device by CUDA events, replayed as one CUDA graph where it may be
    captured.

    Work that needs no preparing is repeated until there are `GRAPH_CALLS`; other work has to bring so many itself.
    """
    turns = -(-GRAPH_CALLS // work.calls_per_repetition) if work.prepare is nothing else 1

    def run() -> None:
        for _ in range(turns):
            work.run()

    work.prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # on which the work was prepared
    with torch.cuda.stream(stream):
        work.run()
    torch.cuda.synchronize()
    replay = run
    if work.capturable:
        graph = torch.cuda.CUDAGraph()
        work.prepare()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):  # torch's own is of the device that captures first
            run()
        replay = graph.replay

    def times(repetitions: int) -> list[float]:
        pairs = []
        for _ in range(repetitions):
            work.prepare()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        calls = turns * work.calls_per_repetition
        return [begin.elapsed_time(end) / 1e3 / calls for begin, end in pairs]

    return times


def stopwatch(work: Work, device: torch.device, ahead: int = 0) -> Stopwatch:
    """The stopwatch for work on ``device``; ``ahead`` as in `cpu_stopwatch`, on a GPU nothing: work is not split there.
    """
    if device.type != "cuda":
        return cpu_stopwatch(work, ahead=ahead)
    with torch.cuda.device(device):
        watch = cuda_stopwatch(work)

    def times(repetitions: int) -> list[float]:
        with torch.cuda.device(device):
            return watch(repetitions)

    return times


@dataclass(frozen=True)
class Protocol:
    """How often contenders are timed.

    Attributes:
        repetitions: timed ones per trial and work; untimed ones of at least `WARMUP_CALLS` calls come before.
        trials: that count.
        patience: seconds in which trials are repeated while the ceiling moves.
        burst: repetitions of a work before the next one's turn.
    """

    repetitions: int = REPETITIONS
    trials: int = TRIALS
    patience: float = PATIENCE
    burst: int = 1


def time_in_turn(watches: Mapping[str, tuple[Stopwatch, Work]], protocol: Protocol, ceiling: Collection[str],
                 progress: Callable[[str], None] = lambda name: None,
                 clock: Callable[[], float] = time.monotonic) -> tuple[dict[str, Timing], float]:
    """Time several works against each other and against a ceiling.

    They take turns after every burst of repetitions, so that a disturbance of the machine hits all alike, and the best
    of each comes from the same moments.

    Args:
        watches: name -> a stopwatch and its work.
        ceiling: names of works that all do what nothing can be faster than; a trial's ceiling is the best of them.
        progress: called with what is being done.
        clock: seconds, for the protocol's patience.

    Returns:
        the timings, of the trials that count, and how much the ceiling moved between these.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in watches}

    def trial() -> float:
        number = len(next(iter(seconds.values()))) + 1
        progress(f"trial {number}" + (": the ceiling moves" if number > protocol.trials else ""))
        found: dict[str, list[float]] = {name: [] for name in watches}
        for watch, work in watches.values():
            watch(-(-WARMUP_CALLS // (work.part or work.calls_per_repetition)))
        for done in range(0, protocol.repetitions, protocol.burst):
            for name, (watch, _) in watches.items():
                found[name] += watch(min(protocol.burst, protocol.repetitions - done))
        for name, times in found.items():
            seconds[name].append(times)
        return ceiling_of(found)

    def ceiling_of(found: Mapping[str, Sequence[float]]) -> float:
        return min(min(found[name]) for name in ceiling)

    counted = until_steady(trial, protocol.trials, protocol.patience, clock)
    moved = movement([ceiling_of({name: seconds[name][number] for name in ceiling}) for number in counted])
    return {name: Timing.of([found[number] for number in counted]) for name, found in seconds.items()}, moved
