"""Policies: functions that turn a budget into a plan.

Every policy but `full` gives all heads the same number of slots, the largest with which
``plan.budget(num_visual_tokens)`` does not exceed the budget asked for. The row buffer counts in the budget.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Protocol

from ssd_kernels import CachePlan, HeadSpec

from .shape import ModelShape

__all__ = ["POLICIES", "build", "full", "heavy", "mixed", "window"]


class Policy(Protocol):
    def __call__(self, shape: ModelShape, budget: float, row_buffer: int | None = None) -> CachePlan: ...


def full(shape: ModelShape, budget: float = 1.0, row_buffer: int | None = None) -> CachePlan:
    """Keep everything. ``budget`` can only be 1, and a row buffer changes nothing.

    Raises:
        ValueError: another budget.
    """
    _check(budget, row_buffer)
    if budget != 1:
        raise ValueError(f"budget of policy full must be 1, got {budget}: it keeps every token")
    return CachePlan.uniform(HeadSpec.full(), shape.num_layers, shape.num_heads, row_buffer or 0)


def window(shape: ModelShape, budget: float, row_buffer: int | None = None) -> CachePlan:
    """Every head keeps its most recent visual tokens.

    Args:
        shape: the model's.
        budget: largest share of the visual tokens held by the mean head, within (0, 1].
        row_buffer: R in steps; None for one grid row.

    Raises:
        TypeError: an argument of another type.
        ValueError: budget out of range, or too small for the row buffer; the message says the smallest possible.
    """
    return _solve(shape, budget, row_buffer, lambda layer, head, size: HeadSpec.window(size))


def heavy(shape: ModelShape, budget: float, row_buffer: int | None = None) -> CachePlan:
    """Every head keeps the tokens it attends to most per step, and half of its slots for the newest. As `window`."""
    return _solve(shape, budget, row_buffer, lambda layer, head, size: _heavy(size))


def mixed(shape: ModelShape, budget: float, row_buffer: int | None = None) -> CachePlan:
    """`window` and `heavy` heads in turn, so that half of all heads are of either kind. As `window`."""
    return _solve(shape, budget, row_buffer,
                  lambda layer, head, size: _heavy(size) if (layer + head) % 2 else HeadSpec.window(size))


POLICIES: dict[str, Policy] = {"full": full, "window": window, "heavy": heavy, "mixed": mixed}


def build(name: str, shape: ModelShape, budget: float, row_buffer: int | None = None) -> CachePlan:
    """The plan of the policy called ``name``; arguments and errors as in `window`.

    Raises:
        ValueError: no such policy.
    """
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name](shape, budget, row_buffer)


def _heavy(size: int) -> HeadSpec:
    # Sums favour old tokens; the mean per step and a recent half keep new ones from starving.
    return HeadSpec.heavy(size, recent=size // 2, score="mean")


def _solve(shape: ModelShape, budget: float, row_buffer: int | None,
           spec: Callable[[int, int, int], HeadSpec]) -> CachePlan:
    """The plan of ``spec(layer, head, size)`` with the largest size within the budget."""
    _check(budget, row_buffer)
    buffer = shape.columns if row_buffer is None else row_buffer
    tokens = shape.num_visual_tokens

    def plan(size: int) -> CachePlan:
        return CachePlan([[spec(layer, head, size) for head in range(shape.num_heads)]
                          for layer in range(shape.num_layers)], buffer)

    sizes = range(1, tokens + 1)
    within = bisect.bisect_right(sizes, budget + 1e-9, key=lambda size: plan(size).budget(tokens))
    if within == 0:
        smallest = math.ceil(plan(1).budget(tokens) * 1e4) / 1e4
        raise ValueError(f"budget must be at least {smallest} with row_buffer={buffer} and {tokens} "
                         f"visual tokens, got {budget}")
    return plan(sizes[within - 1])


def _check(budget: object, row_buffer: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"budget must be a number, got {budget!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be within (0, 1], got {budget}")
    if row_buffer is None:
        return
    if isinstance(row_buffer, bool) or not isinstance(row_buffer, int):
        raise TypeError(f"row_buffer must be an int or None, got {row_buffer!r}")
    if row_buffer < 0:
        raise ValueError(f"row_buffer must be at least 0, got {row_buffer}")
