"""Command line ``ssd-bench``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(help="Benchmarks of ssd_kernels: honest rivals, cold caches, one run.", no_args_is_help=True,
                  add_completion=False)


@app.callback()
def main() -> None:
    """Benchmarks of ssd_kernels: honest rivals, cold caches, one run."""


@app.command()
def kernel(
    batch: Annotated[int, typer.Option(help="Batch rows; a picture with guidance takes two.")] = 16,
    heads: Annotated[int, typer.Option(help="KV heads of the layer.")] = 16,
    head_dim: Annotated[int, typer.Option(help="Elements per key.")] = 128,
    mean: Annotated[int, typer.Option(help="Mean tokens kept per head.")] = 120,
    full: Annotated[int, typer.Option(help="Tokens of the full cache, and the longest head.")] = 600,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Threads for everybody; 0 keeps torch's choice.")] = 0,
    repetitions: Annotated[int, typer.Option(help="Timed runs per trial.")] = 50,
    trials: Annotated[int, typer.Option(help="Rounds over all contenders.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """One decode step of one layer, ours against torch's attention, on cold caches of ragged heads."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from .kernel import Shape, measure, to_json
    from .timing import machine

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise typer.BadParameter(f"must be one of {', '.join(dtypes)}, got {dtype!r}", param_hint="--dtype")
    if threads:
        torch.set_num_threads(threads)
    try:
        shape = Shape(batch, heads, head_dim, mean, full, dtypes[dtype])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console(stderr=True)
    with console.status("checking outputs") as status:
        rows = measure(shape, repetitions, trials, progress=lambda name: status.update(f"timing {name}"))
    about = machine()
    if as_json:
        typer.echo(json.dumps({"machine": about, **to_json(shape, rows)}))
        return
    table = Table(title=f"batch {batch}, {heads} heads x {head_dim}, mean {mean} of {full} slots, {dtype}, cold caches")
    for name in ("", "does"):
        table.add_column(name)
    for name in ("best us", "median us", "GB/s", "time / ours"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.name, row.does, f"{row.microseconds:.0f}", f"{row.median_microseconds:.0f}",
                      f"{row.bytes / row.microseconds / 1e3:.1f}", f"{row.ratio:.2f}")
    Console().print(table)
    Console().print(f"{about['processor']}, {about['threads']} threads, load {about['load']:.1f}, "
                    f"torch {about['torch']}, {about['instruction_set']}; 'ours' is ssd_kernels heavy")
