"""Refresh constraints/cpu.txt: the newest release of everything we install, for every Python, and say what moved.

    python tools/pins.py            # or: make pins

The whole closure of what pyproject.toml names (extras and build tools as well) and of constraints/cpu.in is resolved
by uv for all Pythons from `OLDEST_PYTHON` on at once; where Pythons differ, a line has an environment marker. What
torch pins exactly itself, the libraries of its CUDA build, is left out: on a machine without a GPU nothing takes them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PINS = ROOT / "constraints" / "cpu.in", ROOT / "constraints" / "cpu.txt"
OLDEST_PYTHON = "3.10"
PINNED_BY_TORCH = re.compile(r"(nvidia|cuda)-")
HEADER = """\
# The versions our own tests run with, on machines without a GPU:  pip install -c constraints/cpu.txt -e .
# Never part of the package's metadata, where they would replace a user's CUDA build of torch.
# Made by `make pins` from pyproject.toml and constraints/cpu.in; not to be edited.
"""


def resolved() -> list[str]:
    """One ``name==version ; marker`` per release, sorted by name.

    Raises:
        subprocess.CalledProcessError: uv found no set of releases; it has said why.
    """
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        tools = Path(folder, "build.in")
        tools.write_text("\n".join(build))
        found = subprocess.run(
            ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", OLDEST_PYTHON, "--upgrade",
             "--all-extras", "--no-annotate", "--no-header", str(ROOT / "pyproject.toml"), str(SOURCE), str(tools)],
            stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    return [line for line in found.splitlines() if not PINNED_BY_TORCH.match(line)]


def moved(before: str, after: str) -> list[str]:
    """What differs between two constraints files: ``name: releases -> releases``, a line each."""
    old, new = _releases(before), _releases(after)
    return [f"{name}: {', '.join(old.get(name, ['nothing']))} -> {', '.join(new.get(name, ['nothing']))}"
            for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _releases(constraints: str) -> dict[str, list[str]]:
    """The releases of each package, with their markers, in a constraints file."""
    found = defaultdict(list)
    for line in constraints.splitlines():
        if pin := re.match(r"([\w.-]+)==(\S+)(?:\s*;\s*([^#]*[^#\s]))?", line):
            found[pin[1]].append(pin[2] + (f" ({pin[3]})" if pin[3] else ""))
    return dict(found)


def main() -> None:
    before = PINS.read_text() if PINS.exists() else ""
    after = HEADER + "".join(f"{line}\n" for line in resolved())
    partial = PINS.with_suffix(".partial")
    partial.write_text(after)
    os.replace(partial, PINS)
    print("\n".join(moved(before, after)) or "nothing moved")


if __name__ == "__main__":
    sys.exit(main())
