"""What is believed of recorded times: stable, drifting and jumping ceilings, parts that do not add up."""

from __future__ import annotations

import itertools

import pytest

from ssd_bench.steady import adds_up, movement, steadiest, until_steady


@pytest.mark.parametrize(("ceilings", "counted", "moved"), [
    ([1.0, 1.05, 1.1], [0, 1, 2], 0.1),
    ([1.0, 1.0, 2.0, 2.0, 2.1], [2, 3, 4], 0.05),  # it jumped, and then held still
    ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [3, 4, 5], 1.5 / 1.3 - 1),  # it drifts
    ([1.0, 2.0, 1.0, 2.0, 1.5], [2, 3, 4], 1.0),  # it never holds still: the last of those that move least
    ([2.0, 1.0, 1.0, 1.0, 1.0], [2, 3, 4], 0.0)])
def test_trials_are_chosen_by_the_ceiling_alone(ceilings: list[float], counted: list[int], moved: float):
    found = steadiest(ceilings, 3)
    assert list(found) == counted
    assert movement([ceilings[number] for number in found]) == pytest.approx(moved)


def test_fewer_trials_than_asked_for_all_count():
    assert list(steadiest([1.0], 3)) == [0] and movement([1.0]) == 0


def run(ceilings: list[float], patience: float, count: int = 3) -> tuple[list[int], int]:
    """The trials that count, and how many were run; each takes a second."""
    ran = itertools.count()
    now = [0.0]

    def trial() -> float:
        now[0] += 1
        return ceilings[next(ran)]

    found = list(until_steady(trial, count, patience, lambda: now[0]))
    return found, next(ran)


def test_a_steady_ceiling_needs_no_more_trials():
    assert run([1, 1.1, 1.2, 9], patience=60) == ([0, 1, 2], 3)


def test_a_ceiling_that_moves_has_trials_repeated_until_it_holds_still():
    assert run([1, 2, 1, 1.1, 1.1, 9], patience=60) == ([2, 3, 4], 5)


def test_patience_ends():
    """Two seconds are two more trials; then those count that moved least."""
    assert run([1, 2, 4, 5, 7, 1, 1], patience=2) == ([2, 3, 4], 5)
    assert run([1, 2, 4, 5], patience=0) == ([0, 1, 2], 3)


@pytest.mark.parametrize(("parts", "whole", "shown"), [
    ((6, 3, 1), 10, True), ((6, 3, 1.99), 10, True), ((6, 3, 0), 10, True), ((6, 3, 2.01), 10, False),
    ((100, 60, 15), 305, False)])
def test_parts_add_up_to_a_tenth_or_are_not_shown(parts: tuple[float, ...], whole: float, shown: bool):
    assert adds_up(parts, whole) == shown
