"""The evaluation suite: prompts of the test split as GenEval's metadata. ``python -m ssd_shapes.suite`` writes it.

A prompt is a mapping, and a line of the asset: "tag" (the family), "include" and, where a number is asked for,
"exclude" (lists of {"class", "count"}, with "color" or "position" where asked for), and "prompt" (the text).
"""

from __future__ import annotations

if __name__ == "__main__":
    from ssd_janus import waiting

    waiting.prepare()  # before torch loads

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ssd_kernels.files import write_atomically
from ssd_kernels.reading import Field, naming, read_json_lines
from ssd_shapes import world

ASSET = Path(__file__).parent / "assets" / "prompts.jsonl"
FAMILIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's
PATIENCE = 1000  # draws without a new prompt after which a family counts as used up


def load(path: Path = ASSET) -> list[dict[str, Any]]:
    """The included prompts, families in turn: the first ones alone are a small suite of all families.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no such prompt; the message names file, line and field.
    """
    prompts = read_json_lines(path, 2**24)
    for line, prompt in prompts:
        with naming(f"{path}, line {line}"):
            check(prompt)
    return [prompt for _, prompt in prompts]


def check(prompt: Mapping[str, Any]) -> None:
    """Check that the detector can judge pictures by a prompt; fields that it does not know are left alone.

    Raises:
        ValueError: it cannot; the message names the field.
    """
    members = Field(prompt).members(("tag", "include", "prompt"), None)
    for name in ("tag", "prompt"):
        members[name].string()
    for name, least in (("include", 1), ("exclude", 0)):
        for index, thing in enumerate(members[name].items(least) if name in members else ()):
            parts = thing.members(("class", "count"), None)
            parts["class"].choice(world.SHAPES)
            parts["count"].integer(1, 1000)
            if parts.get("color", Field(None)).value is not None:
                parts["color"].choice(world.COLORS)
            if "position" in parts:
                relation, anchor = parts["position"].items(2, 2)
                relation.choice(world.RELATIONS)
                anchor.integer(0, index - 1)


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
    text = "".join(json.dumps(prompt) + "\n" for prompt in draw(seed, size))
    write_atomically(out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    typer.run(write)
