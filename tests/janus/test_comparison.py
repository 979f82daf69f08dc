"""The comparison of policies: its cases, and the command on a random tiny model."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cli import SHAPE, run

from ssd_janus import ModelShape, Pipeline
from ssd_janus.checkpoints import fingerprint
from ssd_janus.cli.options import PolicyName, load_profile
from ssd_janus.evaluation import comparison
from ssd_janus.evaluation.comparison_page import ABSENT, SECTIONS
from ssd_janus.profiling import measure
from ssd_kernels import HeadSpec, policies
from ssd_kernels.policies import HeadProfile

PAGE = Path(__file__).parents[2] / "docs" / "policy-results.md"


def test_cases_with_the_same_plan_share_a_folder() -> None:
    names = [name.value for name in PolicyName]
    grid = comparison.grid(names, [0.2, 0.5], [0, 24])
    assert [case.plan_name for case in grid].count("full") == 1 and len(grid) == 1 + (len(names) - 1) * 4
    cases = comparison.studies(names, 24)
    assert len({case.label for case in cases}) == len(cases)
    own = {case.plan_name for case in grid}
    shared = {(case.study, case.policy, case.setting) for case in cases if case.plan_name in own}
    assert {("tau", "ssd", "quantile 0.5 of the scores"), ("tau", "ssd_guarded", "a window misses 0.4"),
            ("W : M", "ssd", "1 : 3"), ("W : M", "ssd_guarded", "1 : 1"), ("refresh period", "h2o", "1"),
            ("refresh period", "h2o", "24"), ("prompt", "h2o", "kept")} <= shared
    assert not any(setting in ("8", "48", "competing") for _, _, setting in shared)
    assert {case.study for case in comparison.studies(["h2o"], 24)} == {"refresh period", "guidance", "prompt"}
    # Folders are shared by name: equal names must mean equal plans, and different names different ones.
    plans: dict[str, Any] = {}
    shape = ModelShape(num_layers=1, num_heads=1, num_query_heads=1, head_dim=8, num_visual_tokens=576, columns=24)
    for case in (case for case in [*grid, *cases] if case.policy in ("h2o", "streaming_llm")):
        plan = comparison.build(case, shape, None, 7, torch.float32)
        assert plans.setdefault(case.plan_name, plan) == plan
    assert len(set(map(str, plans.values()))) == len(plans)


def test_formats_have_folders_of_their_own_and_equal_bytes() -> None:
    names = ["full", "window", "online"]
    plain, cases = comparison.grid(names, [0.1, 0.2], [0]), comparison.grid(names, [0.1, 0.2], [0], ["auto", "int8"])
    assert cases[:len(plain)] == plain and [case.plan_name for case in cases[len(plain):]] == [
        "full-int8", "window-0.1-r0-int8", "window-0.2-r0-int8", "online-0.1-r0-int8", "online-0.2-r0-int8"]
    assert [case.label for case in cases] == [case.plan_name for case in cases]
    shape = ModelShape(num_layers=1, num_heads=1, num_query_heads=1, head_dim=28, num_visual_tokens=576, columns=24)
    for case in cases[1:]:
        plan = comparison.build(case, shape, None, 7, torch.bfloat16)
        assert plan.kv_format == case.kv_format
        share = plan.byte_budget(576, head_dim=28, dtype=torch.bfloat16)
        # 32 bytes for 56: all tokens in 8 bits take 57%.
        least, most = (0.57, 0.58) if case.policy == "full" else (case.budget - 1 / 576, case.budget)
        assert least < share <= most
    competing = comparison.compete(plan, 7)
    assert competing.kv_format == "int8" and not competing.keep_prompt


def test_a_competing_prompt_brings_its_slots_along() -> None:
    plan = comparison.compete(tiny.plan_of(HeadSpec.full(), HeadSpec.window(2), HeadSpec.heavy(5, recent=2),
                                           HeadSpec.full(), row_buffer=6), 7)
    assert not plan.keep_prompt and plan.row_buffer == 6
    assert plan.layers[0] == (HeadSpec.full(), HeadSpec.window(9), HeadSpec.heavy(12, recent=2), HeadSpec.full())


def test_defaults_named_in_the_studies_are_those_of_the_policies(profile: Any) -> None:
    shape = SHAPE
    for name, given in (("ssd", {"ratio": 3}), ("ssd_guarded", {"ratio": 1, "loss": 0.4}),
                        ("ssd", {"tau": float(profile.sparsity.quantile(0.5))})):
        bare = policies.build(name, shape, 0.5, 0, profile=profile)
        assert bare == policies.build(name, shape, 0.5, 0, profile=profile, **given)
        other = {"ratio": 2} if "ratio" in given else {"tau": 1.0}
        assert bare != policies.build(name, shape, 0.5, 0, profile=profile, **other)


@pytest.fixture(scope="module")
def profile(folder: Path) -> Any:
    return measure(Pipeline.from_pretrained(folder), [tiny.PROMPTS[3]], guidance_scale=1.0)


@pytest.fixture
def common(folder: Path, profile: Any, tmp_path: Path) -> list[Any]:
    suite = [{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": tiny.PROMPTS[0]},
             {"tag": "colors", "include": [{"class": "heart", "count": 1}], "prompt": tiny.PROMPTS[2]}]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in suite))
    profile.save(tmp_path / "profile.safetensors")
    (tmp_path / "page.md").write_text("Top\n" + "".join(f"<!-- {name} -->\nnot measured yet\n<!-- /{name} -->\n"
                                                        for name in SECTIONS) + "Bottom\n")
    return ["compare", "--out", tmp_path / "out", "--model", folder, "--prompts-file", tmp_path / "suite.jsonl",
            "--profile", tmp_path / "profile.safetensors", "--budget", 0.4, "--budget", 0.6, "--fidelity-prompts", 1,
            "--seeds", 1, "--policy", "full", "--policy", "adaptive", "--policy", "h2o", "--page", tmp_path / "page.md"]


def test_compare_command(common: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ssd-janus", "compare", "--out", "a folder"])
    buffers = ("--row-buffer", 0, "--row-buffer", 24)
    result = run(*common, *buffers, "--part", "quality", "--json", "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert set(record["parts"]) == {"quality"} and len(record["grid"]) == 1 + 2 * 4
    page = (tmp_path / "page.md").read_text()
    assert "- fidelity: not measured, or not finished\n" in page
    assert f"<!-- fidelity -->\n{ABSENT}<!-- /fidelity -->" in page
    assert "`ssd-janus compare --out 'a folder'`" in page and "| full |  |  | " in page
    # 24 of 36 tokens are more than either budget.
    assert "Overall, row buffer 0" in page and "Overall, row buffer 24" not in page
    assert "budget" in record["grid"]["h2o-0.6-r24"]["reason"]
    assert '<img src="plots/policy-quality.png"' in page

    result = run(*common, *buffers, "--row-buffer", 6, "--part", "fidelity", "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(again["parts"]) == {"quality", "fidelity"}
    for label, entry in record["grid"].items():
        assert again["grid"][label].get("quality") == entry.get("quality")
    close = {label: entry["fidelity"]["kl_mean"] for label, entry in again["grid"].items() if "fidelity" in entry}
    assert close["full"] == 0 < close["h2o-0.6-r0"] < close["h2o-0.4-r0"] and len(close) == 9
    assert again["prediction"]["plans"] == 8
    page = (tmp_path / "page.md").read_text()
    assert "Mean KL, row buffer 6" in page and f"| {close['h2o-0.4-r0']:.3g} |" in page and page.startswith("Top\n")
    assert "Spearman" in page and page.endswith("Bottom\n") and "- Not decided (KL, row buffer 6): adaptive" in page
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == [
        "policy-fidelity.png", "policy-prediction.png", "policy-quality.png"]


def test_compare_mixes_formats_at_equal_bytes(common: list[Any], tmp_path: Path) -> None:
    command = [*common, "--row-buffer", 0, "--part", "quality"]
    assert run(*command).exit_code == 0
    page, before = tmp_path / "page.md", {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.json")
                                          if file.parent.name == "batches"}
    assert "<!-- int8 -->\nnot measured yet\n<!-- /int8 -->" in page.read_text(), "left alone without such plans"
    result = run(*command, "--kv", "auto", "--kv", "int8", "--section", "int8", "--part", "fidelity")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {label for label, entry in record["grid"].items() if entry["kv_format"] == "int8"} == {
        "full-int8", "adaptive-0.4-r0-int8", "adaptive-0.6-r0-int8", "h2o-0.4-r0-int8", "h2o-0.6-r0-int8"}
    share = (tiny.HEAD_DIM + 4) / (4 * tiny.HEAD_DIM)  # of float32's bytes
    for label, entry in record["grid"].items():
        stored = share if entry["kv_format"] == "int8" else 1.0
        assert entry["reached"] == pytest.approx(entry["tokens"] * stored)
        # As many bytes, but for what is left when every token is kept.
        assert min(entry["budget"], stored) - 1.01 * stored / tiny.TOKENS < entry["reached"] <= entry["budget"], label
    assert record["grid"]["h2o-0.6-r0"]["predicted_cost"] > 0 == record["grid"]["full"].get("predicted_cost", 0)
    assert record["grid"]["full-int8"]["predicted_cost"] > 0 < record["grid"]["full-int8"]["fidelity"]["kl_mean"]
    assert [goal["measure"] for goal in record["int8_goals"]] == ["KL", "quality", "quality", "KL"]
    assert all(file.stat().st_mtime_ns == time for file, time in before.items()), "nothing is drawn twice"
    text = page.read_text()
    assert "| full int8 | 0 | " in text and "| h2o int8 | 0 | " in text
    assert "- Not decided (quality, row buffer 0): adaptive int8 at 5%" in text
    assert "<!-- quality -->\nOverall" in text and "| adaptive int8 | 0 | " not in text.partition("<!-- int8 -->")[0]
    # A plan's folder says in its settings how it stores.
    (settings,) = tmp_path.glob("out/quality/*/h2o-0.4-r0-int8/settings.json")
    assert json.loads(settings.read_text())["plan"]["kv_format"] == "int8"


def test_a_stopped_comparison_goes_on(common: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*common, "--row-buffer", 0, "--part", "fidelity"]
    monkeypatch.setattr(comparison, "CACHES_AT_ONCE", 2)
    calls: list[int] = []
    original = Pipeline.generate_tokens

    def stop(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("stopped here")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "generate_tokens", stop)
    # Groups of full cache and two plans: the sixth call is the second plan of the second group.
    result = run(*command)
    assert result.exit_code == 2 and "stopped here" in result.stderr
    assert "not measured yet" in (tmp_path / "page.md").read_text()
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.npz")}
    assert len(finished) == 3
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert len(calls) == 6 + 2 + 2, "the full cache and the open plan of the second group, and the third group"
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())
    before = (tmp_path / "out" / "results.json").read_bytes()
    monkeypatch.setattr("sys.argv", ["ssd-janus", "compare", "again"])
    result = run(*command)
    assert result.exit_code == 0 and len(calls) == 10
    # Not even a second line about how it was measured.
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert (tmp_path / "page.md").read_text().count("not measured yet") == 1, "of plans in 8 bits, not asked for"

    result = run(*command, "--fidelity-prompts", 2)
    assert result.exit_code == 2 and "another prompts" in " ".join(result.stderr.split())
    result = run(*command, "--guidance", 1)
    assert result.exit_code == 2 and "another guidance_scale" in " ".join(result.stderr.split())


def test_sensitivity(common: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "STUDIED", ("h2o",))
    result = run(*common, "--part", "sensitivity")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {label: entry["fidelity"]["kl_mean"] for label, entry in record["sensitivity"].items()
             if "fidelity" in entry}
    assert not record["grid"] and record["goals"] == []
    assert len(found) == 5, "of 8 cases, since 8, 24 and 48 steps are more than 20% of 36 tokens"
    assert found["prompt / h2o / kept"] != found["prompt / h2o / competing"]
    assert found["guidance / h2o / 1"] != found["guidance / h2o / 5"]
    page = (tmp_path / "page.md").read_text()
    assert "| h2o | 48 |  | - | - | - |" in page and "| h2o | competing |" in page


@pytest.mark.parametrize("wrong, message", [
    (("--budget", 1.5), "--budget must be within (0, 1], got 1.5"),
    (("--page", PAGE.parent / "quality.md"), "must have the lines <!-- goals -->"),
    (("--model", "/absent", "--policy", "h2o"), "/absent"),
    (("--section", "int8"), "--section says nothing without --page"),
    (("--kv", "best"), "--kv must be auto or int8, got best"),
])
def test_what_cannot_work_is_said_before_drawing(tmp_path: Path, wrong: tuple[object, ...], message: str) -> None:
    result = run("compare", "--out", tmp_path / "out", *wrong)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_profile_is_asked_for_before_drawing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "generate_tokens", lambda *_, **__: pytest.fail("drawn"))
    (tmp_path / "prompts.txt").write_text("a heart\n")
    result = run("compare", "--out", tmp_path, "--model", folder, "--part", "fidelity", "--prompts-file",
                 tmp_path / "prompts.txt", "--policy", "h2o", "--policy", "adaptive")
    assert result.exit_code == 2 and "policy adaptive needs a profile" in " ".join(result.stderr.split())


def test_calls_that_need_no_profile_go_on_in_the_same_folder(folder: Path, profile: Any, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)

    def compare(heads: Any) -> comparison.Comparison:
        return comparison.Comparison(pipe, tmp_path, heads, tiny.PROMPTS[:1], [])

    first = compare(profile)
    first.save()
    assert compare(None).record["profile"] == first.record["profile"] and first.record["profile"]["prompts"] == 1
    with pytest.raises(ValueError, match="made with another profile"):
        compare(replace(profile, sensitivity=2 * profile.sensitivity))


def test_a_profile_of_other_weights_is_said(folder: Path, profile: HeadProfile, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    assert profile.meta["weights"] == fingerprint(pipe.model)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("own", "unknown", "other")}
    for (name, file), weights in zip(files.items(), (fingerprint(pipe.model), None, "0" * 16), strict=True):
        meta = {key: value for key, value in profile.meta.items() if key != "weights"}
        replace(profile, meta=meta if weights is None else meta | {"weights": weights}).save(file)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert load_profile(file, str(folder), [PolicyName.h2o], pipe) is not None
        assert [name for _ in said] == (["other"] if name == "other" else [])
    result = run("generate", "a heart", "--model", folder, "--out", tmp_path / "pictures", "--policy", "adaptive",
                 "--budget", 0.5, "--profile", files["other"])
    assert result.exit_code == 0, result.output
    assert "was measured on other weights (0000000000000000, the" in " ".join(result.stderr.split())
