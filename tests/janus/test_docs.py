"""The code in the guides runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from ssd_janus import ModelShape, Pipeline, profiling
from ssd_janus.checkpoints import fingerprint, included_model, included_profile
from ssd_janus.prompts import shapes_suite
from ssd_kernels.policies import KINDS, POLICIES, HeadProfile, adaptive

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_write_your_own_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_kernels.policies.POLICIES", dict(POLICIES))
    pipe = Pipeline.from_pretrained(folder)
    _, code = re.findall(r"```python\n(.*?)```", (DOCS / "policies.md").read_text(), re.DOTALL)
    names: dict = {"pipe": pipe}
    exec(code.replace("0.2", "0.4"), names)
    assert len(names["pictures"]) == 1
    sizes = [heads[0].size for heads in names["plan"].layers]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert 0.4 - 1 / 36 < names["plan"].budget(36) <= 0.4


def test_budgets_in_bytes_as_the_guide_has_them(folder: Path) -> None:
    code, _ = re.findall(r"```python\n(.*?)```", (DOCS / "policies.md").read_text(), re.DOTALL)
    names: dict = {"pipe": Pipeline.from_pretrained(folder)}
    exec(code.replace("0.1", "0.3"), names)
    assert names["plan"].kv_format == "int8"
    *_, tokens, share = code.splitlines()
    tokens, share = (eval(line, names) for line in (tokens, share))
    assert 0.3 - 1 / 36 < share <= 0.3 and tokens == pytest.approx(share * 4 * tiny.HEAD_DIM / (tiny.HEAD_DIM + 4))


@pytest.mark.parametrize("number", range(3))
def test_the_readme(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every block alone, as written, with a smaller model in place of the included one."""
    source = shutil.copytree(folder, tmp_path / "model")
    tiny.build_processor(tiny.CHAT_TEMPLATE).save_pretrained(source)  # the included model has one, too
    for module in ("checkpoints", "pipeline"):
        monkeypatch.setattr(f"ssd_janus.{module}.included_model", lambda: str(source))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    exec(blocks[number], names)
    if number == 0:
        assert Image.open("two-blue-squares.png").size == (24, 24)
    elif number == 1:
        assert len(names["pictures"]) == 4
    else:
        assert names["out"].shape == (2, 6, 128) and names["out"].isfinite().all()


def test_every_policy_is_in_the_guide() -> None:
    text = (DOCS / "policies.md").read_text()
    assert all(f"| `{name}` |" in text for name in POLICIES)


def test_memory_of_a_profile() -> None:
    """The guide's figure for Janus-Pro-1B: prompts of 32 tokens in bfloat16, 4 pictures with guidance."""
    shape = ModelShape(num_layers=24, num_heads=16, num_query_heads=16, head_dim=128, num_visual_tokens=576, columns=24)
    options = {"batch_size": 8, "head_dim": 128, "max_prompt": 32, "dtype": torch.bfloat16}
    full = shape.full_plan().nbytes(**options)
    plans = [*profiling.plans_beside(shape, profiling.measured_sizes(shape)), profiling.everything_in_8_bits(shape)]
    beside = sum(plan.nbytes(**options) for plan in plans)
    projections = 24 * 4 * (2048 * 2048 + 16 * 128 * 128)
    text = (DOCS / "engine.md").read_text()
    assert f"These caches take {beside / full:.0f} times the" in text
    assert f"| Janus-Pro-1B, bfloat16 | {full / 1e9:.2f} | {(beside + full / 2 + projections) / 1e9:.0f} |" in text
    assert f"takes {beside / full:.0f} times" in (profiling.measure.__doc__ or "")


def test_make_policies_runs_the_command_of_the_page() -> None:
    (make,) = re.findall(r"^COMPARE +\?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = (DOCS / "policy-results.md").read_text()
    assert re.findall(r"^ssd-janus compare --out runs/policies (.*) --page docs", text, re.MULTILINE) == [make]


def test_the_included_profile_is_of_the_included_model() -> None:
    """Of these weights, of prompts that nothing is judged on, and enough for `--policy adaptive --budget 0.1`."""
    profile = HeadProfile.load(included_profile())
    pipe = Pipeline.from_pretrained(included_model())
    assert profile.meta["weights"] == fingerprint(pipe.model)
    assert profile.kinds == tuple(KINDS) and profile.places == profiling.places(pipe.shape)
    assert not set(profile.meta["prompts"]) & {prompt["prompt"] for prompt in shapes_suite()}
    for budget in (0.1, 0.5):
        plan = adaptive(pipe.shape, budget, 0, profile=profile)
        assert budget - 1 / 576 < plan.budget(576) <= budget
    cost = f"{len(profile.meta['prompts'])} prompts, {profile.meta['seconds'] / 60:.1f} minutes"
    assert cost in " ".join((DOCS / "policies.md").read_text().split())
