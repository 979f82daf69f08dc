"""Policies: functions that turn a budget into a `CachePlan`.

    policy(shape, budget, row_buffer=None, *, profile=None, ...) -> CachePlan

- ``shape``: the model's sizes (`Shape`), and where grid rows stand among a picture's tokens (`Raster`).
- ``budget``: largest share of the visual tokens that the mean head may hold, row buffer included, within (0, 1]. Every
  policy uses it up to less than one slot per head on average, so that policies compare at equal bytes.
- ``row_buffer``: R in steps; None for one grid row, 0 to evict at every step.
- ``profile``: what was measured about the heads (`HeadProfile`); only policies in `profiled.py` need one.
- parameters of a policy's own are keyword arguments with defaults.

`build` makes any of them by its name, within a budget in tokens or in bytes, stored in a format of
`ssd_kernels.kv_format` or in the best one.

All raise TypeError or ValueError that names the argument, and `BudgetTooSmall`, a ValueError with the smallest possible
budget, when it is too small for the row buffer. A new policy is one such function and one line in `POLICIES` (in this
repository also a name in `ssd_janus.cli.options.PolicyName` and a row in docs/policies.md; tests say so). Online typing
is no function of these: it decides while it draws (`ssd_attach.online.OnlinePlan`), but `within_budget` gives it
budgets in bytes, too.
"""

from __future__ import annotations

from typing import Any

import torch

from ..plan import CachePlan
from .budget import BEST, within_budget
from .profile import KINDS, HeadProfile
from .profiled import adaptive, head_costs, kind_of, margin, predicted_cost, ssd, ssd_guarded
from .raster import Raster, raster_of
from .solve import BudgetTooSmall, Policy, Shape
from .uniform import decayed, full, h2o, heavy, random, rows, streaming_llm, window

__all__ = ["BEST", "KINDS", "NEED_PROFILE", "POLICIES", "BudgetTooSmall", "HeadProfile", "Raster", "Shape", "adaptive",
           "build", "decayed", "full", "h2o", "head_costs", "heavy", "kind_of", "margin", "predicted_cost", "random",
           "raster_of", "rows", "ssd", "ssd_guarded", "streaming_llm", "window", "within_budget"]

POLICIES: dict[str, Policy] = {policy.__name__: policy for policy in (
    full, window, heavy, decayed, streaming_llm, h2o, rows, random, ssd, ssd_guarded, margin, adaptive)}
NEED_PROFILE = frozenset({"ssd", "ssd_guarded", "margin", "adaptive"})


def build(name: str, shape: Shape, budget: float | None = None, row_buffer: int | None = None, *,
          byte_budget: float | None = None, dtype: torch.dtype | None = None, kv_format: str = "auto",
          profile: HeadProfile | None = None, **parameters: Any) -> CachePlan:
    """The plan of the policy called ``name``.

    Args:
        name: one of `POLICIES`.
        shape: as of policies; with ``byte_budget`` it also has a ``head_dim``.
        budget: in tokens, as of policies.
        row_buffer: as of policies.
        byte_budget: in place of ``budget``, within (0, 1]: largest share that keys, values and scales of visual tokens
            take of the bytes that a full cache has for them in ``dtype`` (`CachePlan.byte_budget`). What is left once
            every token is kept stays unused.
        dtype: of the model's caches, for ``byte_budget``.
        kv_format: how the plan stores keys and values, of `ssd_kernels.kv_format.KV_FORMATS`; or `BEST`, with
            ``byte_budget`` only: the one with which the policy's plan is predicted to cost least (`predicted_cost`),
            fewer tokens in the model's dtype or more of them in 8 bits.
        profile: as of policies; `BEST` needs one, too.
        parameters: of the policy's own.

    Raises:
        TypeError, ValueError: as the policy.
        TypeError: no ``dtype`` or no ``shape.head_dim`` with ``byte_budget``.
        ValueError: no such policy or format, it needs a profile and none is given, both budgets or none.
        BudgetTooSmall: the smallest budget is in the unit of the given one.
    """
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    if name in NEED_PROFILE:
        if profile is None:
            raise ValueError(f"policy {name} needs a profile of the model's heads, got none; make one with "
                             "`ssd-janus profile`")
        parameters["profile"] = profile
    return within_budget(lambda tokens: POLICIES[name](shape, tokens, row_buffer, **parameters), shape, budget,
                         byte_budget, dtype, kv_format, profile)
