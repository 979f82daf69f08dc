"""`ssd-bench compare`: two sets of results side by side, with their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .goals import moved
from .records import SAME_MACHINE, Record, differing, key, measured

COLUMNS = ("", "point", "A us", "B us", "B / A", "noise", "verdict")


@dataclass(frozen=True)
class Pair:
    """One measurement in both sets. Seconds; ``noise`` is relative, None if unknown; ``ratio`` B / A; ``moved``: the
    ceiling of one of them.
    """

    name: str
    point: str
    a: float
    b: float
    ratio: float
    noise: float | None
    moved: bool = False

    @property
    def verdict(self) -> str:
        if self.moved:
            return "the ceiling moved: unknown"
        if self.noise is None:
            return "one trial: unknown"
        if abs(self.ratio - 1) <= self.noise:
            return "within the noise"
        return "faster" if self.ratio < 1 else "slower"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Comparison:
    """Pairs, and what a reader must know before believing them."""

    pairs: list[Pair]
    warnings: list[str]


def noise(line: Record) -> float | None:
    """Relative noise of one measurement: half the spread of its trials' medians; None after a single trial."""
    seconds = line["seconds"]
    return None if len(seconds["trials"]) < 2 else float(seconds["spread"] / 2 / seconds["median"])


def pair(a: Record, b: Record) -> Pair:
    """Both records of one measurement; their noises add like independent errors."""
    point = a["point"]
    label = ", ".join([f"batch {point['batch']}", *(str(point[name]) for name in ("label", "dtype") if name in point)])
    noises = [known for known in (noise(a), noise(b)) if known is not None]
    return Pair(a["contender"]["name"], label, a["seconds"]["median"], b["seconds"]["median"],
                b["seconds"]["median"] / a["seconds"]["median"], math.hypot(*noises) if len(noises) == 2 else None,
                moved(a) or moved(b))


def comparison(a: Sequence[Record], b: Sequence[Record]) -> Comparison:
    """Pair the measurements that both sets hold; of several of the same one, the last counts.

    Raises:
        ValueError: they have no measurement in common.
    """
    timed = [measured(lines) for lines in (a, b)]
    first, second = ({key(line): line for line in lines} for lines in timed)
    common = [name for name in first if name in second]
    if not common:
        raise ValueError("A and B have no measurement in common")
    warnings = []
    for name in SAME_MACHINE:
        # Pair by pair: both sets may hold the same two machines.
        values = {tuple(str(line["machine"].get(name)) for line in (first[one], second[one])) for one in common}
        if apart := sorted(pair for pair in values if pair[0] != pair[1]):
            warnings.append(f"{name} differs: {'; '.join(' against '.join(pair) for pair in apart)}")
    for label, lines, mine, other in (("A", timed[0], first, second), ("B", timed[1], second, first)):
        if len(lines) > len(mine):
            warnings.append(f"{len(lines) - len(mine)} measurements are in {label} more than once; the last ones count")
        if inside := differing(mine.values()):
            warnings.append(f"{label} holds results that differ in {', '.join(inside)}")
        alone = len(mine.keys() - other.keys())
        if alone:
            warnings.append(f"{alone} measurements are in {label} only")
    return Comparison([pair(first[name], second[name]) for name in common], warnings)


def rows(found: Comparison) -> list[list[str]]:
    """A row per pair under `COLUMNS`."""
    return [[one.name, one.point, f"{1e6 * one.a:.1f}", f"{1e6 * one.b:.1f}", f"{one.ratio:.3f}",
             "" if one.noise is None else f"{one.noise:.1%}", one.verdict] for one in found.pairs]
