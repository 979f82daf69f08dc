"""Policies that give every head what its profile says it needs."""

from __future__ import annotations

import numpy as np
import torch

from ..arguments import check_int
from ..heads import HeadSpec, ScoreRule
from ..layout import peak_tokens
from ..plan import CachePlan
from .profile import KINDS, HeadProfile
from .raster import raster_of
from .solve import BudgetTooSmall, Shape, Specs, check, check_number, check_share, largest, make


def ssd(shape: Shape, budget: float, row_buffer: int | None = None, *, profile: HeadProfile, tau: float | None = None,
        ratio: float = 3.0, recent: float = 0.0, score: ScoreRule = "sum") -> CachePlan:
    """Spatial heads keep a window, semantic heads the tokens with the largest running sums: SSD as published
    (arXiv 2510.18716, Algorithm 1).

    The paper gives neither the radius of the neighbourhood, nor tau, nor W and M per budget. Here the radius is the
    profile's, tau the median score, so that half of the heads are of either kind (published head maps fit a semantic
    share of .46 to .63), and M = 3 W, near what fits the published curves.

    Args:
        tau: heads with a sparsity score above it are semantic; None for the median over all heads.
        ratio: M / W.
        recent: share of a semantic head's slots for its newest tokens; the paper has none.
        score: the paper sums attention over all steps.
    """
    scores = _fitting(profile, shape).sparsity
    threshold = float(scores.median()) if tau is None else check_share("tau", tau)
    return _two_kinds(shape, budget, row_buffer, scores > threshold, ratio, recent, score)


def ssd_guarded(shape: Shape, budget: float, row_buffer: int | None = None, *, profile: HeadProfile,
                loss: float = 0.4, window_rows: float = 2.0, ratio: float = 1.0, recent: float = 0.5) -> CachePlan:
    """`ssd` repaired: per-step means instead of sums, half of the semantic heads' slots for their newest tokens, and
    heads typed by what a window would cost them.

    Running sums favour old tokens, so new ones starve, and a fixed radius takes heads for semantic that a slightly
    longer window serves.

    Args:
        loss: heads are semantic when a window misses more than this share of their visual attention.
        window_rows: length of that window in grid rows, at most the grid's.
        ratio: M / W.
        recent: share of a semantic head's slots for its newest tokens.
    """
    stride = raster_of(shape).stride
    length = check_number("window_rows", window_rows, 0, shape.num_visual_tokens / stride)
    missed = _fitting(profile, shape).window_loss(round(length * stride))
    return _two_kinds(shape, budget, row_buffer, missed > check_share("loss", loss), ratio, recent, "mean")


def _fitting(profile: object, shape: Shape) -> HeadProfile:
    """``profile`` itself, of a model of this shape: `HeadProfile.check` for what may not be a profile at all."""
    if not isinstance(profile, HeadProfile):
        raise TypeError(f"profile must be a HeadProfile, got {profile!r}")
    return profile.check(shape)


def _two_kinds(shape: Shape, budget: float, row_buffer: int | None, semantic: torch.Tensor, ratio: float,
               recent: float, score: ScoreRule) -> CachePlan:
    """Windows of W for spatial heads, M = ratio * W heavy slots for ``semantic`` ones [L, H]."""
    check_share("recent", recent)
    check_number("ratio", ratio, 1 / 64, 64)
    tokens, kinds = shape.num_visual_tokens, semantic.tolist()

    def sized(number: int) -> Specs:
        # The larger of the two grows by one token from each plan to the next.
        w, m = (min(tokens, max(1, int(part * number / max(ratio, 1.0)))) for part in (1.0, ratio))
        return lambda layer, head: (HeadSpec.heavy(m, recent=int(recent * m), score=score) if kinds[layer][head]
                                    else HeadSpec.window(w))

    return largest(shape, budget, row_buffer, sized, int(tokens * max(ratio, 1 / ratio)) + 1)


def margin(shape: Shape, budget: float, row_buffer: int | None = None, *, profile: HeadProfile,
           tau: float | None = None, left: int = 1, right: int = 1) -> CachePlan:
    """Semantic heads keep the margin columns by position and need no scores; spatial heads keep a window.

    SSD's own evidence is that semantic heads look at the right-most and the left-most columns of earlier rows. All
    heads have the same number of slots; those that no margin token needs hold the newest tokens.

    Args:
        tau: as in `ssd`.
        left, right: columns at either margin.
    """
    check_int("left", left, 0)
    check_int("right", right, 0)
    if left + right > shape.columns:
        raise ValueError(f"left and right must be together at most {shape.columns}, got {left}, {right}")
    scores = _fitting(profile, shape).sparsity
    semantic = (scores > (float(scores.median()) if tau is None else check_share("tau", tau))).tolist()
    raster = raster_of(shape)
    margins = [token for token in range(shape.num_visual_tokens) if (place := raster.place(token)) is not None
               and (place[1] < left or place[1] >= raster.columns - right)]

    def sized(size: int) -> Specs:
        # At least half of the slots stay with the newest tokens.
        spec = HeadSpec.heavy(size, recent=size - size // 2, score="position", pinned=margins)
        return lambda layer, head: spec if semantic[layer][head] else HeadSpec.window(size)

    return largest(shape, budget, row_buffer, sized, shape.num_visual_tokens)


def adaptive(shape: Shape, budget: float, row_buffer: int | None = None, *, profile: HeadProfile) -> CachePlan:
    """Give every head the kind and the slots that lose least in total.

    The objective is the sum over heads of ``profile.cost``: the squared error that a head's own eviction adds to the
    residual stream, relative to the attention block's output and measured with everything below it intact, times
    what such an error in this layer costs the next-token distribution in nats. It is minimised over kinds and numbers
    of slots under the budget. Per head, the least cost at each measured size is taken and its lower convex hull, with
    0 when everything is kept; slots then go one measured size at a time to the head whose cost falls most per slot,
    which is optimal on hulls (Fox 1966). The last step is cut to what the budget leaves. Costs of different heads are
    added as if independent.

    Raises:
        ValueError: as every policy; the smallest possible budget gives every head the profile's smallest size.
    """
    _fitting(profile, shape)
    buffer = check(shape, budget, row_buffer)
    tokens = shape.num_visual_tokens
    slots_of = [peak_tokens(min(size, tokens), 0, tokens, buffer) for size in profile.sizes]
    cost = profile.cost(buffer)
    least, kind = cost.amin(2).numpy(), cost.argmin(2).numpy()  # [L, H, S]
    heads = [(layer, head) for layer in range(shape.num_layers) for head in range(shape.num_heads)]
    points = [*slots_of, tokens]
    hulls = {key: _hull(points, [*least[key], 0.0]) for key in heads}

    left = int(budget * tokens * len(heads) + 1e-6) - slots_of[0] * len(heads)
    if left < 0:
        why = f"with row_buffer={buffer} and a profile whose smallest size is {profile.sizes[0]}"
        raise BudgetTooSmall(slots_of[0] / tokens, why, budget)
    steps = sorted(
        ((before[1] - after[1]) / (after[0] - before[0]), key, after[0] - before[0])
        for key, hull in hulls.items() for before, after in zip(hull, hull[1:], strict=False))
    slots = dict.fromkeys(heads, slots_of[0])
    for gain, key, step in reversed(steps):
        taken = min(step, left)
        if taken and gain > 0:
            slots[key] += taken
            left -= taken
    # What no cost curve asks for is spread evenly, so that bytes are equal across policies.
    while left > 0 and (short := [key for key in heads if slots[key] < tokens]):
        for key in short[:left]:
            slots[key] += 1
        left -= min(left, len(short))

    def spec(layer: int, head: int) -> HeadSpec:
        peak = slots[layer, head]
        if peak >= tokens:
            return HeadSpec.full()
        nearest = int(np.argmin(np.abs(np.array(slots_of) - peak)))
        return KINDS[profile.kinds[kind[layer, head, nearest]]](_size(peak, tokens, buffer))

    return make(shape, buffer, spec)


def predicted_cost(plan: CachePlan, profile: HeadProfile) -> float:
    """What `adaptive` minimises, for any plan: the total of `head_costs`, in nats per token.

    Raises:
        ValueError: as `head_costs`.
    """
    return float(head_costs(plan, profile).sum())


def head_costs(plan: CachePlan, profile: HeadProfile) -> torch.Tensor:
    """What evicting costs each head of a plan, by ``profile.cost``, and what 8 bits cost it, by ``profile.int8_cost``.

    Costs between measured sizes are interpolated linearly in the number of slots, those below the smallest size count
    as at the smallest, and keeping everything costs nothing. In 8 bits every head costs besides what 8 bits alone cost
    it, or nothing by a profile that has not measured that. Each head counts by its own kind: windows as "window", heavy
    heads that go by positions as "first", by decayed sums as "decayed", those that go by means or protect recent tokens
    as "heavy", else as "sum"; of a kind that the profile lacks, as "heavy".

    Returns:
        [L, H] float64, nats per token.

    Raises:
        ValueError: the plan has another number of layers or KV heads than the profile.
    """
    if (plan.num_layers, plan.num_heads) != (profile.num_layers, profile.num_heads):
        raise ValueError(f"plan must have the profile's {profile.num_layers} layers x {profile.num_heads} KV heads, "
                         f"got {plan.num_layers} layers x {plan.num_heads} KV heads")
    tokens = profile.num_visual_tokens
    points, cost = np.array([*profile.sizes, tokens]), profile.cost(plan.row_buffer)
    found = torch.zeros(plan.num_layers, plan.num_heads, dtype=torch.float64)
    if plan.kv_format == "int8":
        found += profile.int8_cost
    for layer, heads in enumerate(plan.layers):
        for head, spec in enumerate(heads):
            if spec.size is None or spec.size >= tokens:
                continue
            costs = [*cost[layer, head, profile.kinds.index(kind_of(spec, profile))].tolist(), 0.0]
            found[layer, head] += float(np.interp(spec.size, points, costs))
    return found


def kind_of(spec: HeadSpec, profile: HeadProfile) -> str:
    """Which of ``profile.kinds`` a window or heavy head counts as, as `head_costs` says."""
    if spec.kind == "window":
        return "window"
    kind = "sum" if spec.score == "sum" and not spec.recent else "heavy"
    kind = {"position": "first", "decayed": "decayed"}.get(spec.score, kind)
    return kind if kind in profile.kinds else "heavy"


def _size(peak: int, tokens: int, buffer: int) -> int:
    """The largest W or M whose peak is at most ``peak``."""
    return max(size for size in range(1, peak + 1) if peak_tokens(size, 0, tokens, buffer) <= peak)


def _hull(slots: list[int], errors: list[float]) -> list[tuple[int, float]]:
    """Lower convex hull of (slots, error), decreasing, from the smallest size on."""
    hull: list[tuple[int, float]] = []
    for point in zip(slots, errors, strict=True):
        if hull and point[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
