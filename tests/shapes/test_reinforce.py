"""GRPO on the included model: its arithmetic, its log-probabilities, resuming, and the command."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutants import check_json_reader
from transformers import JanusForConditionalGeneration

from ssd_janus.engine import Engine, Sampling
from ssd_janus.pipeline import Pipeline
from ssd_janus.shape import ModelShape
from ssd_kernels.policies import build
from ssd_shapes import attention, detector, export, grpo, janus, reinforce, text, world

TOKENS = 36
PROMPTS = [[0, 7, 8, 9, 3], [0, 9, 3]]
OPTIONS = grpo.Options(steps=4, prompts=2, samples=4, lr=1e-3, layers=2, temperature=0.7, cap=2.0, measure_every=2)


def tiny_model(layers: int = 2, grid: int = 6) -> Any:
    """The included model's form with little in it, which draws ``grid`` x ``grid`` tokens."""
    torch.manual_seed(0)
    config = janus.build_config(text.build_tokenizer(prompts=200))
    config.text_config.update({"num_hidden_layers": layers, "hidden_size": 32, "intermediate_size": 48,
                               "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
                               "initializer_range": 0.2})
    config.vision_config.update({"image_size": 4 * grid, "num_image_tokens": grid * grid, "projection_dim": 32})
    config.vq_config.update({"num_patches": grid, "projection_dim": 32, "image_token_embed_dim": 32})
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config.update(**json.loads((export.MODEL / "generation_config.json").read_text()))
    model.set_attn_implementation({"text_config": attention.register()})
    return model


def tiny_task(**changes: Any) -> grpo.Task:
    """Codes of the lower half are wanted."""
    model = tiny_model()
    plan = build("window", ModelShape.of(model), 0.2, 0)
    prompts = [(prompt, {"number": number}) for number, prompt in enumerate(PROMPTS)]
    task = grpo.Task(model, plan, lambda seed, step, size: prompts[:size],
                     lambda codes, wanted: (codes < 512).float().mean(1), prompts)
    return replace(task, **changes)


def learner(folder: Path, variant: str = "full", task: grpo.Task | None = None,
            **options: Any) -> grpo.Learner:
    task = task or tiny_task()
    initial = {name: value.detach().clone() for name, value in task.model.model.named_parameters()}
    folder.mkdir(exist_ok=True)
    return grpo.Learner(task, replace(OPTIONS, **options), variant, 1, initial, folder)


def test_advantages_are_standard_scores_within_a_prompt() -> None:
    rewards = torch.rand(5, 8, dtype=torch.float64)
    rewards[2] = 0.3
    found, each = grpo.advantages(rewards), rewards.numpy()
    for row in (0, 1, 3, 4):
        assert np.allclose(found[row], (each[row] - each[row].mean()) / each[row].std())
    assert not found[2].any()
    assert torch.equal(grpo.advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]])),
                       torch.tensor([[0.75, -0.25, -0.25, -0.25]]) / torch.tensor(0.1875).sqrt())


def test_importance_weights() -> None:
    """Against a calculation by probabilities in float64."""
    dense, rollout = (-5 * torch.rand(6, 50) for _ in range(2))
    dense[1, 7], rollout[1, 7] = -11.0, -1.0  # a ratio of 4.5e-5
    dense[3, 7], rollout[3, 7] = -10.0, -1.0  # 1.2e-4, which is allowed
    ratio = np.exp(dense.double().numpy()) / np.exp(rollout.double().numpy())
    expected = np.minimum(ratio, 2.0)
    expected[ratio.min(1) < 1e-4] = 0
    found = grpo.importance(dense, rollout, 2.0)
    assert np.allclose(found, expected, rtol=1e-5) and (ratio > 2).any()
    assert not found[1].any() and found[0].all() and found[3].all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts_of_a_full_cache_are_as_likely_as_training_finds(temperature: float) -> None:
    model = tiny_model()
    drawn = Engine(model).rollout(PROMPTS, 3, 5, guidance=1.0, sampling=Sampling.make(temperature))
    exact_model = copy.deepcopy(model).double()
    exact_model.set_attn_implementation({"text_config": "eager"})
    for index, prompt in enumerate(PROMPTS):
        rows = slice(3 * index, 3 * index + 3)
        with torch.no_grad():
            found = grpo.log_probabilities(model, prompt, drawn.tokens[rows], temperature)
            exact = grpo.log_probabilities(exact_model, prompt, drawn.tokens[rows], temperature)
        assert (found - exact).abs().max() < 1e-5 and (drawn.drawn[rows] - exact).abs().max() < 1e-5


def test_rollouts_of_the_included_model_are_as_likely_as_training_finds() -> None:
    pipe = Pipeline.from_pretrained(None)
    pipe.model.set_attn_implementation({"text_config": attention.register()})
    prompts = pipe.prompt_tokens(["two red circles", "a star above a blue ring"])
    drawn = Engine(pipe.model).rollout(prompts, 2, 3, guidance=1.0, sampling=Sampling(), steps=100)
    for index, prompt in enumerate(prompts):
        rows = slice(2 * index, 2 * index + 2)
        with torch.no_grad():
            found = grpo.log_probabilities(pipe.model, prompt, drawn.tokens[rows], 1.0)
        assert (found - drawn.drawn[rows]).abs().max() < 1e-5


@pytest.mark.parametrize("variant", grpo.VARIANTS)
def test_a_step_makes_the_better_sample_likelier(tmp_path: Path, variant: str) -> None:
    seen = []

    def reward(codes: torch.Tensor, wanted: Any) -> torch.Tensor:
        seen.append(codes)
        return torch.arange(len(codes)).flip(0).float() / len(codes)

    task = tiny_task(reward=reward)
    one = learner(tmp_path, variant, task, prompts=1, samples=2, lr=1e-4)
    one.record.held_out.append({})
    before_step = {name: value.clone() for name, value in task.model.state_dict().items()}
    one.step()
    after_step = task.model.state_dict()
    learnt = {name for name, value in after_step.items() if not torch.equal(value, before_step[name])}
    assert learnt and all("language_model.layers." in name or "language_model.norm" in name or "generation_head" in name
                          for name in learnt)
    with torch.no_grad():
        after = grpo.log_probabilities(task.model, PROMPTS[0], seen[0], 0.7).sum(1)
        task.model.load_state_dict(before_step)
        before = grpo.log_probabilities(task.model, PROMPTS[0], seen[0], 0.7).sum(1)
    assert after[0] > before[0] and after[1] < before[1]


def test_only_the_last_layers_learn() -> None:
    model = tiny_model()
    names = grpo.trained(model, 1)
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"1"}
    assert not model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad
    for layers in (0, 3):
        with pytest.raises(ValueError, match="layers must be within 1 .. 2"):
            grpo.trained(model, layers)


def test_the_correction_weighs_by_both_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked where it belongs, with the log-probabilities of both; weights of nothing teach nothing."""
    asked = []

    def importance(dense: torch.Tensor, rollout: torch.Tensor, cap: float) -> torch.Tensor:
        asked.append((dense, rollout, cap))
        return torch.zeros_like(dense)

    monkeypatch.setattr(grpo, "importance", importance)
    for variant in grpo.VARIANTS:
        asked.clear()
        task = tiny_task()
        one = learner(tmp_path / variant, variant, task)
        before = {name: value.detach().clone() for name, value in one.parameters.items()}
        drawn = Engine(task.model, task.plan).rollout(PROMPTS, 4, 4 * 8, guidance=1.0, sampling=Sampling.make(0.7))
        with torch.no_grad():
            dense = grpo.log_probabilities(task.model, PROMPTS[1], drawn.tokens[4:], 0.7)
        one.step()
        assert len(asked) == (2 if variant == "corrected" else 0)
        changed = any(not torch.equal(value, before[name]) for name, value in one.parameters.items())
        assert changed == (variant != "corrected")
        kl = one.record.steps[0]["kl"]
        if variant == "full":
            assert abs(kl) < 1e-6
            continue
        assert kl == pytest.approx(float((drawn.drawn[4:] - dense).mean()), rel=1.0) and kl > 0.01
        if asked:
            assert torch.allclose(asked[1][0], dense, atol=1e-5) and torch.equal(asked[1][1], drawn.drawn[4:])
            assert asked[1][2] == 2.0


def untimed(folder: Path, name: str) -> dict[str, Any]:
    record = json.loads((folder / f"{name}.json").read_text())
    for step in record["steps"]:
        del step["seconds"], step["cpu_seconds"]
    return record


@pytest.mark.parametrize("variant", ["full", "corrected"])
def test_a_resumed_run_is_the_same(tmp_path: Path, variant: str) -> None:
    whole = learner(tmp_path / "whole", variant)
    while not whole.done:
        whole.step()
    parts = learner(tmp_path / "parts", variant)
    parts.step()
    (tmp_path / "parts" / f"{variant}-1-2.safetensors").write_bytes(b"killed before the record was written")
    while not parts.done:
        parts = learner(tmp_path / "parts", variant)
        parts.step()
    assert untimed(tmp_path / "whole", f"{variant}-1") == untimed(tmp_path / "parts", f"{variant}-1")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "parts")]
    assert files[0] == files[1] == [f"{variant}-1-4.safetensors", f"{variant}-1.json"]
    assert len({(tmp_path / name / files[0][0]).read_bytes() for name in ("whole", "parts")}) == 1
    assert [each["step"] for each in whole.record.held_out] == [0, 2, 4]
    done = learner(tmp_path / "whole", variant)
    assert done.done and all(torch.equal(value, parts.parameters[name]) for name, value in done.parameters.items())


def test_learning_shows(tmp_path: Path) -> None:
    one = learner(tmp_path, steps=8, lr=1e-2, samples=8, measure_every=8)
    while not one.done:
        one.step()
    first, last = one.record.held_out
    assert last["full"] > first["full"] + 0.2 and last["compressed"] > first["compressed"] + 0.2


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    one = learner(tmp_path)
    one.step()
    weights = tmp_path / one.record.weights
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{weights.name} is damaged"):
        learner(tmp_path)
    (tmp_path / "corrected-1.json").write_bytes((tmp_path / "full-1.json").read_bytes())
    with pytest.raises(ValueError, match="must be the record of corrected-1, got that of full-1"):
        learner(tmp_path, "corrected")
    check_json_reader(grpo.read_record, tmp_path / "full-1.json",
                      r"digest|steps\.\d+\.(kl|far|(cpu_)?seconds\.\w+\.removed|(cpu_)?seconds\.unknown)", most=150)


def test_rewards() -> None:
    rng = np.random.default_rng(0)
    for family in reinforce.FAMILIES:
        scene = world.draw_scene(rng, world.draw_prompt(rng, "test", family))
        wanted = {"include": scene.include, "exclude": scene.exclude}
        found = detector.detect(world.render(scene))
        assert reinforce.reward_of(found, wanted) == 1.0
        assert reinforce.reward_of([], wanted) == 0.0
        share = reinforce.reward_of(found[1:], wanted)
        assert share == pytest.approx(0.5 * (len(scene.objects) - 1) / len(scene.objects))
    two = {"include": [{"class": "star", "count": 2, "color": "red"}], "exclude": []}
    scene = world.Scene("", "", [], [], [world.Object("star", "red", (30, 30), 15),
                                         world.Object("star", "blue", (66, 66), 15)], "grey")
    assert reinforce.reward_of(detector.detect(world.render(scene)), two) == 0.25


def test_prompts_of_the_task() -> None:
    task = reinforce.shapes_task(Pipeline.from_pretrained(None), "decayed", 0.2, 20)
    drawn = task.draw(1, 2, 20)
    assert drawn == task.draw(1, 2, 20) and drawn[:5] == task.draw(1, 2, 5)
    assert drawn != task.draw(1, 3, 20) and drawn != task.draw(2, 2, 20)
    for prompt, wanted in drawn:
        assert sum(thing["count"] for thing in wanted["include"]) > 1
        assert not any(map(world.held_out, world.named(wanted["include"]))) and prompt[-1] == 3
    assert len(task.held_out) == 20 and {wanted["tag"] for _, wanted in task.held_out} == set(reinforce.FAMILIES)
    assert all(any(map(world.held_out, world.named(wanted["include"]))) for _, wanted in task.held_out)
    assert task.plan.budget(576) == pytest.approx(0.2, abs=0.01)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All variants for a step, with rewards that a model without training can differ in; then it goes on from there."""
    pytest.importorskip("matplotlib")
    model = tmp_path / "model"
    shutil.copytree(export.MODEL, model, ignore=shutil.ignore_patterns("*.safetensors", "training.json"))
    tiny_model(1, 24).save_pretrained(model)
    rewards = itertools.cycle([0.5, 1.0, 0.0])
    monkeypatch.setattr(reinforce, "reward_of", lambda found, wanted: next(rewards))
    given = {"out": tmp_path / "run", "steps": 1, "seeds": 1, "prompts": 1, "samples": 2, "held_out": 2, "layers": 1,
             "model": model, "threads": 0, "page": tmp_path / "page.md"}
    (tmp_path / "page.md").write_text("Before.\n<!-- reinforce -->\nold\n<!-- /reinforce -->\nAfter.\n")
    reinforce.reinforce(**given)
    said = capsys.readouterr().out
    assert "corrected-0 step 1: reward" in said and "| uncorrected | 1 | 1 |" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [record["variant"] for record in results["runs"]] == list(grpo.VARIANTS)
    summary = results["summary"]
    assert summary["full"]["cache_bytes"] > 2 * summary["corrected"]["cache_bytes"]
    assert all(record["held_out"][0] == results["runs"][0]["held_out"][0] for record in results["runs"])
    assert abs(summary["full"]["kl_per_token"]) < 1e-5 and math.isfinite(summary["corrected"]["kl_per_token"])
    assert (tmp_path / "run" / "reinforce.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "reinforce.png").exists()
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("Before.\n") and "| full | 1 | 1 |" in text and text.endswith("After.\n")
    before = (tmp_path / "run" / "results.json").read_bytes()
    reinforce.reinforce(**given)
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    with pytest.raises(ValueError, match="another --samples"):
        reinforce.reinforce(**{**given, "samples": 3})
    with pytest.raises(ValueError, match="--variant must be one of full, uncorrected, corrected, got dense"):
        reinforce.reinforce(**given, variant=["dense"])
