"""Serving pictures that arrive at random: the same arrivals and the same tokens in every way."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
import torch
from typer.testing import CliRunner

from ssd_bench import records, report, serve, tables
from ssd_bench.cli import app
from ssd_bench.models import random_model

PROMPT = [0, 10, 11, 12, 13, 14, 2]
WAYS = ["continuous batching", "static batches", "one at a time"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(64, 96, 2, 2, torch.float32, torch.device("cpu"))


def setting(**changes) -> serve.Setting:
    given = {"model": "small", "dtype": "float32", "capacity": 2, "pictures": 4, "steps": 24, "rate": 50.0, "load": 0.7,
             "seed": 0, "clock": "wall"}
    return serve.Setting(**{**given, **changes})


@pytest.fixture(scope="module")
def lines(model):
    return serve.measure(model, PROMPT, setting(), 0.2)


def test_every_way_serves_all_pictures(lines):
    assert [line["contender"]["name"] for line in lines] == WAYS
    for line in lines:
        assert line["status"] == records.OK and line["same_tokens"]
        start, row, picture = (line["to"][name] for name in ("start", "first_row", "picture"))
        assert 0 <= start["p50"] < row["p50"] <= picture["p50"] <= picture["p99"]
    assert lines[2]["drawn_at_once"] == pytest.approx(1) and 1 <= lines[0]["drawn_at_once"] <= 2


def test_records_are_read_and_shown(lines, tmp_path):
    records.write(lines, tmp_path / "serve.jsonl")
    assert records.read(tmp_path / "serve.jsonl") == json.loads(json.dumps(lines))
    title, columns, rows, _ = tables.describe(lines)
    assert title.startswith("4 pictures arrive, 50.00 a second (Poisson, seed 0), model small, 24 tokens each, up to 2")
    assert [row[0] for row in rows] == WAYS and all(len(row) == len(columns) for row in rows)
    report.save(lines, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "continuous batching" in page and tables.SERVE_NOTES["first row, picture"] in page


def test_the_rate_follows_from_what_full_batches_draw(model):
    lines = serve.measure(model, PROMPT, setting(rate=None, load=0.5, clock="processor", pictures=2), 1.0)
    assert all(line["status"] == records.OK and line["point"]["rate"] > 0 for line in lines)


def test_tokens_that_depend_on_the_way_are_wrong(model, monkeypatch):
    finish = serve.Continuous.finish

    def other(self):
        served = finish(self)
        served[1].tokens[3] += 1
        return served

    monkeypatch.setattr(serve.Continuous, "finish", other)
    statuses = [line["status"] for line in serve.measure(model, PROMPT, setting(pictures=2), 0.2)]
    assert statuses[0] == records.OK and all(status.startswith("wrong") for status in statuses[1:])


def test_what_fails_has_no_number(model, monkeypatch):
    monkeypatch.setattr(serve.Static, "_draw", lambda self, batch: [][0])
    monkeypatch.setattr(serve.Scheduler, "submit", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(IndexError):  # no failure of the machine, but a mistake
        serve.measure(model, PROMPT, setting(pictures=2), 0.2)
    monkeypatch.setattr(serve.Static, "_draw", lambda self, batch: (_ for _ in ()).throw(MemoryError("full")))
    assert [line["status"] for line in serve.measure(model, PROMPT, setting(pictures=2), 0.2)] == ["failed: full"] * 3


def test_arrivals_are_a_poisson_process():
    moments = serve.arrivals(4000, 2.0, 1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert moments[0] == 0 and moments == serve.arrivals(4000, 2.0, 1) != serve.arrivals(4000, 2.0, 2)
    assert all(figure(gaps) == pytest.approx(0.5, rel=0.1) for figure in (statistics.mean, statistics.stdev))


def test_nobody_waits_for_arrivals():
    now = 3.0
    clock = serve.Clock(lambda: now)
    assert clock() == 0
    clock.skip_to(5.0)
    assert clock() == 5
    now += 1
    clock.skip_to(2.0)
    assert clock() == 6


def test_figures():
    served = [serve.Served(0.0, 1.0, 2.0, 4.0), serve.Served(0.0, 1.0, 3.0, 4.0), serve.Served(6.0, 6.0, 7.0, 8.0)]
    found = serve.figures(served)
    assert found["rate"] == 3 / 8 and found["drawn_at_once"] == (3 + 3 + 2) / 5
    assert found["to"]["start"] == {"mean": pytest.approx(2 / 3), "p50": 1.0, "p99": 1.0}
    assert found["to"]["picture"]["p50"] == 4.0 and found["to"]["first_row"]["p99"] == 3.0
    assert [serve.percentile(range(1, 101), share) for share in (1, 50, 99, 100)] == [1, 50, 99, 100]


@pytest.mark.parametrize(("options", "message"), [
    (["--clock", "sun"], "must be one of wall, processor"), (["--dtype", "int8"], "must be one of"),
    (["--capacity", "0"], "capacity")])
def test_bad_options(options, message):
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 2 and message in result.output


def test_bad_settings(model):
    with pytest.raises(ValueError, match="steps must be within 24, a row, and 576, got 7"):
        serve.measure(model, PROMPT, setting(steps=7), 0.2)
