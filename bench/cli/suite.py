"""`ssd-bench suite`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import InstructionSet, Patience, Threads, on_device

if TYPE_CHECKING:
    from ..records import Record


def suite(
    results: Annotated[Path, typer.Option(help="Folder that holds a folder per machine.")] = Path("bench/results"),
    minutes: Annotated[float, typer.Option(help="Begin nothing more after this long.")] = 20,
    threads: Threads = 0,
    instruction_set: InstructionSet = None,
    patience: Patience = 10,
    readme: Annotated[Path | None, typer.Option(help="Markdown file whose marked table to refresh.")] = None,
) -> None:
    """The CPU set of `make bench`: the kernel beside all rivals, sweeps, steps and pictures of the included model.

    Exits with 1 when one of our backends computes something wrong.
    """
    from ssd_kernels.files import check_folder

    from .. import goals
    from ..kernel import any_wrong
    from ..records import read
    from ..report import check_page, needs_matplotlib, refresh, save
    from ..suite import run
    from ..tables import points
    from ..terminal import print_records, print_table, status

    check_folder(results)
    needs_matplotlib()
    if readme is not None:
        check_page(readme)
    on_device("cpu", threads, instruction_set)
    measured: list[Record] = []

    def done(lines: list[Record]) -> None:
        measured.extend(lines)
        print_records(lines)

    with status() as report:
        folder, left = run(results, minutes, patience, report, done)
    for what in left:
        typer.echo(f"left out for lack of time: {what}", err=True)
    save(read(folder), folder / "report.html")
    if readme is not None:
        refresh(readme, read(folder / "kernel.jsonl"))
    if rows := goals.rows(points(read(folder))):
        print_table("goals", goals.COLUMNS, rows, len(goals.COLUMNS))
    typer.echo(folder)
    raise typer.Exit(any_wrong(measured))
