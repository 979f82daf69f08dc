"""constraints/cpu.txt covers all that is installed, on every Python; tools/pins.py says what moved."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINS = [Requirement(line) for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
        if line and not line.startswith("#")]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = ("test", "evaluate", "plot", "train", "triton", "serve", "lint")


@pytest.fixture
def pins() -> ModuleType:
    return load("pins")


def load(tool: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ssd_tools_{tool}", ROOT / "tools" / f"{tool}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(python: str) -> dict[str, str]:
    """What markers see on 64-bit Linux."""
    return {**default_environment(), "python_version": python, "python_full_version": f"{python}.1",
            "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}


def made_to_build() -> Iterator[Requirement]:
    """What the Makefile installs beside the package."""
    text = (ROOT / "Makefile").read_text()
    for line in re.findall(r"^BUILD_TOOLS\s*:=(.*)$|^\t\$\(PIP\) ([a-z][\w -]*)", text, re.MULTILINE):
        for word in "".join(line).replace("'", "").split():
            yield Requirement(word)


def closure(python: str) -> set[str]:
    """Names of all that an install takes on a Python: followed through the metadata of what is installed here."""
    where = environment(python)
    todo = [(requirement, "") for requirement in made_to_build()]
    todo += [(Requirement(f"ssd_kernels[{','.join(EXTRAS)}]"), "")]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({**where, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                try:
                    further = importlib.metadata.requires(name) or []
                except importlib.metadata.PackageNotFoundError:  # of another Python, or another system's torch
                    continue
                todo += [(Requirement(line), wanted) for line in further]
    return {name for name, _ in seen} - {"ssd-kernels"}


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_installed_is_pinned_once(python: str) -> None:
    names = closure(python)
    assert {"torch", "transformers", "regex", "pytest", "ruff", "cmake", "uv"} <= names
    where = environment(python)
    found = {name: [str(pin.specifier) for pin in PINS if canonicalize_name(pin.name) == name
                    and (pin.marker is None or pin.marker.evaluate(where))] for name in names}
    libraries = re.compile(r"(nvidia|cuda)-")  # pinned by torch's CUDA builds themselves
    assert not {name: pins for name, pins in found.items() if len(pins) != 1 and not libraries.match(name)}


def test_pins_are_exact() -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in PINS)


def test_pins_fit_the_metadata() -> None:
    """What is pinned is in the ranges of pyproject.toml, on every Python."""
    for line in importlib.metadata.requires("ssd_kernels") or ():
        requirement = Requirement(line)
        for pin in PINS:
            if canonicalize_name(pin.name) == canonicalize_name(requirement.name):
                release = str(pin.specifier).removeprefix("==")
                assert requirement.specifier.contains(release), (line, release)


def test_the_record_is_of_the_pinned_triton() -> None:
    record = json.loads((ROOT / "tests" / "kernels" / "triton_resources.json").read_text())["triton"]
    assert [str(pin.specifier) for pin in PINS if pin.name == "triton"
            and (pin.marker is None or pin.marker.evaluate(environment("3.11")))] == [f"=={record}"]


BEFORE = "# header\na==1\nb==1 ; python_full_version < '3.11'\nb==2 ; python_full_version >= '3.11'\ngone==3\n"


@pytest.mark.parametrize(("after", "lines"), [
    (BEFORE, []),
    (BEFORE.replace("a==1", "a==1.5"), ["a: 1 -> 1.5"]),
    (BEFORE.replace("gone==3\n", "new-one==4\n"), ["gone: 3 -> nothing", "new-one: nothing -> 4"]),
    (BEFORE.replace("b==2", "b==3"),
     ["b: 1 (python_full_version < '3.11'), 2 (python_full_version >= '3.11') -> "
      "1 (python_full_version < '3.11'), 3 (python_full_version >= '3.11')"]),
    (BEFORE.replace("# header", "# other"), []),
], ids=["nothing", "a release", "a package", "for some Pythons", "a comment"])
def test_what_moved_is_said(pins: ModuleType, after: str, lines: list[str]) -> None:
    assert pins.moved(BEFORE, after) == lines


def test_a_failed_resolution_changes_nothing(pins: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "cpu.txt"
    kept.write_text(BEFORE)
    monkeypatch.setattr(pins, "PINS", kept)
    monkeypatch.setenv("PATH", str(tmp_path))  # no uv
    with pytest.raises(FileNotFoundError):
        pins.main()
    assert kept.read_text() == BEFORE and list(tmp_path.iterdir()) == [kept]


def test_refreshed(pins: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture[str]) -> None:
    """What is written starts with the header; what torch pins itself is left out."""
    kept = tmp_path / "cpu.txt"
    kept.write_text(BEFORE)
    monkeypatch.setattr(pins, "PINS", kept)
    monkeypatch.setenv("PATH", str(tmp_path))
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\necho 'a==2'\necho 'nvidia-cublas==13'\necho 'gone==3'\n")
    uv.chmod(0o755)
    pins.main()
    assert kept.read_text() == pins.HEADER + "a==2\ngone==3\n"
    assert "a: 1 -> 2" in capsys.readouterr().out
