"""``ssd-janus plan``: what it shows is what the policy gives and what the profile says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_cli import SHAPE, run
from typer.testing import Result

from ssd_attach.online import OnlinePlan
from ssd_janus import Pipeline, profiling
from ssd_janus.plan_view import LOOKS
from ssd_kernels import CachePlan, policies
from ssd_kernels.heads import SCORE_RULES
from ssd_kernels.policies import HeadProfile

HEADS = [(layer, head) for layer in range(SHAPE.num_layers) for head in range(SHAPE.num_heads)]


@pytest.fixture(scope="module")
def profile(folder: Path) -> HeadProfile:
    return profiling.measure(Pipeline.from_pretrained(folder), ["a red circle"])


@pytest.fixture
def file(profile: HeadProfile, tmp_path: Path) -> Path:
    profile.save(tmp_path / "profile.safetensors")
    return tmp_path / "profile.safetensors"


@pytest.fixture
def included(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model and its profile in place of the included ones; the value is the profile's file."""
    monkeypatch.setattr("ssd_janus.pipeline.included_model", lambda: str(folder))
    monkeypatch.setattr("ssd_janus.checkpoints.included_model", lambda: str(file.parent))
    return file


def facts(*arguments: object) -> Any:
    result = run("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rows(result: Result) -> list[list[str]]:
    """The cells of the table, a list per head."""
    assert result.exit_code == 0, result.output
    return [re.split(r" +", line.strip()) for line in result.stdout.splitlines() if re.match(r" +\d+ +\d+  ", line)]


def error(result: Result) -> str:
    assert result.exit_code == 2 and result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return lines[0]


def test_the_saved_plan_is_the_policys_and_draws(folder: Path, profile: HeadProfile, file: Path,
                                                 tmp_path: Path) -> None:
    out = tmp_path / "deep" / "plan.json"
    common = ("--policy", "adaptive", "--budget", 0.5, "--row-buffer", 3, "--model", folder, "--profile", file)
    shown = rows(run("plan", *common, "--out", out))
    expected = policies.build("adaptive", SHAPE, 0.5, 3, profile=profile)
    assert CachePlan.load(out) == expected
    assert [(int(layer), int(head)) for layer, head, *_ in shown] == HEADS
    for layer, head, kind, *cells in shown:
        spec = expected.layers[int(layer)][int(head)]
        assert kind == spec.kind
        if kind == "heavy":
            assert cells.pop(0) == spec.score
        assert cells[0] == ("all" if spec.size is None else str(spec.size))
        if spec.recent:
            assert cells[1] == str(spec.recent)
    pictures = [tmp_path / "by-plan", tmp_path / "by-policy"]
    for picture, arguments in zip(pictures, (("--plan", out, "--model", folder), common), strict=True):
        assert run("generate", "a heart", "--out", picture, *arguments).exit_code == 0
    first, second = ((picture / "01-a-heart.png").read_bytes() for picture in pictures)
    assert first == second


def test_reasons_are_the_profiles(folder: Path, profile: HeadProfile, file: Path) -> None:
    common = ("--policy", "adaptive", "--budget", 0.5, "--row-buffer", 0, "--model", folder, "--profile", file)
    found, plan = facts(*common), policies.adaptive(SHAPE, 0.5, 0, profile=profile)
    assert [(head["layer"], head["head"]) for head in found["heads"]] == HEADS
    cost, sizes = profile.cost(0), [*profile.sizes, SHAPE.num_visual_tokens]
    seen = set()
    for head, cells in zip(found["heads"], rows(run("plan", *common)), strict=True):
        at = head["layer"], head["head"]
        spec = plan.layers[at[0]][at[1]]
        assert {name: head[name] for name in spec.to_dict()} == spec.to_dict()
        assert head["sparsity"] == profile.sparsity[at].item()
        if spec.size is None:
            assert (head["cost"], head["window_loss"], head["runner_up"]) == (0, 0, None)
            continue
        assert head["window_loss"] == pytest.approx(1 - profile.age_mass[at][:spec.size].sum().item(), abs=1e-6)
        if spec.size not in sizes:
            continue
        by_kind = dict(zip(profile.kinds, [*cost[at][:, sizes.index(spec.size)].tolist()], strict=True))
        own = policies.kind_of(spec, profile)
        other = min(set(by_kind) - {own}, key=lambda kind: by_kind[kind])  # noqa: B023
        assert head["cost"] == pytest.approx(by_kind[own])
        assert head["window_cost"] == pytest.approx(by_kind["window"])
        assert head["runner_up"] == {"kind": other, "cost": pytest.approx(by_kind[other])}
        assert cells[-5:] == [f"{100 * head['window_loss']:.1f}%", *(
            f"{1e6 * value:.2f}" for value in (by_kind[own], by_kind["window"], by_kind[other])), other]
        seen.add(own)
    assert len(seen) > 1, "the example must have heads of several kinds"
    assert found["predicted_cost"] == pytest.approx(policies.predicted_cost(plan, profile))
    assert found["predicted_cost"] == pytest.approx(sum(head["cost"] for head in found["heads"]))


def test_reasons_count_8_bits_alike(folder: Path, profile: HeadProfile, file: Path) -> None:
    """As kept, as a window and as the runner-up: all of them would be stored in 8 bits."""
    common = ("--policy", "adaptive", "--budget", 0.5, "--row-buffer", 0, "--model", folder, "--profile", file)
    plain, stored = facts(*common)["heads"], facts(*common, "--kv", "int8")["heads"]
    for one, other in zip(plain, stored, strict=True):
        extra = float(profile.int8_cost[one["layer"], one["head"]])
        assert extra > 0
        for name in ("cost", "window_cost"):
            assert other[name] == pytest.approx(one[name] + extra)
        if one["runner_up"] is not None:
            assert other["runner_up"]["cost"] == pytest.approx(one["runner_up"]["cost"] + extra)


def test_the_summary_counts_what_the_plan_takes(folder: Path, file: Path) -> None:
    common = ("--policy", "ssd", "--budget", 0.6, "--model", folder, "--profile", file)
    found = facts(*common)
    plan = policies.ssd(SHAPE, 0.6, profile=HeadProfile.load(file))
    sizes: dict[str, Any] = {"batch_size": 2, "head_dim": SHAPE.head_dim, "max_prompt": 64, "dtype": torch.float32,
                             "num_visual_tokens": SHAPE.num_visual_tokens}
    assert (found["cache_bytes"], found["full_cache_bytes"]) == (plan.nbytes(**sizes),
                                                                 SHAPE.full_plan().nbytes(**sizes))
    assert (found["policy"], found["budget"], found["row_buffer"], found["dtype"]) == ("ssd", 0.6, 6, "float32")
    assert found["budget_reached"] == plan.budget(36)
    assert sum(found["rules"].values()) == len(HEADS) and set(found["rules"]) == {"window", "heavy sum"}
    line = run("plan", *common).stdout.splitlines()[0]
    for part in ("ssd: budget 60.0% asked", f"{plan.budget(36):.2%} reached", "row buffer 6", "in float32",
                 f"{found['rules']['window']} window", f"cost {found['predicted_cost']:.6f} nats per token"):
        assert part in line


def test_parameters_reach_the_plan(folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = HeadProfile.load(file)
    expected = {
        ("h2o", "recent=0.25", "score=mean"): policies.h2o(SHAPE, 0.7, recent=0.25, score="mean"),
        ("random", "seed=3"): policies.random(SHAPE, 0.7, seed=3),
        ("ssd", "tau=0.9", "ratio=2"): policies.ssd(SHAPE, 0.7, profile=profile, tau=0.9, ratio=2),
        ("online", "loss=0.3"): OnlinePlan(SHAPE, 0.7, loss=0.3)}
    drawn: list[CachePlan] = []
    monkeypatch.setattr("ssd_janus.drawing.draw", lambda *arguments, **_: drawn.append(arguments[7]) or iter(()))
    for (policy, *parameters), plan in expected.items():
        common = ("--policy", policy, "--budget", 0.7, "--model", folder, "--profile", file,
                  *(word for parameter in parameters for word in ("--parameter", parameter)))
        if policy != "online":
            found = facts(*common, "--out", tmp_path / "plan.json")
            assert CachePlan.load(tmp_path / "plan.json") == plan
            assert [f"{name}={value}" for name, value in found["parameters"].items()] == parameters
        result = run("generate", "a heart", "--out", tmp_path, *common)
        assert result.exit_code == 0, result.output
        assert drawn.pop().to_dict() == plan.to_dict()
    assert policies.h2o(SHAPE, 0.7).to_dict() not in [plan.to_dict() for plan in expected.values()]


@pytest.mark.parametrize("arguments, message", [
    (("--policy", "online"), "--policy must be one of full, window, .*, adaptive, got online, which decides while"),
    (("--policy", "ssd", "--parameter", "tua=1"),
     "--parameter of policy ssd must be one of tau, ratio, recent, score, got 'tua'"),
    (("--policy", "ssd", "--parameter", "profile=1"), "must be one of tau, ratio, recent, score, got 'profile'"),
    (("--policy", "window", "--parameter", "tau=1"), "--parameter of policy window cannot be given, .* got 'tau'"),
    (("--policy", "ssd", "--parameter", "tau"), "--parameter must be NAME=VALUE, got 'tau'"),
    (("--policy", "ssd", "--parameter", "tau=high"), "--parameter tau must be a number such as .*, got 'high'"),
    (("--policy", "ssd", "--parameter", "tau=NaN"), "--parameter tau must be a number such as .*, got 'NaN'"),
    (("--policy", "ssd", "--parameter", "tau=true"), "--parameter tau must be a number such as .*, got 'true'"),
    (("--policy", "h2o", "--parameter", "score=1"), "--parameter score must be a word, got '1'"),
    (("--policy", "h2o", "--parameter", "recent=0", "--parameter", "recent=1"), "recent must be given once, got it"),
    (("--policy", "h2o", "--parameter", "score=best", "--budget", 0.5), "score must be one of sum, .* got 'best'"),
    (("--policy", "h2o", "--parameter", "recent=2"), "recent must be within 0 .. 1, got 2"),
    (("--policy", "window", "--budget", 0.1), "budget must be at least 0.1945"),
    (("--policy", "adaptive", "--budget", 0.5), "policy adaptive needs a profile"),
])
def test_errors_are_one_line(folder: Path, arguments: tuple, message: str) -> None:
    assert re.search(message, error(run("plan", "--model", folder, *arguments)))


@pytest.mark.parametrize("arguments, message", [
    (("--plan", "p.json", "--parameter", "tau=1"), "--plan already says .* cannot be combined with --parameter"),
    (("--parameter", "tau=1"), "--parameter needs --policy"),
    (("--policy", "online", "--parameter", "tau=1"), "--parameter of policy online must be one of loss, got 'tau'"),
    (("--policy", "online", "--budget", 0.7, "--parameter", "loss=2"), "loss must be within 0 .. 1, got 2"),
])
def test_generate_refuses_parameters_that_do_not_fit(folder: Path, tmp_path: Path, arguments: tuple,
                                                     message: str) -> None:
    result = run("generate", "a heart", "--model", folder, "--out", tmp_path / "out", *arguments)
    assert re.search(message, error(result)) and not (tmp_path / "out").exists()


def test_without_a_profile_there_are_no_reasons(folder: Path) -> None:
    result = run("plan", "--policy", "window", "--budget", 0.5, "--model", folder)
    assert [(int(layer), int(head)) for layer, head, *_ in rows(result)] == HEADS
    assert "sparsity" not in result.stdout and "predicted cost" not in result.stdout
    assert "no profile of this model" in result.stderr
    found = facts("--policy", "window", "--budget", 0.5, "--model", folder)
    assert found["predicted_cost"] is None and "cost" not in found["heads"][0]


def test_the_included_profile_explains_policies_that_need_none(included: Path, profile: HeadProfile) -> None:
    found = facts("--policy", "window", "--budget", 0.5)
    assert found["predicted_cost"] == pytest.approx(
        policies.predicted_cost(policies.window(SHAPE, 0.5), profile))
    # An installation without it still shows what needs none.
    included.unlink()
    assert facts("--policy", "window", "--budget", 0.5)["predicted_cost"] is None
    assert "no profile of the included model" in error(run("plan", "--policy", "ssd", "--budget", 0.5))


def test_profiles_of_other_models_are_refused_or_said(folder: Path, profile: HeadProfile, file: Path) -> None:
    common = ("--policy", "window", "--budget", 0.5, "--model", folder, "--profile", file)
    replace(profile, meta=profile.meta | {"weights": "0" * 16}).save(file)
    assert "was measured on other weights" in " ".join(run("plan", *common).stderr.split())
    two_heads: Any = {name: value[:, :2] for name, value in vars(profile).items()
                      if isinstance(value, torch.Tensor) and value.shape[1:2] == (SHAPE.num_heads,)}
    replace(profile, **two_heads).save(file)
    assert "profile must be of a model with" in error(run("plan", *common))


def test_the_picture_tells_rules_apart(folder: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "plan.png"
    result = run("plan", "--policy", "adaptive", "--budget", 0.5, "--model", folder, "--profile", file, "--picture",
                 out)
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
        seen = {color for _, color in picture.convert("RGB").getcolors(2**24) or []}
    plan = policies.adaptive(SHAPE, 0.5, profile=HeadProfile.load(file))
    rules = {f"heavy {spec.score}" if spec.kind == "heavy" else spec.kind for heads in plan.layers for spec in heads}
    for rule, (_, color) in LOOKS.items():
        if rule != "full":  # white, as the paper
            assert (tuple(bytes.fromhex(color[1:])) in seen) == (rule in rules)


def test_every_rule_has_a_letter_and_a_shade_of_its_own() -> None:
    assert set(LOOKS) == {"full", "window"} | {f"heavy {score}" for score in SCORE_RULES}
    assert len({letter for letter, _ in LOOKS.values()}) == len(LOOKS)
    shades = sorted(Image.new("RGB", (1, 1), color).convert("L").getpixel((0, 0)) for _, color in LOOKS.values())
    assert all(lighter - darker > 20 for darker, lighter in zip(shades, shades[1:], strict=False))
