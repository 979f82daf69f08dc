"""Draw prompts into folders: plain, or as the official evaluators of GenEval and DPG-Bench read them."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssd_kernels import CachePlan

from .checkpoints import fingerprint
from .engine import sampling_settings
from .files import write_atomically
from .layouts import Facts, Found, Layout, Painted, Plain, check_removable, remove
from .pipeline import Pipeline, RunStats
from .progress import ProgressCallback, progress_bar
from .prompts import FilePrompt
from .ranks import ALONE, Ranks, still_missing

SAID = 5  # lines about one thing

Unit = tuple[FilePrompt, ...]  # prompts of following numbers, whose pictures are drawn in one call
# Who draws: called with the work, its units, numbers of prompts whose files stay, and whom to report steps to; yields
# the files of every unit, in any order.
Painters = Callable[["Drawing", Sequence[Unit], Container[int], ProgressCallback], Iterator[Iterable["Files"]]]


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


@dataclass(frozen=True)
class Files:
    """Files that belong together, in the order to write them in, and the pictures in them."""

    contents: Sequence[tuple[Path, bytes]]
    drawn: Sequence[Drawn]

    def write(self) -> Sequence[Drawn]:
        """Write them, each whole or not at all; returns the pictures.

        Raises:
            OSError: a file cannot be written; the message names it.
        """
        for path, data in self.contents:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write(data))  # noqa: B023
        return self.drawn


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
    def settings(self) -> Facts:
        """What all pictures are drawn with."""
        digest = hashlib.blake2b(json.dumps(self.plan.to_dict(), sort_keys=True).encode(), digest_size=6).hexdigest()
        stored = "" if self.plan.kv_format == "auto" else f"{self.plan.kv_format}, "
        budget = self.plan.budget(self.pipe.shape.num_visual_tokens)
        return {"images_per_prompt": self.layout.images, "seed": self.seed,
                "guidance_scale": self.pipe.guidance(self.guidance_scale),
                "plan": f"budget {budget:.4f}, row buffer {self.plan.row_buffer}, {stored}{digest}",
                "weights": fingerprint(self.pipe.model), "dtype": str(self.pipe.dtype).removeprefix("torch."),
                "sampling": sampling_settings(self.pipe.model)}

    def facts(self, prompt: FilePrompt) -> Facts:
        """What the pictures of a prompt are drawn with."""
        return {"prompt": prompt.text, "place": prompt.number, **self.settings}

    def paint(self, unit: Unit, keep: Container[int] = (),
              progress: ProgressCallback = lambda done, total: None) -> Iterator[Files]:
        """Draw a unit; nothing is written. The files that belong together are made one after the other.

        Args:
            unit: one of `units`.
            keep: numbers of prompts whose files are left as they are.
            progress: ``progress(done_steps, all_steps)`` of this unit.
        """
        tokens = self.pipe.generate_tokens(
            [prompt.text for prompt in unit], self.layout.images, self.guidance_scale, self._seed(unit[0]), self.plan,
            batch_size=self.batch_size, progress=progress)
        assert self.pipe.last_run is not None
        began = time.perf_counter()
        pictures = self.pipe.decode(tokens)
        run = replace(self.pipe.last_run, decode_seconds=time.perf_counter() - began)
        images = [slice(place * self.layout.images, (place + 1) * self.layout.images) for place in range(len(unit))]
        painted = [Painted(prompt, self._seed(prompt), tokens[own], pictures[own], self.facts(prompt))
                   for prompt, own in zip(unit, images, strict=True) if prompt.number not in keep]
        return self._files([painted] if self.layout.together else [[own] for own in painted], run)

    def _files(self, groups: Sequence[Sequence[Painted]], run: RunStats) -> Iterator[Files]:
        for group in groups:
            homes = iter(self.layout.homes(group))
            drawn = [Drawn(next(homes), own.prompt.text, image, own.seed + image, picture.size, run)
                     for own in group for image, picture in enumerate(own.pictures)]
            yield Files(list(self.layout.encode(group)), drawn)

    def examine(self, own: Container[int] | None = None) -> Found:
        """What is there already, as `layouts.examine` finds it."""

        @functools.cache
        def size() -> tuple[int, int]:
            return self.pipe.decode(torch.zeros(1, self.pipe.shape.num_visual_tokens, dtype=torch.long))[0].size

        return self.layout.examine(self.prompts, self._all_facts, size, own)

    def missing(self) -> list[Path]:
        """The first file of every prompt that is not drawn yet; empty when the work is done. Reads no pixels."""
        return self.layout.missing(self.prompts, self._all_facts)

    @property
    def _all_facts(self) -> dict[int, Facts]:
        return {prompt.number: self.facts(prompt) for prompt in self.prompts}

    def _seed(self, prompt: FilePrompt) -> int:
        return self.seed + prompt.number * self.layout.images


def draw(pipe: Pipeline, layout: Layout | None, out: Path, prompts: Sequence[FilePrompt], images_per_prompt: int,
         guidance_scale: float | None, seed: int, plan: CachePlan, batch_size: int, *, redraw: bool = False,
         say: Callable[[str], Any] = lambda line: None, ranks: Ranks = ALONE,
         painters: Painters | None = None) -> Iterator[Drawn]:
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
        painters: who draws; None for this process.

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
        _check(work.layout, found, redraw)
    _say_some([f"{line}: drawing it anew" for line in (*found.damaged, *found.differing)], say)
    todo = [unit for unit in own if not found.done.issuperset(prompt.number for prompt in unit)]
    if not todo:
        _make_room(work.layout, [], found, say)
    with progress_bar("drawing", ranks) as report:
        for number, painted in enumerate((painters or _here)(work, todo, found.done, report)):
            if number == 0:  # the arguments were right, and there is something to write
                _make_room(work.layout, [prompt for each in todo for prompt in each], found, say)
            for files in painted:
                yield from files.write()
    if not ranks.alone and (left := work.missing()):
        say(still_missing([str(file) for file in left], len(prompts), "prompts"))


def _here(work: Drawing, todo: Sequence[Unit], keep: Container[int],
          report: ProgressCallback) -> Iterator[Iterator[Files]]:
    """`Painters` of this process."""
    for number, unit in enumerate(todo):
        yield work.paint(unit, keep, lambda done, total: report(number * total + done, len(todo) * total))  # noqa: B023


def _check(layout: Layout, found: Found, redraw: bool) -> None:
    """Raises a ValueError if the call must not go on."""
    differing = found.differing + found.elsewhere
    if differing and not redraw:
        more = f" (and {len(differing) - 1} more differ)" if len(differing) > 1 else ""
        raise ValueError(f"{differing[0]}{more}; --redraw draws what differs anew, or choose another folder")
    if found.strangers and not redraw:
        more = f" (and {len(found.strangers) - 1} more)" if len(found.strangers) > 1 else ""
        raise ValueError(f"{found.strangers[0]}{more} belongs to none of these prompts and pictures, but would "
                         "be read with them; --redraw removes it, or choose another folder")
    check_removable(layout, found.strangers)


def _make_room(layout: Layout, prompts: Sequence[FilePrompt], found: Found, say: Callable[[str], Any]) -> None:
    """Remove what must not be beside the new pictures, and mark as open what is not drawn yet."""
    for path in remove(found.strangers):
        say(f"removed {path}")
    remove(found.stale)
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
