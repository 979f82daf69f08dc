"""The evaluation suite is what its code draws, and asks only for what training never showed."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from mutants import check_json_reader

from ssd_shapes import detector, suite, world


@pytest.fixture(scope="module")
def prompts():
    return suite.load()


def combination(prompt: dict[str, Any]) -> tuple[str, ...]:
    """What may be held out of a prompt, from its metadata."""
    family, include = prompt["tag"], prompt["include"]
    classes = [thing["class"] for thing in include]
    named = [f"{thing.get('color', '')} {thing['class']}".strip() for thing in include]
    if family == "single_object":
        return family, prompt["prompt"].removesuffix(f"a {classes[0]}").strip(), classes[0]
    if family == "counting":
        return family, world.COUNTS[include[0]["count"] - 1], classes[0]
    if family == "position":
        return world.related(include[1]["position"][0], classes[1], classes[0])
    return family, *(named[0].split() if family == "colors" else sorted(named))


def test_file_is_what_is_drawn(prompts):
    assert prompts == suite.draw()
    assert suite.draw(seed=1, size=20) != prompts[:20] == suite.draw(size=20)


@pytest.mark.parametrize("family", ["counting", "position"])
def test_a_suite_may_hold_anything(tmp_path, prompts, family):
    file = tmp_path / "prompts.jsonl"
    chosen = [prompt for prompt in prompts if prompt["tag"] == family][:2]
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in chosen))
    check_json_reader(suite.load, file, r"(.*\.)?unknown|exclude.removed|include\.1\.position.removed", line=True)


def test_written_whole(tmp_path):
    suite.write(tmp_path / "prompts.jsonl", seed=3, size=7)
    assert suite.load(tmp_path / "prompts.jsonl") == suite.draw(3, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        suite.load(tmp_path / "missing")
    (tmp_path / "broken").write_text("{")
    with pytest.raises(ValueError, match="broken, line 1: "):
        suite.load(tmp_path / "broken")
    monkeypatch.setattr(suite, "FAMILIES", ("single_object",))
    with pytest.raises(ValueError, match="size must be at most 10"):
        suite.draw(size=11)


def test_families_are_even(prompts):
    assert len(prompts) >= 300
    counts = Counter(prompt["tag"] for prompt in prompts)
    assert counts.keys() == set(suite.FAMILIES) and counts.pop("single_object") == 10
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(Counter(prompt["tag"] for prompt in prompts[:60]).values()) == {10}


def test_many_combinations(prompts):
    """As many as there are: a family of few says little."""
    counts = Counter(family for family, *_ in {combination(prompt) for prompt in prompts})
    assert min(counts.values()) >= 4 and sum(counts.values()) >= 80, counts


def test_prompts_are_held_out(prompts):
    assert all(world.held_out(combination(prompt)) for prompt in prompts)
    texts = {prompt["prompt"] for prompt in prompts}
    assert len(texts) == len(prompts)
    rng = np.random.default_rng(0)
    assert not texts & {world.draw_prompt(rng).text for _ in range(20_000)}


def test_detector_accepts_true_scenes(prompts):
    rng = np.random.default_rng(0)
    for prompt in prompts:
        wanted = world.Prompt(prompt["prompt"], prompt["tag"], prompt["include"], prompt.get("exclude", []))
        picture = world.render(world.draw_scene(rng, wanted))
        assert detector.score(picture, prompt).correct, prompt["prompt"]
