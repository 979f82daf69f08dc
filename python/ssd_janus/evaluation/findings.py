"""What a comparison of policies says: its goals, and whether predicted costs rank plans as measured ones do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..extras import needs
from .statistics import Interval

PUBLISHED = ("streaming_llm", "h2o", "rows", "ssd", "margin")
RIVALS = ("streaming_llm", "h2o")
LOW_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3)
FULL = ("full", 1.0, 0)
TOLERANCE = 0.02
ROUNDING = 1e-9

Key = tuple[str, float, int]  # policy, budget asked for, row buffer


@dataclass(frozen=True)
class Goal:
    """One goal, one measure and one row buffer.

    Attributes:
        measure: "quality" or "KL".
        row_buffer: R.
        reached: None as long as figures are missing that could decide it.
        text: the goal and its figures, as a sentence.
    """

    measure: str
    row_buffer: int
    reached: bool | None
    text: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _Measure(Protocol):
    """Figures of one measure at one row buffer."""

    name: str

    def better(self, a: Any, b: Any) -> float: ...
    def show(self, value: Any) -> str: ...


class _Quality:
    name = "quality"

    def better(self, a: Interval, b: Interval) -> float:
        return a.mean - b.mean

    def show(self, value: Interval) -> str:
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


class _KL:
    name = "KL"

    def better(self, a: float, b: float) -> float:
        return b - a

    def show(self, value: float) -> str:
        return f"{value:.3g}"


def key(entry: Mapping[str, Any]) -> Key:
    """The key of an entry of the comparison's grid."""
    return entry["policy"], entry["budget"], entry["row_buffer"]


def goals(overall: Mapping[Key, Interval], kl: Mapping[Key, float], impossible: Collection[Key] = ()) -> list[Goal]:
    """Judge the goals from means, for every row buffer that has figures.

    1. Quality of the best published-style policy at 20% is at most .02 below the full cache's.
    2. `adaptive` at 10% is at least as good as the best published-style policy at 20%, quality and KL apart.
    3. `adaptive` is ahead of `streaming_llm` and `h2o` at every budget below 50%, quality and KL apart. Equal figures
       are not ahead.

    A goal is decided only when no missing figure could change the verdict.

    Args:
        overall: overall scores.
        kl: mean KL to the full cache.
        impossible: plans that cannot be made: no figure is missing there. Where only `adaptive` cannot make one it
            is not as good.
    """
    found: list[Goal] = []
    for row_buffer in sorted({key[2] for key in (*overall, *kl) if key[0] != "full"}):
        found.append(_near_full(overall, impossible, row_buffer))
        for measure, figures in ((_Quality(), overall), (_KL(), kl)):
            found.append(_half_the_budget(measure, figures, impossible, row_buffer))
        for measure, figures in ((_Quality(), overall), (_KL(), kl)):
            found.append(_ahead(measure, figures, impossible, row_buffer))
    return found


def _near_full(overall: Mapping[Key, Interval], impossible: Collection[Key], row_buffer: int) -> Goal:
    measure, full = _Quality(), overall.get(FULL)
    best, missing = _best(measure, overall, impossible, 0.2, row_buffer)
    goal = f"the best published-style policy at 20% should be within {TOLERANCE} of the full cache"
    if best is None or full is None:
        return Goal(measure.name, row_buffer, None, goal + _without(missing + (["full"] if full is None else [])))
    reached = full.mean - overall[best].mean <= TOLERANCE + ROUNDING
    return Goal(measure.name, row_buffer, reached if reached or not missing else None,
                f"{goal}: {best[0]} {measure.show(overall[best])}, full {measure.show(full)}{_without(missing)}")


def _half_the_budget(measure: _Measure, figures: Mapping[Key, Any], impossible: Collection[Key],
                     row_buffer: int) -> Goal:
    goal = "adaptive at 10% should be at least as good as the best published-style policy at 20%"
    best, missing = _best(measure, figures, impossible, 0.2, row_buffer)
    ours: Key = ("adaptive", 0.1, row_buffer)
    if best is not None and ours in impossible:
        return Goal(measure.name, row_buffer, False, f"{goal}: adaptive cannot make a plan at 10%")
    if best is None or ours not in figures:
        absent = missing + (["adaptive at 10%"] if ours not in figures else [])
        return Goal(measure.name, row_buffer, None, goal + _without(absent))
    reached = measure.better(figures[ours], figures[best]) >= -ROUNDING
    return Goal(measure.name, row_buffer, reached if not (reached and missing) else None,
                f"{goal}: adaptive {measure.show(figures[ours])}, {best[0]} {measure.show(figures[best])}"
                f"{_without(missing)}")


def _ahead(measure: _Measure, figures: Mapping[Key, Any], impossible: Collection[Key], row_buffer: int) -> Goal:
    goal = f"adaptive should be ahead of {' and '.join(RIVALS)} at every budget below 50%"
    budgets = sorted({*LOW_BUDGETS, *(budget for policy, budget, r in figures if r == row_buffer and budget < 0.5
                                      and policy in (*RIVALS, "adaptive"))})
    ahead, behind = 0, []
    missing: dict[str, dict[str, None]] = {}  # budgets by policy, in order
    for budget in budgets:
        ours: Key = ("adaptive", budget, row_buffer)
        for rival in RIVALS:
            theirs: Key = (rival, budget, row_buffer)
            if theirs in impossible:
                continue
            if absent := [key for key in (theirs, ours) if key not in figures and key not in impossible]:
                for key in absent:
                    missing.setdefault(key[0], {})[f"{budget:.0%}"] = None
            elif ours in impossible:
                behind.append(f"{budget:.0%} ({rival} {measure.show(figures[theirs])}, adaptive can make no plan)")
            elif measure.better(figures[ours], figures[theirs]) <= ROUNDING:
                behind.append(f"{budget:.0%} ({rival} {measure.show(figures[theirs])}, adaptive "
                              f"{measure.show(figures[ours])})")
            else:
                ahead += 1
    compared = f"in {ahead} of {ahead + len(behind)} comparisons" if ahead or behind else "nothing to compare"
    text = f"{goal}: {compared}{'; not at ' + ', '.join(behind) if behind else ''}"
    decided = bool(behind) or (ahead > 0 and not missing)
    return Goal(measure.name, row_buffer, not behind if decided else None,
                text + _without([f"{policy} at {', '.join(found)}" for policy, found in missing.items()]))


def _best(measure: _Measure, figures: Mapping[Key, Any], impossible: Collection[Key], budget: float,
          row_buffer: int) -> tuple[Key | None, list[str]]:
    """The best published-style policy at a budget, and those whose figures are missing; the first of equals."""
    keys: list[Key] = [(policy, budget, row_buffer) for policy in PUBLISHED]
    best: Key | None = None
    for candidate in keys:
        if candidate in figures and (best is None or measure.better(figures[candidate], figures[best]) > 0):
            best = candidate
    return best, [key[0] for key in keys if key not in figures and key not in impossible]


def _without(missing: Sequence[str]) -> str:
    return f"; no figure for {', '.join(missing)}" if missing else ""


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, ties by their mean rank; None for fewer than 3 pairs or where one side is constant.

    Raises:
        ImportError: scipy is missing; the message names the extra.
    """
    with needs("evaluate", "scipy"):
        from scipy.stats import spearmanr
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def prediction(pairs: Mapping[Key, tuple[float, float]]) -> dict[str, Any]:
    """How predicted costs rank plans against measured mean KL.

    Over all plans, where larger budgets alone bring a correlation, and over the plans of each budget and row buffer.

    Args:
        pairs: (predicted cost, mean KL) of every plan that has both.

    Returns:
        "plans" (their number), "spearman" (over all) and "groups": budget, row_buffer, plans and spearman each.
    """
    groups: dict[tuple[float, int], list[tuple[float, float]]] = {}
    for (_, budget, row_buffer), pair in pairs.items():
        groups.setdefault((budget, row_buffer), []).append(pair)
    return {"plans": len(pairs), "spearman": rank_correlation(list(pairs.values())),
            "groups": [{"budget": budget, "row_buffer": row_buffer, "plans": len(found),
                        "spearman": rank_correlation(found)} for (budget, row_buffer), found in sorted(groups.items())]}
