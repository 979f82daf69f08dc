"""Means and paired differences over prompts, with 95% intervals.

Prompts are what is resampled, because pictures of one prompt are alike and the prompts are the sample that conclusions
should hold beyond. Where prompts come in groups (families of a suite) they are resampled within their group, and a mean
is the mean of the groups' means, as GenEval counts it.

Intervals are bootstrap percentile intervals, expanded for few prompts as Hesterberg, "What Teachers Should Know About
the Bootstrap" (The American Statistician 69, 2015) does: the tails are those that would make the interval as long as
Student's. The generator is fixed: equal outcomes have equal intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..extras import needs

RESAMPLES = 4000
TAIL = 0.025
FEWEST = 6  # prompts: of fewer all differences have one sign by chance alone in more than 1 of 20 cases, 2 / 2^n

Groups = Mapping[str, Sequence[float]]  # group -> one value per prompt


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def family_scores(shares: Groups) -> tuple[dict[str, Interval], Interval]:
    """Scores per family, and overall: the mean of the families' scores.

    A family whose prompts are all right or all wrong has nothing to resample. Its interval is the exact one of n
    trials (Clopper and Pearson, Biometrika 26, 1934), 2.5%^(1/n) .. 1 if all are right. Overall's lower end takes such
    a family's score from Beta(n, 1), whose 2.5% quantile that is, and its upper end takes it as 1; the other way round
    if all are wrong.

    Args:
        shares: family -> share of right pictures of every prompt.

    Raises:
        ValueError: nothing to judge.
        ImportError: scipy is missing; the message names the extra.
    """
    _check(shares)
    families, lower, upper = {}, [], []
    for number, (family, values) in enumerate(shares.items()):
        low = high = _resampled(values, number)
        if set(values) == {1}:
            low = _beta(len(values), number)
            families[family] = Interval(1.0, TAIL ** (1 / len(values)), 1.0)
        elif set(values) == {0}:
            high = 1 - _beta(len(values), number)
            families[family] = Interval(0.0, 0.0, 1 - TAIL ** (1 / len(values)))
        else:
            families[family] = _interval({family: values}, low, high)
        lower.append(low)
        upper.append(high)
    return families, _interval(shares, np.mean(lower, axis=0), np.mean(upper, axis=0))


def mean_interval(groups: Groups) -> Interval | None:
    """The mean of the groups' means; None for fewer than `FEWEST` prompts, which say too little.

    Values that are all equal have an interval without width.

    Raises:
        ValueError: no values, or a group without any.
        ImportError: scipy is missing; the message names the extra.
    """
    _check(groups)
    if _count(groups) < FEWEST:
        return None
    draws = np.mean([_resampled(values, number) for number, values in enumerate(groups.values())], axis=0)
    return _interval(groups, draws, draws)


def paired_difference(ours: Groups, theirs: Groups) -> Interval | None:
    """By how much the mean of one is above the other's, of values that belong together prompt by prompt.

    What prompts have in common, such as being hard, cancels out, so that differences are known better than the
    intervals of both means suggest.

    Args:
        ours, theirs: the same groups of the same prompts in the same order.

    Returns:
        mean(ours) - mean(theirs) as `mean_interval` has it; None for too few prompts.

    Raises:
        ValueError: other groups or numbers of prompts.
        ImportError: scipy is missing; the message names the extra.
    """
    sizes, other = ({name: len(values) for name, values in side.items()} for side in (ours, theirs))
    if sizes != other:
        raise ValueError(f"paired values must be of the same prompts, got {sizes} and {other}")
    return mean_interval({name: np.subtract(values, theirs[name]).tolist() for name, values in ours.items()})


def mean_of(groups: Groups) -> float:
    """The mean of the groups' means."""
    return float(np.mean([np.mean(values) for values in groups.values()]))


def _check(groups: Groups) -> None:
    if not groups or not all(groups.values()):
        raise ValueError("there must be at least one group, and a prompt in every group")


def _count(groups: Groups) -> int:
    return sum(map(len, groups.values()))


def _resampled(values: Sequence[float], number: int) -> np.ndarray:
    """Means of resampled values; ``number`` tells apart groups, which are independent."""
    return _counts(len(values), number) @ np.asarray(values, dtype=np.float64) / len(values)


@lru_cache(maxsize=64)
def _counts(size: int, number: int) -> np.ndarray:
    """How often each of ``size`` values is drawn, [RESAMPLES, size]."""
    return np.random.default_rng(number).multinomial(size, [1 / size] * size, size=RESAMPLES).astype(np.float64)


def _beta(size: int, number: int) -> np.ndarray:
    return np.random.default_rng(number).beta(size, 1, size=RESAMPLES)


def _interval(groups: Groups, lower: np.ndarray, upper: np.ndarray) -> Interval:
    tail = _expanded_tail(_count(groups))
    return Interval(mean_of(groups), float(np.quantile(lower, tail)), float(np.quantile(upper, 1 - tail)))


def _expanded_tail(size: int) -> float:
    """Share of the resampled means to leave out at each end."""
    with needs("evaluate", "scipy"):
        from scipy.stats import norm, t
    return float(norm.cdf(t.ppf(TAIL, size - 1) * (size / (size - 1)) ** 0.5)) if size > 1 else 0.0
