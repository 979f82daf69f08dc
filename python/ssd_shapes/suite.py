"""The evaluation suite: prompts of the test split as GenEval's metadata. ``python -m ssd_shapes.suite`` writes it.

A prompt is a mapping, and a line of the asset: "tag" (the family), "include" and, where a number is asked for,
"exclude" (lists of {"class", "count"}, with "color" or "position" where asked for), and "prompt" (the text).
"""

from __future__ import annotations

if __name__ == "__main__":
    from ssd_janus import waiting

    waiting.prepare()  # before torch loads

import json
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ssd_shapes import world

ASSET = Path(__file__).parent / "assets" / "prompts.jsonl"
FAMILIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's
PATIENCE = 1000  # draws without a new prompt after which a family counts as used up


def load(path: Path = ASSET) -> list[dict[str, Any]]:
    """The included prompts, families in turn: the first ones alone are a small suite of all families.

    Raises:
        FileNotFoundError: there is no such file.
        json.JSONDecodeError: a line is not JSON.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(seed: int = 0, size: int = 300) -> list[dict[str, Any]]:
    """``size`` different prompts, families in turn; a family without new ones leaves its turns to the others.

    Raises:
        ValueError: there are fewer than ``size``.
    """
    rng = np.random.default_rng(seed)
    families = list(FAMILIES)
    drawn: dict[str, world.Prompt] = {}
    while len(drawn) < size:
        if not families:
            raise ValueError(f"size must be at most {len(drawn)}, the number of prompts found, got {size}")
        for family in tuple(families):
            prompt = _draw_new(rng, family, drawn)
            if prompt:
                drawn[prompt.text] = prompt
            else:
                families.remove(family)
    return [_metadata(prompt) for prompt in drawn.values()][:size]


def _draw_new(rng: np.random.Generator, family: str, known: dict[str, world.Prompt]) -> world.Prompt | None:
    """A prompt whose text is not ``known``, or none if the family seems used up."""
    for _ in range(PATIENCE):
        prompt = world.draw_prompt(rng, "test", family)
        if prompt.text not in known:
            return prompt
    return None


def _metadata(prompt: world.Prompt) -> dict[str, Any]:
    limits = {"exclude": prompt.exclude} if prompt.exclude else {}
    return {"tag": prompt.family, "include": prompt.include, **limits, "prompt": prompt.text}


def write(
    out: Annotated[Path, typer.Option(help="File to write; replaced if it exists.")] = ASSET,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    size: Annotated[int, typer.Option(help="Number of prompts.")] = 300,
) -> None:
    """Draw the evaluation suite and write it, one JSON object per line."""
    partial = out.with_name(out.name + ".partial")
    partial.write_text("".join(json.dumps(prompt) + "\n" for prompt in draw(seed, size)), encoding="utf-8")
    os.replace(partial, out)


if __name__ == "__main__":
    typer.run(write)
