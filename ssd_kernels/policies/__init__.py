"""Policies: functions that turn a budget into a `CachePlan`.

    policy(shape, budget, row_buffer=None, *, profile=None, ...) -> CachePlan

- ``shape``: the model's sizes (`Shape`), and where grid rows stand among a picture's tokens (`Raster`).
- ``budget``: largest share of the visual tokens that the mean head may hold, row buffer included, within (0, 1]. Every
  policy uses it up to less than one slot per head on average, so that policies compare at equal bytes.
- ``row_buffer``: R in steps; None for one grid row, 0 to evict at every step.
- ``profile``: what was measured about the heads (`HeadProfile`); only policies in `profiled.py` need one.
- parameters of a policy's own are keyword arguments with defaults.

All raise TypeError or ValueError that names the argument, and ValueError with the smallest possible budget when it is
too small for the row buffer. A new policy is one such function and one line in `POLICIES` (in this repository also a
name in `ssd_janus.cli.options.PolicyName` and a row in docs/policies.md; tests say so). Online typing is no function of
these: it decides while it draws (`ssd_attach.online.OnlinePlan`).
"""

from __future__ import annotations

from typing import Any

from ..plan import CachePlan
from .profile import KINDS, HeadProfile
from .profiled import adaptive, head_costs, kind_of, margin, predicted_cost, ssd, ssd_guarded
from .raster import Raster, raster_of
from .solve import Policy, Shape
from .uniform import decayed, full, h2o, heavy, random, rows, streaming_llm, window

__all__ = ["KINDS", "NEED_PROFILE", "POLICIES", "HeadProfile", "Raster", "Shape", "adaptive", "build", "decayed",
           "full", "h2o", "head_costs", "heavy", "kind_of", "margin", "predicted_cost", "random", "raster_of", "rows",
           "ssd", "ssd_guarded", "streaming_llm", "window"]

POLICIES: dict[str, Policy] = {policy.__name__: policy for policy in (
    full, window, heavy, decayed, streaming_llm, h2o, rows, random, ssd, ssd_guarded, margin, adaptive)}
NEED_PROFILE = frozenset({"ssd", "ssd_guarded", "margin", "adaptive"})


def build(name: str, shape: Shape, budget: float, row_buffer: int | None = None, *,
          profile: HeadProfile | None = None, **parameters: Any) -> CachePlan:
    """The plan of the policy called ``name``.

    Raises:
        TypeError, ValueError: as the policy.
        ValueError: no such policy, or it needs a profile and none is given.
    """
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    if name in NEED_PROFILE:
        if profile is None:
            raise ValueError(f"policy {name} needs a profile of the model's heads, got none; make one with "
                             "`ssd-janus profile`")
        parameters["profile"] = profile
    return POLICIES[name](shape, budget, row_buffer, **parameters)
