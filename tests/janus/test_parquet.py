"""Parquet files: rows, what is kept and what is drawn anew."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_drawing import GENEVAL, Painter, contents

from ssd_janus import Pipeline, drawing
from ssd_janus.layouts import GenEval, Layout
from ssd_janus.parquet import COLUMNS, Parquet, read, schema
from ssd_janus.prompts import FilePrompt
from ssd_janus.ranks import ALONE, Ranks

pyarrow = pytest.importorskip("pyarrow")
pyarrow.parquet = pytest.importorskip("pyarrow.parquet")

PROMPTS = [FilePrompt(f"{number:05d}", scene["prompt"], scene, number=number, where=f"prompt {number + 1}")
           for number, scene in enumerate([*GENEVAL, {"prompt": "a ring"}, {"prompt": "a cross"}])]
FIRST, SECOND, THIRD = (f"{first:08d}-{last:08d}.parquet" for first, last in ((0, 1), (2, 3), (4, 4)))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    loaded = Pipeline.from_pretrained(folder)
    return Painter(loaded.model, loaded.processor)


def draw(pipe: Pipeline, out: Path, prompts: list[FilePrompt] = PROMPTS, say: Callable[[str], Any] = print,
         seed: int = 3, redraw: bool = False, ranks: Ranks = ALONE, batch_size: int = 4) -> list[str]:
    """The prompts of the pictures that are drawn, two each, and of two prompts per file."""
    return [drawn.prompt for drawn in drawing.draw(pipe, Parquet(out, 2), out, prompts, 2, None, seed,
                                                   pipe.shape.full_plan(), batch_size, redraw=redraw, say=say,
                                                   ranks=ranks)]


@pytest.fixture(scope="module")
def drawn(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("drawn")
    assert len(draw(pipe, out)) == 10
    return contents(out)


def write(out: Path, files: dict[str, bytes]) -> Path:
    out.mkdir(exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    return out


def test_rows_are_what_the_folder_of_geneval_holds(pipe: Pipeline, drawn: dict[str, bytes], tmp_path: Path) -> None:
    list(drawing.draw(pipe, GenEval(tmp_path / "geneval", 2), tmp_path / "geneval", PROMPTS, 2, None, 3,
                      pipe.shape.full_plan(), 4))
    assert list(drawn) == [FIRST, SECOND, THIRD]
    rows = [row for name in drawn for row in read(write(tmp_path / "out", drawn) / name)]
    assert [(row["number"], row["image"], row["seed"]) for row in rows] == [
        (number, image, 3 + 2 * number + image) for number in range(5) for image in range(2)]
    for row in rows:
        assert list(row) == list(COLUMNS)
        prompt = PROMPTS[row["number"]]
        tokens = pipe.generate_tokens([prompt.text], 1, None, row["seed"], pipe.shape.full_plan())
        assert row["tokens"] == tokens[0].tolist() and row["prompt"] == prompt.text
        assert json.loads(row["metadata"]) == prompt.metadata
        picture = Image.open(io.BytesIO(row["png"]))
        assert picture.tobytes() == pipe.decode(tokens)[0].tobytes()
        assert json.loads(row["settings"]) == json.loads(picture.info["ssd_janus"])
        assert row["png"] == (tmp_path / f"geneval/{row['number']:05d}/samples/{row['image']:05d}.png").read_bytes()


def test_others_read_it(drawn: dict[str, bytes], tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(write(tmp_path / "out", drawn))
    assert table.num_rows == 10 and table.schema.equals(schema())
    assert table.schema.field("tokens").type == pyarrow.list_(pyarrow.int32())
    assert len({tuple(row) for row in zip(*(table[name].to_pylist() for name in ("number", "image", "seed")),
                                          strict=True)}) == 10


def test_what_is_there_is_kept(pipe: Pipeline, drawn: dict[str, bytes], tmp_path: Path) -> None:
    out = write(tmp_path / "out", {name: drawn[name] for name in (FIRST, THIRD)})
    assert draw(pipe, out) == ["a green star"] * 2 + ["a ring"] * 2
    assert contents(out) == drawn and draw(pipe, out) == []


def test_units_of_another_size_double_nothing(pipe: Pipeline, drawn: dict[str, bytes], tmp_path: Path) -> None:
    out = write(tmp_path / "out", {FIRST: drawn[FIRST]})
    assert draw(pipe, out, batch_size=6) == ["a green star"] * 2 + ["a ring"] * 2 + ["a cross"] * 2
    assert list(contents(out)) == [FIRST, "00000002-00000002.parquet", "00000003-00000004.parquet"]
    keys = [(row["number"], row["image"]) for file in sorted(out.iterdir()) for row in read(file)]
    assert sorted(set(keys)) == sorted(keys) and len(keys) == 10


@pytest.mark.parametrize("layout", [1, 2, 3, 5])
def test_ranks_share_the_work(pipe: Pipeline, drawn: dict[str, bytes], tmp_path: Path, layout: int) -> None:
    said: list[str] = []
    for rank in range(layout):
        draw(pipe, tmp_path / "out", say=said.append, ranks=Ranks(rank, layout))
    assert contents(tmp_path / "out") == drawn
    if layout == 2:
        assert any("2 of 5 prompts are not there yet" in line for line in said)


@pytest.mark.parametrize("spoil", [
    lambda data: data[:len(data) // 2], lambda data: b"", lambda data: data[:-1], lambda data: b"PAR1" + data[:200],
    lambda data: data[:len(data) // 3] + bytes([data[len(data) // 3] ^ 255]) + data[len(data) // 3 + 1:]],
    ids=["half", "empty", "end", "head", "flipped"])
def test_damage_is_named_and_drawn_anew(pipe: Pipeline, drawn: dict[str, bytes], tmp_path: Path,
                                        spoil: Callable[[bytes], bytes]) -> None:
    said: list[str] = []
    out = write(tmp_path / "out", {**drawn, SECOND: spoil(drawn[SECOND])})
    assert draw(pipe, out, say=said.append) == ["a green star"] * 2 + ["a ring"] * 2
    assert contents(out) == drawn
    assert len(said) == 1 and said[0].startswith(f"{out / SECOND} is damaged") and "drawing it anew" in said[0]


def test_rows_that_are_missing_or_there_twice(pipe: Pipeline, drawn: dict[str, bytes], tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(io.BytesIO(drawn[FIRST]))
    for part, name, message in ((table.slice(0, 3), FIRST, "must hold 2 pictures of every prompt"),
                                (table.slice(2, 2), "00000001-00000001.parquet", "holds prompt 2 a second time")):
        out, said, file = tmp_path / name, [], io.BytesIO()  # type: ignore[var-annotated]
        pyarrow.parquet.write_table(part, file, write_page_checksum=True)
        write(out, {**drawn, name: file.getvalue()})
        draw(pipe, out, say=said.append)
        assert contents(out) == drawn
        assert len(said) == 1 and message in said[0]


@pytest.mark.parametrize("change, message", [
    (lambda prompts: [prompts[0], FilePrompt("1", "two hearts", {"prompt": "two hearts"}, number=1), *prompts[2:]],
     "was drawn with another prompt ('a heart' there, 'two hearts' now)"),
    (lambda prompts: [prompts[0], FilePrompt("1", "a heart", {"prompt": "a heart"}, number=1), *prompts[2:]],
     "has other metadata ("),
    (lambda prompts: prompts[:3], f"{SECOND} (and 1 more) belongs to none of these prompts"),
])
def test_other_prompts_are_refused_or_drawn_anew(pipe: Pipeline, drawn: dict[str, bytes], tmp_path: Path,
                                                 change: Callable[[list[FilePrompt]], list[FilePrompt]],
                                                 message: str) -> None:
    out = write(tmp_path / "out", drawn)
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(pipe, out, change(PROMPTS))
    assert contents(out) == drawn
    draw(pipe, out, change(PROMPTS), redraw=True)
    draw(pipe, tmp_path / "fresh", change(PROMPTS))
    assert contents(out) == contents(tmp_path / "fresh")


def test_other_settings_are_refused_or_drawn_anew(pipe: Pipeline, drawn: dict[str, bytes], tmp_path: Path) -> None:
    out = write(tmp_path / "out", drawn)
    with pytest.raises(ValueError, match=rf"{FIRST} was drawn with another seed \(3 there, 4 now\) \(and 2 more"):
        draw(pipe, out, seed=4)
    assert contents(out) == drawn
    draw(pipe, out, seed=4, redraw=True, batch_size=2)
    draw(pipe, tmp_path / "fresh", seed=4, batch_size=2)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", [FIRST, "00000009-00000009.parquet", "mine.parquet"])
def test_files_of_others_are_never_removed(pipe: Pipeline, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"number": [1]}), tmp_path / "out" / name)
    before = contents(tmp_path / "out")
    for redraw in (False, True):
        with pytest.raises(ValueError, match="was not drawn here; move it" if redraw else "belongs to none"):
            draw(pipe, tmp_path / "out", redraw=redraw)
        assert contents(tmp_path / "out") == before


def test_what_is_no_file_stops_before_drawing(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / FIRST).mkdir()
    with pytest.raises(ValueError, match=rf"{FIRST} must be a file, or not there"):
        draw(pipe, tmp_path)


def test_no_rows_no_file(tmp_path: Path) -> None:
    layout: Layout = Parquet(tmp_path)
    assert layout.images == 1 and list(layout.encode([])) == []


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow, which is not installed: pip install '\.\[ray\]'"):
        Parquet(tmp_path)
