"""Means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def family_scores(outcomes: Mapping[str, Sequence[Sequence[bool]]]) -> tuple[dict[str, Interval], Interval]:
    """Scores per family, and overall as GenEval counts it: the mean of the families' scores.

    Prompts are resampled with replacement within their family (95% percentile intervals, a fixed generator), because
    pictures of one prompt are alike and the suite's prompts are the sample that conclusions should hold beyond.

    Args:
        outcomes: family -> prompt -> pictures (right or wrong). Every prompt needs at least one picture.

    Raises:
        ValueError: nothing to judge, or a prompt without pictures.
    """
    if not outcomes or not all(prompts and all(len(p) for p in prompts) for prompts in outcomes.values()):
        raise ValueError("outcomes must hold at least one family, and every prompt at least one picture")
    generator = np.random.default_rng(0)
    families, draws, means = {}, [], []
    for family, prompts in outcomes.items():
        shares = np.array([np.mean(pictures) for pictures in prompts])
        drawn = shares[generator.integers(len(shares), size=(RESAMPLES, len(shares)))].mean(1)
        families[family] = _interval(float(shares.mean()), drawn)
        draws.append(drawn)
        means.append(shares.mean())
    return families, _interval(float(np.mean(means)), np.mean(draws, axis=0))


def _interval(mean: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(mean, float(low), float(high))
