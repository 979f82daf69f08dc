"""Budgets in bytes: plans in any format of storage within as many bytes, and the format that loses least."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch

from ..arguments import check_int
from ..kv_format import KV_FORMATS, vector_bytes
from ..plan import CachePlan
from ..reading import shown
from .profile import HeadProfile
from .profiled import predicted_cost
from .solve import BudgetTooSmall, Shape, check_budget

BEST = "best"


def within_budget(make: Callable[[float], CachePlan], shape: Shape, budget: float | None, byte_budget: float | None,
                  dtype: torch.dtype | None, kv_format: str, profile: HeadProfile | None) -> CachePlan:
    """What ``make`` gives within a budget in either unit, stored as ``kv_format`` says.

    Args: as of `ssd_kernels.policies.build`, but for ``make``: the plan within a budget in tokens.

    Raises: likewise.
    """
    if not isinstance(kv_format, str) or kv_format not in (*KV_FORMATS, BEST):
        raise ValueError(f"kv_format must be one of {', '.join(map(repr, (*KV_FORMATS, BEST)))}, got "
                         f"{shown(kv_format)}")
    if (budget is None) == (byte_budget is None):
        raise ValueError("budget, in tokens, or byte_budget must be given, and not both, got "
                         f"budget={shown(budget)} and byte_budget={shown(byte_budget)}")
    if byte_budget is None:
        if kv_format == BEST:
            raise ValueError(f"kv_format={BEST!r} needs byte_budget, got a budget in tokens: at as many tokens, "
                             "storage in 8 bits never loses less")
        return _in(kv_format, make(budget))  # type: ignore[arg-type]  # policies check their budget
    check_budget("byte_budget", byte_budget)
    if not isinstance(dtype, torch.dtype):
        raise TypeError("dtype must be the torch.dtype of the model's caches, whose bytes byte_budget is a share of, "
                        f"got {shown(dtype)}")
    head_dim = check_int("shape.head_dim", getattr(shape, "head_dim", None), 1)

    def stored(kv_format: str) -> CachePlan:
        share = vector_bytes(kv_format, head_dim, dtype) / vector_bytes("auto", head_dim, dtype)
        try:
            return _in(kv_format, make(min(1.0, byte_budget / share)))
        except BudgetTooSmall as error:
            why = f"{error.why}, kv_format={kv_format!r}, head_dim={head_dim} and {dtype}"
            raise BudgetTooSmall(error.smallest * share, why, byte_budget, "byte_budget") from None

    return _best(stored, shape, profile) if kv_format == BEST else stored(kv_format)


def _in(kv_format: str, plan: CachePlan) -> CachePlan:
    """The plan, stored in this format; a copy, in which a subclass finds all that is its own."""
    if kv_format != plan.kv_format:
        plan = copy(plan)
        object.__setattr__(plan, "kv_format", kv_format)
    return plan


def _best(stored: Callable[[str], CachePlan], shape: Shape, profile: Any) -> CachePlan:
    """The plan whose format is predicted to cost least, the first of equals."""
    if not isinstance(profile, HeadProfile):
        raise ValueError(f"kv_format={BEST!r} needs a profile of the model's heads, got {shown(profile)}; make one "
                         "with `ssd-janus profile`")
    if profile.check(shape).int8_error is None:
        raise ValueError(f"kv_format={BEST!r} needs a profile that says what storage in 8 bits costs, got one that was "
                         "made before that was measured; make a new one with `ssd-janus profile`")
    plans: list[CachePlan] = []
    refusals: list[BudgetTooSmall] = []
    for kv_format in KV_FORMATS:
        try:
            plans.append(stored(kv_format))
        except BudgetTooSmall as error:
            refusals.append(error)
    if not plans:
        raise min(refusals, key=lambda error: error.smallest)
    return min(plans, key=lambda plan: predicted_cost(plan, profile))
