"""Folders of pictures, plain or as the official evaluators of GenEval and DPG-Bench read them: what is written, and
what is there already."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, new

from ssd_kernels.files import sweep
from ssd_kernels.reading import read_json, shown

from .images import file_names, png, read_facts, read_picture
from .prompts import FilePrompt

MAX_BYTES = 16 << 20  # of a file with metadata

Facts = Mapping[str, Any]  # what a picture was drawn with, JSON values


@dataclass(frozen=True)
class Painted:
    """The pictures of a prompt, before they are in files.

    Attributes:
        prompt: that they show.
        seed: of the first; the others count on.
        tokens: long [pictures, visual tokens].
        pictures: as many.
        facts: what they were drawn with.
    """

    prompt: FilePrompt
    seed: int
    tokens: torch.Tensor
    pictures: Sequence[Image]
    facts: Facts


class Layout:
    """How a folder of pictures looks, for people or for one evaluator.

    Attributes:
        out: the folder.
        images: pictures of each prompt, by default as many as the evaluators are used with.
        together: whether prompts that are drawn together share files.
    """

    usual_images = 4
    together = False

    def __init__(self, out: Path, images: int | None = None) -> None:
        self.out, self.images = out, self.usual_images if images is None else images

    def files(self, prompt: FilePrompt) -> list[Path]:
        """The PNG files of a prompt."""
        raise NotImplementedError

    def encode(self, painted: Sequence[Painted]) -> Iterator[tuple[Path, bytes]]:
        """The files of prompts that share them, of one prompt where none do, in the order to write them in."""
        for own in painted:
            for file, picture in zip(self.files(own.prompt), own.pictures, strict=True):
                yield file, png(picture, own.facts)

    def homes(self, painted: Sequence[Painted]) -> list[Path]:
        """The file of every picture that `encode` encodes."""
        return [file for own in painted for file in self.files(own.prompt)]

    def file_size(self, width: int, height: int) -> tuple[int, int]:
        """Pixels of a PNG file, from those of a picture."""
        return width, height

    def check(self, prompt: FilePrompt) -> None:
        """Raises ValueError: the evaluator cannot find this prompt's pictures."""

    def advice(self, prompts: Sequence[FilePrompt]) -> Iterator[str]:
        """What to know about evaluating these prompts before they are drawn."""
        return iter(())

    def damage(self, prompt: FilePrompt) -> str | None:
        """What is wrong with files of a prompt other than pictures; None if nothing."""
        return None

    def differences(self, prompt: FilePrompt) -> Iterator[str]:
        """How files of a prompt other than pictures differ from what would be written."""
        return iter(())

    def reopen(self, prompt: FilePrompt) -> None:
        """Mark a prompt as not complete before it is drawn anew."""

    def strangers(self, prompts: Sequence[FilePrompt]) -> Iterator[Path]:
        """What is there that the evaluator would read, and belongs to none of ``prompts``."""
        return iter(())

    def drawn_here(self, file: Path) -> bool:
        """Whether a file among `strangers` was written by this package, and may be removed."""
        return file.name == "metadata.jsonl" or _says_what_with(file)

    def examine(self, prompts: Sequence[FilePrompt], facts: Mapping[int, Facts], size: Callable[[], tuple[int, int]],
                own: Container[int] | None = None) -> Found:
        """What is there already: `examine`."""
        return examine(self, prompts, facts, size, own)

    def missing(self, prompts: Sequence[FilePrompt], facts: Mapping[int, Facts]) -> list[Path]:
        """What is not there yet: `missing`."""
        return missing(self, prompts, facts)


class Plain(Layout):
    """``01-a-red-circle.png`` ... for people. Prompts that are left out keep their place."""

    usual_images = 1

    def __init__(self, out: Path, images: int | None, prompts: Sequence[FilePrompt]) -> None:
        super().__init__(out, images)
        texts = {prompt.number: prompt.text for prompt in prompts}
        self._names = file_names([texts.get(number, "") for number in range(max(texts) + 1)], self.images)

    def files(self, prompt: FilePrompt) -> list[Path]:
        first = prompt.number * self.images
        return [self.out / name for name in self._names[first:first + self.images]]


class GenEval(Layout):
    """``00000/samples/00000.png`` ... and ``00000/metadata.jsonl``, numbered by prompt and by picture; the metadata are
    written last. The evaluator (``evaluation/evaluate_images.py``) reads every folder whose name is a number, in its
    samples every file whose name begins with a number and ".png", and fails where there are no metadata."""

    def _folder(self, prompt: FilePrompt) -> Path:
        return self.out / f"{prompt.number:05d}"

    def files(self, prompt: FilePrompt) -> list[Path]:
        return [self._folder(prompt) / "samples" / f"{image:05d}.png" for image in range(self.images)]

    def encode(self, painted: Sequence[Painted]) -> Iterator[tuple[Path, bytes]]:
        yield from super().encode(painted)
        for own in painted:
            yield self._folder(own.prompt) / "metadata.jsonl", (json.dumps(own.prompt.metadata) + "\n").encode()

    def advice(self, prompts: Sequence[FilePrompt]) -> Iterator[str]:
        lacking = [prompt for prompt in prompts if not {"tag", "include"} <= prompt.metadata.keys()]
        if lacking:
            yield (f'GenEval\'s evaluator needs "tag" and "include" for every prompt and fails without; {len(lacking)} '
                   f"of {len(prompts)} have none ({lacking[0].where}): they are in its evaluation_metadata.jsonl")

    def damage(self, prompt: FilePrompt) -> str | None:
        file = self._folder(prompt) / "metadata.jsonl"
        try:
            read_json(file, MAX_BYTES)
        except FileNotFoundError:
            return f"{file} is missing" if file.parent.exists() else None
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def differences(self, prompt: FilePrompt) -> Iterator[str]:
        with suppress(OSError, ValueError):
            found = read_json(self._folder(prompt) / "metadata.jsonl", MAX_BYTES)
            if found != prompt.metadata:
                yield f"metadata ({shown(found)} there, {shown(prompt.metadata)} now)"

    def reopen(self, prompt: FilePrompt) -> None:
        (self._folder(prompt) / "metadata.jsonl").unlink(missing_ok=True)

    def strangers(self, prompts: Sequence[FilePrompt]) -> Iterator[Path]:
        own = {self._folder(prompt).name: set(self.files(prompt)) for prompt in prompts}
        for folder in _entries(self.out):
            if not folder.name.isdigit() or not folder.is_dir():
                continue
            if folder.name not in own:
                yield folder
                continue
            yield from (file for file in _entries(folder / "samples")
                        if re.match(r"\d+\.png", file.name) and file not in own[folder.name])


class DPGBench(Layout):
    """One ``NAME.png`` per prompt with its pictures in a square, row by row, 2 x 2 for the usual four. The evaluator
    (ELLA, ``dpg_bench/compute_dpg_bench.py``) opens every file of the folder, and finds its questions by the name up to
    the first dot; its ``--resolution`` is the side of one picture."""

    def files(self, prompt: FilePrompt) -> list[Path]:
        return [self.out / f"{prompt.name}.png"]

    def encode(self, painted: Sequence[Painted]) -> Iterator[tuple[Path, bytes]]:
        for own in painted:
            width, height = own.pictures[0].size
            sheet = new("RGB", self.file_size(width, height))
            for number, picture in enumerate(own.pictures):
                sheet.paste(picture, (number % self._side * width, number // self._side * height))
            yield self.files(own.prompt)[0], png(sheet, own.facts)

    def homes(self, painted: Sequence[Painted]) -> list[Path]:
        return [file for own in painted for file in self.files(own.prompt) * len(own.pictures)]

    @property
    def _side(self) -> int:
        return math.ceil(math.sqrt(self.images))

    def file_size(self, width: int, height: int) -> tuple[int, int]:
        return self._side * width, math.ceil(self.images / self._side) * height

    def check(self, prompt: FilePrompt) -> None:
        if "." in prompt.name:
            raise ValueError(f"item_id must hold no dot, where DPG-Bench's evaluator would cut it, got "
                             f"{shown(prompt.name)}")

    def advice(self, prompts: Sequence[FilePrompt]) -> Iterator[str]:
        lacking = [prompt for prompt in prompts if not prompt.has_id]
        if lacking:
            yield (f"DPG-Bench's evaluator finds its questions by item_id; {len(lacking)} of {len(prompts)} prompts "
                   f"have none ({lacking[0].where}): they are in its dpg_bench.csv, or the file names of its prompts")
        if self.images != self.usual_images:
            readable = self.images if self.images < self.usual_images else 0
            yield (f"DPG-Bench's evaluator reads the {self.usual_images} pictures of a 2 x 2 sheet; for sheets of "
                   f"{self.images} " + (f"give it --pic-num {readable}" if readable else "it reads the wrong ones"))

    def strangers(self, prompts: Sequence[FilePrompt]) -> Iterator[Path]:
        own = {file for prompt in prompts for file in self.files(prompt)}
        yield from (file for file in _entries(self.out)
                    if file not in own and (file.suffix.lower() == ".png" or file.name.isdigit() and file.is_dir()))


LAYOUTS: dict[str, type[Layout]] = {"geneval": GenEval, "dpg": DPGBench}


@dataclass
class Found:
    """What a folder holds of what a call would write.

    Attributes:
        done: numbers of the prompts that need not be drawn.
        damaged: what is wrong with files that will be drawn anew, one line each.
        differing: what was drawn with other settings, one line each.
        elsewhere: the same of prompts that another process draws.
        strangers: what the evaluator would read beside.
        stale: files of what is damaged or differs that nothing will be written in the place of.
    """

    done: set[int] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    strangers: list[Path] = field(default_factory=list)
    stale: list[Path] = field(default_factory=list)


def examine(layout: Layout, prompts: Sequence[FilePrompt], facts: Mapping[int, Facts],
            size: Callable[[], tuple[int, int]], own: Container[int] | None = None) -> Found:
    """Look at every file that is there, pixels included.

    Args:
        layout: of the folder.
        prompts: to draw.
        facts: what each prompt would be drawn with, by its number.
        size: returns width and height of one picture.
        own: numbers of the prompts to be drawn here; None for all. Of the others, which another process may be writing,
            only what differs is found.

    Raises:
        ValueError: a folder or device has the name of a picture.
    """
    found = Found()
    for prompt in prompts:
        files = layout.files(prompt)
        there = [file for file in files if file.exists()]
        for file in there:
            if not file.is_file():
                raise ValueError(f"{file} must be a file, or not there")
        if own is not None and prompt.number not in own:
            found.elsewhere += _differing(layout, prompt, there, facts[prompt.number])
            continue
        sweep(files[0].parent)
        if not there:
            continue
        damaged = [problem] if (problem := layout.damage(prompt)) else []
        damaged += [f"{file} is missing" for file in files if file not in there]
        differing: list[str] = []
        for file in there:
            try:
                picture, old = read_picture(file)
            except (OSError, ValueError) as error:
                damaged.append(str(error) if str(file) in str(error) else f"{file}: {error}")
                continue
            if old is None:
                wanted = layout.file_size(*size())
                if picture.size != wanted:
                    damaged.append(f"{file} must be {wanted[0]} x {wanted[1]} pixels large, got "
                                   f"{picture.size[0]} x {picture.size[1]}")
                else:
                    differing.append(f"{file} does not say what it was drawn with")
            elif line := difference(file, old, facts[prompt.number]):
                differing.append(line)
            elif picture.size != layout.file_size(*size()):
                damaged.append(f"{file} has another size than when it was drawn")
        differing += [f"{there[0]} has other {text}" for text in layout.differences(prompt)]
        found.damaged += damaged
        found.differing += differing
        if not damaged and not differing:
            found.done.add(prompt.number)
    found.strangers = list(layout.strangers(prompts))
    return found


def missing(layout: Layout, prompts: Sequence[FilePrompt], facts: Mapping[int, Facts]) -> list[Path]:
    """The first file of every prompt that is not drawn yet, or was drawn with something else; pixels are not looked at.

    Args: as of `examine`.
    """
    return [files[0] for prompt in prompts for files in [layout.files(prompt)]
            if not all(file.is_file() for file in files) or layout.damage(prompt)
            or any(_differing(layout, prompt, files, facts[prompt.number]))]


def _differing(layout: Layout, prompt: FilePrompt, files: Sequence[Path], facts: Facts) -> Iterator[str]:
    """What differs, as far as files say without their pixels; damaged ones say nothing."""
    for file in files:
        with suppress(OSError, ValueError):
            old = read_facts(file)
            if line := f"{file} does not say what it was drawn with" if old is None else difference(file, old, facts):
                yield line
    if files:
        yield from (f"{files[0]} has other {text}" for text in layout.differences(prompt))


def difference(file: Path, old: Facts, wanted: Facts) -> str:
    """How what a picture was drawn with differs from what it would be drawn with; empty where it does not."""
    values = ", ".join(f"{name} ({shown(old.get(name))} there, {shown(wanted.get(name))} now)"
                       for name in {**wanted, **old} if old.get(name) != wanted.get(name))
    return f"{file} was drawn with another {values}" if values else ""


def check_removable(layout: Layout, strangers: Iterable[Path]) -> None:
    """Raise a ValueError if one of these files and folders was not drawn by this package."""
    for path in strangers:
        with suppress(FileNotFoundError):  # another process has found the same, and removes it
            for file in [path] if path.is_file() else [inside for inside in path.rglob("*") if not inside.is_dir()]:
                if not layout.drawn_here(file):
                    raise ValueError(f"{file} must not be there, where it would be read with the pictures, and was not "
                                     "drawn here; move it")


def remove(strangers: Iterable[Path]) -> list[Path]:
    """Remove files and folders, which other processes may be removing, too; returns those that were there."""
    found = []
    for path in strangers:
        found += [path] if path.exists() else []
        while path.is_dir():
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
        path.unlink(missing_ok=True)
    return found


def _says_what_with(file: Path) -> bool:
    try:
        return read_picture(file)[1] is not None
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        return False


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
