"""The plans that requests may name: a policy and a budget, as on the command line, or the server's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

from ssd_attach.choice import DEFAULT_BUDGET, WITH_PROFILE, WITHOUT_PROFILE
from ssd_kernels import CachePlan
from ssd_kernels.policies import NEED_PROFILE, POLICIES, BudgetTooSmall, HeadProfile, build

from ..shape import ModelShape
from .schema import Refused

SERVED = "served"  # names the plan that the server was started with
BUDGETS = (0.05, 0.1, 0.2, 0.35, 0.5)  # to choose from; requests may name others
KEPT = 32  # plans that are not made again; one of Janus-Pro-7B may take some MB


class Plans:
    """Makes plans when they are asked for. Any thread may ask.

    Attributes:
        served: the server's own plan.
    """

    def __init__(self, shape: ModelShape, served: CachePlan, profile: HeadProfile | None, any_plan: bool) -> None:
        """
        Args:
            shape: of the model.
            served: the server's own plan.
            profile: of the model's heads, for the policies that need one.
            any_plan: whether others than ``served`` can be drawn.

        Raises:
            ValueError: the profile is of a model of another shape.
        """
        if profile is not None:
            profile.check(shape)
        self.served, full = served, served == shape.full_plan()
        names = [name for name in POLICIES if profile is not None or name not in NEED_PROFILE]
        self._names = (["full"] if full else [SERVED]) if not any_plan else names if full else [SERVED, *names]
        self._first = (WITHOUT_PROFILE if profile is None else WITH_PROFILE) if any_plan and full else self._names[0]
        self._build = lru_cache(KEPT)(lambda name, budget: build(name, shape, budget, profile=profile))

    def get(self, policy: str | None, budget: float | None) -> CachePlan:
        """
        Args:
            policy: None or `SERVED` for the server's own plan, or a name of `ssd_kernels.policies.POLICIES`.
            budget: None for the command line's default.

        Raises:
            Refused: there is no such plan; the error names the parameter.
        """
        if policy in (None, SERVED):
            if budget is not None:
                raise Refused(400, "budget needs a policy", "budget", "invalid_value")
            return self.served
        if policy not in self._names:
            raise Refused(400, f"policy must be one of {', '.join(self._names)}, got {policy[:60]!r}", "policy",
                          "invalid_value")
        try:
            return self._build(policy, budget or (1.0 if policy == "full" else DEFAULT_BUDGET))
        except ValueError as error:
            raise Refused(400, str(error), "budget", "invalid_value") from None

    @cached_property
    def offers(self) -> dict[str, Any]:
        """As JSON: every policy that may be named, what it says about itself and budgets to choose from; and what to
        begin with. Large models' take a while."""
        data = [{"policy": name, "about": "What this server was started with." if name == SERVED else
                 _first_paragraph(POLICIES[name]), "budgets": self._budgets(name)} for name in self._names]
        budgets = next(offer["budgets"] for offer in data if offer["policy"] == self._first)
        near = min(budgets, key=lambda budget: abs(budget - DEFAULT_BUDGET), default=None)
        return {"data": data, "default": {"policy": self._first, "budget": near}}

    def _budgets(self, name: str) -> list[float]:
        """Those of `BUDGETS` that are large enough."""
        if name in (SERVED, "full"):
            return [1.0] if name == "full" else []
        for index, budget in enumerate(BUDGETS):
            try:
                self._build(name, budget)
            except BudgetTooSmall:
                continue
            return [*BUDGETS[index:]]
        return [1.0]


def _first_paragraph(policy: Callable[..., Any]) -> str:
    return " ".join((inspect.getdoc(policy) or "").partition("\n\n")[0].split())
