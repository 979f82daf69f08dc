"""``--preset``: settings that belong together, for the options that are not given."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import typer

from .terminal import say


class PresetName(str, Enum):
    paper = "paper"


Presets = Mapping[PresetName, Mapping[str, Any]]  # values by name of a command's parameter

# What the paper says, and what it leaves open: docs/paper.md, "The settings".
PRESETS: Presets = {PresetName.paper: {
    "guidance": 5.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "images_per_prompt": 4, "seeds": 4,
    "row_buffer": 24}}

Preset = Annotated[PresetName | None, typer.Option(help=(
    "Settings for the options that are not given. paper: those of SSD (arXiv 2510.18716) and of Janus-Pro's "
    "evaluation, as far as they are known (docs/paper.md)."))]


def filled(preset: PresetName | None, given: Mapping[str, Any], presets: Presets = PRESETS) -> dict[str, Any]:
    """Options with the preset's values where None was given; says in one line which, and what was given instead.

    Args:
        preset: None fills in nothing.
        given: value by parameter, of those that mean something in this call and that the preset may fill in.
        presets: what each fills in; parameters that ``given`` has not are left out.
    """
    if preset is None:
        return dict(given)
    own = {name: value for name, value in presets[preset].items() if name in given}
    taken = [f"{_option(name)} {_shown(value)}" for name, value in own.items() if given[name] is None]
    kept = [f"{_option(name)} {_shown(given[name])} as given, not {_shown(value)}" for name, value in own.items()
            if given[name] is not None and given[name] != value]
    say(f"preset {preset.value}: {', '.join([*taken, *kept]) or 'all options are given as it has them'}")
    return {**given, **{name: value for name, value in own.items() if given[name] is None}}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
