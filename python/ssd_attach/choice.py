"""What caches keep: a plan as it is, or a policy's name and a budget, and what that takes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ssd_kernels import CachePlan
from ssd_kernels.policies import POLICIES, HeadProfile, build

from .online import OnlinePlan
from .shape import ModelShape
from .units import show_bytes

DEFAULT_BUDGET = 0.2
WITHOUT_PROFILE, WITH_PROFILE = "decayed", "adaptive"  # the default policies; docs/models.md says what chose them
PROMPT = 64  # tokens, of the picture whose bytes are told
NAMES = (*POLICIES, "online")


def parameters_of(policy: str) -> dict[str, Any]:
    """The parameters of a policy's own and their defaults; ``policy`` is one of `NAMES`."""
    function: Callable[..., CachePlan] = OnlinePlan if policy == "online" else POLICIES[policy]
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name != "profile"}


@dataclass(frozen=True)
class Choice:
    """A plan, how it came about, and what it takes; as a text one line.

    Attributes:
        policy: its name, or None for a plan that was given.
        asked: the budget that the policy was asked for; None for a plan that was given.
        plan: what caches keep.
        shape: of the model.
        dtype: of the caches.
    """

    policy: str | None
    asked: float | None
    plan: CachePlan
    shape: ModelShape
    dtype: torch.dtype

    def nbytes(self, rows: int = 2, max_prompt: int = PROMPT) -> int:
        """Bytes of a cache for as many rows; a picture with guidance takes two."""
        return self._bytes_of(self.plan, rows, max_prompt)

    def full_nbytes(self, rows: int = 2, max_prompt: int = PROMPT) -> int:
        """As `nbytes`, for a cache that keeps every token."""
        return self._bytes_of(self.shape.full_plan(), rows, max_prompt)

    def _bytes_of(self, plan: CachePlan, rows: int, max_prompt: int) -> int:
        return plan.nbytes(batch_size=rows, head_dim=self.shape.head_dim, max_prompt=max_prompt, dtype=self.dtype,
                           num_visual_tokens=self.shape.num_visual_tokens)

    def __str__(self) -> str:
        reached = f"{self.plan.budget(self.shape.num_visual_tokens):.1%}"
        asked = f"budget {reached}" if self.asked is None else f"budget {self.asked:.1%} asked, {reached} reached"
        own, full, dtype = self.nbytes(), self.full_nbytes(), str(self.dtype).removeprefix("torch.")
        return (f"{self.policy or 'the given plan'}: {asked}, row buffer {self.plan.row_buffer}; {show_bytes(own)} for "
                f"a guided picture's two rows in {dtype}, {own / full:.1%} of the full cache's {show_bytes(full)}")

    __repr__ = __str__


def choose(shape: ModelShape, plan: CachePlan | str | None, dtype: torch.dtype, *, budget: float | None = None,
           row_buffer: int | None = None, profile: HeadProfile | str | os.PathLike[str] | None = None,
           parameters: Mapping[str, Any] | None = None) -> Choice:
    """The plan for a model.

    Args:
        shape: of the model.
        plan: a plan, or the name of a policy: those of `ssd_kernels.policies.POLICIES`, and ``online``. None for
            ``decayed``, or ``adaptive`` where there is a profile.
        dtype: of the caches.
        budget: of a policy; None for 0.2, or 1 for ``full``.
        row_buffer: of a policy; None for one grid row.
        profile: what was measured about the model's heads, or its file; for the policies that need one.
        parameters: of the policy's own.

    Raises:
        TypeError: ``plan`` is neither, ``profile`` is neither a profile nor a path, or a parameter that the policy does
            not have; the message names those that it has.
        ValueError: the plan does not fit the model, no such policy, a policy without the profile that it needs, a
            bad budget, or any of the other arguments beside a plan.
    """
    own = dict(parameters or {})
    if plan is None:
        plan = WITHOUT_PROFILE if profile is None else WITH_PROFILE
    if not isinstance(plan, str):
        given = {"budget": budget, "row_buffer": row_buffer, "profile": profile, **own}
        beside = [name for name, value in given.items() if value is not None]
        if not isinstance(plan, CachePlan):
            raise TypeError(f"plan must be a CachePlan or the name of a policy, one of {', '.join(NAMES)}, got "
                            f"{type(plan).__name__}")
        shape.check(plan)
        if beside:
            raise ValueError(f"{', '.join(beside)} must be left out beside a plan, which says what to keep; a policy's "
                             "name in its place takes them")
        return Choice(None, None, plan, shape, dtype)
    if plan not in NAMES:
        raise ValueError(f"plan must be a CachePlan or the name of a policy, one of {', '.join(NAMES)}, got {plan!r}")
    known = parameters_of(plan)
    for name in own.keys() - known.keys():
        allowed = f"must be one of {', '.join(known)}" if known else "must be none, it has none"
        raise TypeError(f"parameters of policy {plan} {allowed}, besides budget, row_buffer and profile, got {name!r}")
    if profile is not None and not isinstance(profile, (HeadProfile, str, os.PathLike)):
        raise TypeError(f"profile must be a HeadProfile or the path of one, got {type(profile).__name__}")
    asked = (1.0 if plan == "full" else DEFAULT_BUDGET) if budget is None else budget
    if plan == "online":
        made: CachePlan = OnlinePlan(shape, asked, row_buffer, **own)
    else:
        if isinstance(profile, (str, os.PathLike)):
            profile = HeadProfile.load(profile)
        made = build(plan, shape, asked, row_buffer, profile=profile, **own)
    return Choice(plan, asked, made, shape, dtype)
