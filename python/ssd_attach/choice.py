"""What caches keep: a plan as it is, or a policy's name and a budget, and what that takes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ssd_kernels import CachePlan
from ssd_kernels.policies import POLICIES, HeadProfile, build, within_budget

from .online import OnlinePlan
from .shape import ModelShape
from .units import show_bytes

DEFAULT_BUDGET = 0.2
WITHOUT_PROFILE, WITH_PROFILE = "decayed", "adaptive"  # the default policies; docs/models.md says what chose them
PROMPT = 64  # tokens, of the picture whose bytes are told
NAMES = (*POLICIES, "online")
COMMON = ("budget", "byte_budget", "kv_format", "row_buffer", "profile")  # options of all policies


def parameters_of(policy: str) -> dict[str, Any]:
    """The parameters of a policy's own and their defaults; ``policy`` is one of `NAMES`."""
    function: Callable[..., CachePlan] = OnlinePlan if policy == "online" else POLICIES[policy]
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name != "profile"}


def make_plan(policy: str, shape: ModelShape, budget: float | None, row_buffer: int | None = None, *,
              byte_budget: float | None = None, dtype: torch.dtype | None = None, kv_format: str = "auto",
              profile: HeadProfile | None = None, **parameters: Any) -> CachePlan:
    """As `ssd_kernels.policies.build`, for all of `NAMES`."""
    if policy != "online":
        return build(policy, shape, budget, row_buffer, byte_budget=byte_budget, dtype=dtype, kv_format=kv_format,
                     profile=profile, **parameters)
    return within_budget(lambda tokens: OnlinePlan(shape, tokens, row_buffer, **parameters), shape, budget, byte_budget,
                         dtype, kv_format, profile)


@dataclass(frozen=True)
class Choice:
    """A plan, how it came about, and what it takes; as a text one line.

    Attributes:
        policy: its name, or None for a plan that was given.
        asked: the budget that the policy was asked for; None for a plan that was given.
        plan: what caches keep.
        shape: of the model.
        dtype: of the model's keys and values, and of caches whose plan says nothing else.
        in_bytes: ``asked`` is a share of the full cache's bytes, not of the tokens.
    """

    policy: str | None
    asked: float | None
    plan: CachePlan
    shape: ModelShape
    dtype: torch.dtype
    in_bytes: bool = False

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
        tokens, dtype = self.shape.num_visual_tokens, str(self.dtype).removeprefix("torch.")
        reached = f"{self.plan.budget(tokens):.1%}"
        if self.in_bytes:
            share = self.plan.byte_budget(tokens, head_dim=self.shape.head_dim, dtype=self.dtype)
            asked = f"{self.asked:.1%} of the bytes asked, {share:.1%} reached, with {reached} of the tokens"
        else:
            asked = f"budget {reached}" if self.asked is None else f"budget {self.asked:.1%} asked, {reached} reached"
        own, full = self.nbytes(), self.full_nbytes()
        kept, of = (dtype, "") if self.plan.kv_format == "auto" else (self.plan.kv_format, f" in {dtype}")
        return (f"{self.policy or 'the given plan'}: {asked}, row buffer {self.plan.row_buffer}; {show_bytes(own)} for "
                f"a guided picture's two rows in {kept}, {own / full:.1%} of the full cache's {show_bytes(full)}{of}")

    __repr__ = __str__


def choose(shape: ModelShape, plan: CachePlan | str | None, dtype: torch.dtype, *, budget: float | None = None,
           byte_budget: float | None = None, kv_format: str | None = None, row_buffer: int | None = None,
           profile: HeadProfile | str | os.PathLike[str] | None = None,
           parameters: Mapping[str, Any] | None = None) -> Choice:
    """The plan for a model.

    Args:
        shape: of the model.
        plan: a plan, or the name of a policy: those of `ssd_kernels.policies.POLICIES`, and ``online``. None for
            ``decayed``, or ``adaptive`` where there is a profile.
        dtype: of the model's keys and values.
        budget: of a policy, a share of the tokens; None for 0.2, or 1 for ``full``.
        byte_budget: in its place, a share of the bytes that a full cache takes in ``dtype``.
        kv_format: how a policy's plan stores keys and values: ``"auto"``, in ``dtype``, which None is, too; ``"int8"``;
            or ``"best"``, with ``byte_budget`` and a profile, whichever loses less (`ssd_kernels.policies.build`).
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
        given = {"budget": budget, "byte_budget": byte_budget, "kv_format": kv_format, "row_buffer": row_buffer,
                 "profile": profile, **own}
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
        raise TypeError(f"parameters of policy {plan} {allowed}, besides {', '.join(COMMON)}, got {name!r}")
    if profile is not None and not isinstance(profile, (HeadProfile, str, os.PathLike)):
        raise TypeError(f"profile must be a HeadProfile or the path of one, got {type(profile).__name__}")
    if isinstance(profile, (str, os.PathLike)):
        profile = HeadProfile.load(profile)
    if budget is None and byte_budget is None:
        budget = 1.0 if plan == "full" else DEFAULT_BUDGET
    made = make_plan(plan, shape, budget, row_buffer, byte_budget=byte_budget, dtype=dtype,
                     kv_format="auto" if kv_format is None else kv_format, profile=profile, **own)
    return Choice(plan, budget if byte_budget is None else byte_budget, made, shape, dtype, byte_budget is not None)
