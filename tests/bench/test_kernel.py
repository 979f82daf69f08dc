"""`ssd-bench kernel`: its contenders, its gate, its command."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ssd_bench import ceiling, contender, kernel, machine, ours, rivals, rivals_gpu, tables
from ssd_bench.cli import app
from ssd_bench.point import Point
from ssd_bench.timing import Stopwatch, Work, nothing
from ssd_kernels import CachePlan, CompressedCache, HeadSpec, native
from ssd_kernels.layout import LayerLayout

CPU = torch.device("cpu")
SMALL = {"batch": 2, "heads": 3, "head_dim": 32, "mean": 6, "full": 20}
QUICK = kernel.Options(repetitions=2, trials=1, patience=0, row_buffers=(0, 4))
# FlexAttention takes half a minute to compile; it has a test of its own, marked slow.
WITHOUT_FLEX = ("ssd_kernels", "SDPA", "bmm")


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (contender, ours, ceiling):
        monkeypatch.setattr(module, "copies_of", lambda nbytes: 2)
    monkeypatch.setattr(rivals, "copies_of", lambda nbytes: 2)
    monkeypatch.setattr(ceiling, "LARGE", 4096)


def point(**changes: object) -> Point:
    return Point.of_lengths(**{**SMALL, "dtype": "float32", **changes})  # type: ignore[arg-type]


def options(**changes: object) -> kernel.Options:
    return kernel.Options(**{**vars(QUICK), "only": WITHOUT_FLEX, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_everybody_is_right_and_measured(dtype: str):
    lines = kernel.measure(point(dtype=dtype), options())
    assert [line["status"] for line in lines] == ["ok"] * len(lines)
    names = [line["contender"]["name"] for line in lines]
    assert names[:2] == [ceiling.LOOP, ceiling.READ] and len(set(names)) == len(names) == 2 + 4 + 7
    assert lines[0]["ceiling"]["loop"] > 0 and lines[0]["moved"] == 0
    assert all(line["seconds"]["best"] > 0 and line["bytes"]["useful"] > 0 for line in lines)
    json.dumps(lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8_bits_stand_beside_the_point_s_dtype(dtype: str):
    """Right, with fewer bytes held and moved, and never what others are compared with."""
    lines = kernel.measure(point(dtype=dtype), options(kv_formats=("int8", "auto"), only=("ssd_kernels",)))
    found = {line["contender"]["name"]: line for line in lines[2:]}
    assert len(found) == 8 and {line["status"] for line in lines} == {"ok"}
    for name in ("heavy", "heavy, row buffer 4", "window", "window, row buffer 4"):
        whole, eighth = (found[f"ssd_kernels cpu: {name}{format}"] for format in ("", ", int8"))
        assert eighth["contender"]["kv_format"] == "int8" and whole["contender"]["kv_format"] == "auto"
        assert all(eighth["bytes"][part] < whole["bytes"][part] for part in ("useful", "read", "allocated"))
    assert kernel.ours_of(lines) is found["ssd_kernels cpu: heavy"]


def test_wrong_scales_get_no_number(monkeypatch: pytest.MonkeyPatch):
    right = CompressedCache.decode

    def decode(self: CompressedCache, layer: int, *given: torch.Tensor) -> torch.Tensor:
        out = right(self, layer, *given)
        if self.backend == "cpu":
            self._layers[layer].scales[0].mul_(1 + 2**-20)
        return out

    monkeypatch.setattr(CompressedCache, "decode", decode)
    assert "key_scales of row 0" in kernel.measure(point(), one(kv_formats=("int8",)))[-1]["status"]


@pytest.mark.slow
def test_flex_attention_is_right():
    line = kernel.measure(point(), options(only=("FlexAttention",)))[-1]
    assert line["status"] == "ok" and line["setup_seconds"] > 0


@pytest.mark.parametrize(("batch", "spread"), [(1, "uniform"), (1, "two-class"), (5, "skewed")])
def test_gate_passes_the_reference_itself(batch: int, spread: str):
    lines = kernel.measure(point(batch=batch, spread=spread), options(backends=("reference",), only=("reference",)))
    assert {line["status"] for line in lines} == {"ok"} and len(lines) == 6


def one(**changes: object) -> kernel.Options:
    return options(only=("cpu: heavy",), row_buffers=(0,), **changes)


def test_wrong_output_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    right = CompressedCache.decode
    monkeypatch.setattr(CompressedCache, "decode", lambda self, *given: right(self, *given) * (
        1.01 if self.backend == "cpu" else 1))
    lines = kernel.measure(point(), one())
    assert lines[2]["status"].startswith("wrong: output of row 0, head 0") and lines[2]["seconds"] is None
    assert kernel.any_wrong(lines)


@pytest.mark.parametrize("row_buffer", [0, 4])
def test_wrong_kept_sets_get_no_number(monkeypatch: pytest.MonkeyPatch, row_buffer: int):
    """A step that evicts by other scores than it should: output right, kept tokens not."""
    right = CompressedCache.decode

    def decode(self: CompressedCache, layer: int, *given: torch.Tensor) -> torch.Tensor:
        if self.backend == "cpu":
            self._layers[layer].scores.neg_()
        return right(self, layer, *given)

    monkeypatch.setattr(CompressedCache, "decode", decode)
    lines = kernel.measure(point(), options(only=("cpu: heavy",), row_buffers=(row_buffer,)))
    assert lines[2]["status"].startswith("wrong: row 0, head") and "kept other tokens" in lines[2]["status"]


def test_wrong_bytes_in_the_slab_get_no_number(monkeypatch: pytest.MonkeyPatch):
    """A step that stores the right token's value with a bit of noise."""
    right = CompressedCache.decode

    def decode(self: CompressedCache, layer: int, *given: torch.Tensor) -> torch.Tensor:
        out = right(self, layer, *given)
        if self.backend == "cpu":
            self._layers[layer].values.mul_(1 + 2**-20)
        return out

    monkeypatch.setattr(CompressedCache, "decode", decode)
    assert "values of row 0" in kernel.measure(point(), one())[2]["status"]


def test_wrong_rival_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    right = rivals._sdpa
    monkeypatch.setattr(rivals, "_sdpa", lambda *given: right(*given) + 1e-3)
    lines = kernel.measure(point(), options(only=("SDPA full",)))
    assert lines[2]["status"].startswith("wrong") and not kernel.any_wrong(lines)


def test_failing_rival_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch):
    def explode(*given: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(rivals, "_bmm", explode)
    lines = kernel.measure(point(), options(only=("bmm", "SDPA full")))
    assert [line["status"] for line in lines[2:]] == ["failed: no such kernel"] * 2 + ["ok"]


@pytest.mark.parametrize(("only", "error", "ends"), [
    ("cpu: heavy", RuntimeError("no capture"), True), ("cpu: heavy", torch.OutOfMemoryError("no memory"), False),
    ("SDPA full", RuntimeError("no capture"), False)], ids=["ours", "memory", "rival"])
def test_a_step_of_ours_that_cannot_be_timed_ends_the_run(monkeypatch: pytest.MonkeyPatch, only: str,
                                                          error: RuntimeError, ends: bool):
    """It would else be one more contender without a number, and the command leave with 0."""
    right, asked = kernel.stopwatch, []

    def stopwatch(work: Work, device: torch.device, ahead: int) -> Stopwatch:
        asked.append(work)
        if work.prepare is not nothing or only == "SDPA full" and len(asked) == 7:
            raise error
        return right(work, device, ahead)

    monkeypatch.setattr(kernel, "stopwatch", stopwatch)
    with pytest.raises(RuntimeError, match="no capture") if ends else nullcontext():
        lines = kernel.measure(point(), options(only=(only,), row_buffers=(0,)))
        assert [line["status"] for line in lines] == ["ok", "ok", f"failed: {error}"]


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ssd_bench.machine.available_bytes", lambda device: 10)
    lines = kernel.measure(point(), options())
    assert {line["status"][:12] for line in lines[2:]} == {"does not fit"}


@pytest.mark.parametrize("name", ["flash-attn", "FlashInfer", "xformers", "fla decoding"])
def test_missing_libraries_are_named(name: str):
    listed = rivals_gpu.contenders(point(), contender.Arena(point(), CPU), CPU)
    found = [kernel.prepare(one, CPU) for one in listed if one.name.startswith(name)]
    assert found and all(isinstance(status, str) and status.startswith("not installed: ") for status in found)


def test_useful_bytes_are_what_the_cache_holds_during_a_step():
    """Kept and new keys and values, q, k, v and output, cursors; a score read and written per slot, and more."""
    here = point()
    steady = ours.Steady(here, "cpu", CachePlan([ours.specs(here.lengths, True, 0)]), 0, 20, CPU)
    steady.restart()
    kept = sum(len(row) for head in range(3) for row in steady.cache.positions(0, head))
    assert kept == 2 * (sum(here.lengths) - 3)
    assert steady.kept_bytes() == 2 * (kept + 6) * 32 * 4
    vectors, scores = 2 * (kept + 6) + 4 * 6, 8 * kept + 6 * 8
    assert steady.useful_bytes() == vectors * 32 * 4 + scores + 2 * 16 + 4 * kept  # evicting reads positions


def test_every_step_of_a_row_buffer_has_its_share():
    for copies in (1, 2, 5, 24, 25):
        ours_layers, passes = None, None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ours, "copies_of", lambda nbytes, copies=copies: copies)
            ours_layers, passes = ours.layers_and_passes(1, 24)
        assert ours_layers >= copies and ours_layers * passes % 24 == 0
        steady = ours.Steady.__new__(ours.Steady)
        steady.layers, steady.period, steady.passes = ours_layers, 24, passes
        steps = sorted((steady.phase(layer) + turn) % 24 for layer in range(ours_layers) for turn in range(passes))
        assert steps == sorted(list(range(24)) * (ours_layers * passes // 24))


def test_caches_go_back_to_their_first_step():
    here = point()
    steady = ours.Steady(here, "cpu", CachePlan([ours.specs(here.lengths, True, 4)], row_buffer=4), 0, 20, CPU)
    steady.prepare()
    first = [state.cursors[:, 1].tolist() for state in steady.cache._layers]
    assert sorted(step for row in first for step in row) == [20, 20, 22, 22]
    for _ in range(steady.room // steady.passes):
        for _ in range(steady.passes):
            for layer in range(steady.layers):
                steady.decode(layer)
        steady.prepare()
    assert [state.cursors[:, 1].tolist() for state in steady.cache._layers] == first


@pytest.mark.parametrize(("call", "count"), [(lambda: torch.ones(4, 4) @ torch.ones(4), 1 + 2),
                                             (lambda: torch.empty(3).view(1, 3), 0)])
def test_operators_are_counted_without_views(call, count: int):
    assert contender.count_launches(call, CPU) == count


def command(*given: str):
    small = ["--batch", "1", "--heads", "2", "--head-dim", "32", "--dtype", "float32", "--repetitions", "1"]
    return CliRunner().invoke(app, ["kernel", *small, "--trials", "1", "--patience", "0", *given])


def test_plan_of_a_policy_is_measured(tmp_path: Path):
    out = tmp_path / "results.jsonl"
    result = command("--policy", "heavy", "--budget", "0.1", "--row-buffer", "0", "--only", "ssd_kernels", "--json",
                     "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["contender"]["name"] for line in lines] == 2 * [ceiling.LOOP, ceiling.READ,
                                                                        "ssd_kernels cpu: the plan"]
    assert [line["contender"]["kv_format"] for line in lines[2::3]] == ["auto", "int8"]
    for line in lines:
        assert line["point"]["lengths"] == [24 + 57] * 2  # 10% of 576, the new token included
    assert out.read_text() == result.stdout


def test_command_prints_a_table_and_leaves_with_1_when_ours_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contender, "attention", lambda q, k, v: torch.zeros_like(q))
    result = command("--mean", "4", "--full", "8", "--only", "cpu: w")
    assert result.exit_code == 1 and "wrong: output" in result.output and "of ceiling" in result.output


def test_an_instruction_set_is_forced_and_said(tmp_path: Path):
    best, out = native.extension().instruction_set(), tmp_path / "r.jsonl"
    better = best != "portable"
    try:
        run = command("--mean", "4", "--full", "8", "--only", "cpu: heavy", "--instruction-set", "portable", "--out",
                      str(out))
    finally:
        native.extension().set_instruction_set(best)
    assert run.exit_code == 0 and ("portable (forced: the processor has a better one)" in run.output) == better
    about = json.loads(out.read_text().splitlines()[0])["machine"]
    assert (about["instruction_set"], about["forced"]) == ("portable", better)
    assert machine.folder_name({**about, "processor": "P", "cores": 2, "forced": True}) == "p-2-cores-portable-forced"
    assert not machine.facts(CPU)["forced"]


@pytest.mark.parametrize(("given", "word"), [(["--dtype", "int8"], "int8"), (["--instruction-set", "sse9"], "sse9"),
                                             (["--mean", "700"], "mean"),
                                             (["--backend", "gpu"], "gpu"), (["--device", "tpu"], "tpu"),
                                             (["--policy", "nothing"], "nothing"),
                                             (["--budget", "2", "--policy", "h2o"], "budget")])
def test_bad_options_are_refused_by_name(given: list[str], word: str):
    result = CliRunner().invoke(app, ["kernel", *given])
    assert result.exit_code == 2 and word in result.output


def test_table_compares_with_our_heavy_heads():
    lines = kernel.measure(point(), options(only=("ssd_kernels", "SDPA full")))
    title, columns, rows, _ = tables.describe(lines)
    assert "skewed, mean 6 of 20" in title and {len(row) for row in rows} == {len(columns)}
    assert [row[-1] for row in rows if row[0] == "ssd_kernels cpu: heavy"] == ["1.00"]


def test_shared_prompts_have_no_place_among_scored_slots():
    """Without them the same visual tokens are held, each head's first at the beginning of its slots."""
    prompt, plan = 4, CachePlan([[HeadSpec.heavy(5, recent=2), HeadSpec.window(3), HeadSpec.heavy(7)]], row_buffer=3)
    own, shared = (LayerLayout.build(plan.layers[0], plan, prompt, 40, shared_prompts=count) for count in (None, 2))
    with_prompt, without = (ours.filled_positions(layout, prompt, 22) for layout in (own, shared))
    for head in (0, 2):
        kept = plan.layers[0][head].size + 1  # and one since the last refresh
        first, second = (layout.heads[head].score_offset for layout in (own, shared))
        assert without[second:second + kept].tolist() == with_prompt[first + prompt:first + prompt + kept].tolist()
        assert min(without[second:second + kept]) >= prompt
