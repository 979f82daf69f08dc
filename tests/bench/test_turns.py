"""Loops in turn: one at any time, all to their end, whatever becomes of one."""

from __future__ import annotations

import threading

import pytest

from ssd_bench.turns import in_turn


@pytest.mark.parametrize(("turn", "order"), [(0.0, "-a-b-c-a-b-c-a-b---b-"), (2.0, "-aa-bb-cc-a-bb--")])
def test_loops_take_turns_after_so_many_seconds(turn: float, order: str):
    """Every step takes a second, and a loop ends in a turn of its own."""
    now, ran = [0.0], []

    def job(name: str, steps: int):
        def run(pause):
            for _ in range(steps):
                ran.append(name)
                now[0] += 1
                pause()
            return name.upper()

        return run

    jobs = [job("a", 3), job("b", 4), job("c", 2)]
    assert in_turn(jobs, lambda: ran.append("-"), turn, clock=lambda: now[0]) == ["A", "B", "C"]
    assert "".join(ran) == order


def test_one_loop_that_fails_leaves_the_others():
    def fails(pause):
        pause()
        raise ValueError("no luck")

    def goes_on(pause):
        pause()
        pause()
        return threading.get_ident()

    before = threading.active_count()
    error, other = in_turn([fails, goes_on], lambda: None, 0)
    assert isinstance(error, ValueError) and other != threading.get_ident()
    assert threading.active_count() == before


def test_loops_end_when_the_caller_is_interrupted():
    """Also those that would take long, at their next step, and those that have not begun."""
    before, ended = threading.active_count(), []

    def endless(pause):
        try:
            while True:
                pause()
        finally:
            ended.append(1)

    between = iter([None, None, KeyboardInterrupt()])

    def interrupted():
        if (error := next(between)) is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        in_turn([endless, endless, endless], interrupted, 0)
    assert threading.active_count() == before and len(ended) == 2


def test_a_single_loop_runs_where_it_is_called_from():
    between = []
    assert in_turn([lambda pause: (pause(), threading.get_ident())[1]], lambda: between.append(1), 0) == [
        threading.get_ident()]
    assert len(between) == 2
    [error] = in_turn([lambda pause: 1 / 0], lambda: None, 0)
    assert isinstance(error, ZeroDivisionError)
