"""Options that several commands share, what they mean, and what must not be given together."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from ..records import Record

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
Threads = Annotated[int, typer.Option(help="Threads for everybody; 0 keeps torch's choice.")]
InstructionSet = Annotated[str | None, typer.Option(
    help="avx512_bf16, avx512, avx2 or portable, for ours and, as far as it lets itself be told, for torch. Default: "
         "the best.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of tables.")]
Out = Annotated[Path | None, typer.Option(help="Also write the results to this file, as JSON lines.")]
Only = Annotated[list[str] | None, typer.Option(help="Only contenders whose name holds this.")]
Trials = Annotated[int, typer.Option(min=1, help="Rounds over all contenders.")]
Patience = Annotated[float, typer.Option(
    min=0, help="Seconds in which trials are repeated while the ceiling moves by more than 20%.")]
# What torch and its libraries read when they load.
TOLD = {"avx512_bf16": {}, "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
        "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
                 "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
        "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
                     "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}}


def refuse_ignored(context: typer.Context, chosen: str | None, ignored: Mapping[str | None, Sequence[str]]) -> None:
    """Refuse options that say nothing beside, or without, another.

    Args:
        context: of the command.
        chosen: the option that was given.
        ignored: parameters that say nothing, by that option.
    """
    for name in ignored[chosen]:
        if given(context, name):
            why = f"says nothing beside {chosen}" if chosen else "needs --plan or --policy"
            raise typer.BadParameter(why, param_hint=f"--{name.replace('_', '-')}")


def given(context: typer.Context, name: str) -> bool:
    """Whether a parameter is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_out(out: Path | None) -> None:
    """Results must be writable before anything is measured."""
    from ssd_kernels.files import check_folder

    if out is not None:
        if out.is_dir():
            raise typer.BadParameter(f"must be a file, got the folder {out}", param_hint="--out")
        check_folder(out.parent)


def on_device(name: str, threads: int, instruction_set: str | None = None) -> torch.device:
    """The device of that name, for so many threads and an instruction set."""
    if instruction_set is not None:
        force(instruction_set)
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"must be auto, cpu or cuda, got {name!r}", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here", param_hint="--device")
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def force(instruction_set: str) -> None:
    """Keep everybody to an instruction set, torch where it has not been loaded yet."""
    if instruction_set not in TOLD:
        raise typer.BadParameter(f"must be one of {', '.join(TOLD)}, got {instruction_set!r}",
                                 param_hint="--instruction-set")
    if "torch" not in sys.modules:
        os.environ.update(TOLD[instruction_set])
    from ssd_kernels import native

    from .. import machine  # noqa: F401  # remembers which instruction set is the best

    try:
        native.extension().set_instruction_set(instruction_set)
    except (RuntimeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--instruction-set") from None


def run_jobs(jobs: list[tuple[Any, Any]], as_json: bool, out: Path | None) -> list[Record]:
    """Do the jobs, (what, function of it and of a progress callback), and print or write what each gives at once."""
    from .. import goals
    from ..records import write
    from ..tables import points
    from ..terminal import print_records, print_table, status

    lines: list[Record] = []
    for number, (what, job) in enumerate(jobs):
        with status() as report:
            found = job(what, lambda text: report(f"{number + 1} of {len(jobs)}: {text}", number / len(jobs)))  # noqa: B023
        lines += found
        if out is not None:
            write(lines, out)
        if as_json:
            for line in found:
                typer.echo(json.dumps(line))
        else:
            print_records(found)
    if not as_json and len(jobs) > 1 and (rows := goals.rows(points(lines))):
        print_table("goals", goals.COLUMNS, rows, len(goals.COLUMNS))
    return lines
