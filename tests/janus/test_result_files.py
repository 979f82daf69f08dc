"""Files of evaluations that may hold anything: read whole, or refused in one line, or made again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from mutants import check_json_reader, check_reader, refused, spoiled
from test_cli import run

from ssd_janus import Pipeline
from ssd_janus.evaluation import comparison, fidelity, quality, report
from ssd_janus.evaluation.folder import RunFolder, keep_settings, settings
from ssd_janus.evaluation.results import read_record
from ssd_kernels import CachePlan, HeadSpec

SUITE = [{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": tiny.PROMPTS[0]},
         {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "green"}], "prompt": tiny.PROMPTS[1]},
         {"tag": "colors", "include": [{"class": "heart", "count": 1}], "prompt": tiny.PROMPTS[2]}]
TEXTS = [prompt["prompt"] for prompt in SUITE]
PLAN = CachePlan.uniform(HeadSpec.window(9), tiny.LAYERS, 4)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def drawn(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plan measured both ways, in ``quality`` and ``fidelity/plan``."""
    out = tmp_path_factory.mktemp("drawn")
    quality.evaluate(pipe, PLAN, out / "quality", prompts=SUITE, batch_size=2)
    fidelity.evaluate(pipe, {"plan": PLAN}, out / "fidelity", prompts=TEXTS, batch_size=2)
    return out


@pytest.fixture
def record(pipe: Pipeline, drawn: Path, tmp_path: Path) -> Path:
    """The record of a comparison that has everything that one can have."""
    made = comparison.Comparison(pipe, tmp_path / "compare", None, TEXTS, SUITE)
    run = {"command": "ssd-janus compare", "date": "2026-01-01", "machine": "Linux", "guidance": 2.0,
           "fidelity_prompts": 1, "prompts": 2, "seeds": 1, "batch_size": 2, "sensitivity_quality": False}
    for part, date in (("fidelity", "2026-01-01"), ("quality", "2026-01-02"), ("quality", "2026-01-01")):
        made.entries.add_run(part, run | {"date": date})
    made.entries.add_profile({"prompts": 3, "seconds": 1.5, "shared": 0})
    found = {"fidelity": fidelity.evaluate(pipe, {"plan": PLAN}, drawn / "fidelity", prompts=TEXTS,
                                           batch_size=2)["plan"].as_json(),
             "quality": quality.evaluate(pipe, PLAN, drawn / "quality", prompts=SUITE, batch_size=2).as_json()}
    entry = {"policy": "h2o", "budget": 0.4, "row_buffer": 0, "study": "", "setting": "", "guidance": 2.0}
    for measure, result in found.items():
        made.entries.add("grid", measure, "a", {**entry, "reached": 0.4, "predicted_cost": 0.1, measure: result})
    made.entries.add("grid", "fidelity", "b", {**entry, "budget": 0.1, "reason": "budget too small"})
    made.save()
    return tmp_path / "compare" / "results.json"


def test_records_of_comparisons(record: Path) -> None:
    check_json_reader(read_record, record, r"(goals|prediction)\b(?!.removed).*|int8_goals.*|profile|"
                      r"(parts|grid)\.[^.]+\.removed|grid\.[^.]+\.(kv_format|reason|tokens|reached)\.removed|"
                      r"grid\.[^.]+\.(predicted_cost|fidelity|quality)\.removed|.*(kl_interval|psnr_db|ssim)|"
                      r"profile\.seconds|.*\.by_prompt\.\w+.*|.*\.families\.\w+\.removed")
    found = json.loads(record.read_text())
    found["grid"]["other"] = json.loads(json.dumps(found["grid"]["a"]))
    found["grid"]["other"]["quality"]["by_prompt"]["colors"] = [1.0]
    record.write_text(json.dumps(found))
    assert "grid.other.quality.by_prompt must be of as many prompts" in (refused(read_record, record) or "")
    del found["grid"]["other"]["quality"]["overall"]["low"]
    record.write_text(json.dumps(found))
    said = refused(read_record, record) or ""
    assert f"{record}: grid.other.quality.overall.low is missing; remove the file" in said


def test_settings(tmp_path: Path, pipe: Pipeline) -> None:
    wanted = settings(pipe, "shapes", PLAN, None, 8)
    keep_settings(tmp_path, wanted)
    check_json_reader(lambda path: keep_settings(path.parent, wanted), tmp_path / "settings.json",
                      r"plan\.version")  # true equals 1


@pytest.mark.parametrize("wanted, message", [
    ({"a": [1, {"b": [2, 9]}]}, "another a ([1].b[1]: 3 there, 9 now)"),
    ({"a": [1, {"b": [2]}]}, "another a ([1].b length: 2 there, 1 now)"),
    ({"a": [1, {"c": [2, 3]}]}, "another a ([1].b: [2, 3] there, 'nothing' now)"),
    ({"a": "x" * 500}, "another a ([1, {'b': [2, 3]}] there, 'xxx"),
    ({}, "another a ([1, {'b': [2, 3]}] there, 'nothing' now)"),
    ({"a": [1, {"b": [2, 3]}], "version": 2}, "another version ('nothing' there, 2 now)"),
])
def test_what_differs_is_named(tmp_path: Path, wanted: dict[str, Any], message: str) -> None:
    keep_settings(tmp_path, {"a": [1, {"b": [2, 3]}]})
    with pytest.raises(ValueError) as caught:
        keep_settings(tmp_path, wanted)
    assert message in str(caught.value) and len(str(caught.value)) < 250 + len(str(tmp_path))


def batch_files(drawn: Path) -> list[Path]:
    return [drawn / "quality" / "batches" / "seed-0-00002.json", drawn / "fidelity" / "plan" / "batches" /
            "seed-0-00002.npz"]


def test_verdicts(pipe: Pipeline, drawn: Path) -> None:
    file = batch_files(drawn)[0]
    batch = RunFolder(drawn / "again", {"batch_size": 2}, TEXTS, ".json", str).batches(1)[1]
    check_json_reader(lambda path: quality._read(path, batch, SUITE), file)


def test_figures(pipe: Pipeline, drawn: Path) -> None:
    file = batch_files(drawn)[1]

    def read(path: Path) -> Any:
        return fidelity._read(path, 1, True, PLAN, tiny.TOKENS)

    data = file.read_bytes()
    # A flipped bit may be one of the archive's that mean nothing, as a date does: then the figures must be the same.
    good = read(file)
    for mutant in spoiled(data, 400):
        file.write_bytes(mutant)
        if refused(read, file) is None:
            assert all(np.array_equal(good[name], values) for name, values in read(file).items())
    file.write_bytes(data)
    for changes in ({"kl": np.zeros((2, tiny.TOKENS), np.float32)}, {"kl": good["kl"].astype(np.float64)},
                    {"kl": -1 - good["kl"]}, {"error": np.array([None])}, {"norm": np.zeros((10**3, 10**2))}):
        with file.open("wb") as out:
            np.savez(out, **{**good, **changes})
        assert refused(read, file), changes
    np.savez_compressed(file, **{**good, "kl": np.zeros(10**6, np.float32)})  # 4 MB in 4 kB
    assert refused(read, file)
    with file.open("wb") as out:
        np.savez(out, **{name: values for name, values in good.items() if name != "norm"})
    assert "norm.npy" in (refused(read, file) or "")
    file.write_bytes(data)


@pytest.mark.parametrize("number, suffix", [(0, ".json"), (1, ".npz"), (0, ".png"), (1, ".png")])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing"])
def test_damaged_batches_are_named_and_made_again(pipe: Pipeline, drawn: Path, number: int, suffix: str,
                                                  damage: str) -> None:
    root = drawn / ("quality", "fidelity")[number]
    file = sorted(file for file in root.rglob(f"*{suffix}") if file.name != "settings.json")[-1]
    data = file.read_bytes()
    place = 2 * len(data) // 3
    file.unlink()
    if damage != "missing":
        flipped = data[:place] + bytes([data[place] ^ 128]) + data[place + 1:]
        file.write_bytes({"cut": data[:place], "flipped": flipped, "empty": b""}[damage])
    steps: list[int] = []
    common: Any = {"batch_size": 2, "progress": lambda done, total: steps.append(done)}

    def go_on() -> None:
        if number:
            fidelity.evaluate(pipe, {"plan": PLAN}, root, prompts=TEXTS, **common)
        else:
            quality.evaluate(pipe, PLAN, root, prompts=SUITE, **common)

    if damage == "missing" and suffix != ".png":  # not damaged, but never finished
        go_on()
    else:
        with pytest.warns(UserWarning, match=f"ssd_kernels: .*{file.name}.*; drawing batch seed-0-00002 again"):
            go_on()
    assert len(steps) == (3 if number else 1) * tiny.TOKENS, "that batch and no other"
    assert file.read_bytes() == data
    steps.clear()
    go_on()
    assert not steps


@pytest.mark.parametrize("suffix", [".json", ".png"])
def test_what_is_no_file_is_refused_before_drawing(pipe: Pipeline, drawn: Path, suffix: str) -> None:
    file = next(file for file in (drawn / "quality").rglob(f"*{suffix}") if file.name != "settings.json")
    data = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(OSError, match=f"not a regular file.*{file.name}"):
        quality.evaluate(pipe, PLAN, drawn / "quality", prompts=SUITE, batch_size=2, progress=pytest.fail)
    file.unlink()
    file.write_bytes(data)


def test_verdicts_of_other_metadata_are_refused(pipe: Pipeline, drawn: Path) -> None:
    other = [{**SUITE[0], "include": [{"class": "circle", "count": 2}]}, *SUITE[1:]]
    with pytest.raises(ValueError, match=r"another metadata \(\[0\].include\[0\].count: 1 there, 2 now\)"):
        quality.evaluate(pipe, PLAN, drawn / "quality", prompts=other, batch_size=2)


def test_another_version_is_refused(pipe: Pipeline, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_kernels.__version__", "99")
    with pytest.raises(ValueError, match="another version .*'99' now"):
        quality.evaluate(pipe, PLAN, drawn / "quality", prompts=SUITE, batch_size=2)
    assert check_reader(str, batch_files(drawn)[0], []) == 0


def suite_file(folder: Path, prompts: list[dict[str, Any]]) -> Path:
    file = folder / "suite.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return file


def test_folders_of_all_plans_are_checked_before_the_first_is_drawn(folder: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "generate_tokens", lambda *_, **__: pytest.fail("drawn"))
    for place in (out := tmp_path / "out") / "heavy-0.5", out / "quality" / "guidance-2" / "heavy-0.5-r0":
        place.mkdir(parents=True)
        (place / "settings.json").write_text("{}")
    common = ("--model", folder, "--prompts-file", suite_file(tmp_path, SUITE), "--out", out, "--policy", "full",
              "--policy", "heavy", "--budget", 0.5, "--row-buffer", 0)
    for command in (("evaluate",), ("compare", "--part", "quality")):
        result = run(*command, *common)
        assert result.exit_code == 2 and "results made with another" in " ".join(result.stderr.split()), result.output


@pytest.mark.parametrize("change, said", [
    ({"include": [{"class": "bench", "count": 1}]}, "suite.jsonl, line 4: include[0].class must be one of"),
    ({"include": [{"class": "ring"}]}, "suite.jsonl, line 4: include[0].count is missing"),
    ({"include": "a ring"}, "suite.jsonl, line 4: include must be a list"),
    ({"exclude": [{"class": "ring", "count": 0}]}, "suite.jsonl, line 4: exclude[0].count must be an int within"),
    ({"tag": None}, "suite.jsonl, line 4: tag must be a string"),
])
def test_what_the_detector_cannot_judge_is_refused_before_drawing(tmp_path: Path, change: dict[str, Any],
                                                                  said: str) -> None:
    file = suite_file(tmp_path, [*SUITE, {**SUITE[0], "prompt": "a ring", **change}])
    for command in ("evaluate", "compare"):
        result = run(command, "--model", tmp_path / "absent", "--prompts-file", file, "--out", tmp_path / "out")
        assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr


@pytest.mark.parametrize("options, said", [
    (("--suite", "fidelity", "--seeds", 2), "--seeds says nothing with --suite fidelity"),
    (("--no-pictures",), "--no-pictures says nothing with --suite shapes"),
    (("--budget", 0.5), "--budget says nothing without --policy"),
    (("--row-buffer", 0), "--row-buffer says nothing without --policy"),
    (("--page", "/dev/zero"), "/dev/zero: must be a regular file, got a device"),
])
def test_options_that_say_nothing_are_refused(folder: Path, tmp_path: Path, options: tuple[Any, ...],
                                              said: str) -> None:
    result = run("evaluate", "--model", folder, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "out").exists()


def test_names_with_markup_stay_in_their_cell() -> None:
    lines = report.markdown_table(["a|b", "c"], [["x\n<!-- /fidelity -->", "1"]]).splitlines()
    assert lines[0] == r"| a\|b | c |" and lines[2] == "| x &lt;!-- /fidelity --> | 1 |"


def test_a_process_that_is_killed_leaves_nothing_that_counts(folder: Path, drawn: Path, tmp_path: Path) -> None:
    """Killed where it cannot clean up, after its first batch; the next process goes on and ends with the same."""
    command = ["-m", "ssd_janus.cli", "evaluate", "--model", folder, "--out", tmp_path / "out", "--prompts-file",
               suite_file(tmp_path, SUITE), "--batch-size", 1, "--seeds", 400]
    batches = tmp_path / "out" / "full" / "batches"
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not (batches.is_dir() and any(batches.glob("*.json"))):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended by itself"
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name[0] != "."} <= {
        ".json", ".png"}
    finished = {path: path.stat().st_mtime_ns for path in batches.glob("*.json")}
    assert finished and not (tmp_path / "out" / "results.json").exists()
    common: tuple[Any, ...] = ("evaluate", "--model", folder, "--prompts-file", tmp_path / "suite.jsonl",
                               "--batch-size", 1, "--json")
    result = run(*common, "--out", tmp_path / "out")
    whole = run(*common, "--out", tmp_path / "whole")
    assert result.exit_code == 0 and result.stdout == whole.stdout
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
