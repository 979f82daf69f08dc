"""Evaluation: metrics on a random tiny model, and runs that stop and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_cli import run

from ssd_janus import Pipeline
from ssd_janus.checkpoints import fingerprint
from ssd_janus.evaluation import fidelity, quality, report
from ssd_janus.evaluation.folder import RunFolder, settings
from ssd_janus.evaluation.statistics import family_scores, mean_interval, paired_difference
from ssd_kernels import CachePlan, HeadSpec, policies

TEXTS = list(tiny.PROMPTS[:3])
SUITE = [{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": TEXTS[0]},
         {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "green"}], "prompt": TEXTS[1]},
         {"tag": "colors", "include": [{"class": "heart", "count": 1}], "prompt": TEXTS[2]}]


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


def uniform(spec: HeadSpec, **options: Any) -> CachePlan:
    return CachePlan.uniform(spec, tiny.LAYERS, 4, **options)


def test_fidelity_of_the_full_plan_is_perfect(pipe: Pipeline, tmp_path: Path) -> None:
    found = fidelity.evaluate(pipe, {"a": uniform(HeadSpec.full())}, tmp_path, prompts=TEXTS, batch_size=2)["a"]
    assert (found.kl_mean, found.kl_p99, found.agreement, found.ssim) == (0.0, 0.0, 1.0, 1.0)
    assert found.psnr_db is None and found.pictures == 3 and found.budget == 1.0
    assert found.head_error == [[0.0] * 4] * tiny.LAYERS


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_fidelity_falls_with_the_budget(pipe: Pipeline, tmp_path: Path, guidance: float) -> None:
    plans = {str(size): uniform(HeadSpec.window(size)) for size in (24, 12, 3)}
    found = list(fidelity.evaluate(pipe, plans, tmp_path, prompts=TEXTS, guidance_scale=guidance).values())
    for more, less in zip(found, found[1:], strict=False):
        assert 0 < more.kl_mean < less.kl_mean
        assert more.agreement > less.agreement
        assert np.mean(more.head_error) < np.mean(less.head_error)
    # Nothing has been evicted in the first rows.
    rows = found[0].kl_by_row
    assert len(rows) == tiny.GRID and max(rows[:4]) == 0 < min(rows[4:])


def test_only_compressed_heads_have_errors(pipe: Pipeline, tmp_path: Path) -> None:
    plan = tiny.plan_of(HeadSpec.full(), HeadSpec.window(2), HeadSpec.heavy(3), HeadSpec.full())
    errors = fidelity.evaluate(pipe, {"a": plan}, tmp_path, prompts=TEXTS[:1])["a"].head_error
    for heads, specs in zip(errors, plan.layers, strict=True):
        assert [error > 0 for error in heads] == [spec.kind != "full" for spec in specs]


def test_kl_against_a_direct_sum() -> None:
    full, other = torch.randn(2, 5, 7).log_softmax(-1)
    full[0, 3] = -torch.inf
    kl, agreement = fidelity.compare(full, other)
    for row in range(5):
        expected = sum(p.exp() * (p - q) for p, q in zip(full[row], other[row], strict=True) if p > -torch.inf)
        assert kl[row] == pytest.approx(max(float(expected), 0.0), abs=1e-6)
        assert agreement[row] == (full[row].argmax() == other[row].argmax())


def test_recorder_forces_tokens_and_sees_the_guided_distribution(pipe: Pipeline) -> None:
    wanted = torch.randint(0, 64, (3, tiny.TOKENS))
    recorder = fidelity.Recorder(2.0, wanted)
    tokens = pipe.generate_tokens(TEXTS, guidance_scale=2.0, logits_processor=[recorder])
    assert torch.equal(tokens, wanted)
    greedy = fidelity.Recorder(2.0)
    tokens = pipe.generate_tokens(TEXTS, guidance_scale=2.0, temperature=0, logits_processor=[greedy])
    assert torch.equal(tokens, torch.stack(greedy.steps, 1).argmax(-1))


def test_quality_of_a_full_plan_equals_no_plan(pipe: Pipeline, tmp_path: Path) -> None:
    found = quality.evaluate(pipe, pipe.shape.full_plan(), tmp_path, prompts=SUITE, batch_size=3)
    pictures = pipe(TEXTS, seed=0)
    drawn = sorted((tmp_path / "pictures" / "seed-0").iterdir())
    from PIL import Image

    for path, picture in zip(drawn, pictures, strict=True):
        assert Image.open(path).tobytes() == picture.tobytes()
    assert set(found.families) == {"single_object", "colors"} and found.pictures == 3


def test_plans_do_not_depend_on_their_company_and_runs_go_on(pipe: Pipeline, tmp_path: Path) -> None:
    plans = {str(size): uniform(HeadSpec.window(size)) for size in (20, 10)}
    common: dict[str, Any] = {"prompts": TEXTS, "batch_size": 2}
    both = fidelity.evaluate(pipe, plans, tmp_path / "both", **common)
    for name, plan in plans.items():
        assert fidelity.evaluate(pipe, {name: plan}, tmp_path / "alone", **common) == {name: both[name]}
    lost = tmp_path / "both" / "10" / "batches" / "seed-0-00002.npz"
    lost.unlink()
    steps: list[tuple[int, int]] = []
    again = fidelity.evaluate(pipe, plans, tmp_path / "both", **common, progress=lambda *step: steps.append(step))
    assert again == both and lost.exists()
    assert steps == [(step, 3 * tiny.TOKENS) for step in range(1, 3 * tiny.TOKENS + 1)]
    quick = fidelity.evaluate(pipe, plans, tmp_path / "quick", **common, pictures=False)
    assert quick["10"].kl_mean == both["10"].kl_mean and quick["10"].ssim is None
    assert not list((tmp_path / "quick").rglob("*.png"))


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(pipe: Pipeline, tmp_path: Path) -> None:
    plan, common = uniform(HeadSpec.window(9)), {"prompts": SUITE, "seeds": 2, "batch_size": 2}
    whole = quality.evaluate(pipe, plan, tmp_path / "whole", **common)

    drawn: list[int] = []

    def kill(done: int, total: int) -> None:
        drawn.append(done)
        if len(drawn) == 2 * tiny.TOKENS + 5:
            raise Killed

    with pytest.raises(Killed):
        quality.evaluate(pipe, plan, tmp_path / "killed", **common, progress=kill)
    finished = sorted((tmp_path / "killed" / "batches").iterdir())
    assert len(finished) == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.*") if path.is_file()}
    steps: list[int] = []
    again = quality.evaluate(pipe, plan, tmp_path / "killed", **common,
                             progress=lambda done, total: steps.append(done))
    assert len(steps) == 2 * tiny.TOKENS
    assert again == whole
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.png"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    quality.evaluate(pipe, plan, tmp_path / "whole", **common, progress=pytest.fail)


def test_a_folder_of_other_settings_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    plan = uniform(HeadSpec.window(9))
    RunFolder(tmp_path, settings(pipe, "shapes", plan, None, 8), TEXTS, ".json", str)
    RunFolder(tmp_path, settings(pipe, "shapes", plan, 2.0, 8), TEXTS, ".json", str)  # the model's default
    with pytest.raises(ValueError, match="another guidance_scale .2.0 there, 3.0 now"):
        RunFolder(tmp_path, settings(pipe, "shapes", plan, 3.0, 8), TEXTS, ".json", str)
    with pytest.raises(ValueError, match="another plan"):
        RunFolder(tmp_path, settings(pipe, "shapes", uniform(HeadSpec.window(8)), None, 8), TEXTS, ".json", str)
    with pytest.raises(ValueError, match="another prompts"):
        RunFolder(tmp_path, settings(pipe, "shapes", plan, None, 8), TEXTS[:2], ".json", str)
    with pytest.raises(ValueError, match="another weights"):
        other = Pipeline(tiny.build_model(seed=1), pipe.processor)
        RunFolder(tmp_path, settings(other, "shapes", plan, None, 8), TEXTS, ".json", str)


def test_settings_hold_what_the_model_samples_with_and_weights_all_over(fresh: Any) -> None:
    pipe = Pipeline(fresh, tiny.build_processor())

    def seen() -> dict[str, Any]:
        return settings(pipe, "shapes", pipe.shape.full_plan(), None, 8)

    before = seen()
    assert before == seen()
    for name, value in {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.5}.items():
        old = getattr(fresh.generation_config, name)
        setattr(fresh.generation_config, name, value)
        assert seen() != before, name
        setattr(fresh.generation_config, name, old)
    assert seen() == before
    with torch.no_grad():
        fresh.model.language_model.embed_tokens.weight[-1] += 1
    assert seen()["weights"] != before["weights"]


def test_the_same_weights_have_one_fingerprint_in_every_dtype_that_holds_them(fresh: Any) -> None:
    as_made = fingerprint(fresh)
    rounded = fingerprint(fresh.bfloat16())
    assert as_made != rounded == fingerprint(fresh.float()) == fingerprint(fresh.bfloat16()) and len(rounded) == 16


def test_a_model_without_a_default_guidance_is_guided_by_transformers_own(fresh: Any, tmp_path: Path) -> None:
    pipe = Pipeline(fresh, tiny.build_processor())
    fresh.generation_config.guidance_scale = None
    assert pipe.guidance() == 5.0 and pipe.guidance(2) == 2.0
    found = fidelity.evaluate(pipe, {"full": pipe.shape.full_plan()}, tmp_path, prompts=TEXTS, pictures=False)
    assert found["full"].kl_mean == 0
    assert json.loads((tmp_path / "full" / "settings.json").read_text())["guidance_scale"] == 5.0


def test_every_batch_has_its_own_seed(pipe: Pipeline, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, settings(pipe, "shapes", pipe.shape.full_plan(), None, 2), TEXTS, ".json", str)
    batches = folder.batches(3)
    assert [batch.first for batch in batches] == [0, 2] * 3
    assert len({folder.sampling_seed(batch) for batch in batches}) == 6


def test_bootstrap_intervals() -> None:
    prompts = [float(index % 4 == 0) for index in range(400)]
    families, overall = family_scores({"a": prompts, "b": [0.5] * 40})
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert families["a"].mean == 0.25 and overall.mean == 0.375
    assert families["a"].high - families["a"].low == pytest.approx(2 * error, rel=0.1)
    assert overall.high - overall.low == pytest.approx(error, rel=0.1)
    assert (families["b"].low, families["b"].mean, families["b"].high) == pytest.approx((0.5, 0.5, 0.5))
    found = mean_interval({"a": prompts})
    assert found is not None and (found.low, found.high) == (families["a"].low, families["a"].high)
    wrong: dict[str, list[float]]
    for wrong in ({}, {"a": []}, {"a": [1.0], "b": []}):
        for function in (family_scores, mean_interval):
            with pytest.raises(ValueError, match="a prompt in every group"):
                function(wrong)


def test_intervals_of_few_prompts_are_as_long_as_students() -> None:
    # Values whose mean is all but normal: percentile intervals alone would be about 25% too short.
    values = [-1.0, -0.5, 0.0, 0.0, 0.5, 1.0]
    found = mean_interval({"": values})
    length = 2 * 2.571 * np.std(values, ddof=1) / 6**0.5
    assert found is not None and found.high - found.low == pytest.approx(length, rel=0.1)
    assert mean_interval({"": values[:5]}) is None


def test_families_all_right_or_all_wrong_have_exact_intervals() -> None:
    families, overall = family_scores({"right": [1.0] * 10, "wrong": [0.0] * 10})
    # Clopper and Pearson's table for 10 of 10 and 0 of 10.
    assert (families["right"].low, families["right"].high) == (pytest.approx(0.6915, abs=1e-4), 1.0)
    assert (families["wrong"].low, families["wrong"].high) == (0.0, pytest.approx(0.3085, abs=1e-4))
    assert overall.mean == 0.5
    # Half of the quantile of 10 of 10, which is further out for 20 prompts: Student's 2.093 times (20 / 19)^.5.
    assert (overall.low, overall.high) == pytest.approx((0.5 * 0.0159**0.1, 1 - 0.5 * 0.0159**0.1), abs=0.005)
    # More of a family's prompts leave less to chance, and the others are counted as they are.
    many = family_scores({"right": [1.0] * 1000, "wrong": [0.0] * 10})[1]
    assert many.low > 0.49 and many.high > 0.65
    half = [1.0, 0.0] * 20
    sure, unsure = (family_scores({"right": [1.0] * count, "other": half})[1] for count in (1000, 10))
    assert unsure.low < sure.low - 0.02 and unsure.high == pytest.approx(sure.high, abs=0.01)
    # A prompt with one wrong picture of three is not all right; no rounding leads out of 0 .. 1.
    almost = family_scores({"a": [1.0] * 9 + [2 / 3]})[0]["a"]
    assert almost.mean < 1.0 and almost.low != pytest.approx(0.6915, abs=1e-3) and almost.high == 1.0


def test_paired_differences() -> None:
    hard = {"a": [0.1, 0.9, 0.5, 0.3], "b": [0.2, 0.8]}
    found = paired_difference(hard, hard)
    assert found is not None and (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    # By hand: differences of "a" .1, .1, .2, .2 and of "b" .1, .3, means .15 and .2; no mean of draws leaves the range.
    better = {"a": [0.2, 1.0, 0.7, 0.5], "b": [0.3, 1.1]}
    found = paired_difference(better, hard)
    assert found is not None and found.mean == pytest.approx(0.175)
    assert (found.low, found.high) == pytest.approx((0.1, 0.25))
    other = paired_difference(hard, better)
    assert other is not None and (other.mean, other.high) == pytest.approx((-0.175, -0.1))
    # Far smaller than what prompts differ by, and yet clear; unpaired it would be lost.
    generator = np.random.default_rng(0)
    prompts = generator.normal(size=30)
    ours, theirs = prompts + 0.1 + 0.1 * generator.normal(size=30), prompts
    found = paired_difference({"": ours.tolist()}, {"": theirs.tolist()})
    shuffled = paired_difference({"": ours.tolist()}, {"": generator.permutation(theirs).tolist()})
    assert found is not None and shuffled is not None
    assert 0 < found.low < found.high < 0.2 and shuffled.low < 0 < shuffled.high
    assert paired_difference({"": [1.0] * 5}, {"": [0.0] * 5}) is None
    for wrong in ({"a": [0.1] * 4}, {"a": [0.1] * 3, "b": [0.1, 0.2]}, {"a": [0.1] * 4, "c": [0.1, 0.2]}):
        with pytest.raises(ValueError, match="of the same prompts"):
            paired_difference(wrong, hard)


def test_results_carry_what_every_prompt_got(pipe: Pipeline, tmp_path: Path) -> None:
    plan, texts = uniform(HeadSpec.window(9)), [f"{count} {text}" for text in TEXTS for count in "ab"]
    found = fidelity.evaluate(pipe, {"a": plan}, tmp_path, prompts=texts, batch_size=4, pictures=False)["a"]
    saved = [np.load(tmp_path / "a" / "batches" / f"seed-0-0000{first}.npz")["kl"] for first in (0, 4)]
    assert found.kl_by_picture == pytest.approx(np.concatenate(saved).mean(1).tolist())
    assert found.kl_interval is not None and found.kl_interval.low < found.kl_mean < found.kl_interval.high
    assert f"| {found.kl_mean:.4f} [{found.kl_interval.low:.4f}, " in report.markdown({"a": found})
    records = [{"tag": tag, "index": index, "correct": correct} for tag, index, correct in (
        ("colors", 2, True), ("colors", 0, False), ("position", 1, False), ("colors", 2, False), ("colors", 0, False))]
    shapes = quality.summarise(records, 0.5)
    assert shapes.by_prompt == {"colors": [0.0, 0.5], "position": [0.0]} and shapes.pictures == 5
    assert shapes.families["colors"].mean == 0.25 and shapes.overall.mean == 0.125


def test_evaluate_command(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "suite.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in SUITE))
    common = ("--model", folder, "--prompts-file", prompts, "--policy", "full", "--policy", "window", "--budget", 0.4,
              "--budget", 0.6, "--json", "--plot", tmp_path / "plot.png")
    result = run("evaluate", "--out", tmp_path / "shapes", "--seeds", 2, *common)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert list(facts["results"]) == ["full", "window-0.4", "window-0.6"]
    assert facts["results"]["window-0.4"]["budget"] <= 0.4 and facts["results"]["full"]["pictures"] == 6
    table = (tmp_path / "shapes" / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 5000
    (tmp_path / "plot.png").unlink()
    assert "| full | 100.0% | 6 |" in table and "single object" in table
    result = run("evaluate", "--suite", "fidelity", "--out", tmp_path / "fidelity", "--limit", 1, *common)
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)["results"]
    assert results["full"]["kl_mean"] == 0 < results["window-0.6"]["kl_mean"] < results["window-0.4"]["kl_mean"]
    assert results["full"]["pictures"] == 1
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_shapes_suite_needs_metadata(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("a red circle\n")
    result = run("evaluate", "--model", folder, "--out", tmp_path, "--prompts-file", tmp_path / "plain.txt")
    assert result.exit_code == 2 and '"tag" and "include"' in " ".join(result.stderr.split())


def test_missing_extras_are_named() -> None:
    from ssd_janus.extras import needs

    with pytest.raises(ImportError, match=r"pip install '\.\[evaluate\]'"), needs("evaluate", "absent"):
        import absent.part  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="other"), needs("evaluate", "absent"):
        import other  # type: ignore[import-not-found]  # noqa: F401


def test_policies_of_one_suite_make_one_table(pipe: Pipeline, tmp_path: Path) -> None:
    plans = {"full": pipe.shape.full_plan(), "heavy": policies.heavy(pipe.shape, 0.5)}
    results = fidelity.evaluate(pipe, plans, tmp_path, prompts=TEXTS[:1])
    lines = report.markdown(results).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- fidelity -->\nold\n<!-- /fidelity -->\nAfter.\n")
    report.into_page(results, page, "fidelity")
    assert page.read_text() == ("Before.\n<!-- fidelity -->\n" + report.markdown(results)
                                + "<!-- /fidelity -->\nAfter.\n")
    with pytest.raises(ValueError, match="must have the lines <!-- shapes -->"):
        report.into_page(results, page, "shapes")
    assert "equal" in lines[2] and lines[3].startswith("| heavy | 50.0% |")
