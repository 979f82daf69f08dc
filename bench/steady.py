"""Whether recorded times may be believed: ceilings that hold still, parts that add up. Pure functions of seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

MOST_MOVED = 0.2  # of the ceiling, between trials, for a verdict
MOST_APART = 0.1  # of a step's parts from its time, for the parts to be shown


def movement(ceilings: Sequence[float]) -> float:
    """How much slower the slowest of some trials' ceilings was than the fastest, relative."""
    return max(ceilings) / min(ceilings) - 1


def steadiest(ceilings: Sequence[float], count: int) -> range:
    """The ``count`` trials in a row whose ceilings move least, the last of several such; all if there are fewer.

    Only the ceiling chooses: what contenders did in a trial has no say in whether it counts.

    Args:
        ceilings: seconds of the ceiling in every trial.
    """
    runs = [range(first, first + count) for first in range(len(ceilings) - count + 1)]
    return min(reversed(runs), key=lambda run: movement([ceilings[trial] for trial in run]),
               default=range(len(ceilings)))


def until_steady(trial: Callable[[], float], count: int, patience: float, clock: Callable[[], float]) -> range:
    """Run ``count`` trials, and more until the last ``count`` hold still or ``patience`` is over.

    Args:
        trial: runs one, and returns its ceiling's seconds. patience: seconds after the first ``count`` trials.
        clock: in seconds.

    Returns:
        the trials that count: `steadiest`.
    """
    ceilings = [trial() for _ in range(count)]
    began = clock()
    while movement(ceilings[-count:]) > MOST_MOVED and clock() - began < patience:
        ceilings.append(trial())
    return steadiest(ceilings, count)


def adds_up(parts: Iterable[float], whole: float) -> bool:
    """Whether parts are those of ``whole``, and not of another time on another machine."""
    return abs(sum(parts) - whole) <= MOST_APART * whole
