"""What a comparison of policies says: its goals, and whether predicted costs rank plans as measured ones do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..extras import needs
from .statistics import FEWEST, Groups, mean_interval, mean_of, paired_difference

PUBLISHED = ("streaming_llm", "h2o", "rows", "ssd", "margin")
RIVALS = ("streaming_llm", "h2o")
LOW_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3)
INT8 = " int8"  # ends the name of a policy whose plans store keys and values in 8 bits
FULL, FULL_INT8 = ("full", 1.0, 0), (f"full{INT8}", 1.0, 0)
TOLERANCE = 0.02
INT8_TOLERANCE = 2e-4  # nats per token
ROUNDING = 1e-9  # what equal means may differ by

Key = tuple[str, float, int]  # contender, budget asked for in bytes, row buffer


@dataclass(frozen=True)
class Goal:
    """One goal, one measure and one row buffer.

    Attributes:
        measure: "quality" or "KL".
        row_buffer: R.
        reached: None where chance could account for the difference, or a missing figure could change the verdict.
        text: the goal and its figures, as a sentence.
    """

    measure: str
    row_buffer: int
    reached: bool | None
    text: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Measure:
    """Figures of one measure, by prompt."""

    name: str
    figures: Mapping[Key, Groups]
    more_is_better: bool

    def compare(self, ours: Key, theirs: Key, least: float) -> tuple[bool | None, str]:
        """Whether ours is better by at least so much, None where chance leaves room for both, and all figures."""
        a, b = (ours, theirs) if self.more_is_better else (theirs, ours)
        lead = paired_difference(self.figures[a], self.figures[b])
        text = f"{self.show(ours)}, {self.show(theirs)}: "
        if lead is None:
            return None, f"{text}fewer than {FEWEST} prompts cannot tell"
        text += f"lead {self._number(lead.mean)} [{self._number(lead.low)}, {self._number(lead.high)}]"
        return (None, f"{text}, within chance") if lead.low < least <= lead.high else (lead.low >= least, text)

    def show(self, key: Key) -> str:
        return f"{key[0]} {self._number(mean_of(self.figures[key]))}"

    def best(self, budget: float, row_buffer: int, impossible: Collection[Key]) -> tuple[Key | None, list[str]]:
        """The best published-style policy by its mean, the first of equals, and those whose figures are missing."""
        keys: list[Key] = [(policy, budget, row_buffer) for policy in PUBLISHED]
        known = [key for key in keys if key in self.figures]
        choose = max if self.more_is_better else min
        best = choose(known, key=lambda key: mean_of(self.figures[key])) if known else None
        return best, [key[0] for key in keys if key not in self.figures and key not in impossible]

    def _number(self, value: float) -> str:
        return f"{value:.3f}" if self.more_is_better else f"{value:.3g}"


def contender(entry: Mapping[str, Any]) -> str:
    """The policy of an entry, and the format if it is not the model's dtype, which older records do not say."""
    kv_format = entry.get("kv_format", "auto")
    return entry["policy"] if kv_format == "auto" else f"{entry['policy']} {kv_format}"


def key(entry: Mapping[str, Any]) -> Key:
    """The key of an entry of the comparison's grid."""
    return contender(entry), entry["budget"], entry["row_buffer"]


def percent(share: float) -> str:
    """A budget, without needless digits."""
    return f"{100 * share:.3g}%"


def goals(quality: Mapping[Key, Groups], kl: Mapping[Key, Groups], impossible: Collection[Key] = ()) -> list[Goal]:
    """Judge the goals, for every row buffer that has figures.

    1. Quality of the best published-style policy at 20% is at most .02 below the full cache's.
    2. `adaptive` at 10% is at least as good as the best published-style policy at 20%, quality and KL apart.
    3. `adaptive` is ahead of `streaming_llm` and `h2o` at every budget below 50%, quality and KL apart. Equal figures
       are not ahead.

    Plans are compared prompt by prompt; a lead is by how much the first one is better, with its 95% interval
    (`paired_difference`). A goal is reached or missed only where that interval lies on one side altogether and no
    missing figure could change the verdict. Intervals take no account of "best" being chosen by the same figures, nor
    of the number of comparisons.

    Args:
        quality: per family the share of right pictures of every prompt.
        kl: mean KL to the full cache of every prompt, in one group.
        impossible: plans that cannot be made: no figure is missing there. Where only `adaptive` cannot make one it
            is not as good.

    Raises:
        ValueError: figures of one measure are of different prompts.
    """
    measures = _Measure("quality", quality, more_is_better=True), _Measure("KL", kl, more_is_better=False)
    found: list[Goal] = []
    buffers = {key[2] for key in (*quality, *kl) if key[0] != "full" and not key[0].endswith(INT8)}
    for row_buffer in sorted(buffers):
        found.append(_near_full(measures[0], impossible, row_buffer))
        found += [_as_good_as_published(measure, impossible, ("adaptive", 0.1, row_buffer)) for measure in measures]
        found += [_ahead(measure, impossible, row_buffer) for measure in measures]
    return found


def int8_goals(quality: Mapping[Key, Groups], kl: Mapping[Key, Groups], impossible: Collection[Key] = ()) -> list[Goal]:
    """Judge the goals of storage in 8 bits, as `goals` does; none without figures of such plans.

    1. Keeping everything in 8 bits costs at most 0.0002 nats per token.
    2. `adaptive` in 8 bits at 5% of the bytes draws at most .02 fewer pictures right than the full cache.
    3. `adaptive` in 8 bits at 2.5% is at least as good as the best published-style policy at 20%, quality and KL apart.

    Budgets are shares of the bytes that a full cache takes in the model's dtype.

    Args:
        quality, kl, impossible: as of `goals`.
    """
    measures = _Measure("quality", quality, more_is_better=True), _Measure("KL", kl, more_is_better=False)
    found = [_everything_in_8_bits(kl[FULL_INT8])] if FULL_INT8 in kl else []
    for row_buffer in sorted({key[2] for key in (*quality, *kl) if key[0] == f"adaptive{INT8}"}):
        found.append(_int8_near_full(measures[0], row_buffer))
        found += [_as_good_as_published(measure, impossible, (f"adaptive{INT8}", 0.025, row_buffer))
                  for measure in measures]
    return found


def _everything_in_8_bits(kl: Groups) -> Goal:
    goal = f"keeping everything in 8 bits should cost at most {INT8_TOLERANCE:g} nats per token"
    found = mean_interval(kl)
    if found is None:
        return Goal("KL", 0, None, f"{goal}: {mean_of(kl):.3g}, fewer than {FEWEST} prompts cannot tell")
    reached = True if found.high <= INT8_TOLERANCE else False if found.low > INT8_TOLERANCE else None
    return Goal("KL", 0, reached, f"{goal}: {found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]")


def _int8_near_full(measure: _Measure, row_buffer: int) -> Goal:
    ours: Key = (f"adaptive{INT8}", 0.05, row_buffer)
    goal = f"{ours[0]} at 5% of the bytes should be within {TOLERANCE} of the full cache"
    if absent := [key[0] for key in (ours, FULL) if key not in measure.figures]:
        return Goal(measure.name, row_buffer, None, goal + _without(absent))
    reached, text = measure.compare(ours, FULL, -TOLERANCE - ROUNDING)
    return Goal(measure.name, row_buffer, reached, f"{goal}: {text}")


def _near_full(measure: _Measure, impossible: Collection[Key], row_buffer: int) -> Goal:
    goal = f"the best published-style policy at 20% should be within {TOLERANCE} of the full cache"
    best, missing = measure.best(0.2, row_buffer, impossible)
    if best is None or FULL not in measure.figures:
        absent = missing + (["full"] if FULL not in measure.figures else [])
        return Goal(measure.name, row_buffer, None, goal + _without(absent))
    reached, text = measure.compare(best, FULL, -TOLERANCE - ROUNDING)
    return Goal(measure.name, row_buffer, reached if reached or not missing else None,
                f"{goal}: {text}{_without(missing)}")


def _as_good_as_published(measure: _Measure, impossible: Collection[Key], ours: Key) -> Goal:
    contender, budget, row_buffer = ours[0], percent(ours[1]), ours[2]
    goal = f"{contender} at {budget} should be at least as good as the best published-style policy at 20%"
    best, missing = measure.best(0.2, row_buffer, impossible)
    if best is not None and ours in impossible:
        return Goal(measure.name, row_buffer, False, f"{goal}: {contender} cannot make a plan at {budget}")
    if best is None or ours not in measure.figures:
        absent = missing + ([f"{contender} at {budget}"] if ours not in measure.figures else [])
        return Goal(measure.name, row_buffer, None, goal + _without(absent))
    reached, text = measure.compare(ours, best, -ROUNDING)
    return Goal(measure.name, row_buffer, reached if not (reached and missing) else None,
                f"{goal}: {text}{_without(missing)}")


def _ahead(measure: _Measure, impossible: Collection[Key], row_buffer: int) -> Goal:
    goal = f"adaptive should be ahead of {' and '.join(RIVALS)} at every budget below 50%"
    figures = measure.figures
    budgets = sorted({*LOW_BUDGETS, *(budget for policy, budget, r in figures if r == row_buffer and budget < 0.5
                                      and policy in (*RIVALS, "adaptive"))})
    found: dict[bool | None, list[str]] = {True: [], None: [], False: []}  # figures by verdict
    missing: dict[str, dict[str, None]] = {}  # budgets by policy, in order
    for budget in budgets:
        ours: Key = ("adaptive", budget, row_buffer)
        for rival in RIVALS:
            theirs: Key = (rival, budget, row_buffer)
            if theirs in impossible:
                continue
            if absent := [key for key in (theirs, ours) if key not in figures and key not in impossible]:
                for key in absent:
                    missing.setdefault(key[0], {})[percent(budget)] = None
                continue
            reached, text = (measure.compare(ours, theirs, ROUNDING) if ours not in impossible else
                             (False, f"{measure.show(theirs)}, adaptive can make no plan"))
            found[reached].append(f"{percent(budget)} ({text})")
    compared = sum(map(len, found.values()))
    text = f"beyond chance in {len(found[True])} of {compared} comparisons" if compared else "nothing to compare"
    text += f"; within chance in {len(found[None])}, at {', '.join(found[None])}" if found[None] else ""
    text += f"; not ahead in {len(found[False])}, at {', '.join(found[False])}" if found[False] else ""
    verdict = False if found[False] else True if found[True] and not (found[None] or missing) else None
    return Goal(measure.name, row_buffer, verdict, f"{goal}: {text}" + _without(
        [f"{policy} at {', '.join(absent)}" for policy, absent in missing.items()]))


def _without(missing: Sequence[str]) -> str:
    return f"; no figure for {', '.join(missing)}" if missing else ""


def conclusions(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ "prediction", "goals" and "int8_goals" of the entries of a comparison's grid, as its record has them."""

    def figures(measure: str, name: str) -> dict[Key, Any]:
        return {key(entry): entry[measure][name] for entry in entries if measure in entry}

    kl, right = figures("fidelity", "kl_by_picture"), figures("quality", "by_prompt")
    impossible = {key(entry) for entry in entries if "reason" in entry}
    close = {plan: {"": values} for plan, values in kl.items()}
    pairs = {key(entry): (entry["predicted_cost"], entry["fidelity"]["kl_mean"]) for entry in entries
             if "predicted_cost" in entry and "fidelity" in entry}
    return {"prediction": prediction(pairs), "goals": [goal.as_json() for goal in goals(right, close, impossible)],
            "int8_goals": [goal.as_json() for goal in int8_goals(right, close, impossible)]}


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
