"""Run the essential checks with other releases of what we build on, and print one table.

    python tools/compat.py                                    # or: make compat; exit status 1 if anything failed
    python tools/compat.py --write docs/compatibility.md      # the table as a page; its summary in README.md
    python tools/compat.py --only triton --only "torch 2.11"  # some rows
    python tools/compat.py --newest                           # or: make newest; the newest of everything, exit status 0

Every row replaces one thing in the environment that this runs in, by a folder that comes first on PYTHONPATH and stays
in the cache (--cache, else SSD_COMPAT_CACHE, else build/compat: some gigabytes where torch comes from PyPI). Other
Pythons get environments of their own, with the pinned releases. What cannot be had is a row that says so.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE_MARK = re.compile(r"(<!-- releases: make compat -->\n).*?(<!-- /releases -->)", re.DOTALL)
COLUMNS = ("coupling", "kernels", "executed", "compiled")
# pytest's arguments for each column.
CHECKS: dict[str, tuple[str, ...]] = {
    "coupling": ("tests/janus/test_releases.py",),
    "kernels": ("tests/kernels/test_contract.py", "tests/kernels/test_ops.py", "-k",
                "cpu and (kind_of_head or row_buffer or whole_picture or opcheck or compiled)"),
    "executed": ("tests/kernels/test_contract.py", "tests/kernels/test_shapes.py", "-k",
                 "ptx_triton and (kind_of_head or row_buffer or a-part or prefill_scores or mass_is or D72)"),
    "compiled": ("tests/kernels/test_triton_resources.py", "-k",
                 "(sm_80 and D128 and R24 and M256) or (sm_90 and D64) or multiply_adds"),
}
RELEASES = {
    "transformers": ("5.18", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24"),
    "torch": ("2.11", "2.13", "2.14", "2.15"),
    "triton": ("3.6", "3.7", "3.8", "3.9"),
    "numpy": ("1.26", "2.0", "2.4"),
    "python": ("3.10", "3.11", "3.12", "3.13", "3.14"),
}
COVERED = {"transformers": ("coupling",), "torch": COLUMNS, "triton": ("executed", "compiled"),
           "numpy": ("coupling",), "python": ("coupling", "kernels")}
TITLES = {"transformers": "transformers", "torch": "torch", "triton": "Triton", "numpy": "NumPy", "python": "Python"}


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name, release: what is replaced, and by which release ("" before it is known).
        cells: by column, what came out; columns that do not concern the row are absent.
        missing: why nothing was tested, or "".
    """

    name: str
    release: str
    cells: dict[str, str] = field(default_factory=dict)
    missing: str = ""

    @property
    def failed(self) -> bool:
        return any(not cell.endswith(" passed") for cell in self.cells.values())

    def line(self) -> str:
        if self.missing:
            return f"| {TITLES.get(self.name, self.name)} {self.release} | not tested: {self.missing} | | | |"
        cells = (self.cells.get(column, "") for column in COLUMNS)
        return f"| {TITLES.get(self.name, self.name)} {self.release} | " + " | ".join(cells) + " |"


class CannotHave(Exception):
    """A release that cannot be installed here; the message says why."""


class Cache:
    """Folders with other releases, made on demand and kept; and what was found with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checked: dict[tuple[str, ...], str] = {}

    def check(self, column: str, python: str, paths: Sequence[Path]) -> str:
        """As `check`, once for each environment: the pinned releases are in several rows."""
        key = (column, python, *map(str, paths))
        if key not in self._checked:
            self._checked[key] = check(column, python, paths)
        return self._checked[key]

    def overlay(self, name: str, requirements: Sequence[str], *options: str) -> Path:
        """A folder for PYTHONPATH with ``requirements``; ``options`` of ``uv pip install``."""
        target = self.folder / name
        if not target.is_dir():
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _install("--python", sys.executable, "--target", str(partial), *options, *requirements)
            partial.rename(target)
        return target

    def python(self, release: str) -> Path:
        """The interpreter of an environment with Python ``release``, the pinned releases and this checkout."""
        target = self.folder / f"python-{release}"
        python, done = target / "bin" / "python", target / ".built"
        if not done.exists():
            _run("uv", "venv", "--quiet", "--clear", "--python", release, "--no-python-downloads", str(target))
            pinned = ("--python", str(python), "-c", "constraints/cpu.txt")
            _install(*pinned, "setuptools", "pybind11", "ninja", "cmake")
            _install(*pinned, "torch")
            _install(*pinned, "--no-build-isolation", "-e", ".[test]")
            _run(str(python), "setup.py", "--quiet", "build_ext", "--inplace")
            done.touch()
        return python


def _run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=env)
    if done.returncode:
        lines = [line.strip(" ×╰─▶│├") for line in done.stderr.splitlines() if line.strip(" ×╰─▶│├")]
        raise CannotHave(lines[1 if len(lines) > 1 and lines[0].endswith(":") else 0][:150] if lines else "no reason")
    return done.stdout


def _install(*arguments: str) -> None:
    _run("uv", "pip", "install", "--quiet", *arguments)


def check(column: str, python: str, paths: Sequence[Path]) -> str:
    """Run the checks of a column; "12 passed", or what failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_WAIT_POLICY": "passive",
               "TRITON_CACHE_DIR": str(Path(folder, "triton")), "HF_HUB_OFFLINE": "1", "SSD_KERNELS_CUDA": "0"}
        run = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
                              *CHECKS[column]], cwd=ROOT, env=env, text=True, capture_output=True)
        if not report.exists():
            lines = (run.stdout + run.stderr).strip().splitlines()
            return f"failed: {lines[-1][:100] if lines else f'exit status {run.returncode}'}"
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    for case in failed:
        fault = next(part for part in case if part.tag in ("failure", "error"))
        print(f"    {case.get('name')}: {(fault.get('message') or '').splitlines()[0][:150]}", flush=True)
    passed = sum(not len(case) for case in cases)
    if failed or not passed:
        return f"**{len(failed)} of {len(cases)} failed**"
    return f"{passed} passed"


def version(name: str, python: str, paths: Sequence[Path]) -> str:
    """The full release of a package as the checks find it."""
    code = f"import importlib.metadata; print(importlib.metadata.version({name!r}))"
    return _run(python, "-c", code, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}).strip()


def prepared(cache: Cache, name: str, release: str) -> tuple[str, list[Path], str]:
    """The interpreter, what goes on PYTHONPATH, and the full release of a row.

    Raises:
        CannotHave: the release cannot be had here.
    """
    if name == "python":
        if release == f"{sys.version_info.major}.{sys.version_info.minor}":
            return sys.executable, [], platform.python_version()
        python = str(cache.python(release))
        return python, [], _run(python, "-c", "import platform; print(platform.python_version())").strip()
    here = version(name, sys.executable, [])
    if here.startswith(release + "."):
        return sys.executable, [], here
    requirement, slug = f"{name}=={release}.*", f"{name}-{release}"
    if name == "torch":
        try:
            overlay = cache.overlay(slug, [requirement], "--torch-backend", "cpu")
        except CannotHave:
            overlay = cache.overlay(slug, [requirement])
    else:
        overlay = cache.overlay(slug, [requirement], *(["--no-deps"] if name in ("triton", "numpy") else []))
    return sys.executable, [overlay], version(name, sys.executable, [overlay])


def tried(cache: Cache, name: str, release: str) -> Row:
    """One row: installed, checked."""
    try:
        python, paths, found = prepared(cache, name, release)
    except CannotHave as why:
        print(f"    {why}", flush=True)
        return Row(name, release, missing="could not be installed here")
    columns = COLUMNS if not paths and python == sys.executable else COVERED[name]
    return Row(name, found, {column: cache.check(column, python, paths) for column in columns})


def newest(cache: Cache) -> Row:
    """The newest releases of everything that pyproject.toml names, together."""
    wanted = _run("uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--python", sys.executable,
                  "--extra", "test", "pyproject.toml").split()
    slug = f"newest-{hashlib.sha256(' '.join(wanted).encode()).hexdigest()[:12]}"
    overlay = cache.overlay(slug, wanted, "--no-deps")
    found = ", ".join(f"{TITLES[name]} {version(name, sys.executable, [overlay])}"
                      for name in ("transformers", "torch", "triton", "numpy"))
    return Row("everything", f"newest ({found})",
               {column: check(column, sys.executable, [overlay]) for column in COLUMNS})


HEADER = ("| | " + " | ".join(("coupling to transformers", "kernels on CPUs", "Triton, executed",
                               "Triton, compiled ahead")) + " |\n|---|---|---|---|---|\n")


def page(rows: Sequence[Row], pinned: str, day: str) -> str:
    """The table as a page."""
    return f"""\
# Which releases were tested

By `make compat` on {day}, on {platform.system()} {platform.machine()} without a GPU: the essential checks, with one
thing at a time replaced in the environment of the tests ({pinned}). The tests themselves run with these pinned
releases; other rows are there to show that nothing ties this package to them.

{HEADER}{"".join(row.line() + chr(10) for row in rows)}
"Coupling" are the checks of `tests/janus/test_releases.py`: with a full plan, the engine and transformers' own loop
draw what transformers draws without this package, and with a compressed cache they agree. "Kernels on CPUs" are parts
of the contract and of the operators, `torch.compile` included. Triton's kernels are executed from the PTX that the
release makes of them ([how](cuda.md#tested-without-a-gpu)), and compiled for compute capabilities 8.0 and 9.0: nothing
spills, and as many programs run at once as with the pinned release. An empty cell does not concern the row. Other
Pythons come with the releases that constraints/cpu.txt names for them, such as NumPy 2.5 from Python 3.12 on. `make
newest` tries the newest release of everything at once.
"""


def rows_of(text: str) -> Iterator[tuple[str, str, bool]]:
    """Of each row in a page: what, which release, and whether it was tested and passed."""
    for line in text.splitlines():
        if found := re.match(rf"\| ({'|'.join(TITLES.values())}) (\S+) \| (.*)", line):
            yield found[1], found[2], not found[3].startswith("not tested") and "failed" not in found[3]


def summary(text: str) -> str:
    """What README.md says of a page: for each thing, the releases that passed."""
    passed: dict[str, list[str]] = {}
    for title, release, fine in rows_of(text):
        if fine:
            passed.setdefault(title, []).append(".".join(release.split(".")[:2]))
    day = re.search(r"on (\d{4}-\d\d-\d\d)", text)
    parts = ";\n".join(f"{title} {', '.join(releases)}" for title, releases in passed.items())
    return f"Tested on {day[1] if day else '?'} with\n{parts}\n([what was run with each](docs/compatibility.md)).\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the essential checks with other releases of what we build on.")
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("SSD_COMPAT_CACHE", ROOT / "build/compat")))
    parser.add_argument("--only", action="append", help='a thing, such as triton, or a row, such as "torch 2.11"')
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table there, its summary to README.md")
    parser.add_argument("--newest", action="store_true", help="the newest of everything; always exit status 0")
    options = parser.parse_args(arguments)
    cache = Cache(options.cache.resolve())
    cache.folder.mkdir(parents=True, exist_ok=True)
    print(HEADER, end="", flush=True)
    if options.newest:
        print(newest(cache).line())
        return 0
    rows = []
    for name, releases in RELEASES.items():
        for release in releases:
            if not options.only or {name, f"{name} {release}"} & set(options.only):
                rows.append(tried(cache, name, release))
                print(rows[-1].line(), flush=True)
    if options.write:
        pinned = ", ".join([f"Python {platform.python_version()}",
                            *(f"{TITLES[name]} {version(name, sys.executable, [])}" for name in RELEASES
                              if name != "python")])
        text = page(rows, pinned, datetime.date.today().isoformat())
        readme = ROOT / "README.md"
        for file, content in ((options.write, text), (readme, PAGE_MARK.sub(
                lambda found: found[1] + summary(text) + found[2], readme.read_text()))):
            partial = file.with_name(file.name + ".partial")
            partial.write_text(content)
            partial.replace(file)
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
