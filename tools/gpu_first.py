"""First contact with a GPU: everything worth knowing about the kernels there, in nine minutes.

    python tools/gpu_first.py --out DIR               # or: make gpu; DIR may stand in the variable OUT
    python tools/gpu_first.py --step smoke --step kernel    # some parts, or single steps such as "smoke cuda split"
    python tools/gpu_first.py --seconds 1800          # more time for every step
    python tools/gpu_first.py --list

Installs nothing and needs no network: the Python at hand brings torch, Triton, pytest and transformers. An extension
that was built elsewhere is used if it loads, and else built. Nothing here imports torch, so that whatever breaks, this
goes on: a step is a process group of its own with a deadline, at which it is killed, since no signal that can be caught
ends a process that waits for a hanging kernel. A step is skipped only where one that it needs has failed.

The folder gets ``steps.jsonl`` (a line when a step ends: step, status, seconds, rc, first error line), ``times.jsonl``
(records of ssd-bench), ``tests-*.jsonl`` (a line per contract test), ``log.txt`` (what the steps said),
``summary.json`` and ``summary.md``. The exit status is 0 if no step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_summary

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 530
BACKENDS = ("cuda", "triton")
SMOKE = ("plain", "refresh", "grouped", "split", "rotary")  # of tests/kernels/test_smoke.py, the simplest first
OLDEST_TRANSFORMERS = (5, 18)
MARK = "SSD_GPU_FIRST"  # the variable by which the processes of a run are known
GRACE = 5.0  # seconds for a killed process to go
LOGGED = 10**6  # characters of a step's output in the log: the first and the last half of it
OK = gpu_summary.OK


@dataclass(frozen=True)
class Step:
    """A command that is run by itself.

    Attributes:
        name: its part, and what of the part.
        command: program and arguments, run in the repository's folder.
        needs: steps without which it would say nothing.
        instead_of: the step that it makes up for, where that failed; it is not run otherwise.
        environment: variables beside those of `environment`.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    instead_of: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def part(self) -> str:
        return self.name.partition(" ")[0]


@dataclass(frozen=True)
class Stage:
    """Steps that run at the same time.

    Attributes:
        seconds: of the whole that are theirs.
        least: seconds that they get even if later ones then have less.
    """

    seconds: float
    steps: tuple[Step, ...]
    least: float = 0


def stages(out: Path, workers: int = 12, small: bool = False, build: bool = False) -> list[Stage]:
    """All that there is to do, in order.

    Args:
        out: folder of the results.
        workers: processes of the contract tests.
        small: sizes for trying this out.
        build: build the extension in any case.
    """
    python = (sys.executable, "-u")

    def measure(what: str, *options: str) -> tuple[str, ...]:
        return (*python, "-m", "bench.gpu", what, *options, "--out", str(out / "times.jsonl"),
                *(["--small"] if small else []))

    def test(processes: int, *arguments: str) -> tuple[str, ...]:
        # Only pytest-timeout's thread gets past a kernel that hangs: it ends the process, and xdist starts another.
        return (*python, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "-n", str(processes),
                "--timeout=60", "--timeout-method=thread", *arguments)

    def sanitize(tool: str, backend: str) -> Step:
        case = {"cuda": "cuda and (test_smallest_sizes and R3-keep or test_heads_split_over_blocks and f32-R0-keep)",
                "triton": "triton and test_smallest_sizes and (R3-keep or R3-evict)"}[backend]
        # initcheck must see what torch's kernels write.
        ours = () if tool == "initcheck" else ("--kernel-name", "kns=decode", "--kernel-name", "kns=prefill")
        return Step(f"{tool} {backend}", (
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *ours, *python, "-m", "pytest", "-v", "-m",
            "gpu", "-p", "no:cacheprovider", "tests/kernels/test_contract.py", "tests/kernels/test_split_heads.py",
            "-k", case), needs(backend), environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    def needs(backend: str) -> tuple[str, ...]:
        return (f"smoke {backend} {SMOKE[0]}",)

    def loads(backend: str) -> tuple[str, ...]:
        return ("extension",) if backend == "cuda" else ()

    check = (*python, "-m", "bench.gpu", "extension")
    built = ("bash", "-c", f"{shlex.quote(sys.executable)} setup.py --quiet build_ext --inplace && {shlex.join(check)}")
    insist = {"SSD_KERNELS_CUDA": "1"}

    def contract(backend: str) -> tuple[str, ...]:
        if small:
            return test(2, "tests/kernels/test_contract.py", "-k", f"{backend} and test_smallest_sizes")
        return test(max(1, workers // 2), "tests/kernels", "--ignore=tests/kernels/test_graph.py", "-k", backend)

    return [
        Stage(5, (Step("versions", (*python, str(Path(__file__).resolve()), "--versions")),)),
        *([Stage(60, (Step("extension", built, environment=insist),))] if build else
          [Stage(20, (Step("extension", check),), least=40),
           Stage(0, (Step("build", built, instead_of="extension", environment=insist),), least=60)]),
        Stage(40, tuple(Step(f"smoke {backend} {case}", test(0, "-s", "tests/kernels/test_smoke.py", "-k",
                                                             f"{backend} and {case}"),
                             loads(backend), environment={"CUDA_LAUNCH_BLOCKING": "1"})
                        for backend in BACKENDS for case in SMOKE)),
        Stage(45, (*(Step(f"graph {backend}", test(2, "tests/kernels/test_graph.py", "-k", backend), needs(backend))
                     for backend in BACKENDS),
                   Step("graph engine", test(2, "tests/janus/test_engine_capture.py")))),
        *(Stage(30, (Step(f"kernel {backend}", measure("kernel", "--backend", backend), needs(backend)),))
          for backend in BACKENDS),
        *(Stage(seconds, (Step(f"engine {backend}", measure("engine", "--backend", backend), needs(backend)),))
          for backend, seconds in zip(BACKENDS, (60, 30), strict=True)),
        Stage(150, tuple(Step(f"contract {backend}", contract(backend), loads(backend),
                              environment={"SSD_TEST_RECORD": str(out / f"tests-{backend}.jsonl")})
                         for backend in BACKENDS)),
        Stage(25, (Step("rivals torch", measure("rivals", "--group", "torch")),)),
        Stage(35, (Step("rivals installed", measure("rivals", "--group", "installed")),)),
        Stage(20, (Step("rivals compiled", measure("rivals", "--group", "compiled")),)),
        Stage(40, tuple(sanitize(tool, backend) for tool in ("memcheck", "racecheck") for backend in BACKENDS)),
        Stage(0, tuple(sanitize(tool, backend) for tool in ("initcheck", "synccheck") for backend in BACKENDS)),
    ]


def environment(mark: str) -> dict[str, str]:
    """Variables of every step."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "python"))))
    return {**os.environ, MARK: mark, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive",
            "HF_HUB_OFFLINE": "1", "HYPOTHESIS_PROFILE": "gpu"}


class Runner:
    """Runs stages within a time and writes down what came of them.

    Attributes:
        records: of all steps that have ended, by name.
        said: the output of each.
        stopped: number of the signal that asked for an end, or 0.
    """

    def __init__(self, out: Path, seconds: float, report: Callable[[str], None] = print) -> None:
        self.out, self.report = out, report
        self.ends = time.monotonic() + seconds
        self.records: dict[str, dict[str, Any]] = {}
        self.said: dict[str, str] = {}
        self.stopped = 0

    def stop(self, number: int, frame: object = None) -> None:
        """A signal handler: end what runs and begin no more."""
        self.stopped = number

    def run(self, listed: Sequence[Stage]) -> None:
        """One stage after the other. A stage has its own seconds and what earlier ones left over; if they took more,
        the last ones have less, or are left out."""
        for index, stage in enumerate(listed):
            if self.stopped:
                return
            left = self.ends - time.monotonic()
            later = sum(each.seconds for each in listed[index + 1:])
            self._run_stage(stage.steps, min(left, max(stage.seconds, stage.least, left - later)))

    def _run_stage(self, steps: Sequence[Step], seconds: float) -> None:
        wanted = [step for step in steps if self._due(step, seconds)]
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(Running(step)) for step in wanted]
            deadline = time.monotonic() + seconds
            while running:
                late = self.stopped > 0 or time.monotonic() >= deadline
                ended = [one for one in running if late or one.process.poll() is not None]
                for one in ended:
                    one.kill()
                until = time.monotonic() + GRACE
                for one in ended:
                    running.remove(one)
                    one.wait(until)
                    self._ended(one, late)
                time.sleep(0.02)

    def _due(self, step: Step, seconds: float) -> bool:
        if step.instead_of and self.records.get(step.instead_of, {}).get("status", OK) == OK:
            return False
        failed = [name for name in step.needs if self.records.get(name, {}).get("status", OK) != OK]
        if failed:
            self._write(step, "skipped", 0, None, f"needs {', '.join(failed)}")
        elif seconds < 1:
            self._write(step, "left out", 0, None, "no time is left")
        elif shutil.which(step.command[0]) is None:
            self._write(step, "left out", 0, None, f"{step.command[0]} is not installed")
        else:
            return True
        return False

    def _ended(self, one: Running, late: bool) -> None:
        text, rc, seconds = one.output(), one.process.returncode, time.monotonic() - one.began
        self.said[one.step.name] = text
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            shown = text if len(text) <= LOGGED else f"{text[:LOGGED // 2]}\n[...]\n{text[-LOGGED // 2:]}"
            log.write(f"== {one.step.name}\n$ {shlex.join(one.step.command)}\n{shown.rstrip()}\n\n")
        if late and rc != 0:
            status, error = "timed out", f"killed after {seconds:.0f} s; {first_error(text) or 'it said nothing'}"
            if rc is None:
                error = f"does not end, although it was {error}"
        elif rc == 0:
            status, error = OK, None
        else:
            ending = f"ended by {signal.Signals(-rc).name}: " if rc is not None and rc < 0 else ""
            status, error = "failed", ending + (first_error(text) or f"exit status {rc}")
        self._write(one.step, status, seconds, rc, error)
        if status == OK and one.step.instead_of:
            self.records[one.step.instead_of]["status"] = OK

    def _write(self, step: Step, status: str, seconds: float, rc: int | None, error: str | None) -> None:
        line = {"step": step.name, "status": status, "seconds": round(seconds, 2), "rc": rc, "error": error}
        self.records[step.name] = dict(line)
        with (self.out / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.report(f"{seconds:6.1f} s  {step.name}: {status}{f': {error}' if error else ''}")


class Running:
    """A step while it runs, in a process group of its own; all that is left of it is killed at the end."""

    def __init__(self, step: Step) -> None:
        self.step, self.mark = step, uuid.uuid4().hex
        self.file = tempfile.TemporaryFile()  # no pipe: it could fill, or be held open by who outlives the step
        self.began = time.monotonic()
        self.process = subprocess.Popen(step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self.file,
                                        stderr=subprocess.STDOUT, start_new_session=True,
                                        env={**environment(self.mark), **step.environment})

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.returncode is None:
            self.kill()
        self.file.close()

    def output(self) -> str:
        """What it has said."""
        self.file.seek(0)
        return self.file.read().decode(errors="replace")

    def kill(self) -> None:
        """End the process group, and what has left it but still has the step's environment."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in processes_with(f"{MARK}={self.mark}"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)

    def wait(self, until: float) -> None:
        """For a killed process, but not for ever: the driver may hold on to it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0, until - time.monotonic()))


def processes_with(variable: str) -> Iterator[int]:
    """Numbers of the processes that began with ``NAME=VALUE`` in their environment."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in file.read_bytes().split(b"\0"):
                yield int(file.parent.name)


ERRORS = re.compile(
    r"^(?:E   +\S.*"  # pytest's
    r"|(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Failed)\b.*"  # Python's
    r"|FAILED[ :].*|Fatal Python error.*"
    r"|=+ (?:Error|Invalid|Race|Hazard|Barrier|Divergent|Uninitialized|Program hit|Target application|Device not).*"
    r"|.*\berror\b ?:.*)$", re.MULTILINE)


def first_error(text: str) -> str | None:
    """The first line that looks like an error, else the last line, at most 300 characters of it; None without any."""
    found = ERRORS.search(text)
    lines = [found[0]] if found else text.strip().splitlines()[-1:]
    return " ".join(lines[0].split())[:300] if lines else None


def versions() -> Iterator[str]:
    """What is installed here, without importing any of it, and what follows."""
    yield f"Python {platform.python_version()}, {os.cpu_count()} processors"
    for name in ("torch", "triton", "transformers", "hypothesis", "pytest", "pytest-xdist", "pytest-timeout", "typer",
                 "flashinfer-python", "flash-attn", "xformers", "fla-core"):
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed"
    for command in (("nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.sm,clocks.max.sm,clocks.mem",
                     "--format=csv,noheader"), ("nvcc", "--version")):
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=4)
            yield f"{command[0]}: {(said.stdout + said.stderr).strip().splitlines()[-1]}"
        except (OSError, subprocess.TimeoutExpired, IndexError) as error:
            yield f"{command[0]}: {error}"
    yield from old_transformers()


def old_transformers() -> Iterator[str]:
    """What an unsupported release of transformers means for the results; nothing with a supported one."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        yield "NOTE: without transformers there is no ssd_janus: no engine step can run; all else can"
        return
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        yield (f"NOTE: transformers {version} is older than {oldest}, the oldest that ssd_janus supports: its own loop "
               "cannot draw pictures, and is not measured; the engine's steps need its layers only, and are measured")


def selected(listed: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages with the named parts and steps only; all without a name.

    Raises:
        ValueError: there is no such part or step.
    """
    known = {name for stage in listed for step in stage.steps for name in (step.part, step.name)}
    for name in names:
        if name not in known:
            raise ValueError(f"--step must be one of {', '.join(sorted(known))}, got {name!r}")
    kept = [replace(stage, steps=tuple(step for step in stage.steps
                                       if not names or {step.part, step.name, step.instead_of} & {*names}))
            for stage in listed]
    return [stage for stage in kept if stage.steps]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or "gpu", help="folder of the results")
    parser.add_argument("--step", action="append", default=[], help="a part or a step; may be repeated; all by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all steps together ({SECONDS})")
    parser.add_argument("--workers", type=int, default=12, help="processes of the contract tests (12)")
    parser.add_argument("--small", action="store_true", help="sizes for trying this out")
    parser.add_argument("--build", action="store_true", help="build the extension, even if there is one that loads")
    parser.add_argument("--list", action="store_true", help="print the steps and their seconds, and run none")
    parser.add_argument("--versions", action="store_true", help="print what is installed, and run nothing")
    given = parser.parse_args(arguments)
    if given.versions:
        print("\n".join(versions()))
        return 0
    out = Path(given.out).resolve()
    try:
        listed = selected(stages(out, given.workers, given.small, given.build), given.step)
    except ValueError as error:
        parser.error(str(error))
    scale = given.seconds / SECONDS
    listed = [replace(stage, seconds=scale * stage.seconds) for stage in listed]
    if given.list:
        for stage in listed:
            print(f"{stage.seconds:4.0f} s  {', '.join(step.name for step in stage.steps)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for pattern in ("steps.jsonl", "times.jsonl", "tests-*.jsonl", "log.txt", "summary.*"):
        for file in out.glob(pattern):
            file.unlink()
    runner = Runner(out, given.seconds, lambda line: print(line, flush=True))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, runner.stop)
    try:
        runner.run(listed)
    finally:
        print(f"\n{gpu_summary.write(out, runner.records, runner.said.get('versions', ''))}", flush=True)
    if runner.stopped:
        return 128 + runner.stopped
    return int(any(record["status"] in ("failed", "timed out") for record in runner.records.values()))


if __name__ == "__main__":
    sys.exit(main())
