"""tools/gpu_first.py: every kind of bad end of a step leaves its line, and the others run."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("gpu_first")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture
def fake(tool: ModuleType):
    """A step that runs a piece of Python."""
    def step(name: str, code: str = "", **more: Any) -> Any:
        return tool.Step(name, (sys.executable, "-S", "-c", code), **more)

    return step


def run(tool: ModuleType, out: Path, *stages: Any, seconds: float = 60) -> dict[str, dict[str, Any]]:
    """What a run of these stages wrote, by step."""
    tool.Runner(out, seconds, report=lambda line: None).run(stages)
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line for line in lines}


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


HANGS = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("step 3", flush=True)
time.sleep(600)
"""
SPAWNS = """
import os, subprocess, sys, time
# One stays in the process group without the environment, one leaves it with the environment.
for session, variables in ((False, {}), (True, None)):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=session,
                             env=variables)
    print(child.pid, flush=True)
"""


def test_every_bad_end_leaves_a_line(tool: ModuleType, fake, tmp_path: Path) -> None:
    found = run(tool, tmp_path, tool.Stage(3, (fake("hangs", HANGS),)), tool.Stage(57, (
        fake("fails", "print('so far'); raise ValueError('no good')"),
        fake("exits", "import sys; sys.exit(7)"),
        fake("without newline", "import sys; sys.stdout.write('no newline'); sys.exit(3)"),
        fake("dies", "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
        fake("says nonsense", "import os; os.write(1, bytes(range(256))); os._exit(1)"),
        tool.Step("absent", ("no-such-program",)),
        fake("works", "print('fine')"),
    )))
    assert {name: line["status"] for name, line in found.items()} == {
        "absent": "left out", "hangs": "timed out", "works": "ok",
        **dict.fromkeys(("fails", "exits", "without newline", "dies", "says nonsense"), "failed")}
    assert found["hangs"]["rc"] == -signal.SIGKILL and found["hangs"]["seconds"] >= 3
    assert re.fullmatch(r"killed after \d+ s; step 3", found["hangs"]["error"])
    assert found["fails"]["error"] == "ValueError: no good" and found["fails"]["rc"] == 1
    assert found["exits"]["error"] == "exit status 7"
    assert found["without newline"]["error"] == "no newline" and found["without newline"]["rc"] == 3
    assert found["dies"]["error"] == "ended by SIGSEGV: before" and found["dies"]["rc"] == -signal.SIGSEGV
    assert found["absent"]["error"] == "no-such-program is not installed"
    log = (tmp_path / "log.txt").read_text()
    assert all(f"== {name}\n" in log for name in found if name != "absent") and "so far" in log


def test_nothing_of_a_step_is_left(tool: ModuleType, fake, tmp_path: Path) -> None:
    """Whether it ends by itself or is killed; children too, in the process group or out of it."""
    runner = tool.Runner(tmp_path, 60, report=lambda line: None)
    runner.run([tool.Stage(3, (fake("ends", SPAWNS), fake("hangs", SPAWNS + "time.sleep(600)"))), tool.Stage(57, ())])
    assert [record["status"] for record in runner.records.values()] == ["ok", "timed out"]
    children = [int(number) for said in runner.said.values() for number in said.split()]
    assert len(children) == 4
    deadline = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children))


def test_output_is_kept_while_a_pipe_would_be_full(tool: ModuleType, fake, tmp_path: Path) -> None:
    said = "print('x' * 3_000_000)\nraise RuntimeError('at the end')"
    found = run(tool, tmp_path, tool.Stage(30, (fake("talks", said),)))
    assert found["talks"]["error"] == "RuntimeError: at the end"
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 1.2 * tool.LOGGED and "RuntimeError: at the end" in log and "\n[...]\n" in log


def test_time_that_is_left_goes_to_who_comes_next(tool: ModuleType, fake, tmp_path: Path) -> None:
    """And who comes last pays for what was taken too much."""
    runner = tool.Runner(tmp_path, 100, report=lambda line: None)
    given: list[float] = []
    runner._run_stage = lambda steps, seconds: given.append(round(seconds))
    runner.run([tool.Stage(30, ()), tool.Stage(50, ()), tool.Stage(20, ())])
    assert given == [30, 80, 100]  # nothing took any time
    runner.ends = time.monotonic() + 40  # of which the stages want 90
    given.clear()
    runner.run([tool.Stage(0, (), least=25), tool.Stage(50, ()), tool.Stage(40, ())])
    assert given == [25, 40, 40]
    found = run(tool, tmp_path, tool.Stage(2, (fake("hangs", HANGS),)), tool.Stage(0, (fake("late"),)), seconds=2)
    assert found["hangs"]["status"] == "timed out" and found["late"] == {
        "step": "late", "status": "left out", "seconds": 0, "rc": None, "error": "no time is left"}


def test_a_second_way_is_tried_where_the_first_failed(tool: ModuleType, fake, tmp_path: Path) -> None:
    def stages(first: str, second: str) -> list[Any]:
        return [tool.Stage(9, (fake("extension", first),)),
                tool.Stage(9, (fake("build", second, instead_of="extension"),)),
                tool.Stage(9, (fake("smoke", needs=("extension",)),))]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    assert list(run(tool, tmp_path / "a", *stages("", ""))) == ["extension", "smoke"]
    found = run(tool, tmp_path / "b", *stages("1/0", ""))
    assert [line["status"] for line in found.values()] == ["failed", "ok", "ok"]
    found = run(tool, tmp_path / "c", *stages("1/0", "1/0"))
    assert found["smoke"]["status"] == "skipped" and found["smoke"]["error"] == "needs extension"


def fakes(tool: ModuleType, fake, failing: str) -> list[Any]:
    """The real steps, each done at once, one failing."""
    return [tool.Stage(stage.seconds, tuple(
        fake(step.name, "raise RuntimeError('planted')" if step.name == failing else "", needs=step.needs,
             instead_of=step.instead_of) for step in stage.steps)) for stage in tool.stages(Path("out"))]


def test_each_step_may_fail(tool: ModuleType, fake, tmp_path: Path) -> None:
    """Only those that need it are skipped."""
    steps = {step.name: step for stage in tool.stages(tmp_path) for step in stage.steps}
    for failing in ("versions", "extension", "smoke cuda plain", "smoke triton split", "engine cuda"):
        out = tmp_path / failing
        out.mkdir()
        stages = fakes(tool, fake, failing)
        if failing == "extension":  # and building it fails, too
            stages = [tool.Stage(stage.seconds, tuple(
                fake(step.name, "1/0", instead_of=step.instead_of) if step.name == "build" else step
                for step in stage.steps)) for stage in stages]
        found = run(tool, out, *stages, seconds=530)
        expected = {failing, "build"} if failing == "extension" else {failing}
        while more := {name for name, step in steps.items() if expected & {*step.needs}} - expected:
            expected |= more
        assert {name for name, line in found.items() if line["status"] != "ok"} == expected, failing
        assert {*found} | {"build"} == {*steps}


def test_the_plan_is_the_one_that_was_asked_for(tool: ModuleType, tmp_path: Path) -> None:
    stages = tool.stages(tmp_path)
    assert sum(stage.seconds for stage in stages) <= tool.SECONDS
    parts = list(dict.fromkeys(step.part for stage in stages for step in stage.steps))
    assert parts == ["versions", "extension", "build", "smoke", "graph", "kernel", "engine", "contract", "rivals",
                     "memcheck", "racecheck", "initcheck", "synccheck"]
    names = [step.name for stage in stages for step in stage.steps]
    assert len({*names}) == len(names)
    for stage in stages:
        for step in stage.steps:
            assert {*step.needs, *([step.instead_of] if step.instead_of else [])} <= {*names[:names.index(step.name)]}


def test_some_steps_are_chosen_by_name(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tool.selected(tool.stages(tmp_path), ["engine", "smoke cuda split", "extension"])
    assert [step.name for stage in kept for step in stage.steps] == [
        "extension", "build", "smoke cuda split", "engine cuda", "engine triton"]
    with pytest.raises(SystemExit):
        tool.main(["--step", "painting"])
    assert "--step must be one of" in capsys.readouterr().err


def test_make_gpu_runs_it_with_the_python_at_hand() -> None:
    """It builds first, whatever is there, in parts too."""
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # of a make around this
    said = subprocess.run(["make", "--no-print-directory", "-n", "gpu", "PYTHON=PYTHON", "OUT=there",
                           "STEPS=smoke kernel", "SECONDS=60"], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=True).stdout
    expected = "PYTHON tools/gpu_first.py --build --out there --seconds 60 --step extension --step smoke --step kernel"
    assert said.replace("\\\n", " ").split() == expected.split()


def test_an_extension_that_is_there_may_be_built_anew(tool: ModuleType, tmp_path: Path) -> None:
    steps = {step.name: step for stage in tool.stages(tmp_path, build=True) for step in stage.steps}
    assert "build" not in steps and "build_ext --inplace" in steps["extension"].command[-1]


@pytest.mark.parametrize(("text", "error"), [
    ("collected\nE       AssertionError: layer 0\nE   more\nFAILED a", "E AssertionError: layer 0"),
    ("Traceback\n  File\ntorch.AcceleratorError: CUDA error: an illegal memory access\nmore",
     "torch.AcceleratorError: CUDA error: an illegal memory access"),
    ("========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 1 error",
     "========= Invalid __global__ read of size 4"),
    ("decode.cu(12): error: no such name\nninja: build stopped", "decode.cu(12): error: no such name"),
    ("1 passed\nerrors: none\nthe last word\n", "the last word"),
    ("", None),
])
def test_first_error_line(tool: ModuleType, text: str, error: str | None) -> None:
    assert tool.first_error(text) == error


def test_the_oldest_transformers_is_pyprojects(tool: ModuleType) -> None:
    asked = re.search(r"transformers>=(\d+)\.(\d+)", (ROOT / "pyproject.toml").read_text())
    assert asked and tuple(map(int, asked.groups())) == tool.OLDEST_TRANSFORMERS


@pytest.mark.parametrize(("version", "said"), [
    ("5.17.0", "NOTE: transformers 5.17.0 is older than 5.18"), ("5.18.0", ""), ("6.0.1", ""),
    (None, "NOTE: without transformers")])
def test_an_old_transformers_is_named(tool: ModuleType, version: str | None, said: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    lines = list(tool.old_transformers())
    assert len(lines) == bool(said) and all(line.startswith(said) for line in lines)


def test_only_the_standard_library(tool: ModuleType) -> None:
    """Whatever is broken there, the driver goes on."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu_first; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    roots = {name.partition(".")[0] for name in loaded.split()}
    assert roots - sys.stdlib_module_names <= {"gpu_first", "gpu_summary", "__main__"}


def test_stopping_it_ends_its_steps_and_sums_up(tool: ModuleType, tmp_path: Path) -> None:
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu_first as tool\n"
            f"step = tool.Step('hangs', (sys.executable, '-S', '-c', {HANGS!r}))\n"
            f"tool.stages = lambda *given: [tool.Stage(60, (step,))]\n"
            f"sys.exit(tool.main(['--out', {str(tmp_path)!r}]))")
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while not (started := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert "| goal |" in process.communicate(timeout=30)[0]
    assert process.returncode == 128 + signal.SIGTERM and started and not any(alive(int(number)) for number in started)
    [line] = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert line["status"] == "timed out"
