"""Run folders of training: the options a run was started with, and files that can be told from damaged ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ssd_kernels.files import write_atomically
from ssd_kernels.reading import Field, naming, read_bytes, read_json, shown

DIGESTS, OPTIONS = "files.json", "options.json"
LARGEST = 2**31  # bytes of weights or of an optimizer's state


def main(function: Callable[..., None]) -> None:
    """Run a function as a command; what the user can put right is said in one line, with exit code 2."""
    try:
        typer.run(function)
    except (OSError, ValueError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise SystemExit(2) from None


def write_json(file: Path, value: Any) -> None:
    """Write JSON; the file appears whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(file, lambda out: out.write(text.encode()))


def digest(file: Path) -> str:
    """Tells contents of files apart.

    Raises:
        OSError, ValueError: no regular file that can be read.
    """
    return hashlib.blake2b(read_bytes(file, LARGEST), digest_size=16).hexdigest()


def seal(folder: Path, names: Iterable[str]) -> None:
    """Write down the digests of a folder's files, so that `check` can tell when one is damaged."""
    write_json(folder / DIGESTS, {name: digest(folder / name) for name in names})


def check(folder: Path, names: Iterable[str]) -> None:
    """Check that files of a folder are what they were when `seal` was called.

    Raises:
        ValueError: one is missing, damaged or was not there then; the message names it.
    """
    try:
        known = read_json(folder / DIGESTS, 2**16)
        with naming(folder / DIGESTS):
            found = Field(known).members(tuple(names), None)
        for name in names:
            if digest(folder / name) != found[name].value:
                raise ValueError(f"{folder / name} is damaged: it is not what was written")
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: the run was not finished, or another version wrote "
                         "it") from None


def weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        OSError, ValueError: no such file, or a damaged one; the message names it.
    """
    try:
        return load(read_bytes(file, LARGEST))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def check_shapes(file: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that a file holds tensors of the names and shapes of ``wanted``; it may hold others besides.

    Raises:
        ValueError: it does not; the message names the file and the first tensor.
    """
    for name, value in wanted.items():
        have = list(found[name].shape) if name in found else "none"
        if have != list(value.shape):
            raise ValueError(f"{file}: {name} must be of shape {list(value.shape)}, got {have}; another version wrote "
                             "the file")


def keep_options(run: Path, options: Mapping[str, Any], started: bool, change: bool) -> None:
    """Write the options that results depend on into a run's folder, or check that it goes on with those in there.

    Args:
        run: the folder, which must exist.
        options: by parameter.
        started: whether the folder holds a checkpoint.
        change: go on with other options, which then are those of the run.

    Raises:
        ValueError: they differ, or a started run does not say its own; the message names the first one that differs.
    """
    file = run / OPTIONS
    known = {}
    if file.exists():
        known = read_json(file, 2**16)
        with naming(file):
            Field(known).members(optional=None)
    for name in options:
        if (started or known) and not change and known.get(name) != options[name]:
            raise ValueError(f"{run} was started with another --{name.replace('_', '-')} ({shown(known.get(name))} "
                             f"there, {shown(options[name])} now); choose another folder, or go on with this one by "
                             "--change-options")
    if known != options:
        write_json(file, options)


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null for those that are not measured yet: JSON has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
