"""Prompts, from the command line and from files that may hold anything."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_kernels.reading import naming, parse_json, read_text, shown

if TYPE_CHECKING:
    from .pipeline import Pipeline

MAX_BYTES = 64 << 20  # of a file
LONGEST = 100_000  # characters of a prompt; every model's limit is below
LONGEST_NAME = 250  # bytes; file systems take 255, with ".png"
# Windows has devices of these names in every folder.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)

Skip = Callable[[str], Any]


@dataclass(frozen=True)
class FilePrompt:
    """One prompt.

    Attributes:
        name: file name of its pictures in DPG-Bench's layout.
        text: the prompt.
        metadata: GenEval's, at least {"prompt": text}.
        has_id: whether the name comes from the file, and is no mere number.
        number: its place among the prompts, from 0. Prompts that are left out keep theirs.
        where: what messages call it, such as ``prompts.txt, line 3``.
    """

    name: str
    text: str
    metadata: dict[str, Any]
    has_id: bool = False
    number: int = 0
    where: str = "prompt"


def gather(texts: Sequence[str] | None, path: Path | None, skip: Skip | None = None) -> list[FilePrompt]:
    """Prompts from the command line or from a file.

    Args: ``skip`` as in `read`.

    Raises:
        ValueError: both or neither are given; otherwise as `read`.
    """
    if bool(texts) == (path is not None):
        raise ValueError(f"give prompts or --prompts-file, got {'both' if texts else 'neither'}")
    if path is not None:
        return read(path, skip)
    entries: Iterator[Entry] = ((f"prompt {number}", None, text) for number, text in enumerate(texts or (), 1))
    return _collect("the command line", entries, skip)


def shapes_suite() -> list[dict[str, Any]]:
    """The included prompts of the shapes world, GenEval metadata each: "tag", "include", "exclude", "prompt"."""
    from ssd_shapes.suite import load

    return load()


def calibration(count: int) -> list[str]:
    """Prompts of the shapes world to profile with; none names a combination held out for its suite."""
    import numpy as np

    from ssd_shapes import world

    generator = np.random.default_rng(1)
    families = [name for name in world.FAMILIES if name != "single_object"]
    return [world.draw_prompt(generator, "train", families[index % len(families)]).text for index in range(count)]


def read(path: Path, skip: Skip | None = None) -> list[FilePrompt]:
    """Read prompts from a file or folder. Lines end at ``\\n`` or ``\\r\\n`` and nowhere else.

    - ``.jsonl``: one JSON object with a "prompt" per line, such as GenEval's ``evaluation_metadata.jsonl``;
    - ``.csv`` with columns ``item_id`` and ``text``, such as DPG-Bench's ``dpg_bench.csv`` (several lines of one item
      are one prompt);
    - a folder of ``.txt`` files, one prompt each, such as DPG-Bench's ``prompts``;
    - any other file: one prompt per line.

    Args:
        path: the file or folder, UTF-8; suffixes in any case.
        skip: called with a message for every prompt that is wrong, which is then left out. None raises the first one.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if there is none.
        ValueError: the file is no such file, or too large, holds no prompts, or a prompt is wrong; the message names
            file and line.
    """
    if path.is_dir():
        return _collect(str(path), _folder(path), skip)
    text = read_text(path, MAX_BYTES)
    form = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower(), _lines)
    return _collect(str(path), form(path, text), skip)


def fitting(pipe: Pipeline, prompts: Sequence[FilePrompt], skip: Skip | None = None) -> list[FilePrompt]:
    """The prompts that the model can read, which is all, unless one is too long.

    Args: ``skip`` as in `read`.

    Raises:
        ValueError: as `passing`.
    """
    try:
        pipe.prompt_tokens([prompt.text for prompt in prompts])
        return list(prompts)
    except ValueError:
        pass  # one of them, but which?
    return passing(prompts, lambda prompt: pipe.prompt_tokens([prompt.text]), skip)


def passing(prompts: Sequence[FilePrompt], check: Callable[[FilePrompt], Any],
            skip: Skip | None = None) -> list[FilePrompt]:
    """The prompts for which ``check`` raises no ValueError.

    Args: ``skip`` as in `read`.

    Raises:
        ValueError: as ``check``, where ``skip`` is None, with where the prompt is from; or no prompt is left.
    """
    found = []
    for prompt in prompts:
        with _skipping(skip), naming(prompt.where):
            check(prompt)
            found.append(prompt)
    if not found:
        raise ValueError("there must be a prompt that can be drawn, got none")
    return found


# What a reader of one form of file yields for every prompt: where it stands, its id or None, and its text, its
# metadata, or the error that stands for it.
Entry = tuple[str, "str | None", "str | dict[str, Any] | ValueError"]


def _lines(path: Path, text: str) -> Iterator[Entry]:
    for number, line in _numbered(text):
        yield f"{path}, line {number}", None, _without_return(line)


def _jsonl(path: Path, text: str) -> Iterator[Entry]:
    for number, line in _numbered(text):
        value: str | dict[str, Any] | ValueError
        try:
            value = parse_json(line)
            if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
                value = ValueError(f'must be a JSON object with a "prompt", got {shown(line)}')
        except json.JSONDecodeError as error:
            value = ValueError(f"not JSON ({error.msg}): {shown(line)}")
        except ValueError as error:
            value = error
        yield f"{path}, line {number}", None, value


def _csv(path: Path, text: str) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: dict[str, tuple[int, str]] = {}
    columns: list[str] = []
    number = 0
    while True:
        number = rows.line_num + 1
        with naming(f"{path}, line {number}"):
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise ValueError(f"not CSV ({error})") from None
        if row is None:
            return
        if not row:
            continue
        if not columns:
            columns = row
            if [columns.count(name) for name in ("item_id", "text")] != [1, 1]:
                raise ValueError(f"{path}, line {number}: must have columns item_id and text, got "
                                 f"{shown(', '.join(columns))}")
            continue
        where = f"{path}, line {number}"
        if len(row) != len(columns):
            yield where, str(number), ValueError(f"must have {len(columns)} fields as the first line, got {len(row)}")
            continue
        name, value = (row[columns.index(column)] for column in ("item_id", "text"))
        first, known = lines.setdefault(name, (number, value))
        if known != value:
            yield where, name, ValueError(f"item_id {shown(name)} must have one text, got another in line {first}")
        elif first == number:
            yield where, name, value


def _folder(path: Path) -> Iterator[Entry]:
    texts: dict[str, tuple[Path, str]] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() != ".txt" or file.name.startswith("."):
            continue
        try:
            text = _without_return(read_text(file, MAX_BYTES).strip().replace("\r\n", "\n"))
        except ValueError as error:
            yield "", file.stem, error  # which names the file
            continue
        first, known = texts.setdefault(file.stem, (file, text))
        if known != text:
            yield str(file), file.stem, ValueError(f"must hold the same text as {first.name}, whose name is its own")
        elif first == file:
            yield str(file), file.stem, text


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _without_return(text: str) -> str | ValueError:
    return ValueError("lines must end with \\n or \\r\\n, got a lone \\r") if "\r" in text else text


def _collect(source: str, entries: Iterator[Entry], skip: Skip | None) -> list[FilePrompt]:
    """The prompts among ``entries``, checked."""
    found: list[FilePrompt] = []
    count = 0
    for count, (where, name, value) in enumerate(entries, 1):
        with _skipping(skip), naming(where) if where else nullcontext():
            if isinstance(value, ValueError):
                raise value
            metadata = {"prompt": value.strip()} if isinstance(value, str) else value
            _check_text(metadata["prompt"])
            if name is not None:
                _check_name(name)
            found.append(FilePrompt(f"{count - 1:05d}" if name is None else name, metadata["prompt"], metadata,
                                    name is not None, count - 1, where))
    if not found:
        raise ValueError(f"{source} must hold prompts, got {f'{count} that are wrong' if count else 'none'}")
    return found


@contextmanager
def _skipping(skip: Skip | None) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if skip is None:
            raise
        skip(str(error))


def _check_text(text: str) -> None:
    if not text.strip():
        raise ValueError("must not be blank")
    if len(text) > LONGEST:
        raise ValueError(f"must be at most {LONGEST} characters long, got {len(text)}: {shown(text)}")
    for index, character in enumerate(text):
        if not character.isprintable() and unicodedata.category(character) in ("Cc", "Cs") and not character.isspace():
            raise ValueError(f"must be text, got U+{ord(character):04X} at character {index + 1}: {shown(text)}")


def _check_name(name: str) -> None:
    """Refuse what cannot be the name of a file in the output folder."""
    if not name or name.startswith(".") or name.endswith((".", " ")) or RESERVED.match(name) or "/" in name or (
            "\\" in name) or not name.isprintable():
        raise ValueError(f"item_id must be the name of a file, got {shown(name)}")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"item_id must be at most {LONGEST_NAME} bytes long, got {len(name.encode())}: {shown(name)}")
