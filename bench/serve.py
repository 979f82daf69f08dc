"""`ssd-bench serve`: pictures that arrive at random, drawn by continuous batching, in static batches, one at a time."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ssd_janus import ModelShape
from ssd_janus.engine import Engine, PictureRequest, Sampling, Scheduler, Ticket
from ssd_kernels.policies import build

from . import machine
from .kernel import first_line
from .records import OK, Record, record

POLICY, ROW_BUFFER = "heavy", 24
POLL_SECONDS = 2e-3  # between two looks at the clock by who lets pictures arrive
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Clock:
    """Seconds that go on while something is drawn; when nothing is, the time until the next arrival is skipped."""

    def __init__(self, base: Callable[[], float]) -> None:
        self._base, self._ahead = base, -base()

    def __call__(self) -> float:
        return self._base() + self._ahead

    def skip_to(self, moment: float) -> None:
        """Now it is ``moment``, unless it is later."""
        self._ahead += max(0.0, moment - self())


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        model: name for tables. dtype: of weights and cache.
        capacity: pictures at once. pictures: that arrive. steps: tokens of each.
        rate: arrivals a second; None: `load` of what full batches would draw. load: that share.
        seed: of the arrivals. clock: one of `CLOCKS`.
        guidance: of all.
    """

    model: str
    dtype: str
    capacity: int
    pictures: int
    steps: int
    rate: float | None
    load: float
    seed: int
    clock: str
    guidance: float = 5.0


@dataclass
class Served:
    """One picture's moments by the clock, and its tokens."""

    submitted: float
    joined: float | None = None
    first_row: float | None = None
    finished: float | None = None
    tokens: torch.Tensor | None = None


class Server(Protocol):
    """A way to serve."""

    def submit(self, request: PictureRequest) -> None:
        """A picture arrives."""

    def idle(self) -> bool:
        """Whether nothing waits or is drawn."""

    def finish(self) -> list[Served]:
        """All pictures, in their order, once they are done; raises what failed."""

    def close(self) -> None:
        """Nothing is drawn any more."""


class Continuous:
    """The engine's scheduler."""

    def __init__(self, engine: Engine, setting: Setting, max_prompt: int, clock: Clock) -> None:
        slots = engine.slots(setting.capacity, max_prompt=max_prompt, steps=setting.steps)
        self._scheduler = Scheduler(slots, max_waiting=setting.pictures, clock=clock)
        self._tickets: list[Ticket] = []

    def submit(self, request: PictureRequest) -> None:
        self._tickets.append(self._scheduler.submit(request))

    def idle(self) -> bool:
        return all(ticket.done() for ticket in self._tickets)

    def finish(self) -> list[Served]:
        return [Served(ticket.submitted, tokens=ticket.result(), joined=ticket.joined, first_row=ticket.first_row,
                       finished=ticket.finished) for ticket in self._tickets]

    def close(self) -> None:
        self._scheduler.close(cancel=True)


class Static:
    """Batches that begin and end together: of all that wait when the last one has ended, up to the capacity."""

    def __init__(self, engine: Engine, setting: Setting, capacity: int, clock: Clock) -> None:
        self._engine, self._setting, self._capacity, self._clock = engine, setting, capacity, clock
        self._columns = engine.shape.columns
        self._changed, self._ended = threading.Condition(), False
        self._asked: list[tuple[PictureRequest, Served]] = []
        self._done = 0
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: PictureRequest) -> None:
        with self._changed:
            self._asked.append((request, Served(self._clock())))
            self._changed.notify()

    def idle(self) -> bool:
        return self._done == len(self._asked) or self._failure is not None

    def finish(self) -> list[Served]:
        self.close()
        if self._failure is not None:
            raise self._failure
        return [served for _, served in self._asked]

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while self._done == len(self._asked) and not self._ended:
                        self._changed.wait()
                    batch = self._asked[self._done:self._done + self._capacity]
                if not batch:
                    return
                self._draw(batch)
                self._done += len(batch)
        except Exception as error:
            self._failure = error

    def _draw(self, batch: Sequence[tuple[PictureRequest, Served]]) -> None:
        steps = 0

        def progress(done: int, total: int) -> None:
            nonlocal steps
            steps += 1
            for _, served in batch:
                if steps == 1:
                    served.joined = self._clock()
                if steps == self._columns:
                    served.first_row = self._clock()

        requests = [request for request, _ in batch]
        tokens = self._engine.generate(
            [request.prompt for request in requests], guidance=[request.guidance for request in requests],
            seeds=[request.seed for request in requests], sampling=requests[0].sampling, steps=self._setting.steps,
            progress=progress)
        for drawn, (_, served) in zip(tokens, batch, strict=True):
            served.finished, served.tokens = self._clock(), drawn


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Moments in seconds of a Poisson process of ``rate``, the first at 0."""
    chance, moments = random.Random(seed), [0.0]
    while len(moments) < count:
        moments.append(moments[-1] + chance.expovariate(rate))
    return moments


def serve(server: Server, requests: Sequence[PictureRequest], moments: Sequence[float], clock: Clock) -> list[Served]:
    """Let pictures arrive whether others are done or not (an open loop)."""
    try:
        for request, moment in zip(requests, moments, strict=True):
            while clock() < moment:
                if server.idle():
                    clock.skip_to(moment)
                else:
                    time.sleep(POLL_SECONDS)
            server.submit(request)
        return server.finish()
    finally:
        server.close()


def measure(model: Any, prompt: Sequence[int], setting: Setting, budget: float,
            progress: Callable[[str], None] = lambda text: None) -> list[Record]:
    """Serve the same arrivals in every way.

    Args:
        model: transformers' Janus.
        prompt: of every fourth picture; those of the others are shorter.
        budget: of the plan; 1 keeps everything.

    Raises:
        ValueError: a setting is out of range.
    """
    shape = ModelShape.of(model)
    if not shape.columns <= setting.steps <= shape.num_visual_tokens:
        raise ValueError(f"steps must be within {shape.columns}, a row, and {shape.num_visual_tokens}, got "
                         f"{setting.steps}")
    if setting.clock != "wall" and model.device.type != "cpu":
        raise ValueError(f"clock must be wall on {model.device}, got {setting.clock}")
    engine = Engine(model, None if budget == 1 else build(POLICY, shape, budget, ROW_BUFFER))
    sampling = Sampling()
    inside = len(prompt) - 2  # tokens between begin-of-text and begin-of-image
    prompts = [[prompt[0], *prompt[1:1 + inside * share // 4], prompt[-1]] for share in (4, 2, 3, 1)]
    requests = [PictureRequest(prompts[index % len(prompts)], setting.guidance, index, sampling)
                for index in range(setting.pictures)]
    about, base = machine.facts(model.device), CLOCKS[setting.clock]
    rate = setting.rate
    if rate is None:
        progress("finding what full batches draw")
        began = base()
        engine.generate([request.prompt for request in (requests * setting.capacity)[:setting.capacity]],
                        guidance=setting.guidance, steps=setting.steps)
        rate = setting.load * setting.capacity / (base() - began)
    point = {"label": setting.model, "batch": setting.capacity, "dtype": setting.dtype, "pictures": setting.pictures,
             "steps": setting.steps, "rate": rate, "seed": setting.seed, "clock": setting.clock, "budget": budget,
             "guidance": setting.guidance}
    moments = arrivals(setting.pictures, rate, setting.seed)
    lines: list[Record] = []
    expected: list[torch.Tensor] | None = None
    for name, make in ways(engine, setting, len(prompt)):
        progress(f"serving: {name}")
        contender, clock = {"name": name, "backend": None, "budget": budget}, Clock(base)
        try:
            served = serve(make(clock), requests, moments, clock)
        except (RuntimeError, MemoryError) as error:
            lines.append(record("serve", about, point, contender, status=f"failed: {first_line(error)}", seconds=None))
            continue
        tokens = [one.tokens for one in served if one.tokens is not None]
        expected = tokens if expected is None else expected
        same = all(map(torch.equal, tokens, expected)) and len(tokens) == len(expected)
        if engine.exact and not same:
            status = "wrong: a picture's tokens depend on how it is served"
            lines.append(record("serve", about, point, contender, status=status, seconds=None))
            continue
        lines.append(record("serve", about, point, contender, status=OK, same_tokens=same, **figures(served)))
    about["load_after"] = machine.load()
    return lines


def ways(engine: Engine, setting: Setting, longest: int) -> Iterator[tuple[str, Callable[[Clock], Server]]]:
    """Names of the ways to serve, and what makes each."""
    yield "continuous batching", lambda clock: Continuous(engine, setting, longest, clock)
    yield "static batches", lambda clock: Static(engine, setting, setting.capacity, clock)
    yield "one at a time", lambda clock: Static(engine, setting, 1, clock)


def figures(served: Sequence[Served]) -> dict[str, Any]:
    """What a record says of pictures that have been served."""
    finished = [_known(one.finished) for one in served]
    whole = max(finished) - served[0].submitted
    drawing = sum(_known(one.finished) - _known(one.joined) for one in served)
    waits = {"start": [_known(one.joined) - one.submitted for one in served],
             "first_row": [_known(one.first_row) - one.submitted for one in served],
             "picture": [_known(one.finished) - one.submitted for one in served]}
    median = statistics.median(waits["picture"])
    return {"seconds": {"median": median, "best": min(waits["picture"]), "spread": 0.0, "trials": [median]},
            "rate": len(served) / whole, "drawn_at_once": drawing / busy(served),
            "to": {name: {"mean": statistics.mean(values), "p50": percentile(values, 50),
                          "p99": percentile(values, 99)} for name, values in waits.items()}}


def busy(served: Sequence[Served]) -> float:
    """Seconds in which at least one picture was drawn."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((_known(one.joined), _known(one.finished)) for one in served):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def percentile(values: Sequence[float], share: int) -> float:
    """The smallest value that at least ``share`` of 100 values do not exceed."""
    ordered = sorted(values)
    return ordered[-(-share * len(ordered) // 100) - 1]


def _known(moment: float | None) -> float:
    assert moment is not None
    return moment
