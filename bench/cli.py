"""Command line ``ssd-bench``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssd_janus import waiting
from ssd_janus.cli.presets import Preset, PresetName, filled
from ssd_janus.cli.terminal import as_command

if TYPE_CHECKING:
    import torch

    from .point import Point
    from .records import Record

app = typer.Typer(help="Benchmarks of ssd_kernels: strong rivals, cold caches, one run.", no_args_is_help=True,
                  add_completion=False)

Files = Annotated[list[Path], typer.Argument(help="Result files (.jsonl) or folders of them.", exists=True)]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
Threads = Annotated[int, typer.Option(help="Threads for everybody; 0 keeps torch's choice.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of tables.")]
Out = Annotated[Path | None, typer.Option(help="Also write the results to this file, as JSON lines.")]
Repetitions = Annotated[int, typer.Option(min=1, help="Timed repetitions per trial.")]
Trials = Annotated[int, typer.Option(min=1, help="Rounds over all contenders.")]


@app.callback()
def main() -> None:
    """Benchmarks of ssd_kernels: strong rivals, cold caches, one run."""
    waiting.prepare()


@app.command()
@as_command
def kernel(
    context: typer.Context,
    batch: Annotated[list[int], typer.Option(help="Rows; a picture with guidance takes two.")] = [16],  # noqa: B006
    heads: Annotated[list[int], typer.Option(help="KV heads of the layer.")] = [16],  # noqa: B006
    head_dim: Annotated[list[int], typer.Option(help="Elements per key.")] = [128],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16 or float16.")] = ["bfloat16"],  # noqa: B006
    mean: Annotated[list[int], typer.Option(help="Mean tokens kept per head.")] = [120],  # noqa: B006
    full: Annotated[int, typer.Option(help="Tokens of the full cache, and of the longest head possible.")] = 600,
    spread: Annotated[list[str], typer.Option(help="How lengths differ: uniform, two-class or skewed.")] = [  # noqa: B006
        "skewed"],
    plan: Annotated[Path | None, typer.Option(help="Run one layer of this plan instead.", exists=True)] = None,
    layer: Annotated[int, typer.Option(help="Which layer of the plan.")] = 0,
    policy: Annotated[str | None, typer.Option(help="Run this policy's plan instead (needs no profile).")] = None,
    budget: Annotated[list[float], typer.Option(help="With --policy.")] = [0.2],  # noqa: B006
    prompt: Annotated[int, typer.Option(help="With a plan: prompt tokens.")] = 24,
    start: Annotated[int, typer.Option(help="With a plan: visual tokens in the cache.")] = 480,
    score: Annotated[bool | None, typer.Option(help="Only plans with scores, or without. Default: both.")] = None,
    row_buffer: Annotated[list[int], typer.Option(help="Steps between evictions; 0 evicts at each.")] = [  # noqa: B006
        0, 24],
    kv: Annotated[list[str], typer.Option(help="How ours store keys and values: auto, as --dtype says; int8.")] = [  # noqa: B006
        "auto", "int8"],
    backend: Annotated[list[str] | None, typer.Option(help="Of ours; default all that can run but reference.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only contenders whose name holds this.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
    repetitions: Repetitions = 50,
    trials: Trials = 3,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """One decode step of one layer, ours against others' attention, on cold caches of ragged heads.

    Options that may be given several times make a table for each combination. Exits with 1 when one of our backends
    computes something wrong; it gets no number then.
    """
    from .kernel import Options, any_wrong, measure
    from .point import Point

    _refuse_ignored(context, "--plan" if plan else "--policy" if policy else None, KERNEL_OPTIONS)
    where = _device(device, threads)
    _check_out(out)
    _check_backends(backend)
    _check_formats(kv)
    points: list[Point] = []
    buffers: Sequence[int] = row_buffer
    try:
        if plan is not None or policy is not None:
            points = list(_planned(plan, layer, policy, budget, row_buffer, kv, heads, batch, head_dim, dtype, prompt,
                                   start))
        else:
            points = [Point.of_lengths(*values, full=full, spread=kind) for *values, kind in
                      itertools.product(batch, heads, head_dim, dtype, mean, spread)]
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    options = Options(where, backend, (False, True) if score is None else (score,), buffers, kv, tuple(only or ()),
                      repetitions, trials)
    lines = _run([(point, lambda point, report: measure(point, options, report)) for point in points], as_json, out)
    raise typer.Exit(any_wrong(lines))


# What options say nothing, by what decides the lengths: a plan, a policy or the options themselves.
KERNEL_OPTIONS = {
    "--plan": ("mean", "full", "spread", "score", "row_buffer", "kv", "heads", "budget"),
    "--policy": ("mean", "full", "spread", "score", "layer"),
    None: ("layer", "budget", "prompt", "start")}

Model = Annotated[list[str], typer.Option(help="included, 1b or 7b (random weights), or a folder or hub id.")]
Pictures = Annotated[list[int], typer.Option(help="Pictures at once; two rows each.")]
DType = Annotated[list[str], typer.Option(help="float32, bfloat16 or float16.")]
Compiled = Annotated[bool, typer.Option(help="Also transformers with torch.compile; it takes minutes to compile.")]
Budgets = Annotated[list[float], typer.Option(help="Of the engine's plans, besides the full one.")]
RowBuffers = Annotated[list[int], typer.Option(help="Of the engine's plans.")]
Only = Annotated[list[str] | None, typer.Option(help="Only contenders whose name holds this.")]
Plans = Annotated[list[Path] | None, typer.Option("--plan", exists=True, help=(
    "Plan file for the engine, besides the full plan and in place of --budget and --row-buffer; may be repeated."))]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many likeliest codes; 0 from all.")]
# The table of the paper's efficiency: docs/paper.md.
PRESETS = {PresetName.paper: {"pictures": [32, 64, 128], "dtype": ["bfloat16"], "top_k": 0, "budget": [0.2],
                              "row_buffer": [0, 24]}}


@app.command()
@as_command
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
    trials: Trials = 3,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Whole decoder steps at a fixed fill: transformers' loop and our engine, with where the time goes."""
    _decoder(model, pictures, dtype, start, steps, budget, row_buffer, compiled, only, _device(device, threads), trials,
             as_json, out, None)


@app.command()
@as_command
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
    trials: Trials = 1,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Whole pictures: pictures per second, cost against the place in the picture, memory."""
    if largest_in is not None:
        _refuse_ignored(context, "--largest-in", {"--largest-in": ("pictures",)})
    if plan:
        _refuse_ignored(context, "--plan", {"--plan": ("budget", "row_buffer")})
    silent = [*(["pictures"] if largest_in is not None else []), *(["budget", "row_buffer"] if plan else [])]
    options = {"pictures": pictures, "dtype": dtype, "top_k": top_k, "budget": budget, "row_buffer": row_buffer}
    if preset is not None:
        open_ = {name: value if _given(context, name) else None for name, value in options.items()
                 if name not in silent}
        options |= filled(preset, open_, PRESETS)
    _decoder(model, options["pictures"], options["dtype"], None, steps, options["budget"], options["row_buffer"],
             compiled, only, _device(device, threads), trials, as_json, out, largest_in, options["top_k"], plan or ())


def _decoder(models: list[str], pictures: list[int], dtypes: list[str], start: int | None, steps: int,
             budgets: list[float], row_buffers: list[int], compiled: bool, only: list[str] | None,
             device: torch.device, trials: int, as_json: bool, out: Path | None, largest_in: float | None,
             top_k: int = 50, plans: Sequence[Path] = ()) -> None:
    """`step` and `image`: loads one model at a time."""
    from ssd_janus import ModelShape
    from ssd_kernels import CachePlan

    from .decoder import Setting, largest, loops, measure
    from .models import load
    from .point import DTYPES

    _check_out(out)
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
                setting = Setting(label, dtype, count, steps, start, trials, f"largest within {largest_in:g} GB", top_k)
                lines += measure(model, [loop], setting, report)
            return lines
        for count in pictures:
            lines += measure(model, found, Setting(label, dtype, count, steps, start, trials, top_k=top_k), report)
        return lines

    try:
        lines = _run([(what, job) for what in itertools.product(models, dtypes)], as_json, out)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(any(line["status"].startswith("wrong") for line in lines))


@app.command()
@as_command
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
    from .models import load as load_model
    from .point import DTYPES
    from .serve import CLOCKS, Setting, measure

    where = _device(device, threads)
    _check_out(out)
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
        lines = _run([(model, job)], as_json, out)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(any(line["status"].startswith("wrong") for line in lines))


@app.command()
@as_command
def suite(
    results: Annotated[Path, typer.Option(help="Folder that holds a folder per machine.")] = Path("bench/results"),
    minutes: Annotated[float, typer.Option(help="Begin nothing more after this long.")] = 8,
    threads: Threads = 0,
    readme: Annotated[Path | None, typer.Option(help="Markdown file whose marked table to refresh.")] = None,
) -> None:
    """The CPU set of `make bench`: the kernel beside all rivals, sweeps, steps and pictures of the included model.

    Exits with 1 when one of our backends computes something wrong.
    """
    from ssd_kernels.files import check_folder

    from .kernel import any_wrong
    from .records import read
    from .report import check_page, needs_matplotlib, refresh, save
    from .suite import run
    from .terminal import print_records, status

    check_folder(results)
    needs_matplotlib()
    if readme is not None:
        check_page(readme)
    _device("cpu", threads)
    measured: list[Record] = []

    def done(lines: list[Record]) -> None:
        measured.extend(lines)
        print_records(lines)

    with status() as report:
        folder, left = run(results, minutes, report, done)
    for what in left:
        typer.echo(f"left out for lack of time: {what}", err=True)
    save(read(folder), folder / "report.html")
    if readme is not None:
        refresh(readme, read(folder / "kernel.jsonl"))
    typer.echo(folder)
    raise typer.Exit(any_wrong(measured))


@app.command()
@as_command
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Result file or folder.", exists=True)],
    after: Annotated[Path, typer.Argument(metavar="B", help="Result file or folder.", exists=True)],
    as_json: AsJson = False,
) -> None:
    """Ratios B / A of what both measured, and which of them are within the noise."""
    from .compare import COLUMNS, comparison, rows
    from .records import read
    from .terminal import print_table

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


@app.command()
@as_command
def plot(files: Files, out: Annotated[Path, typer.Option(help="Folder for PNG and SVG files.")]) -> None:
    """Draw roofline, time against batch and slots, step breakdown and memory, as far as the results go."""
    from .plot import save_all
    from .records import read

    for path in save_all(_read(read, files), out):
        typer.echo(path)


@app.command()
@as_command
def report(
    files: Files,
    out: Annotated[Path | None, typer.Option(help="HTML file to write, self-contained.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Markdown file whose marked table to refresh.")] = None,
) -> None:
    """Build one page from result files, or refresh the table between a Markdown file's markers."""
    from .records import read
    from .report import refresh, save

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
    from .report import mixed

    try:
        found: list[Record] = read(*files)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if note := mixed(found):
        typer.echo(f"note: {note}", err=True)
    return found


def _refuse_ignored(context: typer.Context, chosen: str | None, ignored: Mapping[str | None, Sequence[str]]) -> None:
    """Refuse options that say nothing beside, or without, another.

    Args:
        context: of the command.
        chosen: the option that was given.
        ignored: parameters that say nothing, by that option.
    """
    for name in ignored[chosen]:
        if _given(context, name):
            why = f"says nothing beside {chosen}" if chosen else "needs --plan or --policy"
            raise typer.BadParameter(why, param_hint=f"--{name.replace('_', '-')}")


def _given(context: typer.Context, name: str) -> bool:
    """Whether a parameter is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_out(out: Path | None) -> None:
    """Results must be writable before anything is measured."""
    from ssd_kernels.files import check_folder

    if out is not None:
        if out.is_dir():
            raise typer.BadParameter(f"must be a file, got the folder {out}", param_hint="--out")
        check_folder(out.parent)


def _device(name: str, threads: int) -> torch.device:
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


def _check_formats(names: Sequence[str]) -> None:
    from ssd_kernels.kv_format import KV_FORMATS

    for name in names:
        if name not in KV_FORMATS:
            raise typer.BadParameter(f"must be one of {', '.join(KV_FORMATS)}, got {name!r}", param_hint="--kv")


def _check_backends(names: list[str] | None) -> None:
    from ssd_kernels import backends

    for name in names or ():
        reason = backends.available().get(name, f"must be one of {', '.join(backends.backend_names())}")
        if reason:
            raise typer.BadParameter(f"{name!r}: {reason}", param_hint="--backend")


def _planned(path: Path | None, layer: int, policy: str | None, budgets: Sequence[float], row_buffers: Sequence[int],
             kv_formats: Sequence[str], heads: Sequence[int], batches: Sequence[int], head_dims: Sequence[int],
             dtypes: Sequence[str], prompt: int, start: int) -> Iterator[Point]:
    """Points of a plan file, or of a policy at every budget, row buffer and format."""
    from ssd_janus import ModelShape
    from ssd_kernels import CachePlan
    from ssd_kernels.policies import build

    from .point import Point

    if path is not None and policy is not None:
        raise ValueError("give --plan or --policy, not both")
    plans = []
    if path is not None:
        plans.append((f"plan {path.name}, layer {layer}", CachePlan.load(path)))
    else:
        for count, budget, buffer, kv_format in itertools.product(heads, budgets, row_buffers, kv_formats):
            made = build(policy or "", ModelShape(1, count, count, 128, 576, 24), budget, buffer)
            label = f"policy {policy} {budget:.0%}, row buffer {buffer}" + (", int8" if kv_format == "int8" else "")
            plans.append((label, replace(made, kv_format=kv_format)))
    for (label, plan), batch, head_dim, dtype in itertools.product(plans, batches, head_dims, dtypes):
        yield Point.of_plan(plan, layer, label, batch, head_dim, dtype, prompt, start, 576)


def _run(jobs: list[tuple[Any, Any]], as_json: bool, out: Path | None) -> list[Record]:
    """Do the jobs, (what, function of it and of a progress callback), and print or write what each gives at once."""
    from .records import write
    from .terminal import print_records, status

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
    return lines
