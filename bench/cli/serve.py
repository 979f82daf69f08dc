"""`ssd-bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AsJson, Device, Out, Threads, check_out, on_device, run_jobs

if TYPE_CHECKING:
    from ..records import Record


def serve(
    model: Annotated[str, typer.Option(help="included, 1b or 7b (random), or a folder or hub id.")] = "included",
    capacity: Annotated[int, typer.Option(min=1, help="Most pictures at once.")] = 8,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures that arrive.")] = 32,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Arrivals a second. Default: from --load.")] = None,
    load: Annotated[float, typer.Option(min=0.01, help="Share of what full batches draw that arrives.")] = 0.7,
    steps: Annotated[int, typer.Option(help="Tokens per picture.")] = 576,
    budget: Annotated[float, typer.Option(min=0.01, max=1, help="Of the plan; 1 keeps everything.")] = 0.2,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of the arrivals.")] = 0,
    clock: Annotated[str, typer.Option(help="wall, or processor: the process's own time.")] = "wall",
    device: Device = "auto",
    threads: Threads = 0,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Pictures that arrive at random: continuous batching, static batches, one at a time.

    The same arrivals for all (Poisson, an open loop). Exits with 1 when a picture's tokens depend on how it is served.
    """
    from ..models import load as load_model
    from ..point import DTYPES
    from ..serve import CLOCKS, Setting, measure

    where = on_device(device, threads)
    check_out(out)
    for name, value, known in (("--dtype", dtype, DTYPES), ("--clock", clock, CLOCKS)):
        if value not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}, got {value!r}", param_hint=name)

    def job(name: str, report: Any) -> list[Record]:
        report(f"loading {name}")
        loaded, prompt = load_model(name, DTYPES[dtype], where)
        label = name if not Path(name).is_dir() else Path(name).name
        setting = Setting(label, dtype, capacity, pictures, steps, rate, load, seed, clock)
        return measure(loaded, prompt, setting, budget, report)

    try:
        lines = run_jobs([(model, job)], as_json, out)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(any(line["status"].startswith("wrong") for line in lines))
