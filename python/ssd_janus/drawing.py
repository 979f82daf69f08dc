"""Draw prompts into folders: plain, or as the official evaluators of GenEval and DPG-Bench read them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL.Image import Image, new

from ssd_kernels import CachePlan

from .files import write_text
from .images import file_names, save_picture
from .pipeline import Pipeline, RunStats
from .progress import progress_bar
from .prompts import FilePrompt

Layout = Literal["geneval", "dpg"]


@dataclass(frozen=True)
class Drawn:
    """One picture: where it is (``file``), its ``prompt``, number among the prompt's (``image``), ``seed``, (width,
    height) and the statistics of the run that drew it."""

    file: Path
    prompt: str
    image: int
    seed: int
    size: tuple[int, int]
    run: RunStats


def draw(pipe: Pipeline, layout: Layout | None, out: Path, prompts: Sequence[FilePrompt], images_per_prompt: int,
         guidance_scale: float | None, seed: int, plan: CachePlan, batch_size: int) -> Iterator[Drawn]:
    """Draw every prompt, write the files, and show a progress bar.

    - None: ``01-a-red-circle.png`` ..., everything drawn anew;
    - ``geneval``: ``00000/samples/00000.png`` ... and ``00000/metadata.jsonl``, numbered by prompt and by picture
      (GenEval, ``evaluation/evaluate_images.py``);
    - ``dpg``: one ``NAME.png`` per prompt with its pictures in a square, row by row, 2 x 2 for the usual four
      (ELLA, ``dpg_bench/compute_dpg_bench.py``; its ``--resolution`` is the side of one picture).

    With a layout, batches of whole prompts are drawn one by one and those that are complete on disk are skipped. Every
    picture has its own seed, counted on from ``seed`` over all prompts, so that a run that goes on draws the same ones.

    Args: as the command line's ``generate``; ``batch_size`` counts pictures.
    """
    size = max(1, batch_size // images_per_prompt) if layout else len(prompts)
    batches = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
    names = file_names([prompt.text for prompt in prompts], images_per_prompt)
    if layout:
        batches = [batch for batch in batches
                   if not all(_last_file(layout, out, index, prompts[index]).exists() for index in batch)]
    if not batches:
        return
    with progress_bar("drawing") as report:
        for number, batch in enumerate(batches):
            pictures = pipe([prompts[index].text for index in batch], images_per_prompt, guidance_scale,
                            seed + batch.start * images_per_prompt, plan, batch_size=batch_size,
                            progress=lambda done, total: report(number * total + done, len(batches) * total))  # noqa: B023
            assert pipe.last_run is not None
            for place, index in enumerate(batch):
                own = slice(place * images_per_prompt, (place + 1) * images_per_prompt)
                if layout:
                    files = _write(layout, out, index, prompts[index], pictures[own])
                else:
                    files = [out / name for name in names[own]]
                    for file, picture in zip(files, pictures[own], strict=True):
                        save_picture(picture, file)
                for image, (file, picture) in enumerate(zip(files, pictures[own], strict=True)):
                    own_seed = seed + index * images_per_prompt + image
                    yield Drawn(file, prompts[index].text, image, own_seed, picture.size, pipe.last_run)


def _last_file(layout: Layout, out: Path, index: int, prompt: FilePrompt) -> Path:
    """The file of a prompt that is written last."""
    return out / f"{prompt.name}.png" if layout == "dpg" else out / f"{index:05d}" / "metadata.jsonl"


def _write(layout: Layout, out: Path, index: int, prompt: FilePrompt, pictures: Sequence[Image]) -> list[Path]:
    """Write one prompt's pictures; returns the file of each."""
    last = _last_file(layout, out, index, prompt)
    if layout == "dpg":
        save_picture(_square(pictures), last)
        return [last] * len(pictures)
    (last.parent / "samples").mkdir(parents=True, exist_ok=True)
    files = [last.parent / "samples" / f"{number:05d}.png" for number in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        save_picture(picture, file)
    write_text(last, json.dumps(prompt.metadata) + "\n")
    return files


def _square(pictures: Sequence[Image]) -> Image:
    side = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = new("RGB", (side * width, math.ceil(len(pictures) / side) * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % side * width, number // side * height))
    return sheet
