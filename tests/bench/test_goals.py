"""Goals: met, missed or without a verdict, from made-up records."""

from __future__ import annotations

from typing import Any

import pytest

from ssd_bench.ceiling import LOOP
from ssd_bench.goals import floor_share, goals, rows, sentences
from ssd_bench.kernel import share
from ssd_bench.records import left_out, record
from ssd_bench.report import page
from ssd_bench.tables import describe, machine_line

MACHINE = {"processor": "CPU", "cores": 2, "threads": 2, "memory_bytes": 1, "instruction_set": "avx2", "load": 1.0,
           "python": "3", "torch": "2", "ssd_kernels": "1", "commit": "c", "command": "c"}
OURS, SDPA, BMM = "ssd_kernels cpu: heavy", "SDPA, every head the mean length", "two bmm, every head the mean length"


@pytest.fixture
def kernel(make):
    """Records of ours and rivals in us, under a loop that reads 100 GB/s: 16 x 16 heads of 120 tokens in bfloat16 are
    15.9 MB.
    """
    def build(best: float, moved: float = 0.0, rivals: tuple[tuple[str, float], ...] = (), **point: Any):
        lines = [make(LOOP), make(OURS, (best, 2 * best, 3 * best), **point),
                 *(make(name, (us, us, us), **point) for name, us in rivals)]
        return [line | {"ceiling": {"read": 9e10, "copy": 2e11, "loop": 1e11}, "moved": moved} for line in lines[1:]]

    return build


def test_the_share_is_of_what_can_be_read_and_best_with_best(kernel):
    """Neither the copy's rate nor the medians count; a sum of torch's that is faster than the loop does."""
    [line] = kernel(200)
    assert share(line) == pytest.approx(line["bytes"]["useful"] / 200e-6 / 1e11)
    assert share(line | {"ceiling": {"read": 1.25e11, "copy": 2e11, "loop": 1e11}}) == pytest.approx(0.8 * share(line))
    assert share(line | {"ceiling": {"read": 9e10, "copy": 2e11}}) == pytest.approx(0.5 * share(line))


@pytest.mark.parametrize(("best", "moved", "verdict"), [(160, 0.0, "met"), (160, 0.2, "met"), (180, 0.1, "missed"),
                                                        (160, 0.21, "no verdict"), (180, 0.5, "no verdict")])
def test_goals_are_met_or_missed_in_the_open(kernel, best: float, moved: float, verdict: str):
    lines = kernel(best, moved, ((SDPA, 4 * best), (BMM, 2.5 * best)))
    [(aim, reached, said, beside)] = goals(lines)
    assert (aim, said) == ("bfloat16 at 95% of the ceiling", verdict)
    assert reached == f"{share(lines[0]):.0%}" and reached in ("99%", "88%")
    assert beside == f"{SDPA}: 4.0 times as long, {BMM}: 2.5 times as long"
    assert sentences(lines) == [f"{aim}: {verdict}, {reached}; {beside}"]
    text = page(lines)
    assert f">{verdict}<" in text and "<h2>Goals</h2>" in text
    assert ("TOO MUCH FOR A VERDICT" in machine_line(lines[0])) == (verdict == "no verdict")


@pytest.mark.parametrize(("bests", "verdict"), [([1.6, 1.7, 1.9], "met"), ([1.6, 1.7, 1.95], "no verdict")])
def test_no_verdict_where_ours_never_came_through_twice(kernel, bests: list[float], verdict: str):
    [line] = kernel(160)
    assert goals([line | {"seconds": line["seconds"] | {"bests": bests}}])[0][2] == verdict


def test_8_bits_have_a_goal_of_their_own(kernel):
    [line] = kernel(160)
    eighth = {**line, "contender": line["contender"] | {"name": f"{OURS}, int8", "kv_format": "int8"}}
    assert [found[0] for found in goals([line, eighth])] == [f"{stored} at 95% of the ceiling"
                                                             for stored in ("bfloat16", "int8")]
    assert len(goals([line])) == 1


def test_what_was_left_out_is_not_measured(kernel):
    lines = [kernel(160)[0], *steps("included", "float32", 8, 2, 5), *steps("1b", "bfloat16", 1, 2, 5),
             *steps("included", "float32", 32, 2, 5)]
    found = [goals([left_out(line["kind"], line["machine"], line["point"], "no time")]) for line in lines]
    assert [one[0][:3] for one in (found[0], found[1], found[5])] == [
        ("bfloat16 at 95% of the ceiling", "", "not measured"),
        ("3 times as fast as transformers' best loop", "", "not measured"), ("80% of the floor", "", "not measured")]
    assert found[-1] == []
    line = left_out("kernel", lines[0]["machine"], lines[0]["point"], "no time")
    assert sentences([line]) == ["bfloat16 at 95% of the ceiling: not measured"]


def test_other_points_and_kinds_have_no_goals(kernel, make):
    assert goals(kernel(160, batch=64)) and goals(kernel(160, spread="uniform"))
    assert goals(kernel(160, mean=60)) == goals(kernel(160, heads=8)) == goals(kernel(160, batch=1)) == []
    assert goals([{**make(), "kind": "serve"}]) == goals([{**make(), "kind": "image"}]) == []


def steps(model: str, dtype: str, pictures: int, ours: float, theirs: float | None = None, moved: float = 0.0):
    """Records of a decoder step, seconds; reading what it takes would be a second."""
    def line(name: str, seconds: float, **contender: Any):
        timing = {"median": 2 * seconds, "best": seconds, "spread": 0.0, "trials": [2 * seconds]}
        point = {"label": model, "batch": pictures, "rows": 2 * pictures, "dtype": dtype, "steps": 4, "start": 480,
                 "batch_is": "fixed"}
        return record("step", MACHINE, point, {"name": name, "backend": None, **contender}, status="ok", seconds=timing,
                      bytes={"cache": 1, "peak": None}, moved=moved, floor={"bytes": 10, "read": 10.0})

    found = [line("engine, 20%, row buffer 24", ours, backend="auto", budget=0.2, row_buffer=24),
             line("engine, full plan", 9 * ours, backend="auto", budget=1.0, row_buffer=0)]
    return found if theirs is None else [line("static", theirs), line("dynamic", 3 * theirs), *found]


def test_steps_are_judged_by_the_floor_or_by_the_rival():
    lines = steps("1b", "bfloat16", 1, 1.25, 2.5)
    assert floor_share(lines[2]) == 0.8
    assert goals(lines) == [("80% of the floor", "80%", "met", "2.00 times as fast as transformers' best loop")]
    assert goals(steps("1b", "bfloat16", 1, 1.3, 2.6))[0][2] == "missed"
    assert goals(steps("1b", "bfloat16", 1, 1.3, 2.6, moved=0.3))[0][2] == "no verdict"
    assert goals(steps("included", "float32", 8, 2, 5.9)) == [
        ("3 times as fast as transformers' best loop", "2.95 times", "missed", "50% of the floor")]
    assert goals(steps("included", "float32", 8, 2)) == goals(steps("included", "float32", 32, 2, 6)) == []


def test_tables_show_the_best_step_and_the_floor():
    title, columns, found, _ = describe(steps("1b", "bfloat16", 1, 1.25, 2.5))
    shown = dict(zip(columns, found[2], strict=True))
    expected = {"ms/step": "1250.0", "median": "2500.0", "of floor": "80%", "x transf.": "2.00"}
    assert {name: shown[name] for name in expected} == expected
    assert rows([steps("1b", "bfloat16", 1, 1.25, 2.5)])[0][0] == "step, model 1b, 2 rows, bfloat16"
