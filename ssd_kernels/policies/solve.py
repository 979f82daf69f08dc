"""What policies share: checking arguments and using up a budget."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Protocol

from ..heads import HeadSpec
from ..plan import CachePlan
from .raster import raster_of

Specs = Callable[[int, int], HeadSpec]  # (layer, head) -> spec


class Shape(Protocol):
    """The sizes that a plan depends on; ``columns`` is the number of tokens in a grid row.

    Where a picture is more than grid rows one after the other, the shape also has a ``raster``, a `Raster`.
    """

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_visual_tokens(self) -> int: ...
    @property
    def columns(self) -> int: ...


Policy = Callable[..., CachePlan]  # (shape, budget, row_buffer=None, *, profile=..., own parameters) -> plan


class BudgetTooSmall(ValueError):
    """A policy cannot make a plan within a budget.

    Attributes:
        smallest: budget that it needs.
        why: what that depends on, as the end of a sentence.
    """

    def __init__(self, smallest: float, why: str, given: object, name: str = "budget") -> None:
        super().__init__(f"{name} must be at least {math.ceil(smallest * 1e4) / 1e4:g} {why}, got {given}")
        self.smallest, self.why = smallest, why


def make(shape: Shape, row_buffer: int, spec: Specs) -> CachePlan:
    """The plan of ``spec(layer, head)``."""
    return CachePlan([[spec(layer, head) for head in range(shape.num_heads)] for layer in range(shape.num_layers)],
                     row_buffer)


def largest(shape: Shape, budget: float, row_buffer: int | None, sized: Callable[[int], Specs],
            steps: int) -> CachePlan:
    """The largest of the plans ``sized(1) .. sized(steps)`` that is within the budget.

    Plans must grow with their number, by at most one slot per head on average from one to the next; then less than one
    slot per head stays unused, unless the last of them is still within the budget.

    Raises:
        TypeError, ValueError: bad budget or row buffer.
        BudgetTooSmall: even the first plan exceeds the budget.
    """
    buffer = check(shape, budget, row_buffer)
    tokens = shape.num_visual_tokens

    def reached(number: int) -> float:
        return make(shape, buffer, sized(number)).budget(tokens)

    numbers = range(1, steps + 1)
    within = bisect.bisect_right(numbers, budget + 1e-9, key=reached)
    if within == 0:
        raise BudgetTooSmall(reached(1), f"with row_buffer={buffer} and {tokens} visual tokens", budget)
    return make(shape, buffer, sized(numbers[within - 1]))


def check(shape: Shape, budget: object, row_buffer: object) -> int:
    """Check the arguments that all policies share; returns R in steps."""
    check_budget("budget", budget)
    if row_buffer is None:
        return raster_of(shape).stride
    if isinstance(row_buffer, bool) or not isinstance(row_buffer, int):
        raise TypeError(f"row_buffer must be an int or None, got {row_buffer!r}")
    if row_buffer < 0:
        raise ValueError(f"row_buffer must be at least 0, got {row_buffer}")
    return row_buffer


def check_budget(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number within (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be within (0, 1], got {value}")


def check_number(name: str, value: object, low: float, high: float) -> float:
    """``value`` as a number within [low, high].

    Raises:
        TypeError: not a number (bool does not count as one).
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be within {low:g} .. {high:g}, got {value}")
    return float(value)


def check_share(name: str, value: object) -> float:
    """A number within [0, 1]."""
    return check_number(name, value, 0, 1)
