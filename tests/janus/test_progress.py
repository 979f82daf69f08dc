"""Progress without a terminal."""

from __future__ import annotations

import pytest

from ssd_janus.progress import PAUSE, Lines, progress_bar


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str], seconds_per_step: float, total: int, first: int = 1) -> list[str]:
    clock = Clock()
    lines = Lines("drawing", clock)
    for done in range(first, total + 1):
        clock.now += seconds_per_step
        lines.report(done, total)
    return capsys.readouterr().err.splitlines()


def test_a_fast_run_has_a_line_at_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines_of(capsys, 0.5, 200)
    assert [line.split(",")[0] for line in found] == [f"drawing: {done}/200 steps" for done in range(20, 201, 20)]
    assert found[0] == "drawing: 20/200 steps, 0:00:10 elapsed, 0:01:30 left"
    assert found[-1] == "drawing: 200/200 steps, 0:01:40 elapsed, 0:00:00 left"


def test_a_slow_run_has_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines_of(capsys, 7.0, 1000)
    assert 200 <= len(found) <= 7000 / PAUSE + 10
    assert found[0] == "drawing: 5/1000 steps, 0:00:35 elapsed, 1:56:05 left"


def test_a_run_that_goes_on_estimates_by_its_own_speed(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines_of(capsys, 1.0, 100, first=51)
    assert found[0] == "drawing: 60/100 steps, 0:00:10 elapsed, 0:00:40 left"


def test_a_report_of_everything_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("[red]comparing[/red]") as report:
        report(0, 0)
        report(3, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[red]comparing[/red]: 3/3 steps, 0:00:00 elapsed")
