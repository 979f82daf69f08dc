"""`ssd-bench kernel`: its clockwork, its gate, its command."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from ssd_bench import kernel
from ssd_bench.cli import app
from ssd_bench.timing import time_interleaved
from ssd_kernels import CompressedCache

SMALL = kernel.Shape(batch=2, heads=4, head_dim=32, mean=6, full=20, dtype=torch.float32)


def test_timing_takes_minimum_and_median_of_timed_runs_only():
    ticks = itertools.accumulate([0, 5, 1, 3, 1, 4], initial=100.0)
    next(ticks)  # clock readings: 100, 105, 106, 109, 110, 114 -> runs of 5, 3 and 4 seconds
    ran = []
    result = time_interleaved({"call": lambda: ran.append(1)}, repetitions=1, trials=3, warmup=2,
                              clock=lambda: next(ticks))
    assert len(ran) == 9
    assert (result["call"].best, result["call"].median) == (3.0, 4.0)


@pytest.mark.parametrize("shape", [SMALL, kernel.Shape(), replace(SMALL, mean=20), replace(SMALL, heads=1)],
                         ids=["small", "default", "all-full", "one-head"])
def test_head_lengths_are_ragged_and_keep_the_mean(shape: kernel.Shape):
    lengths = shape.lengths()
    assert len(lengths) == shape.heads
    assert abs(sum(lengths) / shape.heads - shape.mean) <= 0.5
    assert 2 <= min(lengths) and max(lengths) <= shape.full


def test_useful_bytes_are_what_the_cache_holds_during_a_step():
    cache, _, _ = kernel._cache(SMALL, kernel.HeadSpec.heavy, 0, seed=0)
    kept = sum(len(positions) for head in range(SMALL.heads) for positions in cache.positions(0, head))
    appended = SMALL.batch * SMALL.heads
    assert SMALL.useful_bytes == 2 * (kept + appended) * SMALL.head_dim * 4


def test_every_contender_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "COLD_BYTES", 1)
    rows = kernel.measure(SMALL, repetitions=2, trials=1)
    assert {row.name for row in rows} >= {*kernel.OURS, "read", "SDPA uniform", "SDPA padded + mask"}
    assert all(row.microseconds > 0 and row.bytes > 0 for row in rows)
    assert next(row for row in rows if row.name == kernel.OURS[1]).ratio == 1.0


def test_wrong_output_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    right = CompressedCache.decode
    monkeypatch.setattr(CompressedCache, "decode", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(RuntimeError, match="wrong output"):
        kernel.measure(SMALL, repetitions=1, trials=1)


def test_command_prints_json(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "COLD_BYTES", 1)
    result = CliRunner().invoke(app, ["kernel", "--batch", "1", "--heads", "2", "--head-dim", "32", "--mean", "4",
                                      "--full", "8", "--dtype", "float32", "--repetitions", "2", "--trials", "1",
                                      "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["shape"]["dtype"] == "float32" and len(data["rows"]) == 8


def test_unknown_dtype_is_refused_by_name():
    result = CliRunner().invoke(app, ["kernel", "--dtype", "int8"])
    assert result.exit_code == 2 and "int8" in result.output


def test_impossible_lengths_are_refused_by_name():
    result = CliRunner().invoke(app, ["kernel", "--mean", "700", "--full", "600"])
    assert result.exit_code == 2 and "mean" in result.output
