"""The evaluators' folders: what is written, what is kept, and what is refused."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_cli import run

from ssd_janus import Pipeline, drawing
from ssd_janus.images import FACTS, read_picture, save_picture
from ssd_janus.layouts import DPGBench, GenEval, Painted
from ssd_janus.pipeline import RunStats
from ssd_janus.prompts import read
from ssd_kernels import policies

GENEVAL = [{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
           {"tag": "single_object", "include": [{"class": "heart", "count": 1}], "prompt": "a heart"},
           {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a green star"}]


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    path = tmp_path / "geneval.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    return path


@pytest.fixture
def dpg(tmp_path: Path) -> Path:
    path = tmp_path / "dpg.csv"
    path.write_text("item_id,text\nstuff7,a heart\nstuff9,a red circle\n")
    return path


class Painter(Pipeline):
    """Draws at once: noise that depends on what real pictures depend on."""

    def generate_tokens(self, prompts: Any, count: int, guidance: Any, seed: int, plan: Any, **_: Any) -> torch.Tensor:
        self.last_run = RunStats(len(prompts) * count, 36, 2, 1.0, 1.0, 1.0, 1, 1, "cpu")
        tokens = []
        for index in range(len(prompts) * count):
            what = f"{prompts[index // count]} {seed + index} {self.guidance(guidance)} {plan.to_dict()}"
            tokens.append(list(random.Random(what).randbytes(36)))
        return torch.tensor(tokens)

    def decode(self, tokens: torch.Tensor) -> list[Image.Image]:
        return [Image.frombytes("RGB", (24, 24), random.Random(str(row)).randbytes(24 * 24 * 3))
                for row in tokens.tolist()]


@pytest.fixture(scope="module")
def real(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def pipe(real: Pipeline) -> Pipeline:
    return Painter(real.model, real.processor)


@pytest.fixture(scope="module")
def drawn(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in GenEval's layout, not to be changed."""
    return reference(pipe, tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def really_drawn(real: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference(real, tmp_path_factory.mktemp("really-drawn"))


def reference(pipe: Pipeline, path: Path) -> Path:
    prompts = path / "geneval.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    draw(pipe, path / "out", prompts)
    return path / "out"


def draw(pipe: Pipeline, out: Path, prompts: Path, say: Callable[[str], Any] = print, images: int = 2,
         guidance: float | None = None, seed: int = 0, budget: float | None = None, redraw: bool = False) -> list[str]:
    """The prompts of the pictures that are drawn, two at once per prompt."""
    layout = (DPGBench if prompts.suffix == ".csv" else GenEval)(out, images)
    plan = pipe.shape.full_plan() if budget is None else policies.window(pipe.shape, budget)
    return [drawn.prompt for drawn in drawing.draw(pipe, layout, out, read(prompts), images, guidance, seed, plan, 4,
                                                   redraw=redraw, say=say)]


def copy(drawn: Path, out: Path) -> Path:
    for path in drawn.rglob("*"):
        if path.is_file():
            (out / path.relative_to(drawn)).parent.mkdir(parents=True, exist_ok=True)
            (out / path.relative_to(drawn)).write_bytes(path.read_bytes())
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def evaluated(out: Path, layout: str) -> list[str]:
    """The files that the evaluator takes for pictures, as its code finds them."""
    if layout == "dpg":
        return sorted(os.listdir(out))
    found = []
    for folder in sorted(name for name in os.listdir(out) if (out / name).is_dir() and name.isdigit()):
        json.loads((out / folder / "metadata.jsonl").read_text())
        found += [f"{folder}/{name}" for name in sorted(os.listdir(out / folder / "samples"))
                  if re.match(r"\d+\.png", name)]
    return found


def test_geneval_layout(pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path) -> None:
    files = [f"{index:05d}/{image:05d}.png" for index in range(3) for image in range(2)]
    assert evaluated(drawn, "geneval") == files
    for index, metadata in enumerate(GENEVAL):
        # As GenEval's evaluator reads it: the whole file is one JSON object.
        assert json.loads((drawn / f"{index:05d}" / "metadata.jsonl").read_text()) == metadata
    picture, facts = read_picture(drawn / "00001" / "samples" / "00001.png")
    assert picture.size == (24, 24) and facts is not None
    assert [facts[name] for name in ("prompt", "seed", "images_per_prompt", "guidance_scale")] == ["a heart", 0, 2, 2.0]
    out = copy(drawn, tmp_path / "out")
    assert draw(pipe, out, geneval) == [] and contents(out) == contents(drawn)


def test_dpg_layout(real: Pipeline, dpg: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert len(draw(real, out, dpg, images=4)) == 8
    assert evaluated(out, "dpg") == ["stuff7.png", "stuff9.png"]
    sheet = Image.open(out / "stuff7.png")
    assert sheet.size == (48, 48)
    for index, picture in enumerate(real("a heart", 4)):
        left, top = index % 2 * 24, index // 2 * 24
        assert sheet.crop((left, top, left + 24, top + 24)).tobytes() == picture.tobytes()
    before = contents(out)
    (out / "stuff9.png").write_bytes(before["stuff9.png"][:-40])
    said: list[str] = []
    assert draw(real, out, dpg, said.append, images=4) == ["a red circle"] * 4
    assert contents(out) == before and len(said) == 1 and f"{out}/stuff9.png is damaged" in said[0]
    with pytest.raises(ValueError, match=r"images_per_prompt \(4 there, 3 now\)"):
        draw(real, out, dpg, images=3)


@pytest.mark.parametrize("options, message", [
    ({"images": 3}, "images_per_prompt (2 there, 3 now)"),
    ({"images": 1}, "images_per_prompt (2 there, 1 now)"),
    ({"seed": 5}, "seed (0 there, 5 now)"),
    ({"guidance": 3}, "guidance_scale (2.0 there, 3.0 now)"),
    ({"budget": 0.5}, "plan ('budget 1.0000, row buffer 0,"),
])
def test_other_settings_are_refused_or_drawn_anew(pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path,
                                                  options: dict[str, Any], message: str) -> None:
    out = copy(drawn, tmp_path / "out")
    with pytest.raises(ValueError, match=r"00000/samples/00000\.png was drawn with another .*--redraw") as caught:
        draw(pipe, out, geneval, **options)
    assert message in str(caught.value) and contents(out) == contents(drawn)
    draw(pipe, out, geneval, **options, redraw=True)
    draw(pipe, tmp_path / "fresh", geneval, **options)
    assert contents(out) == contents(tmp_path / "fresh") != contents(drawn)
    assert draw(pipe, out, geneval, **options, redraw=True) == []


def test_other_weights_and_dtypes(fresh: Any, pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        fresh.model.generation_head.vision_head.weight[0, 0] += 1
    out = copy(drawn, tmp_path / "out")
    for name in ("weights", "dtype"):
        model = fresh if name == "weights" else fresh.bfloat16()
        with pytest.raises(ValueError, match=rf"00000\.png was drawn with another .*{name} \('.*there"):
            draw(Painter(model, pipe.processor), out, geneval)


@pytest.mark.parametrize("name, value", [("top_k", 7), ("min_p", 0.25), ("repetition_penalty", 1.5)])
def test_other_sampling_of_the_models_own(fresh: Any, pipe: Pipeline, geneval: Path, tmp_path: Path, name: str,
                                          value: float) -> None:
    painter = Painter(fresh, pipe.processor)
    draw(painter, tmp_path / "out", geneval)
    setattr(fresh.generation_config, name, value)
    with pytest.raises(ValueError, match=r"00000\.png was drawn with another sampling \("):
        draw(painter, tmp_path / "out", geneval)


def test_the_dtype_is_the_language_models(fresh: Any, pipe: Pipeline, geneval: Path, tmp_path: Path) -> None:
    fresh.model.vision_model.bfloat16()
    draw(Painter(fresh, pipe.processor), tmp_path / "out", geneval)
    facts = read_picture(tmp_path / "out" / SAMPLE)[1]
    assert facts is not None and facts["dtype"] == "float32"


@pytest.mark.parametrize("options, backend", [({"guidance": math.nan}, "auto"), ({"guidance": -1.0}, "auto"),
                                              ({"seed": 2**63}, "auto"), ({"seed": 5}, "cudnn")])
def test_what_is_wrong_changes_nothing(real: Pipeline, really_drawn: Path, geneval: Path, tmp_path: Path,
                                       options: dict[str, Any], backend: str) -> None:
    """Neither what is to be drawn anew nor what is to be removed."""
    out = copy(really_drawn, tmp_path / "out")
    geneval.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL[:2]))
    with pytest.raises(ValueError, match="guidance_scale|seed|backend"):
        draw(Pipeline(real.model, real.processor, backend), out, geneval, **options, redraw=True)
    assert contents(out) == contents(really_drawn)


def other_text(lines: list[dict]) -> list[dict]:
    return [lines[0], lines[1] | {"prompt": "two hearts"}, lines[2]]


def other_metadata(lines: list[dict]) -> list[dict]:
    return [lines[0], lines[1], lines[2] | {"tag": "colors"}]


@pytest.mark.parametrize("change, message, anew", [
    (other_text, "00001/samples/00000.png was drawn with another prompt ('a heart' there, 'two hearts' now)", 2),
    (other_metadata, "00002/samples/00000.png has other metadata (", 2),
    (lambda lines: lines[:2], "00002 belongs to none of these prompts", 0),
    (lambda lines: lines[::-1], "00000/samples/00000.png was drawn with another prompt", 4),
    (lambda lines: [*lines, {"prompt": "a ring"}], None, 2),
], ids=["text", "metadata", "fewer", "order", "more"])
def test_other_prompts(pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path,
                       change: Callable[[list[dict]], list[dict]], message: str | None, anew: int) -> None:
    out = copy(drawn, tmp_path / "out")
    geneval.write_text("".join(json.dumps(line) + "\n" for line in change(GENEVAL)))
    if message is not None:
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(pipe, out, geneval)
        assert contents(out) == contents(drawn)
    assert len(draw(pipe, out, geneval, redraw=message is not None)) == anew
    draw(pipe, tmp_path / "fresh", geneval)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("layout, place", [("geneval", "00000/samples/00009.png"), ("geneval", "00009/a.txt"),
                                           ("geneval", "00000/samples/00000.png4kq1.tmp"), ("dpg", "mine.PNG")])
def test_pictures_of_others_are_never_removed(pipe: Pipeline, geneval: Path, dpg: Path, tmp_path: Path, layout: str,
                                              place: str) -> None:
    file = tmp_path / "out" / place
    file.parent.mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(file, "PNG")
    for redraw in (False, True):
        with pytest.raises(ValueError, match="was not drawn here; move it" if redraw else "belongs to none"):
            draw(pipe, tmp_path / "out", geneval if layout == "geneval" else dpg, redraw=redraw)
        assert list(contents(tmp_path / "out")) == [place]


def test_one_folder_for_both_layouts(pipe: Pipeline, drawn: Path, dpg: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"00000 \(and 2 more\) belongs to none"):
        draw(pipe, copy(drawn, tmp_path / "both"), dpg)


def spoil(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(change(file.read_bytes())) and None


SAMPLE, METADATA = "00001/samples/00001.png", "00001/metadata.jsonl"


@pytest.mark.parametrize("name, change, message", [
    (SAMPLE, spoil(lambda data: data[:len(data) // 2]), "is damaged"),
    (SAMPLE, spoil(lambda data: data[:-1]), "is damaged"),
    (SAMPLE, spoil(lambda data: b""), "is damaged"),
    (SAMPLE, spoil(lambda data: data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]), "is damaged"),
    (SAMPLE, lambda file: save_picture(Image.new("RGB", (12, 24)), file), "must be 24 x 24 pixels large, got 12 x 24"),
    (SAMPLE, lambda file: save_picture(Image.new("RGB", (12, 24)), file, read_picture(file)[1]), "another size"),
    (SAMPLE, lambda file: Image.new("RGB", (24, 24)).save(file, "GIF"), "is damaged"),
    (SAMPLE, Path.unlink, "is missing"),
    (METADATA, Path.unlink, "is missing"),
    (METADATA, spoil(lambda data: data[:9]), "metadata.jsonl"),
    (METADATA, spoil(lambda data: b""), "metadata.jsonl"),
])
def test_damage_is_named_and_drawn_anew(pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path, name: str,
                                        change: Callable[[Path], object], message: str) -> None:
    out = copy(drawn, tmp_path / "out")
    change(out / name)
    said: list[str] = []
    assert draw(pipe, out, geneval, said.append) == ["a heart"] * 2
    assert len(said) == 1 and str(out / name) in said[0] and message in said[0] and "drawing it anew" in said[0]
    assert contents(out) == contents(drawn)


def test_prompts_that_are_left_out_change_no_others(pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path) -> None:
    prompts = read(geneval)
    list(drawing.draw(pipe, GenEval(tmp_path / "out", 2), tmp_path / "out", prompts[::2], 2, None, 0,
                      pipe.shape.full_plan(), 4))
    assert contents(tmp_path / "out") == {
        name: data for name, data in contents(drawn).items() if not name.startswith("00001")}


def test_a_folder_that_is_being_redrawn_is_not_complete(pipe: Pipeline, drawn: Path, geneval: Path,
                                                        tmp_path: Path) -> None:
    out = copy(drawn, tmp_path / "out")
    for _ in drawing.draw(pipe, GenEval(out, 2), out, read(geneval), 2, None, 9, pipe.shape.full_plan(), 2,
                          redraw=True):
        with pytest.raises(FileNotFoundError):
            evaluated(out, "geneval")
        break
    assert draw(pipe, out, geneval, seed=9, redraw=True) == ["a heart"] * 2 + ["a green star"] * 2
    draw(pipe, tmp_path / "fresh", geneval, seed=9)
    assert contents(out) == contents(tmp_path / "fresh")


def test_pictures_that_say_nothing(pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path) -> None:
    """Of the right size, but who knows what with."""
    out = copy(drawn, tmp_path / "out")
    for text in (None, "[]"):
        info = PngInfo()
        if text is not None:
            info.add_text(FACTS, text)
        Image.open(drawn / SAMPLE).save(out / SAMPLE, "PNG", pnginfo=info)
        with pytest.raises(ValueError, match=rf"{out / SAMPLE} does not say what it was drawn with"):
            draw(pipe, out, geneval)
    assert draw(pipe, out, geneval, redraw=True) == ["a heart"] * 2
    assert contents(out) == contents(drawn)


def test_what_is_no_file_stops_before_drawing(pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path) -> None:
    out = copy(drawn, tmp_path / "out")
    (out / SAMPLE).unlink()
    os.mkfifo(out / SAMPLE)
    with pytest.raises(ValueError, match=rf"{out / SAMPLE} must be a file"):
        draw(pipe, out, geneval)


def hang(at: int, then: Callable[[], object]) -> Callable[[int], None]:
    """`os.fsync` before which, when the file of this number is full but has no name yet, something else happens."""
    fsync, count = os.fsync, 0

    def slow(handle: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            then()
        fsync(handle)

    return slow


UNFINISHED = ["00000/metadata.jsonl", "00000/samples/00000.png", "00000/samples/00001.png", "00001/samples/00000.png"]


def test_what_a_killed_run_leaves(pipe: Pipeline, drawn: Path, geneval: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes the pictures of a run, and is killed while it writes the fourth."""
    out, prompts = tmp_path / "out", read(geneval)
    pictures = [[read_picture(drawn / f"{index:05d}/samples/{image:05d}.png") for image in range(2)]
                for index in range(2)]
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            monkeypatch.setattr(os, "fsync", hang(5, lambda: (os.write(writer, b"."), time.sleep(60))))
            for prompt, own in zip(prompts, pictures, strict=False):
                painted = Painted(prompt, 0, torch.zeros(2, 36), [picture for picture, _ in own], own[0][1] or {})
                drawing.Files(list(GenEval(out, 2).encode([painted])), []).write()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(reader)
    assert list(contents(out)) == UNFINISHED
    with pytest.raises(FileNotFoundError):
        evaluated(out, "geneval")  # which says that the run is not complete
    said: list[str] = []
    assert len(draw(pipe, out, geneval, said.append)) == 4
    assert [line.split("/out/")[1] for line in said] == [
        "00001/metadata.jsonl is missing: drawing it anew", "00001/samples/00001.png is missing: drawing it anew"]
    assert contents(out) == contents(drawn)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_stop(folder: Path, really_drawn: Path, geneval: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    def stop() -> None:
        assert signal.getsignal(number) is not signal.SIG_DFL
        signal.raise_signal(number)

    command = ("generate", "--prompts-file", geneval, "--layout", "geneval", "--out", tmp_path / "out",
               "--model", folder, "--images-per-prompt", 2, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", hang(5, stop))
        result = run(*command)
    assert result.exit_code == 128 + number and result.stderr.endswith("stopped\n") and "Traceback" not in result.output
    assert list(contents(tmp_path / "out")) == UNFINISHED
    result = run(*command)
    assert result.exit_code == 0 and "4 pictures drawn, the other 2 were there already\n" in result.stderr
    assert contents(tmp_path / "out") == contents(really_drawn)


def test_refusing_and_redrawing_by_command(folder: Path, really_drawn: Path, geneval: Path, tmp_path: Path) -> None:
    out = copy(really_drawn, tmp_path / "out")
    command = ("generate", "--prompts-file", geneval, "--layout", "geneval", "--out", out, "--model", folder,
               "--images-per-prompt", 2, "--seed", 7)
    result = run(*command)
    assert result.exit_code == 2 and "seed (0 there, 7 now)" in result.stderr and "(and 5 more differ)" in result.stderr
    result = run(*command, "--redraw")
    assert result.exit_code == 0 and "... and 1 more like these" in result.stderr
    assert len([line for line in result.stderr.splitlines() if "seed (0 there, 7 now): drawing it anew" in line]) == 5
