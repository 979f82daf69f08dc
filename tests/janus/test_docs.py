"""The code in the guides runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tiny
from PIL import Image

from ssd_janus import Pipeline
from ssd_kernels.policies import POLICIES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_write_your_own_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_kernels.policies.POLICIES", dict(POLICIES))
    pipe = Pipeline.from_pretrained(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "policies.md").read_text(), re.DOTALL)
    names: dict = {"pipe": pipe}
    exec(code.replace("0.2", "0.4"), names)
    assert len(names["pictures"]) == 1
    sizes = [heads[0].size for heads in names["plan"].layers]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert 0.4 - 1 / 36 < names["plan"].budget(36) <= 0.4


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
