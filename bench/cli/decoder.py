"""`ssd-bench step` and `image`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssd_janus.cli.presets import Preset, PresetName, filled

from .options import (
    AsJson,
    Device,
    InstructionSet,
    Only,
    Out,
    Patience,
    Threads,
    Trials,
    check_out,
    given,
    on_device,
    refuse_ignored,
    run_jobs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ..records import Record

Model = Annotated[list[str], typer.Option(help="included, 1b or 7b (random weights), or a folder or hub id; "
                                              "NAME:int8: with weights in bytes.")]
Pictures = Annotated[list[int], typer.Option(help="Pictures at once; two rows each.")]
DType = Annotated[list[str], typer.Option(help="float32, bfloat16 or float16.")]
Compiled = Annotated[bool, typer.Option(help="Also transformers with torch.compile; it takes minutes to compile.")]
Budgets = Annotated[list[float], typer.Option(help="Of the engine's plans, besides the full one.")]
RowBuffers = Annotated[list[int], typer.Option(help="Of the engine's plans.")]
Plans = Annotated[list[Path] | None, typer.Option("--plan", exists=True, help=(
    "Plan file for the engine, besides the full plan and in place of --budget and --row-buffer; may be repeated."))]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many likeliest codes; 0 from all.")]
# The table of the paper's efficiency: docs/paper.md.
PRESETS = {PresetName.paper: {"pictures": [32, 64, 128], "dtype": ["bfloat16"], "top_k": 0, "budget": [0.2],
                              "row_buffer": [0, 24]}}


def step(
    model: Model = ["included"],  # noqa: B006
    pictures: Pictures = [1, 8],  # noqa: B006
    dtype: DType = ["float32"],  # noqa: B006
    start: Annotated[int, typer.Option(help="Visual tokens in the cache.")] = 480,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per trial.")] = 24,
    budget: Budgets = [0.5, 0.2],  # noqa: B006
    row_buffer: RowBuffers = [0, 24],  # noqa: B006
    compiled: Compiled = False,
    only: Only = None,
    device: Device = "auto",
    threads: Threads = 0,
    instruction_set: InstructionSet = None,
    patience: Patience = 30,
    trials: Trials = 3,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Whole decoder steps at a fixed fill: transformers' loop and our engine, with where the time goes."""
    where = on_device(device, threads, instruction_set)
    _decoder(model, pictures, dtype, start, steps, budget, row_buffer, compiled, only, where, trials, patience, as_json,
             out, None)


def image(
    context: typer.Context,
    model: Model = ["included"],  # noqa: B006
    pictures: Pictures = [8],  # noqa: B006
    dtype: DType = ["float32"],  # noqa: B006
    largest_in: Annotated[float | None, typer.Option(help="Instead: as many as fit into this many GB.")] = None,
    steps: Annotated[int, typer.Option(min=24, help="Tokens per picture.")] = 576,
    preset: Preset = None,
    plan: Plans = None,
    budget: Budgets = [0.5, 0.2],  # noqa: B006
    row_buffer: RowBuffers = [0, 24],  # noqa: B006
    top_k: TopK = 50,
    compiled: Compiled = False,
    only: Only = None,
    device: Device = "auto",
    threads: Threads = 0,
    instruction_set: InstructionSet = None,
    patience: Patience = 30,
    trials: Trials = 1,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Whole pictures: pictures per second, cost against the place in the picture, memory."""
    if largest_in is not None:
        refuse_ignored(context, "--largest-in", {"--largest-in": ("pictures",)})
    if plan:
        refuse_ignored(context, "--plan", {"--plan": ("budget", "row_buffer")})
    silent = [*(["pictures"] if largest_in is not None else []), *(["budget", "row_buffer"] if plan else [])]
    options = {"pictures": pictures, "dtype": dtype, "top_k": top_k, "budget": budget, "row_buffer": row_buffer}
    if preset is not None:
        open_ = {name: value if given(context, name) else None for name, value in options.items()
                 if name not in silent}
        options |= filled(preset, open_, PRESETS)
    where = on_device(device, threads, instruction_set)
    _decoder(model, options["pictures"], options["dtype"], None, steps, options["budget"], options["row_buffer"],
             compiled, only, where, trials, patience, as_json, out, largest_in, options["top_k"], plan or ())


def _decoder(models: list[str], pictures: list[int], dtypes: list[str], start: int | None, steps: int,
             budgets: list[float], row_buffers: list[int], compiled: bool, only: list[str] | None,
             device: torch.device, trials: int, patience: float, as_json: bool, out: Path | None,
             largest_in: float | None, top_k: int = 50, plans: Sequence[Path] = ()) -> None:
    """`step` and `image`: loads one model at a time."""
    from ssd_janus import ModelShape
    from ssd_kernels import CachePlan

    from ..decoder import Setting, largest, loops, measure
    from ..models import load
    from ..point import DTYPES

    check_out(out)
    for name in dtypes:
        if name not in DTYPES:
            raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got {name!r}", param_hint="--dtype")
    for count in pictures:
        if count < 1:
            raise typer.BadParameter(f"must be at least 1, got {count}", param_hint="--pictures")

    def job(what: tuple[str, str], report: Any) -> list[Record]:
        name, dtype = what
        report(f"loading {name}")
        model, prompt = load(name, DTYPES[dtype], device)
        files = {f"plan {file.stem}": ModelShape.of(model).check(CachePlan.load(file)) for file in plans}
        known = list(loops(model, prompt, compiled, budgets, row_buffers, top_k=top_k, plans=files))
        found = [loop for loop in known if not only or any(part in loop.name for part in only)]
        if not found:
            raise ValueError(f"only must be part of one of {'; '.join(loop.name for loop in known)}, got "
                             f"{', '.join(only or ())}")
        label, lines = (name if not Path(name).is_dir() else Path(name).name), []
        if largest_in is not None:
            for loop in found:
                count = largest(loop, model, len(prompt), largest_in)
                setting = Setting(label, dtype, count, steps, start, trials, f"largest within {largest_in:g} GB",
                                  top_k, patience)
                lines += measure(model, [loop], setting, report)
            return lines
        for count in pictures:
            setting = Setting(label, dtype, count, steps, start, trials, top_k=top_k, patience=patience)
            lines += measure(model, found, setting, report)
        return lines

    try:
        lines = run_jobs([(what, job) for what in itertools.product(models, dtypes)], as_json, out)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(any(line["status"].startswith("wrong") for line in lines))
