"""Draw prompts into folders: plain, or as the official evaluators of GenEval and DPG-Bench read them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssd_kernels import CachePlan

from .checkpoints import fingerprint
from .engine import sampling_settings
from .images import file_names, save_picture
from .layouts import Facts, Found, Layout, check_removable, examine, remove
from .pipeline import Pipeline, RunStats
from .progress import progress_bar
from .prompts import FilePrompt

SAID = 5  # lines about one thing


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
         guidance_scale: float | None, seed: int, plan: CachePlan, batch_size: int, *, redraw: bool = False,
         say: Callable[[str], Any] = lambda line: None) -> Iterator[Drawn]:
    """Draw every prompt, write the files, and show a progress bar.

    Without a layout, ``01-a-red-circle.png`` ... are drawn anew. With a layout, batches of whole
    prompts are drawn one by one. Every picture remembers what it was drawn with; those that are there already, whole
    and drawn with the same, are kept, damaged ones are drawn anew. Device and backend do not count: they differ in
    rounding only.

    Every picture has its own seed, counted on from ``seed`` over all prompts, so that a run that goes on draws the same
    ones.

    Args: as the command line's ``generate``, and

        layout: of the folder ``out``, with as many pictures of each prompt.
        prompts: at least one, by their numbers.
        batch_size: pictures at once.
        redraw: draw anew what was drawn with other settings, and remove what was drawn for other prompts.
        say: called with lines about what is replaced, damaged, or left alone.

    Raises:
        ValueError: without ``redraw``, the folder holds pictures that were drawn with other settings or for other
            prompts; the message names them. Or another argument is wrong. Nothing is changed then.
        OSError: a file cannot be written; the message names it.
    """
    settings = {"images_per_prompt": images_per_prompt, "seed": seed, **_settings(pipe, plan, guidance_scale)}
    facts = {prompt.number: {"prompt": prompt.text, "place": prompt.number, **settings} for prompt in prompts}
    if layout is None:
        names = _plain_names(out, prompts, images_per_prompt)
        _say_what_is_there(out, [name for own in names.values() for name in own], say)
        found = Found()
        size = prompts[-1].number + 1  # all at once

        def write(prompt: FilePrompt, pictures: Sequence[Any], own_facts: Facts) -> list[Path]:
            out.mkdir(parents=True, exist_ok=True)
            for file, picture in zip(names[prompt.number], pictures, strict=True):
                save_picture(picture, file, own_facts)
            return names[prompt.number]
    else:
        found = _find(pipe, layout, prompts, facts, redraw, say)
        size = max(1, batch_size // images_per_prompt)
        write = layout.write
    batches = [batch for batch in _batches(prompts, size)
               if not found.done.issuperset(prompt.number for prompt in batch)]
    if not batches:
        _make_room(layout, prompts, found, say)
        return
    with progress_bar("drawing") as report:
        for number, batch in enumerate(batches):
            pictures = pipe([prompt.text for prompt in batch], images_per_prompt, guidance_scale,
                            seed + batch[0].number * images_per_prompt, plan, batch_size=batch_size,
                            progress=lambda done, total: report(number * total + done, len(batches) * total))  # noqa: B023
            assert pipe.last_run is not None
            if number == 0:  # the arguments were right, and there is something to write
                _make_room(layout, prompts, found, say)
            for place, prompt in enumerate(batch):
                if prompt.number in found.done:
                    continue
                own = pictures[place * images_per_prompt:(place + 1) * images_per_prompt]
                files = write(prompt, own, facts[prompt.number])
                for image, (file, picture) in enumerate(zip(files, own, strict=True)):
                    own_seed = seed + prompt.number * images_per_prompt + image
                    yield Drawn(file, prompt.text, image, own_seed, picture.size, pipe.last_run)


def _settings(pipe: Pipeline, plan: CachePlan, guidance_scale: float | None) -> dict[str, Any]:
    """What pictures depend on, besides their prompts and seeds."""
    digest = hashlib.blake2b(json.dumps(plan.to_dict(), sort_keys=True).encode(), digest_size=6).hexdigest()
    stored = "" if plan.kv_format == "auto" else f"{plan.kv_format}, "
    return {"guidance_scale": pipe.guidance(guidance_scale),
            "plan": f"budget {plan.budget(pipe.shape.num_visual_tokens):.4f}, row buffer {plan.row_buffer}, {stored}"
                    f"{digest}",
            "weights": fingerprint(pipe.model), "dtype": str(pipe.dtype).removeprefix("torch."),
            "sampling": sampling_settings(pipe.model)}


def _find(pipe: Pipeline, layout: Layout, prompts: Sequence[FilePrompt], facts: Mapping[int, Facts], redraw: bool,
          say: Callable[[str], Any]) -> Found:
    """What is there, unless the call must not go on."""

    @functools.cache
    def size() -> tuple[int, int]:
        return pipe.decode(torch.zeros(1, pipe.shape.num_visual_tokens, dtype=torch.long))[0].size

    found = examine(layout, prompts, facts, size)
    if found.differing and not redraw:
        more = f" (and {len(found.differing) - 1} more differ)" if len(found.differing) > 1 else ""
        raise ValueError(f"{found.differing[0]}{more}; --redraw draws what differs anew, or choose another folder")
    if found.strangers and not redraw:
        more = f" (and {len(found.strangers) - 1} more)" if len(found.strangers) > 1 else ""
        raise ValueError(f"{found.strangers[0]}{more} belongs to none of these prompts and pictures, but the evaluator "
                         "would read it; --redraw removes it, or choose another folder")
    check_removable(found.strangers)
    _say_some([f"{line}: drawing it anew" for line in (*found.damaged, *found.differing)], say)
    return found


def _make_room(layout: Layout | None, prompts: Sequence[FilePrompt], found: Found, say: Callable[[str], Any]) -> None:
    """Remove what must not be beside the new pictures, and mark as open what is not drawn yet."""
    remove(found.strangers)
    for path in found.strangers:
        say(f"removed {path}")
    for prompt in prompts:
        if layout is not None and prompt.number not in found.done:
            layout.reopen(prompt)


def _plain_names(out: Path, prompts: Sequence[FilePrompt], images: int) -> dict[int, list[Path]]:
    """The files of each prompt, by its number; prompts that are left out keep their place."""
    texts = {prompt.number: prompt.text for prompt in prompts}
    names = file_names([texts.get(number, "") for number in range(max(texts) + 1)], images)
    return {number: [out / name for name in names[number * images:(number + 1) * images]] for number in texts}


def _say_what_is_there(out: Path, files: Sequence[Path], say: Callable[[str], Any]) -> None:
    """What drawing into a folder without a layout replaces, and what stays beside it."""
    _say_some([f"{file} is there and will be replaced" for file in files if file.exists()], say)
    others = sorted(set(out.glob("*.png")) - set(files)) if out.is_dir() else []
    if others:
        say(f"{out} also holds {len(others)} other picture{'s' * (len(others) > 1)}, such as {others[0].name}: "
            f"{'they stay' if len(others) > 1 else 'it stays'}")


def _say_some(lines: Sequence[str], say: Callable[[str], Any]) -> None:
    for line in lines[:SAID]:
        say(line)
    if len(lines) > SAID:
        say(f"... and {len(lines) - SAID} more like these")


def _batches(prompts: Sequence[FilePrompt], size: int) -> Iterator[list[FilePrompt]]:
    """At most ``size`` prompts each, of following numbers, and the same ones in every run."""
    batch: list[FilePrompt] = []
    for prompt in prompts:
        if batch and (prompt.number != batch[-1].number + 1 or len(batch) == size):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch
