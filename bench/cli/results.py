"""`ssd-bench compare`, `plot` and `report`: what is made of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AsJson

if TYPE_CHECKING:
    from ..records import Record

Files = Annotated[list[Path], typer.Argument(help="Result files (.jsonl) or folders of them.", exists=True)]


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Result file or folder.", exists=True)],
    after: Annotated[Path, typer.Argument(metavar="B", help="Result file or folder.", exists=True)],
    as_json: AsJson = False,
) -> None:
    """Ratios B / A of what both measured, and which of them are within the noise."""
    from ..compare import COLUMNS, comparison, rows
    from ..records import read
    from ..terminal import print_table

    try:
        found = comparison(read(before), read(after))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for warning in found.warnings:
        typer.echo(f"note: {warning}", err=True)
    if as_json:
        for one in found.pairs:
            typer.echo(json.dumps(one.to_dict()))
        return
    print_table("B / A", COLUMNS, rows(found), 2)


def plot(files: Files, out: Annotated[Path, typer.Option(help="Folder for PNG and SVG files.")]) -> None:
    """Draw roofline, time against batch and slots, step breakdown and memory, as far as the results go."""
    from ..plot import save_all
    from ..records import read

    for path in save_all(_read(read, files), out):
        typer.echo(path)


def report(
    files: Files,
    out: Annotated[Path | None, typer.Option(help="HTML file to write, self-contained.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Markdown file whose marked table to refresh.")] = None,
) -> None:
    """Build one page from result files, or refresh the table between a Markdown file's markers."""
    from ..records import read
    from ..report import refresh, save

    if out is None and readme is None:
        raise typer.BadParameter("give --out or --readme")
    lines = _read(read, files)
    try:
        if out is not None:
            save(lines, out)
            typer.echo(out)
        if readme is not None:
            refresh(readme, lines)
            typer.echo(readme)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read(read: Any, files: list[Path]) -> list[Record]:
    from ..report import mixed

    try:
        found: list[Record] = read(*files)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if note := mixed(found):
        typer.echo(f"note: {note}", err=True)
    return found
