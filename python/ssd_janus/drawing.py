"""Draw prompts into folders: plain, or as the official evaluators of GenEval and DPG-Bench read them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from ssd_kernels import CachePlan

from .checkpoints import fingerprint
from .engine import sampling_settings
from .layouts import Facts, Found, Layout, Plain, check_removable, examine, missing, remove
from .pipeline import Pipeline, RunStats
from .progress import ProgressCallback, progress_bar
from .prompts import FilePrompt
from .ranks import ALONE, Ranks, still_missing

SAID = 5  # lines about one thing

Unit = tuple[FilePrompt, ...]  # prompts of following numbers, whose pictures are drawn in one call


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


def units(prompts: Sequence[FilePrompt], images_per_prompt: int, batch_size: int) -> list[Unit]:
    """The units of work that prompts make, the same ones in every run: as many whole prompts as fit into a batch.

    Args: as of `draw`.
    """
    size = max(1, batch_size // images_per_prompt)
    found: list[list[FilePrompt]] = []
    for prompt in prompts:
        if not found or prompt.number != found[-1][-1].number + 1 or len(found[-1]) == size:
            found.append([])
        found[-1].append(prompt)
    return [tuple(unit) for unit in found]


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and where to: done unit by unit, in any order and in any process.

    Every picture has its own seed, counted on from ``seed`` over all prompts, and its file remembers what it was drawn
    with. Device and backend do not count: they differ in rounding only.

    Attributes: as the arguments of `draw`.
    """

    pipe: Pipeline
    layout: Layout
    prompts: Sequence[FilePrompt]
    guidance_scale: float | None
    seed: int
    plan: CachePlan
    batch_size: int

    @property
    def units(self) -> list[Unit]:
        """All units of work."""
        return units(self.prompts, self.layout.images, self.batch_size)

    @functools.cached_property
    def facts(self) -> dict[int, Facts]:
        """What the pictures of every prompt are drawn with, by its number."""
        digest = hashlib.blake2b(json.dumps(self.plan.to_dict(), sort_keys=True).encode(), digest_size=6).hexdigest()
        stored = "" if self.plan.kv_format == "auto" else f"{self.plan.kv_format}, "
        budget = self.plan.budget(self.pipe.shape.num_visual_tokens)
        settings = {
            "images_per_prompt": self.layout.images, "seed": self.seed,
            "guidance_scale": self.pipe.guidance(self.guidance_scale),
            "plan": f"budget {budget:.4f}, row buffer {self.plan.row_buffer}, {stored}{digest}",
            "weights": fingerprint(self.pipe.model), "dtype": str(self.pipe.dtype).removeprefix("torch."),
            "sampling": sampling_settings(self.pipe.model)}
        return {prompt.number: {"prompt": prompt.text, "place": prompt.number, **settings} for prompt in self.prompts}

    def paint(self, unit: Unit, progress: ProgressCallback = lambda done, total: None) -> list[Image]:
        """The pictures of a unit, prompt by prompt; nothing is written.

        Args:
            unit: one of `units`.
            progress: ``progress(done_steps, all_steps)`` of this unit.
        """
        return self.pipe([prompt.text for prompt in unit], self.layout.images, self.guidance_scale, self._seed(unit[0]),
                         self.plan, batch_size=self.batch_size, progress=progress)

    def write(self, unit: Unit, pictures: Sequence[Image], keep: Container[int] = ()) -> Iterator[Drawn]:
        """Write the files of a unit that was just painted, each whole or not at all.

        Args:
            unit: one of `units`.
            pictures: of `paint`.
            keep: numbers of prompts whose files are left as they are.
        """
        run, images = self.pipe.last_run, self.layout.images
        assert run is not None
        for place, prompt in enumerate(unit):
            if prompt.number in keep:
                continue
            own = pictures[place * images:(place + 1) * images]
            files = self.layout.write(prompt, own, self.facts[prompt.number])
            for image, (file, picture) in enumerate(zip(files, own, strict=True)):
                yield Drawn(file, prompt.text, image, self._seed(prompt) + image, picture.size, run)

    def examine(self, own: Container[int] | None = None) -> Found:
        """What is there already, as `layouts.examine` finds it."""

        @functools.cache
        def size() -> tuple[int, int]:
            return self.pipe.decode(torch.zeros(1, self.pipe.shape.num_visual_tokens, dtype=torch.long))[0].size

        return examine(self.layout, self.prompts, self.facts, size, own)

    def missing(self) -> list[Path]:
        """The first file of every prompt that is not drawn yet; empty when the work is done. Reads no pixels."""
        return missing(self.layout, self.prompts, self.facts)

    def _seed(self, prompt: FilePrompt) -> int:
        return self.seed + prompt.number * self.layout.images


def draw(pipe: Pipeline, layout: Layout | None, out: Path, prompts: Sequence[FilePrompt], images_per_prompt: int,
         guidance_scale: float | None, seed: int, plan: CachePlan, batch_size: int, *, redraw: bool = False,
         say: Callable[[str], Any] = lambda line: None, ranks: Ranks = ALONE) -> Iterator[Drawn]:
    """Draw every prompt, write the files, and show a progress bar.

    Pictures that are there already, whole and drawn with the same, are kept; damaged ones are drawn anew. Only a
    process that is alone and has no layout draws everything anew, into ``01-a-red-circle.png`` and so on.

    Args: as the command line's ``generate``, and

        layout: of the folder ``out``, with as many pictures of each prompt.
        prompts: at least one, by their numbers.
        batch_size: pictures at once.
        redraw: draw anew what was drawn with other settings, and remove what was drawn for other prompts.
        say: called with lines about what is replaced, damaged, or left alone.
        ranks: which of several processes this is; each draws its own units of the work and says what is missing when it
            is done.

    Raises:
        ValueError: without ``redraw``, a folder with a layout holds pictures that were drawn with other settings or for
            other prompts; the message names them. Or another argument is wrong. Nothing is changed then.
        OSError: a file cannot be written; the message names it.
    """
    work = Drawing(pipe, layout or Plain(out, images_per_prompt, prompts), prompts, guidance_scale, seed, plan,
                   batch_size)
    own = ranks.own(work.units)
    numbers = {prompt.number for unit in own for prompt in unit}
    if layout is None:
        _say_what_is_there(out, [file for prompt in prompts for file in work.layout.files(prompt)], say, ranks)
        found = Found() if ranks.alone else work.examine(numbers)
    else:
        found = work.examine(numbers)
        _check(found, redraw)
    _say_some([f"{line}: drawing it anew" for line in (*found.damaged, *found.differing)], say)
    todo = [unit for unit in own if not found.done.issuperset(prompt.number for prompt in unit)]
    if not todo:
        _make_room(work.layout, [], found, say)
    with progress_bar("drawing", ranks) as report:
        for number, unit in enumerate(todo):
            pictures = work.paint(unit, lambda done, total: report(number * total + done, len(todo) * total))  # noqa: B023
            if number == 0:  # the arguments were right, and there is something to write
                _make_room(work.layout, [prompt for each in todo for prompt in each], found, say)
            yield from work.write(unit, pictures, found.done)
    if not ranks.alone and (left := work.missing()):
        say(still_missing([str(file) for file in left], len(prompts), "prompts"))


def _check(found: Found, redraw: bool) -> None:
    """Raises a ValueError if the call must not go on."""
    differing = found.differing + found.elsewhere
    if differing and not redraw:
        more = f" (and {len(differing) - 1} more differ)" if len(differing) > 1 else ""
        raise ValueError(f"{differing[0]}{more}; --redraw draws what differs anew, or choose another folder")
    if found.strangers and not redraw:
        more = f" (and {len(found.strangers) - 1} more)" if len(found.strangers) > 1 else ""
        raise ValueError(f"{found.strangers[0]}{more} belongs to none of these prompts and pictures, but the evaluator "
                         "would read it; --redraw removes it, or choose another folder")
    check_removable(found.strangers)


def _make_room(layout: Layout, prompts: Sequence[FilePrompt], found: Found, say: Callable[[str], Any]) -> None:
    """Remove what must not be beside the new pictures, and mark as open what is not drawn yet."""
    for path in remove(found.strangers):
        say(f"removed {path}")
    for prompt in prompts:
        if prompt.number not in found.done:
            layout.reopen(prompt)


def _say_what_is_there(out: Path, files: Sequence[Path], say: Callable[[str], Any], ranks: Ranks) -> None:
    """What drawing into a folder without a layout replaces, and what stays beside it."""
    if ranks.alone:
        _say_some([f"{file} is there and will be replaced" for file in files if file.exists()], say)
    others = sorted(set(out.glob("*.png")) - set(files)) if out.is_dir() else []
    if others and ranks.number == 0:
        say(f"{out} also holds {len(others)} other picture{'s' * (len(others) > 1)}, such as {others[0].name}: "
            f"{'they stay' if len(others) > 1 else 'it stays'}")


def _say_some(lines: Sequence[str], say: Callable[[str], Any]) -> None:
    for line in lines[:SAID]:
        say(line)
    if len(lines) > SAID:
        say(f"... and {len(lines) - SAID} more like these")
