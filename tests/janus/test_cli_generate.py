"""`ssd-janus generate` and `gallery`: defaults, what is said and checked before anything is drawn, and the sheet."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from test_cli import run
from test_drawing import GENEVAL, contents, evaluated

from ssd_janus.images import read_picture


@pytest.mark.parametrize("layout, name, text, count", [
    ("geneval", "a.jsonl", json.dumps(GENEVAL[0]), 4), ("dpg", "a.csv", "item_id,text\nb7,a heart\n", 4),
    (None, "a.txt", "a heart", 1)])
def test_defaults_follow_the_layout(folder: Path, tmp_path: Path, layout: str | None, name: str, text: str,
                                    count: int) -> None:
    (tmp_path / name).write_text(text)
    result = run("generate", "--prompts-file", tmp_path / name, "--out", tmp_path / "out", "--model", folder, "--json",
                 *(["--layout", layout] if layout else []))
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == count and "note: " not in result.stderr


@pytest.mark.parametrize("layout, count, notes", [
    ("geneval", 4, ['GenEval\'s evaluator needs "tag" and "include" for every prompt and fails without; 1 of 1 have '
                    "none (prompt 1)"]),
    ("dpg", 4, ["finds its questions by item_id; 1 of 1 prompts have none (prompt 1)"]),
    ("dpg", 1, ["item_id", "for sheets of 1 give it --pic-num 1"]),
    ("dpg", 5, ["item_id", "for sheets of 5 it reads the wrong ones"]),
])
def test_what_the_evaluator_lacks_is_said_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 layout: str, count: int, notes: list[str]) -> None:
    def begin(*args: object, **options: object) -> None:
        raise RuntimeError("drawing begins")

    monkeypatch.setattr("ssd_janus.drawing.draw", begin)
    result = run("generate", "a heart", "--layout", layout, "--out", tmp_path / "out", "--model", folder,
                 "--images-per-prompt", count)
    *said, last = [line for line in result.stderr.splitlines() if line.startswith(("note: ", "error: "))]
    assert last == "error: drawing begins" and len(said) == len(notes)
    assert all(note in line for note, line in zip(notes, said, strict=True))


def test_every_prompt_is_checked_before_the_first_is_drawn(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    prompts = tmp_path / "a.csv"
    prompts.write_text(f"item_id,text\n../x,a heart\nb,{'red ' * 300}\nc,a star\nd.e,a ring\nf,a heart\n")
    common = ("generate", "--prompts-file", prompts, "--layout", "dpg", "--out", out, "--model", folder)
    for line in (2, 3, 5):
        result = run(*common)
        assert result.exit_code == 2 and f"error: {prompts}, line {line}: " in result.stderr
        assert not out.parent.exists()
        lines = prompts.read_text().splitlines(keepends=True)
        lines[line - 1] = "\n"
        prompts.write_text("".join(lines))
    prompts.write_text(f"item_id,text\n../x,a heart\nb,{'red ' * 300}\nc,a star\nd.e,a ring\nf,a heart\n")
    result = run(*common, "--skip-invalid")
    assert result.exit_code == 0, result.output
    assert [line.split(": ")[1] for line in result.stderr.splitlines() if line.endswith("left out")] == [
        f"{prompts}, line {line}" for line in (2, 3, 5)]
    assert evaluated(out, "dpg") == ["c.png", "f.png"]
    facts = read_picture(out / "f.png")[1]
    assert facts is not None and facts["place"] == 4, "the others' seeds stay the same"


@pytest.mark.parametrize("prompt", ["", "  ", "a \x1b[2J heart"])
def test_a_blank_prompt_leaves_nothing_behind(folder: Path, tmp_path: Path, prompt: str) -> None:
    result = run("generate", "a heart", prompt, "--out", tmp_path / "out", "--model", folder)
    assert result.exit_code == 2 and "error: prompt 2: must" in result.stderr
    assert not (tmp_path / "out").exists()


def test_plain_pictures_say_what_they_replace(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("generate", "a heart", "a [red] circle", "--out", out, "--model", folder).exit_code == 0
    result = run("generate", "a heart", "--out", out, "--model", folder, "--seed", 3)
    assert result.exit_code == 0
    assert f"note: {out}/01-a-heart.png is there and will be replaced\n" in result.stderr
    assert f"note: {out} also holds 1 other picture, such as 02-a-red-circle.png: it stays\n" in result.stderr
    result = run("generate", "a heart", "--redraw", "--out", out, "--model", folder)
    assert result.exit_code == 2 and "--redraw needs --layout" in result.stderr


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        result = run("generate", "a heart", "--out", out, "--model", "not even looked at")
        assert result.exit_code == 2 and result.stderr == f"error: {tmp_path}/file: Not a directory\n"


def test_a_disk_that_fills_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    result = run("generate", "a heart", "--out", tmp_path / "out", "--model", folder)
    assert result.exit_code == 2
    assert result.stderr.endswith(f"error: {tmp_path}/out/01-a-heart.png: No space left on device\n")
    assert contents(tmp_path / "out") == {}


def test_gallery(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "sheet.png"
    result = run("gallery", "a red circle", "a heart", "--model", folder, "--out", file, "--policy", "full",
                 "--policy", "window", "--budget", 0.4, "--budget", 0.6, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plans"] == ["full", "window-0.4", "window-0.6"]
    width, height = Image.open(file).size
    assert width > 3 * 192 and height > 2 * 192


@pytest.mark.parametrize("command", ["gallery", "profile", "evaluate"])
def test_other_commands_check_prompts_and_folders_first(folder: Path, tmp_path: Path, command: str) -> None:
    prompts, out = tmp_path / "a.txt", tmp_path / "deep" / ("a.png" if command == "gallery" else "out")
    prompts.write_text("a heart\n\n" + "red " * 300)
    more = {"gallery": (), "profile": ("--no-plots",), "evaluate": ("--suite", "fidelity")}[command]
    result = run(command, "--prompts-file", prompts, "--out", out, "--model", folder, *more)
    assert result.exit_code == 2 and f"error: {prompts}, line 3: prompts must be at most" in result.stderr
    assert not out.parent.exists()
    out.parent.write_text("")
    result = run(command, "--prompts-file", prompts, "--out", out, "--model", "not even looked at", *more)
    assert result.exit_code == 2 and result.stderr == f"error: {out.parent}: Not a directory\n"


@pytest.mark.parametrize("command", [("gallery", "a heart", "--out"), ("evaluate", "--out", "out", "--plot")])
def test_what_cannot_be_a_file_is_found_before_the_model_is_loaded(tmp_path: Path, command: tuple[str, ...]) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "fifo.png", "not a regular file")):
        result = run(*command, path, "--model", "not even looked at")
        assert result.exit_code == 2 and result.stderr == f"error: {path}: {message}\n"


def test_names_are_no_markup(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "[red]a[" / ":heart:"
    result = run("generate", "[b]a heart[/]", "--out", out, "--model", folder)
    assert result.exit_code == 0 and result.stdout == f"{out}/01-b-a-heart.png\n"
    result = run("generate", "--prompts-file", out / "[none].txt", "--model", folder)
    assert result.stderr == f"error: {out}/[none].txt: No such file or directory\n"
