"""tools/compat.py: what it says of checks, and that page, README and lists of releases agree."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"


@pytest.fixture(scope="module")
def compat() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ssd_tools_compat", ROOT / "tools" / "compat.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look names up
    spec.loader.exec_module(module)
    return module


def test_readme_says_what_the_page_says(compat: ModuleType) -> None:
    block = compat.PAGE_MARK.search((ROOT / "README.md").read_text())
    assert block and block[0].split("\n", 1)[1] == compat.summary(PAGE.read_text()) + block[2]


def test_page_has_every_release(compat: ModuleType) -> None:
    """Each release of the lists has a row; none failed, and those that were not tested say why."""
    rows = list(compat.rows_of(PAGE.read_text()))
    assert [(title, ".".join(release.split(".")[:2])) for title, release, _ in rows] == [
        (compat.TITLES[name], release) for name, releases in compat.RELEASES.items() for release in releases]
    assert "failed" not in PAGE.read_text()
    assert not re.search(r"not tested: *\|", PAGE.read_text())


def test_lists_begin_where_the_metadata_do(compat: ModuleType) -> None:
    """The oldest release that may be installed is among those that are tested, and so is the one at hand."""
    lines = re.findall(r'^ +"((?:torch|transformers|triton)>=[^";]*)', (ROOT / "pyproject.toml").read_text(), re.M)
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}
    for name in ("transformers", "torch", "triton"):
        least = next(Version(part.version) for part in ranges[name] if part.operator == ">=")
        assert least == Version(compat.RELEASES[name][0]), name
        here = Version(importlib.metadata.version(name))
        assert f"{here.major}.{here.minor}" in compat.RELEASES[name]


def test_a_table_keeps_its_rows(compat: ModuleType) -> None:
    """Written and read again: what passed, what failed, what could not be had."""
    rows = [compat.Row("torch", "2.11.0", {"coupling": "14 passed", "kernels": "70 passed"}),
            compat.Row("torch", "2.15", missing="no such release"),
            compat.Row("triton", "3.6.0", {"executed": "**2 of 9 failed**"}),
            compat.Row("numpy", "2.0.2", {"coupling": "14 passed"})]
    page = compat.page(rows, "Python 3.11.7", "2026-01-02")
    assert list(compat.rows_of(page)) == [("torch", "2.11.0", True), ("torch", "2.15", False),
                                          ("Triton", "3.6.0", False), ("NumPy", "2.0.2", True)]
    assert [row.failed for row in rows] == [False, False, True, False]
    assert compat.summary(page).startswith("Tested on 2026-01-02 with\ntorch 2.11;\nNumPy 2.0\n(")


@pytest.mark.parametrize(("code", "cell"), [
    ("def test_a(): pass\ndef test_b(): pass", "2 passed"),
    ("def test_a(): pass\ndef test_b(): assert 0", "**1 of 2 failed**"),
    ("import pytest\n@pytest.fixture\ndef x(): 1 / 0\ndef test_a(x): pass", "**1 of 1 failed**"),
    ("import pytest\ndef test_a(): pytest.skip()", "**0 of 1 failed**"),
    ("import os\nos._exit(3)", "failed: exit status 3"),
], ids=["passes", "fails", "error", "nothing ran", "crash"])
def test_checks(compat: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, cell: str) -> None:
    """A failing, an impossible, an empty and a crashing run are told from one that passes."""
    (tmp_path / "test_it.py").write_text(code)
    monkeypatch.setitem(compat.CHECKS, "coupling", (str(tmp_path / "test_it.py"), "-c", "/dev/null", "--noconftest"))
    found = compat.check("coupling", sys.executable, [])
    assert found == cell
    assert compat.Row("torch", "2.11", {"coupling": found}).failed == (cell != "2 passed")


def test_what_cannot_be_installed_is_a_row(compat: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """uv's reason is told, and no half-made folder is taken for the release afterwards."""
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\necho '  × No solution found when resolving dependencies:' >&2\n"
                  "echo '  ╰─▶ there is no version of numpy==2.9' >&2\nexit 1\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cache = compat.Cache(tmp_path / "cache")
    row = compat.tried(cache, "numpy", "2.9")
    assert row.line() == "| NumPy 2.9 | not tested: could not be installed here | | | |"
    assert "there is no version of numpy==2.9" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "numpy-2.9").exists()
