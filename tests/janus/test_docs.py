"""The code in the guides runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

import ssd_janus
from ssd_attach.choice import choose
from ssd_attach.models import chameleon, emu3
from ssd_attach.units import show_bytes
from ssd_janus import ModelShape, Pipeline, profiling
from ssd_janus.checkpoints import fingerprint, included_model, included_profile
from ssd_janus.prompts import shapes_suite
from ssd_kernels.policies import KINDS, POLICIES, HeadProfile, Raster, adaptive

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


SIZES = {  # KV heads, D, layers, and the raster
    "Janus-Pro-1B": (16, 128, 24, Raster(24, 24)), "Janus-Pro-7B": (32, 128, 30, Raster(24, 24)),
    "Emu3, 90 x 90": (8, 128, 32, emu3().raster), "Lumina-mGPT 7B, 48 x 48": (32, 128, 32, chameleon().raster),
    "Lumina-mGPT 7B, 64 x 64": (32, 128, 32, chameleon(64, 64).raster),
    "LlamaGen XL, 16 x 16": (20, 64, 36, Raster(16, 16)), "LlamaGen XL, 32 x 32": (20, 64, 36, Raster(32, 32))}


def test_what_caches_of_models_take() -> None:
    """The table of docs/models.md is what plans say."""
    lines = (DOCS / "models.md").read_text().splitlines()
    for name, (heads, dim, layers, raster) in SIZES.items():
        shape = ModelShape(layers, heads, heads, dim, raster.tokens, raster.columns, raster)
        full = choose(shape, "full", torch.bfloat16)
        others = [choose(shape, "full", torch.bfloat16, kv_format="int8"), choose(shape, None, torch.bfloat16),
                  choose(shape, None, torch.bfloat16, kv_format="int8")]
        cells = [f"{show_bytes(each.nbytes())}, {each.nbytes() / full.nbytes():.1%}" for each in others]
        assert f"| {name} | {heads} x {dim}, {layers} | {show_bytes(full.nbytes())} | {' | '.join(cells)} |" in lines


def test_what_enable_says() -> None:
    """The lines of docs/models.md, of the included model."""
    names = {"ssd_janus": ssd_janus, "model": Pipeline.from_pretrained(None).model}
    text = (DOCS / "models.md").read_text()
    calls = re.findall(r"^print\((ssd_janus\.enable\(model, .*\))\)$", text, re.MULTILINE)
    assert len(calls) == 2
    for call in calls:
        assert f"```\n{eval(call, names)}\n```" in text


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
