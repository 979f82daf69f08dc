"""Several real processes at one work: torchrun's, and ones that start when they like and are killed where they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.serve

sys.path.insert(0, str(Path(__file__).parents[1] / "janus"))
import tiny  # noqa: E402

SUITE = [{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
         {"tag": "single_object", "include": [{"class": "heart", "count": 1}], "prompt": "a heart"},
         {"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "two stars"}]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a process of its own, as one of so many ranks; what still runs is killed at the end."""
    running = []

    def begin(*command: object, rank: tuple[int, int] | None = None, torchrun: int = 0) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK") and not name.startswith("SLURM_")}
        environment["OMP_NUM_THREADS"] = "1"  # as torchrun has it
        if rank is not None:
            environment |= {"RANK": str(rank[0]), "WORLD_SIZE": str(rank[1])}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", torchrun] if torchrun else []
        process = subprocess.Popen(
            [sys.executable, *map(str, [*launcher, "-m", "ssd_janus.cli", *command])], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd=tmp_path)
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def end(process: subprocess.Popen[str]) -> str:
    """What a process says on stderr, in one line, when it has ended well."""
    _, said = process.communicate()
    assert process.returncode == 0, said
    return " ".join(said.split())


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def wait_for(process: subprocess.Popen[str], pattern: str, out: Path) -> None:
    """Until the process has made such a file."""
    while process.poll() is None and not any(out.rglob(pattern)):
        time.sleep(0.01)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "suite.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in SUITE))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, for what takes long."""
    path = tmp_path_factory.mktemp("tiny-janus")
    tiny.build_model().save_pretrained(path)
    tiny.build_processor().save_pretrained(path)
    return path


@pytest.mark.parametrize("layout", [[], ["--layout", "geneval", "--images-per-prompt", 2]], ids=["plain", "geneval"])
def test_generate_under_torchrun(start: Start, suite: Path, tmp_path: Path, layout: list[object]) -> None:
    command = ("generate", "--prompts-file", suite, "--batch-size", 2, "--policy", "window", "--budget", 0.1, *layout)
    end(start(*command, "--out", tmp_path / "alone"))
    said = end(start(*command, "--out", tmp_path / "ranks", torchrun=2))
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")
    for rank in range(2):
        assert f"rank {rank} of 2, drawing: " in said and f"rank {rank} of 2: " in said
    # A rank that comes late has nothing to do.
    assert "0 pictures drawn" in end(start(*command, "--out", tmp_path / "ranks", rank=(2, 3)))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_ranks_work_is_taken_up_by_the_next_run(start: Start, suite: Path, tmp_path: Path,
                                                         killed: int) -> None:
    command = ("evaluate", "--prompts-file", suite, "--batch-size", 1, "--policy", "window", "--budget", 0.1, "--seeds",
               2)
    end(start(*command, "--out", tmp_path / "alone"))
    out = tmp_path / "ranks"
    victim = start(*command, "--out", out, rank=(killed, 2))
    wait_for(victim, "seed-*.json", out)
    os.killpg(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "it ended by itself"
    # The other one starts when that one is dead, and cannot tell.
    assert "are not there yet, such as" in end(start(*command, "--out", out, rank=(1 - killed, 2)))
    assert not (out / "results.json").exists()
    # Three at once, and one of them twice.
    ranks = [start(*command, "--out", out, rank=(rank, 3)) for rank in (0, 1, 2, 2)]
    said = [end(process) for process in ranks]
    assert any("results.json and table.md" in text for text in said)
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.parametrize("name", ["compare", "profile"])
def test_two_ranks_at_once(start: Start, suite: Path, model: Path, tmp_path: Path, name: str) -> None:
    more: tuple[object, ...] = ("--limit", 3, "--batch-size", 1) if name == "profile" else (
        "--policy", "full", "--policy", "window", "--policy", "h2o", "--budget", 0.4, "--row-buffer", 0, "--seeds", 1,
        "--part", "fidelity", "--part", "quality", "--batch-size", 1, "--plots", tmp_path / "plots")
    command = (name, "--model", model, "--prompts-file", suite, *more)
    end(start(*command, "--out", tmp_path / "out"))
    alone = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "alone")  # the record says the command, folder and all
    ranks = [start(*command, "--out", tmp_path / "out", rank=(rank, 2)) for rank in range(2)]
    for process in ranks:
        end(process)
    assert contents(tmp_path / "out") == alone


def test_comparisons_of_other_plans_at_once(start: Start, suite: Path, model: Path, tmp_path: Path) -> None:
    """Each is a call of its own, in one folder."""
    command = ("compare", "--model", model, "--prompts-file", suite, "--row-buffer", 0, "--seeds", 1, "--part",
               "quality", "--budget", 0.4, "--budget", 0.6, "--batch-size", 1, "--out", tmp_path / "out")
    policies = ("window", "h2o", "streaming_llm")
    for process in [start(*command, "--policy", policy) for policy in policies]:
        end(process)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(record["grid"]) == {f"{policy}-{budget}-r0" for policy in policies for budget in (0.4, 0.6)}
    assert all(entry["quality"]["pictures"] == len(SUITE) for entry in record["grid"].values())
    assert len(record["parts"]["quality"]) == len(policies)
