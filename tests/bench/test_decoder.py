"""Whole steps: transformers' loop and the engine draw the same tokens, and every step is timed once."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from ssd_bench import decoder, loops, tables
from ssd_bench.models import random_model
from ssd_bench.plot import figures
from ssd_bench.timing import Timing

PROMPT = [0, 10, 11, 12, 2]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(64, 96, 2, 2, torch.float32, torch.device("cpu"))


def listed(model, **options):
    return list(decoder.loops(model, PROMPT, budgets=(0.2,), **options))


def test_loops_are_named_for_what_they_are(model):
    assert [loop.name for loop in listed(model)] == [
        "transformers, dynamic cache", "transformers, static cache", "engine, full plan", "engine, 20%, row buffer 0",
        "engine, 20%, row buffer 24"]
    assert [loop.plan.row_buffer for loop in listed(model)][-1] == 24


@pytest.mark.parametrize("sample", [False, True])
def test_all_loops_with_everything_kept_draw_the_same_tokens(model, sample: bool):
    drawn = []
    for loop in listed(model)[:3]:
        torch.manual_seed(1)
        drawn.append(loop.run(2, 8, None, None, sample))
    assert drawn[0].tokens.shape == (2, 8)
    assert all(torch.equal(one.tokens, drawn[0].tokens) for one in drawn)
    assert [len(one.seconds) for one in drawn] == [7, 7, 7]
    assert model.model.vision_model.config.num_image_tokens == 576  # put back


def test_steps_are_timed_by_the_clock(model):
    """A clock that advances by one more second at each reading: 1, 2, 3, ... seconds between readings."""
    def clock():
        seconds = itertools.accumulate(itertools.count())
        return lambda: float(next(seconds))

    theirs = loops.transformers_loop(model, [PROMPT], 4, "dynamic", clock=clock())
    ours = loops.engine_loop(decoder.Engine(model), [PROMPT], 4, clock=clock())
    assert theirs.seconds == [4, 6, 8]  # the prompt's forward comes first, and others have their turn between steps
    assert ours.seconds == [2, 4, 6]


def test_a_step_at_a_fill_attends_to_as_many_tokens_in_every_loop(model):
    """5 prompt tokens, 480 visual ones and those drawn: dynamic caches hold them all, static ones have room."""
    found = {loop.name: loop.run(1, 4, 480, None, True) for loop in listed(model)}
    token = 2 * 2 * 2 * 2 * 32 * 4  # rows, layers, keys and values, heads, head_dim, float32
    assert found["transformers, dynamic cache"].cache_bytes == token * (5 + 480 + 3)
    assert found["transformers, static cache"].cache_bytes == token * (5 + 480 + 4)
    assert found["engine, 20%, row buffer 0"].cache_bytes < 0.25 * found["engine, full plan"].cache_bytes


def setting(start: int | None = 480, steps: int = 2, trials: int = 1) -> decoder.Setting:
    return decoder.Setting("tiny", "float32", 1, steps, start, trials, patience=0)


def test_records_of_steps_and_pictures(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoder, "adds_up", lambda parts, whole: True)
    for start, steps in ((480, 2), (None, 26)):
        lines = decoder.measure(model, listed(model), setting(start, steps, trials=2))
        assert [line["status"] for line in lines] == ["ok"] * 5 and {line["same_tokens"] for line in lines} == {"ok"}
        for line in lines:
            assert line["kind"] == ("image" if start is None else "step")
            assert len(line["seconds"]["trials"]) == 2 and line["split"].keys() == set(decoder.PARTS)
            assert min(line["split"].values()) > 0 and line["bytes"]["cache"] > 0
            assert ("by_row" in line) == (start is None) != ("floor" in line)
        json.dumps(lines)
        title, columns, rows, _ = tables.describe(lines)
        assert "tiny" in title and {len(row) for row in rows} == {len(columns)}
        assert ("pict./s" in columns) == (start is None)
        found = figures(lines)
        assert set(found) == {"step-breakdown"} | ({"place"} if start is None else set())
        bars = found["step-breakdown"].axes[0].patches
        assert [bar.get_width() for bar in bars[:5]] == pytest.approx([1e3 * line["split"]["linear"] for line in lines])


def test_parts_of_another_time_are_not_shown(model, monkeypatch: pytest.MonkeyPatch):
    """Each loop is split again, a few times, and then has no parts."""
    asked = []
    monkeypatch.setattr(decoder, "adds_up", lambda parts, whole: asked.append((list(parts), whole)))
    [line] = decoder.measure(model, listed(model)[:1], setting())
    assert "split" not in line and len(asked) == decoder.SPLITS
    assert {whole for _, whole in asked} == {line["seconds"]["best"]} and min(min(parts) for parts, _ in asked) > 0
    assert tables.decoder_rows([line])[0][4:7] == ["", "", ""]


def test_parts_are_those_of_the_fastest_step():
    steps = [{"total": 6.0, "linear": 3.0, "attention": 2.0, "rest": 1.0},
             {"total": 5.0, "linear": 1.0, "attention": 3.0, "rest": 1.0},
             {"total": 9.0, "linear": 5.0, "attention": 2.0, "rest": 2.0}]
    timing = Timing(median=6.5, best=5.5, spread=0.0, trials=[6.5], bests=[5.5])
    assert decoder.parts_of(steps, timing, "step") == ({"linear": 1.0, "attention": 3.0, "rest": 1.0}, 5.5)
    assert decoder.parts_of(steps, timing, "image") == ({"linear": 3.0, "attention": 2.0, "rest": 1.0}, 6.5)


def test_a_step_moves_the_weights_once_and_every_row_s_tokens(model):
    full, *_, small = listed(model)[2:]
    few, many = (decoder.decode_bytes(model, full.plan, 5, rows, 480) for rows in (2, 6))
    weights = sum(parameter.nbytes for parameter in model.model.language_model.layers.parameters())
    token = 2 * 2 * 2 * 32 * 4  # keys and values of 2 layers, 2 heads, head_dim 32
    assert (many - few) / 4 == pytest.approx((5 + 481) * token, rel=0.02)
    assert few - (many - few) / 2 == weights and decoder.decode_bytes(model, small.plan, 5, 2, 480) < few


def test_engine_with_other_tokens_gets_no_number(model, monkeypatch: pytest.MonkeyPatch):
    right = loops.engine_loop

    def wrong(*given, **options):
        drawn = right(*given, **options)
        drawn.tokens[:, 3] += 1
        return drawn

    monkeypatch.setattr(decoder, "engine_loop", wrong)
    lines = decoder.measure(model, listed(model), setting())
    assert [line["status"] for line in lines[:2]] == ["ok", "ok"]
    assert all(line["status"] == "wrong: the engine's tokens differ from transformers' at step 3" for line in lines[2:])
    assert all(line["seconds"] is None for line in lines[2:])


def test_loop_that_fails_leaves_the_others(model):
    def explode(*given):
        raise RuntimeError("out of it")

    loop = decoder.Loop("transformers, odd cache", {"backend": None}, listed(model)[0].plan, explode)
    lines = decoder.measure(model, [loop, *listed(model)[:1]], setting())
    assert [line["status"] for line in lines] == ["failed: out of it", "ok"]


def test_largest_batch_grows_as_the_budget_falls(model):
    full, *_, small = listed(model)[2:]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    counts = [decoder.largest(loop, model, 5, (weights + 2e8) / 1e9) for loop in (full, small)]
    assert 1 <= counts[0] < counts[1]
    with pytest.raises(ValueError, match="largest-in"):
        decoder.largest(full, model, 5, 1e-6)
