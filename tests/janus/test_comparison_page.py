"""The page about a comparison of policies: its sections, tables and plots, from made-up records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib import colors

from ssd_janus import plots
from ssd_janus.cli.options import PolicyName
from ssd_janus.evaluation import report
from ssd_janus.evaluation.comparison_page import ABSENT, SECTIONS, sections

PAGE = Path(__file__).parents[2] / "docs" / "policy-results.md"


def test_the_page_has_all_sections() -> None:
    report.check_page(PAGE, SECTIONS)
    empty = {"parts": {}, "profile": None, "grid": {}, "sensitivity": {}, "prediction": None, "goals": []}
    made = sections(empty, [], {"fidelity": "plot.png"})
    assert tuple(made) == SECTIONS
    assert all(text == ABSENT for name, text in made.items() if name != "runs")


def test_tables_are_in_order_and_have_intervals() -> None:
    def entry(policy: str, budget: float, row_buffer: int, kl: float) -> dict[str, Any]:
        interval = None if row_buffer else {"mean": kl, "low": kl / 2, "high": 2 * kl}
        families = {"colors": {"mean": 0.5, "low": 0.25, "high": 0.75}}
        return {"policy": policy, "budget": budget, "row_buffer": row_buffer, "reached": budget,
                "predicted_cost": kl / 4,
                "fidelity": {"kl_mean": kl, "kl_p99": kl, "agreement": 0.5, "kl_interval": interval},
                "quality": {"pictures": 1, "families": families, "overall": families["colors"]}}

    jumbled = [entry("rows", 0.2, 0, 0.01), entry("h2o", 0.3, 24, 0.02), entry("h2o", 0.3, 0, 0.03),
               entry("h2o", 0.2, 0, 0.04)]
    groups = [{"budget": 0.2, "row_buffer": 0, "spearman": 1.0, "plans": 2}]
    record = {"parts": {}, "profile": None, "goals": [], "grid": dict(enumerate(jumbled)),
              "prediction": {"spearman": 0.5, "plans": 4, "groups": groups},
              "sensitivity": {"a": {"study": "tau", "setting": "0.2", **entry("ssd", 0.2, 0, 0.05)}}}
    made = sections(record, ["h2o", "rows"], {})
    families = made["quality"].partition("<details>")[2]
    assert re.findall(r"\| (\w+) \| ([\d.]+)% \| (\d+) \|", families) == [
        ("h2o", "20.0", "0"), ("h2o", "30.0", "0"), ("h2o", "30.0", "24"), ("rows", "20.0", "0")]
    assert "| h2o | 0 | 30.0% | 0.03 [0.015, 0.06] |" in made["fidelity"]
    assert "0.02 [" not in made["fidelity"], "without an interval, nothing stands in its place"
    assert "| ssd | 0.2 | 20.0% | 0.05 [0.025, 0.1] |" in made["sensitivity"]
    assert "Mean KL over predicted cost, row buffer 24:" in made["prediction"]
    assert "| h2o | 4 | 4 |" in made["prediction"]


def test_formats_stand_side_by_side() -> None:
    def entry(kv_format: str | None, right: float, **more: Any) -> dict[str, Any]:
        shares = {"colors": [right, right - 0.2] * 3}
        overall = {"mean": right - 0.1, "low": 0.1, "high": 0.9}
        known = {} if kv_format is None else {"kv_format": kv_format}
        return {"policy": "h2o", "budget": 0.05, "row_buffer": 0, "reached": 0.049, **known,
                "quality": {"pictures": 6, "families": {"colors": overall}, "overall": overall, "by_prompt": shares},
                **more}

    full = entry(None, 0.9, policy="full", budget=1.0, reached=1.0)
    record = {"parts": {}, "profile": None, "goals": [], "prediction": None, "sensitivity": {}, "int8_goals": [
        {"measure": "KL", "row_buffer": 0, "reached": True, "text": "8 bits cost little"}]}
    made = sections({**record, "grid": {"a": entry("int8", 0.8, tokens=0.174), "b": entry(None, 0.5), "c": full}},
                    ["full", "h2o"], {})["int8"]
    assert "- Reached (KL, row buffer 0): 8 bits cost little.\n" in made
    assert "| full | 0 | 100.0% | 100.0% | 0.80 [0.10, 0.90] |  |  |  |  |\n" in made
    assert "| h2o | 0 | 4.9% | 4.9% | 0.40 [0.10, 0.90] | -0.400 [-0.400, -0.400] |  |  |  |\n" in made
    assert ("| h2o int8 | 0 | 4.9% | 17.4% | 0.70 [0.10, 0.90] | -0.100 [-0.100, -0.100] | +0.300 [+0.300, +0.300] |"
            "  |  |\n") in made
    assert sections({**record, "grid": {"b": entry(None, 0.5), "c": full}}, ["full", "h2o"], {})["int8"] == ABSENT
    overall = sections({**record, "grid": {"a": entry("int8", 0.8), "b": entry(None, 0.5)}}, ["h2o"], {})["quality"]
    assert "| policy | 5% |" in overall and "| h2o | 0.40" in overall and "| h2o int8 | 0.70" in overall


def test_no_two_policies_look_alike_in_plots() -> None:
    styles = [plots._style(number) for number in range(len(PolicyName))]
    for key in (lambda style: colors.to_hex(style["color"]), lambda style: style["marker"]):
        assert len(set(map(key, styles))) == len(PolicyName)
