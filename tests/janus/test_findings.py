"""Goals and verdicts of a comparison of policies, on made-up figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssd_janus.evaluation import findings
from ssd_janus.evaluation.findings import LOW_BUDGETS, PUBLISHED, RIVALS, Goal, Key, goals, prediction, rank_correlation
from ssd_janus.evaluation.statistics import Groups

PAGE = Path(__file__).parents[2] / "docs" / "policy-results.md"


def by_prompt(mean: float) -> Groups:
    """Two families of prompts that are hard or easy for every policy alike."""
    return {"colors": [mean - 0.3, mean, mean + 0.3] * 2, "counting": [mean - 0.1, mean + 0.1] * 3}


def world(**changes: float) -> tuple[dict[Key, Groups], dict[Key, Groups]]:
    """Figures that reach every goal; ``changes`` sets means by ``policy_percent``, for quality and, negated, for KL."""
    means = {"full_100": 0.6, **{f"{policy}_{budget * 100:g}": 0.5 + budget / 10 for policy in PUBLISHED
                                 for budget in (*LOW_BUDGETS, 0.5)},
             **{f"adaptive_{budget * 100:g}": 0.59 for budget in (*LOW_BUDGETS, 0.5)}, "h2o_20": 0.585, **changes}
    keys = {name: (name.rpartition("_")[0], float(name.rpartition("_")[2]) / 100, 0 if name == "full_100" else 24)
            for name in means}
    return ({keys[name]: by_prompt(mean) for name, mean in means.items()},
            {keys[name]: {"": by_prompt(1 - mean)["colors"]} for name, mean in means.items()})


def verdicts(found: list[Goal]) -> list[bool | None]:
    return [goal.reached for goal in found]


def test_goals_that_are_reached() -> None:
    found = goals(*world())
    assert verdicts(found) == [True] * 5
    assert [goal.measure for goal in found] == ["quality", "quality", "KL", "quality", "KL"]
    assert "h2o 0.585, full 0.600: lead -0.015 [-0.015, -0.015]" in found[0].text
    assert "adaptive 0.41, h2o 0.415: lead 0.005" in found[2].text
    assert "beyond chance in 10 of 10 comparisons" in found[3].text


@pytest.mark.parametrize("changes, expected", [
    ({"full_100": 0.606}, [False, True, True, True, True]),
    ({"full_100": 0.605}, [True] * 5),  # .605 - .585 is .02, give or take rounding
    ({"adaptive_10": 0.584}, [True, False, False, True, True]),
    ({"adaptive_10": 0.585}, [True] * 5),  # equal is at least as good
    ({"rows_20": 0.6}, [True, False, False, True, True]),
    ({"h2o_30": 0.7}, [True, True, True, False, False]),
    ({"streaming_llm_5": 0.59}, [True, True, True, False, False]),  # equal is not ahead
    ({"h2o_50": 0.7}, [True] * 5),
    ({"rows_30": 0.7}, [True] * 5),
])
def test_goals_that_are_missed(changes: dict[str, float], expected: list[bool]) -> None:
    assert verdicts(goals(*world(**changes))) == expected


def test_the_sentence_names_where_adaptive_is_behind() -> None:
    found = goals(*world(h2o_30=0.7, streaming_llm_5=0.59))
    assert "in 8 of 10" in found[3].text
    assert "not ahead in 2, at 5% (adaptive 0.590, streaming_llm 0.590: lead 0.000" in found[3].text
    assert "30% (adaptive 0.590, h2o 0.700: lead -0.110 [-0.110" in found[3].text


def doubt(figures: dict[Key, Groups], key: Key, size: float) -> None:
    """Let every other prompt be ``size`` better and worse, which leaves the mean as it is."""
    figures[key] = {name: [value + (-1) ** number * size for number, value in enumerate(values)]
                    for name, values in figures[key].items()}


@pytest.mark.parametrize("measure", ["quality", "KL"])
def test_what_chance_can_account_for_is_not_decided(measure: str) -> None:
    figures = world()
    index = ("quality", "KL").index(measure)
    ours, rival = ("adaptive", 0.1, 24), ("h2o", 0.2, 24)
    doubt(figures[index], ours, 0.002)
    found = [goal for goal in goals(*figures) if goal.measure == measure]
    assert verdicts(found) == [True] * len(found), "better by .005 for every second prompt by .003 .. .007"
    doubt(figures[index], ours, 0.05)
    found = [goal for goal in goals(*figures) if goal.measure == measure]
    assert verdicts(found[-2:]) == [None, True] and "within chance" in found[-2].text
    doubt(figures[index], rival, 0.2)
    found = [goal for goal in goals(*figures) if goal.measure == measure]
    assert verdicts(found) == [*[None] * (len(found) - 1), None]
    assert "beyond chance in 9 of 10 comparisons; within chance in 1, at 20% (adaptive" in found[-1].text


def test_a_miss_of_one_comparison_outweighs_chance_in_others() -> None:
    quality, kl = world(h2o_30=0.7)
    doubt(quality, ("h2o", 0.2, 24), 0.2)
    found = goals(quality, kl)
    assert verdicts(found) == [None, None, True, False, False]
    assert "beyond chance in 8 of 10 comparisons; within chance in 1, at 20%" in found[3].text
    assert "; not ahead in 1, at 30%" in found[3].text


def test_few_prompts_decide_nothing() -> None:
    quality, kl = ({key: {"": values["" if "" in values else "colors"][:5]} for key, values in figures.items()}
                   for figures in world(adaptive_10=0.2))
    found = goals(quality, kl)
    assert verdicts(found) == [None] * 5 and all("fewer than 6 prompts cannot tell" in goal.text for goal in found)


@pytest.mark.parametrize("absent, expected", [
    (("full", 1.0, 0), [None, True, True, True, True]),
    (("rows", 0.2, 24), [True, None, None, True, True]),  # rows could only make the best one better
    (("adaptive", 0.1, 24), [True, None, None, None, None]),
    (("h2o", 0.3, 24), [True, True, True, None, None]),
])
def test_missing_figures_leave_open_what_they_could_change(absent: Key, expected: list[bool | None]) -> None:
    quality, kl = world()
    del quality[absent], kl[absent]
    found = goals(quality, kl)
    assert verdicts(found) == expected
    assert all(absent[0] in goal.text.partition("no figure for")[2] for goal in found if goal.reached is None)


def test_missing_figures_cannot_save_a_missed_goal() -> None:
    quality, kl = world(adaptive_10=0.584, h2o_5=0.7, full_100=0.7)
    for figures in (quality, kl):
        del figures["margin", 0.2, 24], figures["h2o", 0.3, 24]
    assert verdicts(goals(quality, kl)) == [None, False, False, False, False]


def test_impossible_plans_are_not_missing() -> None:
    quality, kl = world()
    for key in (rival := [(name, 0.05, 24) for name in RIVALS]) + [("adaptive", 0.05, 24), ("rows", 0.2, 24)]:
        del quality[key], kl[key]
    assert verdicts(goals(quality, kl, [*rival, ("adaptive", 0.05, 24), ("rows", 0.2, 24)])) == [True] * 5
    quality, kl = world()
    del quality["adaptive", 0.1, 24], kl["adaptive", 0.1, 24]
    assert verdicts(goals(quality, kl, [("adaptive", 0.1, 24)])) == [True, False, False, False, False]


def test_goals_of_one_measure_alone() -> None:
    quality, kl = world()
    assert verdicts(goals({}, kl)) == [None, None, True, None, True]
    assert verdicts(goals(quality, {})) == [True, True, None, True, None]
    assert goals({}, {}) == [] == goals({findings.FULL: by_prompt(0.5)}, {})


def test_rank_correlation() -> None:
    assert rank_correlation([(1, 10), (2, 100), (3, 1e6)]) == pytest.approx(1)
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    # Ranks 1.5 1.5 3 4 against 1 2 3 4: Pearson's correlation of these.
    assert rank_correlation([(5, 1), (5, 2), (6, 3), (7, 4)]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    for too_little in ([], [(1, 1), (2, 2)], [(1, 1), (1, 2), (1, 3)], [(1, 4), (2, 4), (3, 4)]):
        assert rank_correlation(too_little) is None


def test_prediction_within_a_budget_is_apart_from_that_across_budgets() -> None:
    pairs = {("a", 0.1, 0): (9.0, 1.0), ("b", 0.1, 0): (8.0, 2.0), ("c", 0.1, 0): (7.0, 3.0),
             ("a", 0.5, 24): (0.3, 0.03), ("b", 0.5, 24): (0.2, 0.02)}
    found = prediction(pairs)
    assert found["plans"] == 5 and 0 < found["spearman"] < 1
    assert found["groups"] == [
        {"budget": 0.1, "row_buffer": 0, "plans": 3, "spearman": pytest.approx(-1)},
        {"budget": 0.5, "row_buffer": 24, "plans": 2, "spearman": None}]


def int8_world(**changes: float) -> tuple[dict[Key, Groups], dict[Key, Groups]]:
    """`world` with plans in 8 bits that reach every goal."""
    quality, kl = world()
    for name, (budget, mean) in {"adaptive_5": (0.05, 0.59), "adaptive_2.5": (0.025, 0.585), **{
            name: (float(name.rpartition("_")[2]) / 100, mean) for name, mean in changes.items()}}.items():
        key: Key = (name.rpartition("_")[0] + findings.INT8, budget, 24)
        quality[key], kl[key] = by_prompt(mean), {"": by_prompt(1 - mean)["colors"]}
    kl[findings.FULL_INT8] = {"": [1e-4, 2e-4] * 6}
    return quality, kl


@pytest.mark.parametrize("changes, expected", [
    ({}, [True] * 4),
    ({"adaptive_5": 0.579}, [True, False, True, True]),  # more than .02 below .6
    ({"adaptive_5": 0.58}, [True] * 4),
    ({"adaptive_2.5": 0.584}, [True, True, False, False]),  # below h2o's .585
    ({"adaptive_2.5": 0.6}, [True] * 4),
])
def test_goals_of_8_bits(changes: dict[str, float], expected: list[bool]) -> None:
    quality, kl = int8_world(**changes)
    found = findings.int8_goals(quality, kl)
    assert verdicts(found) == expected and [goal.measure for goal in found] == ["KL", "quality", "quality", "KL"]
    # They are besides the others, which take no notice of them.
    assert goals(quality, kl) == goals(*world()) and findings.int8_goals(*world()) == []


def test_goals_of_8_bits_that_are_missed_or_open() -> None:
    quality, kl = int8_world()
    for values, expected in (([3e-4, 3e-4] * 6, False), ([0.0, 3.9e-4] * 6, None), ([0.0] * 5, None)):
        kl[findings.FULL_INT8] = {"": values}
        assert findings.int8_goals(quality, kl)[0].reached is expected
    del quality[findings.FULL], quality["rows", 0.2, 24]
    found = findings.int8_goals(quality, kl)
    assert verdicts(found[1:]) == [None, None, True]
    assert "no figure for full" in found[1].text and "no figure for rows" in found[2].text
