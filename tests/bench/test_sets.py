"""The sets of `make bench` and `make gpu`: what they hold, and that they end in time."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from ssd_bench import ceiling, contender, gpu, machine, rivals, rivals_gpu, suite
from ssd_bench.kernel import Options
from ssd_bench.point import Point
from ssd_bench.records import read
from ssd_bench.report import page


def test_the_set_stops_in_time_and_says_what_it_left(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch):
    """Every job takes two minutes; of three, the last would begin after four."""
    now = [0.0]

    def work(patience, report):
        assert patience == 5
        report("working")
        now[0] += 120
        return [make()]

    job = suite.Job("kernel", suite.MAIN.to_dict() | {"device": "cpu"}, work)
    monkeypatch.setattr(suite, "FILES", {"a.jsonl": lambda: iter([job, job]), "b.jsonl": lambda: iter([job])})
    told: list[str] = []
    done: list = []
    folder, left = suite.run(tmp_path, 3.9, 5, lambda text, share: told.append(f"{text} {share:.2f}"), done.append,
                             clock=lambda: now[0])
    title = "batch 16, 16 heads x 128, skewed, mean 120 of 600, bfloat16, cold caches"
    assert left == [f"b.jsonl: {title}"] and told == ["a.jsonl, 1 of 3: working 0.00", "a.jsonl, 2 of 3: working 0.33"]
    assert len(done) == 2
    assert folder.parent == tmp_path and len(read(folder / "a.jsonl")) == 2
    [missing] = read(folder / "b.jsonl")
    assert missing["status"] == "left out: its turn came after 3.9 minutes" and missing["point"] == job.point
    assert f"<h2>Left out for lack of time</h2><ul>\n<li>{title}</li>\n</ul>" in page(read(folder))


def test_rewriting_its_own_results_is_no_change(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch):
    """Results are tracked files: all records name the commit that was there at the start."""
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        subprocess.run(("git", "-C", str(tmp_path), *who, *arguments), check=True, capture_output=True)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "commit", functools.cache(machine.commit.__wrapped__))  # a process that begins
    results = tmp_path / "results" / machine.folder_name(machine.facts(torch.device("cpu")))
    machine.commit.cache_clear()
    results.mkdir(parents=True)
    (results / "a.jsonl").write_text("earlier\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=earlier")
    job = suite.Job("kernel", {}, lambda patience, report: [make(machine=machine.facts(torch.device("cpu")))])
    monkeypatch.setattr(suite, "FILES", {"a.jsonl": lambda: iter([job]), "b.jsonl": lambda: iter([job])})
    folder, _ = suite.run(tmp_path / "results", 1, 0, lambda text, share: None, len)
    commits = {line["machine"]["commit"] for line in read(folder)}
    assert folder == results and len(commits) == 1 and re.fullmatch("[0-9a-f]{12}", commits.pop())
    machine.commit.cache_clear()
    assert machine.commit().endswith("+")


def test_what_is_left_out_has_the_point_of_what_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ceiling, "LARGE", 4096)
    point = Point.of_lengths(batch=1, heads=2, head_dim=32, dtype="float32", mean=8, full=16)
    job = suite._kernel_job(point, Options(only=("SDPA full",), repetitions=1, trials=1))
    assert [(line["kind"], line["point"]) for line in job.run(0, str)] == [(job.kind, job.point)] * 3


def test_the_sweeps_share_their_main_point():
    assert {suite.MAIN.batch, *suite.BATCHES} == {1, 4, 16, 64}
    assert suite.MAIN.mean not in suite.MEANS
    assert [len(list(jobs())) for jobs in suite.FILES.values()] == [6, 2, 18, 14]


def test_the_gpu_set_holds_what_the_goals_name():
    """The most telling batch first; every published shape; rivals at the same lengths as ours."""
    points = list(gpu.kernel_points(gpu.Sizes()))
    assert points[0].batch == 256 and {point.batch for point in points} == {1, 2, 16, 32, 64, 256}
    plans = {point.label: point.plan for point in points if point.plan is not None and point.full == 600}
    assert sorted(round(plan.budget(576), 2) for plan in plans.values()) == [0.2, 0.2, 1.0]
    shapes = [(32, 8, 4096), (1, 16, 512)]
    assert [(point.batch, point.heads, point.mean) for point in points if point.full not in (600,)] == shapes
    rivals = list(gpu.rival_points(gpu.Sizes()))
    assert [(point.batch, point.heads, point.mean) for point in rivals[1:3]] == shapes
    assert {point.lengths for point in rivals if point.full == 600} <= {point.lengths for point in points}


def test_every_rival_is_in_one_group_of_the_gpu_set():
    point, cpu = Point.of_lengths(1, 2, 32, "float32", 4, 8), torch.device("cpu")
    arena = contender.Arena(point, cpu)
    for one in (*rivals.contenders(point, arena, cpu), *rivals_gpu.contenders(point, arena, cpu)):
        found = [names for groups in gpu.RIVALS.values() for names in groups if any(name in one.name for name in names)]
        assert len(found) == (one.name != "two bmm, a call per head (2)"), one.name


def test_what_fails_on_a_gpu_is_a_record_and_the_next_is_measured(tmp_path: Path, make,
                                                                  monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    out = tmp_path / "times.jsonl"

    def fails():
        raise RuntimeError("CUDA error: no luck\nmore")

    point = Point.of_lengths(batch=2).to_dict()
    for measure in (fails, lambda: [make(batch=2)]):
        gpu.attempt(out, point, "ssd_kernels cuda", measure)
    failed, measured = read(out)
    assert failed["status"] == "failed: CUDA error: no luck" and failed["point"] == point
    assert measured["status"] == "ok"
    with pytest.raises(SystemExit, match="1 of 2 have no number; the first: failed: CUDA error: no luck"):
        gpu.finish([[failed], [measured]])
