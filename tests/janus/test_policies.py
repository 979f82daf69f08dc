"""Policies: the budget is used up and never exceeded."""

from __future__ import annotations

import pytest

from ssd_janus import ModelShape, policies

JANUS = ModelShape(num_layers=24, num_heads=16, num_query_heads=16, head_dim=128, num_visual_tokens=576, columns=24)
SMALL = ModelShape(num_layers=3, num_heads=2, num_query_heads=4, head_dim=32, num_visual_tokens=36, columns=6)


@pytest.mark.parametrize("name", ["window", "heavy", "mixed"])
@pytest.mark.parametrize("row_buffer", [None, 0, 1, 7, 24])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2, 1 / 3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [JANUS, SMALL], ids=["janus", "small"])
def test_budgets_are_met_from_below(name: str, row_buffer: int | None, budget: float, shape: ModelShape) -> None:
    try:
        plan = policies.build(name, shape, budget, row_buffer)
    except ValueError as error:
        smallest = float(str(error).split("at least ")[1].split()[0])
        assert smallest > budget
        assert policies.build(name, shape, smallest, row_buffer).budget(shape.num_visual_tokens) > budget
        return
    got = plan.budget(shape.num_visual_tokens)
    assert got <= budget + 1e-9
    assert got > budget - 1.01 / shape.num_visual_tokens
    assert plan.row_buffer == (shape.columns if row_buffer is None else row_buffer)
    assert (plan.num_layers, plan.num_heads) == (shape.num_layers, shape.num_heads)


def test_twenty_per_cent_of_janus() -> None:
    assert {spec.size for heads in policies.window(JANUS, 0.2).layers for spec in heads} == {91}


def test_heavy_keeps_half_recent_by_means() -> None:
    spec = policies.heavy(JANUS, 0.2).layers[3][5]
    assert (spec.kind, spec.recent, spec.score) == ("heavy", spec.size // 2, "mean")


def test_mixed_has_as_many_heads_of_either_kind() -> None:
    kinds = [spec.kind for heads in policies.mixed(JANUS, 0.2).layers for spec in heads]
    assert kinds.count("window") == kinds.count("heavy") == len(kinds) // 2
    one_head = ModelShape(4, 1, 4, 32, 36, 6)
    assert [heads[0].kind for heads in policies.mixed(one_head, 0.5).layers] == ["window", "heavy"] * 2


def test_full_keeps_everything() -> None:
    plan = policies.build("full", JANUS, 1.0)
    assert plan.budget(576) == 1 and plan.row_buffer == 0
    with pytest.raises(ValueError, match="budget of policy full must be 1, got 0.2"):
        policies.full(JANUS, 0.2)


@pytest.mark.parametrize("arguments, error, message", [
    (("window", JANUS, 0), ValueError, r"budget must be within \(0, 1\], got 0"),
    (("window", JANUS, 1.5), ValueError, "budget must be within"),
    (("window", JANUS, float("nan")), ValueError, "budget must be within"),
    (("window", JANUS, "20%"), TypeError, "budget must be a number"),
    (("window", JANUS, 0.2, -1), ValueError, "row_buffer must be at least 0"),
    (("window", JANUS, 0.2, 2.5), TypeError, "row_buffer must be an int"),
    (("heavy", JANUS, 0.03), ValueError, "budget must be at least 0.0435 with row_buffer=24"),
    (("paper", JANUS, 0.2), ValueError, "policy must be one of full, window, heavy, mixed, got 'paper'"),
])
def test_bad_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        policies.build(*arguments)
