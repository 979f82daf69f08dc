"""Result files: read and written whole, compared with their noise, without names of machines."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize(("text", "word"), [("{", "not JSON"), ("[1]", "ssd_bench"),
                                            ('{"format": "other"}', "ssd_bench"),
                                            ('{"format": "ssd_bench", "version": 99}', "version 1")])
def test_foreign_lines_are_refused_with_file_and_line(tmp_path: Path, make, text: str, word: str):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(make()) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=f"x.jsonl, line 2: .*{word}"):
        read(path)


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
    assert kernel_rows([make(trials=(200,))])[0][3] == "" and kernel_rows([make()])[0][3] == "20%"


def test_only_the_same_measurement_is_compared(make):
    found = comparison([make(), make(batch=2), make(RIVAL)],
                       [make(), make(dtype="float32"), make(RIVAL, status="wrong")])
    assert [pair.name for pair in found.pairs] == [OURS]
    assert found.warnings == ["2 measurements are in A only", "1 measurements are in B only"]


def test_another_machine_is_said(make):
    found = comparison([make()], [make(machine={"processor": "Other"})])
    assert found.warnings == ["processor differs: CPU against Other"]


def test_compare_command(tmp_path: Path, make):
    write([make()], tmp_path / "a.jsonl")
    write([make(trials=(190, 200, 210))], tmp_path / "b.jsonl")
    write([make(batch=3)], tmp_path / "c.jsonl")
    run = CliRunner().invoke(app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--json"])
    assert json.loads(run.stdout)["verdict"] == "slower"
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
