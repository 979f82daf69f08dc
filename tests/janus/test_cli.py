"""``ssd-janus``, as a user and as a script call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner, Result

import ssd_janus.cli
from ssd_janus import ModelShape
from ssd_janus.cli.options import PolicyName, choose_plans
from ssd_janus.images import contact_sheet, file_names
from ssd_kernels import CachePlan, HeadSpec, policies

SHAPE = ModelShape(tiny.LAYERS, 4, 4, tiny.HEAD_DIM, tiny.TOKENS, tiny.GRID)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(ssd_janus.cli.app, [str(argument) for argument in arguments])


def draw(folder: Path, out: Path, *arguments: object) -> Result:
    return run("generate", "a red circle", "A heart!", "--model", folder, "--out", out, "--seed", 1, *arguments)


def test_generate_writes_pictures_and_json(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "pictures"
    result = draw(folder, out, "--policy", "heavy", "--budget", 0.5, "--images-per-prompt", 2, "--json",
                  "--batch-size", 3)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["01-a-red-circle-1.png", "01-a-red-circle-2.png", "02-a-heart-1.png", "02-a-heart-2.png"]
    assert [record["file"] for record in records] == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [record["prompt"] for record in records] == ["a red circle"] * 2 + ["A heart!"] * 2
    for number, record in enumerate(records):
        with Image.open(record["file"]) as picture:
            assert (picture.width, picture.height) == (record["width"], record["height"]) == (24, 24)
        assert (record["seed"], record["plan_budget"], record["guidance_scale"]) == (1 + number, 0.5, 2.0)
        assert 0 < record["cache_bytes"] < record["full_cache_bytes"]
    assert "of the full cache's" in result.stderr and "pictures/s" in result.stderr
    assert "weights" not in result.stderr


def test_verbose_shows_memory(folder: Path, tmp_path: Path) -> None:
    result = draw(folder, tmp_path, "--verbose")
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0]: line for line in result.stderr.splitlines()}
    for part in ("weights", "cache", "step buffers", "decoding", "peak"):
        assert "MB" in lines[part]


def test_generate_repeats_and_plans_from_files_equal_policies(folder: Path, tmp_path: Path) -> None:
    policies.window(SHAPE, 0.4, 6).save(tmp_path / "plan.json")
    assert draw(folder, tmp_path / "a", "--policy", "window", "--budget", 0.4).exit_code == 0
    result = draw(folder, tmp_path / "b", "--plan", tmp_path / "plan.json", "--backend", "reference")
    assert result.exit_code == 0
    assert "01-a-red-circle.png" in result.stdout
    for name in file_names(["a red circle", "A heart!"], 1):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("arguments, message", [
    (("--policy", "window", "--budget", 0.1), "budget must be at least 0.1945"),
    (("--policy", "full", "--budget", 0.5), "budget must be at least 1 for policy full"),
    (("--budget", 0.5), "--budget needs --policy"),
    (("--plan", "missing.json"), "missing.json"),
    (("--plan", "p.json", "--policy", "window"), "--plan already says what to keep"),
    (("--device", "cuda:99"), "device"),
    (("--device", "toaster"), "device"),
    (("--backend", "cudnn"), "backend must be one of"),
    (("--guidance", -2), "guidance_scale must be at least 0"),
    (("--model", "./nowhere"), "model must be a folder or a hub id"),
])
def test_errors_are_one_line(folder: Path, tmp_path: Path, arguments: tuple, message: str) -> None:
    result = draw(folder, tmp_path, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in result.stderr


def test_a_damaged_plan_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    result = draw(folder, tmp_path, "--plan", tmp_path / "plan.json")
    assert result.exit_code == 2 and "plan.json" in result.stderr


def test_a_plan_of_another_model_is_named(folder: Path, tmp_path: Path) -> None:
    CachePlan.uniform(HeadSpec.full(), 1, 2).save(tmp_path / "other.json")
    result = draw(folder, tmp_path, "--plan", tmp_path / "other.json")
    assert result.exit_code == 2 and f"error: {tmp_path / 'other.json'}: plan must have the model's" in result.stderr


def test_every_policy_is_offered() -> None:
    assert set(PolicyName.__members__) == set(policies.POLICIES) | {"online"}


def test_info() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["backends"]["reference"]["available"] and "included_model" in facts
    text = run("info").stdout
    assert "backend reference" in text and "included model" in text


def test_demo_draws_a_contact_sheet(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_janus.pipeline.included_model", lambda: str(folder))
    monkeypatch.setattr("ssd_janus.cli.demo.DEFAULT_BUDGET", 0.5)
    result = run("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert "contact_sheet.png" in result.stdout and "pictures/s" in result.stdout
    with Image.open(tmp_path / "demo" / "contact_sheet.png") as sheet:
        assert sheet.width > 2 * 48 and sheet.height > 8 * 48
    assert len(list((tmp_path / "demo" / "full").iterdir())) == len(ssd_janus.cli.demo.DEMO_PROMPTS)


def test_help_needs_no_heavy_imports() -> None:
    code = ("import sys; from typer.testing import CliRunner; from ssd_janus.cli import app\n"
            "result = CliRunner().invoke(app, ['generate', '--help']); assert result.exit_code == 0, result.output\n"
            "assert '--row-buffer' in result.output\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "COLUMNS": "120"})


def test_contact_sheets_need_a_picture_per_caption() -> None:
    with pytest.raises(ValueError, match="column 'full' must have 2 pictures, got 1"):
        contact_sheet({"full": [Image.new("RGB", (4, 4))]}, ["a", "b"])


def test_plan_files_and_policies_have_different_names(tmp_path: Path) -> None:
    file = tmp_path / "window-0.5.json"
    policies.window(SHAPE, 0.3).save(file)
    window, full = PolicyName.window, PolicyName.full
    plans = choose_plans(SHAPE, [file], [full, window], [0.4, 0.4], None, None)
    assert list(plans) == ["window-0.5", "full", "window-0.4"] and plans["full"] == SHAPE.full_plan()
    with pytest.raises(ValueError, match="--plan.*window-0.5"):
        choose_plans(SHAPE, [file], [window], [0.5], None, None)
    with pytest.raises(ValueError, match="--plan.*got a twice"):
        choose_plans(SHAPE, [file.rename(tmp_path / "a.json")] * 2, [], [], None, None)
