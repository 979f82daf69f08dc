"""``ssd-janus``, as a user and as a script call it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import ssd_janus.cli
from ssd_janus import ModelShape
from ssd_janus.cli.options import FormatName, PolicyName, choose_plans
from ssd_janus.images import contact_sheet, file_names
from ssd_kernels import CachePlan, HeadSpec, policies
from ssd_kernels.kv_format import KV_FORMATS

SHAPE = ModelShape(tiny.LAYERS, 4, 4, tiny.HEAD_DIM, tiny.TOKENS, tiny.GRID)
PIPE: Any = SimpleNamespace(shape=SHAPE, dtype=torch.float32)


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


def test_every_format_is_offered() -> None:
    assert set(FormatName.__members__) == {*KV_FORMATS, policies.BEST}


def test_formats_and_budgets_name_plans() -> None:
    """No two plans of one run have a folder in common."""
    names, formats = [PolicyName.full, PolicyName.window], [FormatName.auto, FormatName.int8]
    tokens = choose_plans(PIPE, [], names, [0.4], 0, None, formats=formats)
    assert list(tokens) == ["full", "full-int8", "window-0.4", "window-0.4-int8"]
    shares = choose_plans(PIPE, [], names, [0.4], 0, None, in_bytes=True, formats=formats)
    assert list(shares) == ["full", "full-int8", "window-0.4-bytes", "window-0.4-bytes-int8"]
    for found in (tokens, shares):
        assert all(plan.kv_format == ("int8" if name.endswith("int8") else "auto") for name, plan in found.items())
    few, many = (tokens[f"window-0.4{end}"].budget(tiny.TOKENS) for end in ("", "-int8"))
    assert few == many and few == shares["window-0.4-bytes"].budget(tiny.TOKENS)
    assert shares["window-0.4-bytes-int8"] == policies.build("window", SHAPE, None, 0, byte_budget=0.4,
                                                             dtype=torch.float32, kv_format="int8")
    assert list(choose_plans(PIPE, [], [], [], None, None, formats=formats)) == ["full", "full-int8"]


@pytest.mark.parametrize("command, arguments, message", [
    ("generate", ["--policy", "window", "--budget", 0.2, "--budget-bytes", 0.2], "--budget and --budget-bytes cannot"),
    ("evaluate", ["--policy", "window", "--budget", 0.2, "--budget-bytes", 0.2], "--budget and --budget-bytes cannot"),
    ("plan", ["--policy", "window", "--kv", "best"], "--kv best needs --budget-bytes"),
    ("gallery", ["--policy", "window", "--kv", "best"], "--kv best needs --budget-bytes"),
    ("generate", ["--kv", "best"], "--kv best needs --budget-bytes"),
    ("generate", ["--budget-bytes", 0.2], "--budget-bytes needs --policy, one of full, "),
    ("generate", ["--plan", "plan.json", "--kv", "int8"], "--plan already says what to keep and .* with --kv"),
    ("evaluate", ["--plan", "plan.json", "--kv", "int8"], "--kv says nothing without --policy"),
    ("gallery", ["--plan", "plan.json", "--kv", "int8"], "--kv says nothing without --policy"),
    ("gallery", ["--budget", 0.2], "--budget says nothing without --policy"),
    ("evaluate", ["--budget-bytes", 0.2], "--budget-bytes says nothing without --policy"),
    ("generate", ["--kv", "int4"], "'int4' is not one of 'auto', 'int8', 'best'")])
def test_formats_and_budgets_that_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str,
                                              arguments: list[object], message: str) -> None:
    """Refused before a model is loaded, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssd_janus.pipeline.Pipeline.from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    words = {"generate": ["a cat"], "gallery": ["a cat"], "evaluate": ["--out", "out"]}.get(command, [])
    result = run(command, *words, *arguments)
    assert result.exit_code == 2 and re.search(message, " ".join(result.stderr.split())), result.stderr
    assert not list(tmp_path.iterdir())


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
    plans = choose_plans(PIPE, [file], [full, window], [0.4, 0.4], None, None)
    assert list(plans) == ["window-0.5", "full", "window-0.4"] and plans["full"] == SHAPE.full_plan()
    with pytest.raises(ValueError, match="--plan.*window-0.5"):
        choose_plans(PIPE, [file], [window], [0.5], None, None)
    with pytest.raises(ValueError, match="--plan.*got a twice"):
        choose_plans(PIPE, [file.rename(tmp_path / "a.json")] * 2, [], [], None, None)
