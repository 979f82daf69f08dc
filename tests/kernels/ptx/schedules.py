"""In which order threads run, and what the memory model may do to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from . import build

AT_ONCE, ANY_TIME, WHEN_AWAITED = 0, 1, 2  # when asynchronous copies arrive


@dataclass(frozen=True)
class Schedule:
    """How the executor runs a launch.

    Attributes:
        seed: of all that is drawn; the next launch has the next one.
        independent: threads of a warp go on by themselves, some at a time; else in lockstep where they can.
        alive: blocks that run at once, each for a random while.
        weak: plain stores reach other blocks only at a fence, at random or at the end, and plain loads may be stale.
        copies: AT_ONCE, ANY_TIME or WHEN_AWAITED.
        races: report accesses that neither a barrier nor fences around an atomic order.
        counts: count instructions and accesses.
    """

    seed: int = 0
    independent: bool = False
    alive: int = 1
    weak: bool = False
    copies: int = WHEN_AWAITED
    races: bool = True
    counts: bool = False


SCHEDULES = {
    "lockstep": Schedule(),
    "eager": Schedule(alive=64, weak=True, copies=AT_ONCE),
    "late": Schedule(independent=True, alive=64, weak=True, copies=WHEN_AWAITED),
    "adversarial": Schedule(independent=True, alive=6, weak=True, copies=ANY_TIME),
}


def usual() -> Schedule:
    """What tests run that ask for nothing else; SSD_PTX_SCHEDULE and SSD_PTX_SEED choose another."""
    name, seed = os.environ.get("SSD_PTX_SCHEDULE", "lockstep"), int(os.environ.get("SSD_PTX_SEED", "0"))
    return replace(SCHEDULES[name], seed=seed)


def use(schedule: Schedule) -> None:
    """Run all launches from now on so."""
    build.module().set_options(**asdict(schedule))


@contextmanager
def scheduled(schedule: Schedule) -> Iterator[None]:
    """Run launches so, and afterwards as usual."""
    use(schedule)
    try:
        yield
    finally:
        use(usual())
