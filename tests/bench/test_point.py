"""Benchmark points: head lengths, and the plans that hold them."""

from __future__ import annotations

import json

import pytest

from ssd_bench.point import SPREADS, Point, head_lengths, specs
from ssd_kernels import CachePlan, HeadSpec


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("heads", "mean", "full"), [(16, 120, 600), (4, 6, 20), (1, 6, 20), (5, 20, 20), (3, 19, 20)])
def test_head_lengths_keep_the_mean(spread: str, heads: int, mean: int, full: int):
    lengths = head_lengths(heads, mean, full, spread)
    assert len(lengths) == heads
    assert abs(sum(lengths) / heads - mean) <= 0.5
    assert 2 <= min(lengths) and max(lengths) <= full


def test_spreads_differ():
    uniform, classes, skewed = (head_lengths(16, 120, 600, spread) for spread in SPREADS)
    assert len(set(uniform)) == 1 and len(set(classes)) == 2 and len(set(skewed)) == 16


@pytest.mark.parametrize(("given", "word"), [({"mean": 700}, "mean"), ({"mean": 1}, "mean"),
                                             ({"spread": "odd"}, "spread"), ({"batch": 0}, "batch"),
                                             ({"heads": 0}, "heads"), ({"dtype": "int8"}, "int8")])
def test_bad_values_are_refused_by_name(given: dict, word: str):
    with pytest.raises(ValueError, match=word):
        Point.of_lengths(**given)


def test_a_heads_plan_holds_its_length_during_a_step():
    """Window of 9 and the new token; with a row buffer of 4, 10 - 2.5 and 1 to 4 new ones."""
    assert specs((10,), False, 0) == [HeadSpec.window(9)]
    assert specs((10,), True, 4) == [HeadSpec.heavy(8)]
    assert specs((2,), True, 24) == [HeadSpec.heavy(1)]


def test_lengths_of_a_plan_count_prompt_and_new_token():
    plan = CachePlan([[HeadSpec.window(5), HeadSpec.full()], [HeadSpec.full(), HeadSpec.full()]])
    point = Point.of_plan(plan, 0, "x", 2, 32, "float32", prompt=3, start=20, tokens=30)
    assert point.lengths == (3 + 5 + 1, 3 + 20 + 1) and point.full == 33 and point.heads == 2
    assert json.loads(json.dumps(point.to_dict()))["lengths"] == [9, 24]
    assert "plan" not in point.to_dict()


def test_lengths_of_a_row_buffer_are_means_over_it():
    """Rows hold 5, 6, 7 or 8 tokens and the new one, from the last refresh before ``start`` on."""
    plan = CachePlan([[HeadSpec.window(5)]], row_buffer=4)
    point = Point.of_plan(plan, 0, "x", 1, 32, "float32", prompt=0, start=22, tokens=30)
    assert (point.lengths, point.start) == ((round((6 + 7 + 8 + 9) / 4),), 20)


def test_bytes_of_attention():
    """Keys and values of 12 tokens in each of 3 rows, queries and outputs of 2 heads, bfloat16 of 32."""
    point = Point.of_lengths(batch=3, heads=2, head_dim=32, mean=6, full=8, spread="uniform")
    assert point.attend_bytes() == 3 * 32 * 2 * (2 * 12 + 2 * 2)
    assert point.attend_bytes(2 * 8) == 3 * 32 * 2 * (2 * 16 + 2 * 2)
