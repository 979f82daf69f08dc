"""Prompt files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FilePrompt:
    """One prompt of a file.

    Attributes:
        name: file name of its pictures in DPG-Bench's layout.
        text: the prompt.
        metadata: GenEval's, at least {"prompt": text}.
    """

    name: str
    text: str
    metadata: dict[str, Any]


def gather(texts: Sequence[str] | None, path: Path | None) -> list[FilePrompt]:
    """Prompts from the command line or from a file.

    Raises:
        ValueError: both or neither are given; otherwise as `read`.
    """
    if bool(texts) == (path is not None):
        raise ValueError(f"give prompts or --prompts-file, got {'both' if texts else 'neither'}")
    if path is not None:
        return read(path)
    return [_plain(f"{number:05d}", text) for number, text in enumerate(texts or ())]


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


def read(path: Path) -> list[FilePrompt]:
    """Read prompts from a file or folder.

    - ``.jsonl``: one JSON object with a "prompt" per line, such as GenEval's ``evaluation_metadata.jsonl``;
    - ``.csv`` with columns ``item_id`` and ``text``, such as DPG-Bench's ``dpg_bench.csv`` (several lines of one item
      are one prompt);
    - a folder of ``.txt`` files, one prompt each, such as DPG-Bench's ``prompts``;
    - any other file: one prompt per line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prompts, or a malformed line; the message names file and line.
    """
    if path.is_dir():
        found = [_plain(file.stem, file.read_text(encoding="utf-8").strip()) for file in sorted(path.glob("*.txt"))]
    elif path.suffix == ".csv":
        found = _csv(path)
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        found = [_json(path, number, line) if path.suffix == ".jsonl" else _plain(f"{index:05d}", line)
                 for index, (number, line) in enumerate(numbered)]
    if not found or not all(prompt.text.strip() for prompt in found):
        raise ValueError(f"{path} must hold prompts, got {'none' if not found else 'a blank one'}")
    return found


def _plain(name: str, text: str) -> FilePrompt:
    return FilePrompt(name, text, {"prompt": text})


def _json(path: Path, number: int, line: str) -> FilePrompt:
    try:
        metadata = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number}: not JSON ({error.msg})") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise ValueError(f'{path} line {number}: must be a JSON object with a "prompt", got {line[:60]}')
    return FilePrompt(f"{number - 1:05d}", metadata["prompt"], metadata)


def _csv(path: Path) -> list[FilePrompt]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"item_id", "text"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have columns item_id and text, got {', '.join(reader.fieldnames or ())}")
        texts = {row["item_id"]: row["text"] for row in reader}
    return [_plain(name, text) for name, text in texts.items()]
