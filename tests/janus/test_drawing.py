"""Prompt files, the evaluators' folders, and the gallery."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_cli import run

from ssd_janus.prompts import gather, read

GENEVAL = [{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
           {"tag": "single_object", "include": [{"class": "heart", "count": 1}], "prompt": "a heart"},
           {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a green star"}]


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    path = tmp_path / "geneval.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    return path


def test_prompt_files(tmp_path: Path, geneval: Path) -> None:
    assert [prompt.metadata for prompt in read(geneval)] == GENEVAL
    (tmp_path / "plain.txt").write_text("a red circle\n\n  a heart \n")
    assert [prompt.text for prompt in read(tmp_path / "plain.txt")] == ["a red circle", "a heart"]
    (tmp_path / "dpg.csv").write_text('item_id,text,other\nb7,"a circle, red",1\nb7,"a circle, red",2\na1,a heart,1\n')
    assert [(p.name, p.text) for p in read(tmp_path / "dpg.csv")] == [("b7", "a circle, red"), ("a1", "a heart")]
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("x1", "x0"):
        (folder / f"{name}.txt").write_text(f"picture {name}\n")
    assert [(p.name, p.text) for p in read(folder)] == [("x0", "picture x0"), ("x1", "picture x1")]


@pytest.mark.parametrize("name, text, message", [
    ("a.jsonl", '{"prompt": "a"}\n{"tag": 1}\n', 'line 2: must be a JSON object with a "prompt"'),
    ("a.jsonl", '{"prompt": "a"}\n\n{broken\n', "line 3: not JSON"),
    ("a.csv", "name,text\n1,a\n", "columns item_id and text"),
    ("a.txt", "\n \n", "got none"),
    ("a.jsonl", '{"prompt": " "}\n', "a blank one"),
])
def test_malformed_prompt_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_prompts_come_from_one_place(geneval: Path) -> None:
    with pytest.raises(ValueError, match="got both"):
        gather(["a heart"], geneval)
    with pytest.raises(ValueError, match="got neither"):
        gather([], None)


def test_geneval_layout_and_going_on(folder: Path, geneval: Path, tmp_path: Path) -> None:
    def draw(out: Path) -> list[dict]:
        result = run("generate", "--prompts-file", geneval, "--layout", "geneval", "--out", out, "--model", folder,
                     "--images-per-prompt", 2, "--batch-size", 4, "--json")
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    out = tmp_path / "out"
    assert [record["file"] for record in draw(out)] == [
        str(out / f"{index:05d}" / "samples" / f"{image:05d}.png") for index in range(3) for image in range(2)]
    for index, metadata in enumerate(GENEVAL):
        # As GenEval's evaluator reads it: the whole file is one JSON object.
        assert json.loads((out / f"{index:05d}" / "metadata.jsonl").read_text()) == metadata
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    assert len(before) == 6 and draw(out) == []
    (out / "00002" / "metadata.jsonl").unlink()  # killed while the last batch was written
    (out / "00002" / "samples" / "00000.png").unlink()
    assert [record["prompt"] for record in draw(out)] == ["a green star"] * 2
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == before


def test_dpg_layout(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "stuff7.txt").write_text("a heart")
    common = ("--model", folder, "--images-per-prompt", 4, "--batch-size", 4)
    result = run("generate", "--prompts-file", prompts, "--layout", "dpg", "--out", tmp_path / "dpg", *common)
    assert result.exit_code == 0, result.output
    result = run("generate", "a heart", "--out", tmp_path / "plain", *common)
    sheet = Image.open(tmp_path / "dpg" / "stuff7.png")
    assert sheet.size == (48, 48)
    for index, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        left, top = index % 2 * 24, index // 2 * 24
        assert sheet.crop((left, top, left + 24, top + 24)).tobytes() == Image.open(path).tobytes()


def test_gallery(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "sheet.png"
    result = run("gallery", "a red circle", "a heart", "--model", folder, "--out", file, "--policy", "full",
                 "--policy", "window", "--budget", 0.4, "--budget", 0.6, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plans"] == ["full", "window-0.4", "window-0.6"]
    width, height = Image.open(file).size
    assert width > 3 * 192 and height > 2 * 192
