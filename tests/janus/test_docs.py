"""The code in the guides runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssd_janus import Pipeline
from ssd_kernels.policies import POLICIES

DOCS = Path(__file__).parents[2] / "docs"


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


def test_every_policy_is_in_the_guide() -> None:
    text = (DOCS / "policies.md").read_text()
    assert all(f"| `{name}` |" in text for name in POLICIES)
