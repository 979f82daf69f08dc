"""Measurements by several processes in one folder: all files are those of one process, and calls lose nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_cli import run
from test_drawing import contents
from test_result_files import SUITE, suite_file

from ssd_janus import Pipeline
from ssd_janus.evaluation import comparison
from ssd_janus.evaluation.comparison_page import SECTIONS
from ssd_janus.evaluation.entries import Entries
from ssd_janus.evaluation.results import read_record
from ssd_janus.profiling import measure

TEXTS = [prompt["prompt"] for prompt in SUITE]
WORKS: dict[str, list[Any]] = {
    "shapes": ["evaluate", "--policy", "full", "--policy", "window", "--budget", 0.5, "--seeds", 2, "--batch-size", 2],
    "fidelity": ["evaluate", "--suite", "fidelity", "--policy", "full", "--policy", "window", "--budget", 0.5,
                 "--budget", 0.3, "--batch-size", 2],
    "compare": ["compare", "--policy", "full", "--policy", "h2o", "--budget", 0.4, "--row-buffer", 0, "--row-buffer",
                24, "--part", "fidelity", "--part", "quality", "--seeds", 1, "--fidelity-prompts", 3, "--batch-size",
                2],
    "profile": ["profile", "--batch-size", 1, "--no-plots"],
}


class Work:
    """A call of a command on the tiny model, with pages and all, into a folder of its own."""

    def __init__(self, name: str, model: Path, out: Path) -> None:
        self.out = out
        out.mkdir()
        page = out / "page.md"
        names = SECTIONS if name == "compare" else [name]
        page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
        self.command = [*WORKS[name], "--model", model, "--prompts-file", suite_file(out, SUITE), "--out", out / "out",
                        *(["--page", page] if name != "profile" else [])]

    def __call__(self, monkeypatch: pytest.MonkeyPatch, rank: tuple[int, int] | None = None) -> str:
        """Run it, as one of so many ranks; returns what it says on stderr, in one line."""
        for name, value in zip(("RANK", "WORLD_SIZE"), rank or (), strict=False):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("sys.argv", ["ssd-janus", "of the test"])
        result = run(*self.command)
        assert result.exit_code == 0, result.output
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        return " ".join(result.stderr.split())

    @property
    def result(self) -> Path:
        return self.out / "out" / ("profile.safetensors" if self.command[0] == "profile" else "results.json")


@pytest.fixture(scope="module", params=WORKS)
def alone(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / request.param
    with pytest.MonkeyPatch.context() as monkeypatch:
        Work(request.param, folder, out)(monkeypatch)
    return request.param, out


def test_files_are_the_same_whatever_the_number_of_ranks(alone: tuple[str, Path], folder: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    name, whole = alone
    work = Work(name, folder, tmp_path / "ranks")
    *first, last = (2, 3), (0, 3), (1, 3)
    for rank in first:
        said = work(monkeypatch, rank)
        assert "are not there yet, such as" in said and "run the same command again, with any number of ranks" in said
        assert f"rank {rank[0]} of {rank[1]}" in said
        if name != "compare":
            assert not work.result.exists(), "of an unfinished work"
    assert "not there yet" not in work(monkeypatch, last)
    assert contents(work.out) == contents(whole)
    # Late, twice, and for fun: nothing changes.
    files = {file: file.stat().st_mtime_ns for file in work.out.rglob("seed-*") if file.is_file()}
    work(monkeypatch, first[0])
    assert contents(work.out) == contents(whole)
    assert all(file.stat().st_mtime_ns == when for file, when in files.items())


def test_another_number_of_ranks_takes_up_what_a_lost_one_left(alone: tuple[str, Path], folder: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    name, whole = alone
    work = Work(name, folder, tmp_path / "ranks")
    assert "are not there yet" in work(monkeypatch, (0, 3))
    done = {file: file.stat().st_mtime_ns for pattern in ("seed-*", "layer-*", "heads-*")
            for file in work.out.rglob(pattern) if file.is_file()}
    assert done
    work(monkeypatch)
    assert contents(work.out) == contents(whole)
    assert all(file.stat().st_mtime_ns == when for file, when in done.items()), "nothing is done twice"


def test_the_last_rank_does_again_what_is_damaged_of_its_own(folder: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work("shapes", folder, tmp_path / "ranks")
    for rank in ((0, 2), (1, 2)):
        work(monkeypatch, rank)
    before = contents(work.out)
    broken = work.out / "out" / "full" / "batches" / "seed-0-00002.json"  # the second batch
    broken.write_text("[")
    assert f"1 of 8 batches are not there yet, such as {broken}" in work(monkeypatch, (0, 2))
    said = work(monkeypatch, (1, 2))
    assert "drawing batch seed-0-00002 again" in said and contents(work.out) == before


def test_nonsense_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for command in (["generate", "a heart"], ["evaluate"], ["compare"], ["profile"]):
        result = run(*command, "--out", tmp_path / "out", "--model", tmp_path / "absent")
        assert result.exit_code == 2 and "error: RANK must be less than WORLD_SIZE, which is 4" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


FACTS = {"command": "ssd-janus compare", "date": "2026-01-01", "machine": "Linux", "guidance": 2.0,
         "fidelity_prompts": 3, "prompts": 3, "seeds": 1, "batch_size": 25, "sensitivity_quality": False}


def compare(pipe: Pipeline, out: Path) -> comparison.Comparison:
    return comparison.Comparison(pipe, out, None, TEXTS, SUITE, seeds=1)


def steps(*names: str, measures: Sequence[str] = ("fidelity", "quality")) -> list[comparison.Step]:
    return [comparison.Step(measure, "grid", measure, comparison.grid(names, [0.4], [0, 24]))
            for measure in measures]


def test_calls_with_other_plans_in_one_folder_lose_nothing_of_each_other(pipe: Pipeline, tmp_path: Path) -> None:
    """All are there from the beginning, and each knows only its own plans."""
    whole = compare(pipe, tmp_path / "whole")
    whole.run(steps("full", "window", "h2o"), FACTS)
    several = [compare(pipe, tmp_path / "out") for _ in range(4)]
    several[0].run(steps("h2o", measures=["quality"]), FACTS)
    several[1].run(steps("window"), FACTS)
    several[2].run(steps("full"), FACTS)
    several[3].run(steps("h2o", measures=["fidelity"]), FACTS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finding_that_comes_while_another_is_summed_up_is_not_lost(pipe: Pipeline, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower of two processes writes last, and has read the findings before the faster one had any."""
    slow, fast = compare(pipe, tmp_path), compare(pipe, tmp_path)
    read, reads = Entries.read, []
    published: list[set[str]] = []

    def late(self: Entries) -> dict[str, Any]:
        found = read(self)
        reads.append(self)
        if self is slow.entries and reads.count(self) == 1:
            fast.run(steps("window", measures=["quality"]), FACTS)
        return found

    slow.entries.add("grid", "quality", "full", json.loads(json.dumps(entry_of(pipe, tmp_path / "other", "full"))))
    monkeypatch.setattr(Entries, "read", late)
    slow.save(lambda record: published.append(set(record["grid"])))
    assert reads.count(slow.entries) == 2 and fast.entries in reads
    labels = {"full", *(case.label for case in comparison.grid(["window"], [0.4], [0, 24]))}
    assert set(read_record(tmp_path / "results.json")["grid"]) == labels and published[-1] == labels


def entry_of(pipe: Pipeline, out: Path, label: str) -> dict[str, Any]:
    made = compare(pipe, out)
    made.run(steps(label, measures=["quality"]), FACTS)
    entry: dict[str, Any] = made.record["grid"][label]
    return entry


def test_folders_of_before_are_read(pipe: Pipeline, tmp_path: Path) -> None:
    """They have results.json alone, in the order in which plans were measured, and may lack what others had lost."""
    made = compare(pipe, tmp_path / "out")
    made.run(steps("full", "window", "h2o"), FACTS)
    before = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "results")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    record["grid"] = dict(sorted(record["grid"].items(), reverse=True))
    record["parts"] = {"quality": 2 * record["parts"]["quality"], "fidelity": record["parts"]["fidelity"]}
    del record["grid"]["h2o-0.4-r0"]["quality"]
    (tmp_path / "out" / "results.json").write_text(json.dumps(record))
    again = compare(pipe, tmp_path / "out")
    assert again.record["grid"]["window-0.4-r0"] == made.record["grid"]["window-0.4-r0"]
    again.run(steps("window", measures=["fidelity"]), FACTS)
    assert "quality" not in again.record["grid"]["h2o-0.4-r0"]
    again.run(steps("h2o", measures=["quality"]), FACTS, progress=lambda done, total: None)
    found = contents(tmp_path / "out")
    # A reason why there can be no plan was of both measures.
    assert {name: data for name, data in found.items() if name in before} == before


def test_damaged_findings_are_named(pipe: Pipeline, tmp_path: Path) -> None:
    made = compare(pipe, tmp_path)
    made.run(steps("full", measures=["quality"]), FACTS)
    file = tmp_path / "results" / "grid" / "quality" / "full.json"
    good = file.read_text()
    for data in ("", "[]", good[:-9], good.replace('"budget": 1.0', '"budget": "all"')):
        file.write_text(data)
        with pytest.raises(ValueError, match=r"quality/full\.json: .*; remove the file"):
            made.save()
    file.unlink()
    made.run(steps("full", measures=["quality"]), FACTS)
    assert file.read_text() == good


def test_a_profile_goes_on_where_it_was_stopped(pipe: Pipeline, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(pipe, TEXTS, seed=3, batch_size=1)
    draw, calls = Pipeline.generate_tokens, []

    def stop(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return draw(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "generate_tokens", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(pipe, TEXTS, seed=3, batch_size=1, folder=tmp_path / "parts")
    again = measure(pipe, TEXTS, seed=3, batch_size=1, folder=tmp_path / "parts")
    # Three batches; one batch of probes, with the full cache twice; one layer was done.
    assert len(calls) == 3 + 2 + 1 + 1 + (tiny.LAYERS - 1)
    again.save(tmp_path / "again")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    for damaged in ("heads-00001", f"layer-{tiny.LAYERS - 1:03d}-00000"):
        file = tmp_path / "parts" / f"{damaged}.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        calls.clear()
        measure(pipe, TEXTS, seed=3, batch_size=1, folder=tmp_path / "parts").save(tmp_path / "again")
        assert 1 <= len(calls) <= 2 and (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(ValueError, match="made with another seed .3 there, 4 now"):
        measure(pipe, TEXTS, seed=4, batch_size=1, folder=tmp_path / "parts")
