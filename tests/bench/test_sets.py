"""The sets of `make bench` and `make gpu`: what they hold, and that they end in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssd_bench import gpu, suite
from ssd_bench.records import read


def test_the_set_stops_in_time_and_says_what_it_left(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch):
    """Every job takes two minutes; of three, the last would begin after four."""
    now = [0.0]

    def job(report):
        report("working")
        now[0] += 120
        return [make()]

    monkeypatch.setattr(suite, "FILES", {"a.jsonl": lambda: iter([job, job]), "b.jsonl": lambda: iter([job])})
    told: list[str] = []
    done: list = []
    folder, left = suite.run(tmp_path, 3.9, told.append, done.append, clock=lambda: now[0])
    assert left == ["b.jsonl, part 1"] and told == ["a.jsonl: working"] * 2 and len(done) == 2
    assert folder.parent == tmp_path and len(read(folder)) == 2


def test_the_sweeps_share_their_main_point():
    assert {suite.MAIN.batch, *suite.BATCHES} == {1, 4, 16, 64}
    assert suite.MAIN.mean not in suite.MEANS
    assert [len(list(jobs())) for jobs in suite.FILES.values()] == [1, 2, 14]


def test_the_gpu_set_holds_both_kinds_of_points():
    points = [point for point, _ in gpu.jobs(torch.device("cpu"))]
    assert {point.batch for point in points} == {2, 16, 64, 256}
    plans = {point.label: point.plan for point in points if point.plan is not None}
    budgets = sorted(round(plan.budget(gpu.TOKENS), 2) for plan in plans.values())
    assert budgets == [0.2, 1.0]
    assert all(point.full == 600 for point in points)


def test_make_gpu_ends_with_ours_in_one_table(make):
    lines = [make(batch=2), make("SDPA full cache"), make(status="wrong"), make(batch=256, trials=(50, 60, 70))]
    rows = gpu.summary(lines)
    assert [row[1:4] for row in rows] == [["2", "ssd_kernels cpu: heavy", "100.0"],
                                          ["256", "ssd_kernels cpu: heavy", "60.0"]]
