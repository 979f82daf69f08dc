"""Result files: read and written whole, compared with their noise, without names of machines."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from mutants import check_json_reader
from typer.testing import CliRunner

from ssd_bench import machine
from ssd_bench.cli import app
from ssd_bench.compare import comparison, rows
from ssd_bench.records import read, write
from ssd_bench.tables import kernel_rows

OURS, RIVAL = "ssd_kernels cpu: heavy", "SDPA full cache"  # as in conftest.py


def test_files_hold_what_was_written(tmp_path: Path, make):
    lines = [make(), make(RIVAL)]
    write(lines, tmp_path / "new" / "a.jsonl")
    write([make(batch=2)], tmp_path / "new" / "b.jsonl")
    assert read(tmp_path / "new" / "a.jsonl") == lines
    assert len(read(tmp_path / "new")) == 3


@pytest.mark.parametrize(("text", "word"), [("{", "Expecting"), ("[1]", "must be an object"),
                                            ('{"format": "other"}', "version is missing"),
                                            ('{"format": "other", "version": 1}', "format must be 'ssd_bench'"),
                                            ('{"format": "ssd_bench", "version": 99}', "version must be 1, got 99")])
def test_foreign_lines_are_refused_with_file_and_line(tmp_path: Path, make, text: str, word: str):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(make()) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=f"x.jsonl, line 2: .*{word}"):
        read(path)


@pytest.mark.parametrize("kind", ["kernel", "image"])
def test_result_files_may_hold_anything(tmp_path: Path, make, kind: str):
    line = make()
    if kind == "image":
        line |= {"kind": kind, "bytes": {"cache": 5, "peak": None}, "split": {"linear": 1, "attention": 0, "rest": 0.5},
                 "by_row": [0.1, 0.2], "loop_seconds": 2.5, "contender": {"name": "engine", "backend": "auto",
                                                                         "budget": 0.2, "row_buffer": 24},
                 "point": {"label": "1b", "batch": 8, "rows": 16, "dtype": "float32", "steps": 4, "start": None,
                           "batch_is": "fixed"}}
        del line["ceiling"], line["launches"]
    path = tmp_path / "x.jsonl"
    write([make(), line], path)
    check_json_reader(read, path, line=True, free=(
        r"machine\.(cores|instruction_set|commit|device.*|load_after\.removed)|(.*\.)?(unknown)|status|launches|"
        r"contender\.(omits.*|does.*|backend.*|budget.removed)|point\.(prompt|device|row_buffer|start|spread).*|bytes\.peak|"
        r"(ceiling|launches|split|by_row|loop_seconds).removed"))


@pytest.mark.parametrize("file", sorted((machine.ROOT / "bench" / "results").glob("*/*.jsonl")),
                         ids=lambda file: file.stem)
def test_committed_results_can_be_read(file: Path):
    assert read(file)


def test_empty_folder_is_said(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no .jsonl"):
        read(tmp_path)


@pytest.mark.parametrize(("after", "verdict"), [((100, 110, 120), "within the noise"), ((140, 150, 160), "slower"),
                                                ((65, 70, 75), "faster")])
def test_differences_count_beyond_the_noise(make, after: tuple[float, ...], verdict: str):
    """Half spreads of 10% and about as much: together about 14%."""
    [pair] = comparison([make()], [make(trials=after)]).pairs
    assert pair.verdict == verdict and pair.ratio == pytest.approx(after[1] / 100)
    assert pair.noise == pytest.approx(((10 / 100) ** 2 + ((after[2] - after[0]) / 2 / after[1]) ** 2) ** 0.5)


def test_a_single_trial_has_no_noise_to_judge_by(make):
    """Its spread of 0 must not pass for certainty, neither in a verdict nor in a table."""
    [pair] = comparison([make()], [make(trials=(200,))]).pairs
    assert (pair.noise, pair.verdict) == (None, "one trial: unknown")
    assert rows(comparison([make()], [make(trials=(200,))]))[0][-2] == ""
    assert kernel_rows([make(trials=(200,))])[0][4] == "" and kernel_rows([make()])[0][4] == "20%"


def test_no_verdict_where_the_ceiling_moved(make):
    for before, after, verdict in ((0.3, 0.0, "the ceiling moved: unknown"), (0.0, 0.3, "the ceiling moved: unknown"),
                                   (0.1, 0.2, "slower")):
        a, b = make() | {"moved": before}, make(trials=(200,) * 3) | {"moved": after}
        [pair] = comparison([a], [b]).pairs
        assert pair.verdict == verdict and pair.ratio == 2


def test_only_the_same_measurement_is_compared(make):
    found = comparison([make(), make(batch=2), make(RIVAL)],
                       [make(), make(dtype="float32"), make(RIVAL, status="wrong")])
    assert [pair.name for pair in found.pairs] == [OURS]
    assert found.warnings == ["2 measurements are in A only", "1 measurements are in B only"]


def test_runs_of_one_set_and_pairs_of_two_machines_are_told_apart(make):
    """Both sets hold results of two machines, and each pair is of both."""
    one, two = {"torch": "1"}, {"torch": "2"}
    found = comparison([make(machine=one), make(RIVAL, machine=two)], [make(machine=two), make(RIVAL, machine=one)])
    assert found.warnings == ["torch differs: 1 against 2; 2 against 1", "A holds results that differ in torch",
                              "B holds results that differ in torch"]
    found = comparison([make(), make()], [make()])
    assert found.warnings == ["1 measurements are in A more than once; the last ones count"]


def test_another_machine_is_said(make):
    found = comparison([make()], [make(machine={"processor": "Other"})])
    assert found.warnings == ["processor differs: CPU against Other"]


def test_compare_command(tmp_path: Path, make):
    write([make()], tmp_path / "a.jsonl")
    write([make(trials=(190, 200, 210))], tmp_path / "b.jsonl")
    write([make(batch=3)], tmp_path / "c.jsonl")
    run = CliRunner().invoke(app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--json"])
    assert json.loads(run.stdout)["verdict"] == "slower"
    write([make(machine={"threads": 1})], tmp_path / "d.jsonl")
    run = CliRunner().invoke(app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "d.jsonl"), "--json"])
    assert run.stderr == "note: threads differs: 2 against 1\n" and json.loads(run.stdout)["ratio"] == 1
    assert "2.000" in CliRunner().invoke(app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]).output
    run = CliRunner().invoke(app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")])
    assert run.exit_code == 2 and "no measurement in common" in run.output


def test_facts_hold_no_host_name_and_no_local_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", [".venv/bin/ssd-bench", "kernel", "--plan=/home/me/p.json", "--out",
                                     "/tmp/x/y.jsonl"])
    about = machine.facts(torch.device("cpu"))
    assert about["command"] == "ssd-bench kernel --plan=p.json --out y.jsonl"
    text = json.dumps(about)
    assert socket.gethostname() not in text and str(machine.ROOT) not in text
    assert {"processor", "threads", "load", "torch", "commit", "time"} <= set(about)


def test_folder_names():
    about = {"processor": "AMD EPYC(TM) 7", "cores": 2, "instruction_set": "avx2"}
    assert machine.folder_name(about) == "amd-epyc-tm-7-2-cores-avx2"
    assert machine.folder_name(about | {"gpu": "NVIDIA H200"}) == "nvidia-h200"
