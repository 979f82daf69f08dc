"""``ssd-janus``: draw pictures from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from . import cli_compare, cli_evaluate, cli_plan  # noqa: F401  # add their commands
from .options import (
    DEFAULT_BUDGET,
    Backend,
    Device,
    Dtype,
    Guidance,
    LayoutName,
    Model,
    Parameters,
    PolicyName,
    ProfileFile,
    PromptsFile,
    RowBuffer,
    Seed,
    app,
    check_plan_options,
    choose_plan,
    console,
    last_run,
    load,
    load_profile,
    messages,
    one_line_errors,
    policy_parameters,
    show_bytes,
    summary,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from .pipeline import Pipeline, RunStats

DEMO_PROMPTS = (
    "a red circle",
    "a photo of a blue star",
    "two green squares",
    "three yellow triangles",
    "a purple heart and an orange ring",
    "a black diamond and a pink cross",
    "a white circle above a red square",
    "a brown triangle left of a blue circle",
)


@app.command()
@one_line_errors
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw, one text per prompt.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("pictures"),
    seed: Seed = 0,
    model: Model = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file: what each head keeps.")] = None,
    policy: Annotated[PolicyName | None, typer.Option(help="Make a plan by this rule. Default: full, nothing is "
                                                           "evicted.")] = None,
    budget: Annotated[float | None, typer.Option(help="Share of the picture's tokens that the policy may keep, row "
                                                      f"buffer included. Default: {DEFAULT_BUDGET}.")] = None,
    row_buffer: RowBuffer = None,
    parameter: Parameters = None,
    profile: ProfileFile = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    prompts_file: PromptsFile = None,
    layout: Annotated[LayoutName | None, typer.Option(
        help="Write the folders that the evaluators of GenEval or DPG-Bench read. Prompts that have their pictures "
             "already are skipped, so a killed run goes on.")] = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Most pictures drawn at once; fewer where memory is "
                                                        "short.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per picture on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also show what memory was used for.")] = False,
) -> None:
    """Draw prompts and write PNG files."""
    check_plan_options(plan, policy, budget, row_buffer, parameter)
    parameters = policy_parameters(policy, parameter)
    from .prompts import gather

    chosen = gather(prompts, prompts_file)
    pipe = load(model, device, dtype, backend)
    heads = load_profile(profile, model, [policy] if policy else [], pipe)
    cache_plan = choose_plan(pipe.shape, plan, policy, budget, row_buffer, heads, parameters)
    out.mkdir(parents=True, exist_ok=True)
    from . import drawing

    scale = pipe.guidance(guidance)
    run, count = None, 0
    for drawn in drawing.draw(pipe, None if layout is None else layout.value, out, chosen, images_per_prompt, guidance,
                              seed, cache_plan, batch_size):
        run, count = drawn.run, count + 1
        if as_json:
            record = {"file": str(drawn.file), "prompt": drawn.prompt, "image": drawn.image, "seed": drawn.seed,
                      "width": drawn.size[0], "height": drawn.size[1], "plan_budget": round(run.budget, 4),
                      "guidance_scale": scale, "cache_bytes": run.cache_bytes,
                      "full_cache_bytes": run.full_cache_bytes,
                      "pictures_per_second": round(run.pictures_per_second, 4), "backend": run.backend}
            print(json.dumps(record), flush=True)
        else:
            console.print(str(drawn.file), markup=False, soft_wrap=True)
    done = summary(run) if run and not layout else f"{count} pictures drawn, the others were there already"
    messages.print(done, markup=False, soft_wrap=True)
    if verbose and run:
        _show_memory(pipe)


def _show_memory(pipe: Pipeline) -> None:
    report = pipe.memory_report()
    table = Table("memory", "bytes", "when", box=None, pad_edge=False)
    table.add_row("weights", show_bytes(report.weights), "always")
    table.add_row("cache", show_bytes(report.cache), "while tokens are drawn")
    table.add_row("step buffers", f"at most {show_bytes(report.step)}", "while tokens are drawn")
    table.add_row("decoding", show_bytes(report.decode), "afterwards, without the cache")
    table.add_row("peak", show_bytes(report.peak), "of the two")
    if report.device_peak is not None:
        table.add_row("measured peak", show_bytes(report.device_peak), "by torch, while tokens were drawn")
    messages.print(table)


@app.command()
@one_line_errors
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what was built and what can run here."""
    import importlib.metadata

    import ssd_kernels

    facts = ssd_kernels.info()
    facts["transformers"] = importlib.metadata.version("transformers")
    facts["included_model"] = _included_model_or_none()
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in ("version", "python", "torch", "transformers", "machine", "threads"):
        table.add_row(name, str(facts[name]))
    for name, value in facts["extension"].items():
        table.add_row(f"extension {name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    for name, state in facts["backends"].items():
        table.add_row(f"backend {name}", "can run here" if state["available"] else f"cannot run: {state['reason']}")
    table.add_row("included model", facts["included_model"] or "not installed")
    console.print(table)


@app.command()
@one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the contact sheet.")] = Path("demo"),
    seed: Seed = 0,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
) -> None:
    """Draw the same prompts with the full cache and with a 20% plan, side by side on one sheet."""
    pipe = load(None, device, dtype, backend)
    from ssd_kernels import policies

    from .images import contact_sheet, file_names, save_picture

    out.mkdir(parents=True, exist_ok=True)
    plans = {"full": pipe.shape.full_plan(), "20%": policies.heavy(pipe.shape, DEFAULT_BUDGET)}
    columns: dict[str, list[Image]] = {}
    runs: dict[str, RunStats] = {}
    for name, plan in plans.items():
        messages.print(f"{len(DEMO_PROMPTS)} pictures, {name} cache", markup=False)
        pictures = pipe(DEMO_PROMPTS, guidance_scale=guidance, seed=seed, plan=plan, progress=True)
        runs[name] = last_run(pipe)
        columns[f"{name} cache"] = pictures
        folder = out / name.rstrip("%")
        folder.mkdir(exist_ok=True)
        for file_name, picture in zip(file_names(DEMO_PROMPTS, 1), pictures, strict=True):
            save_picture(picture, folder / file_name)
    sheet = out / "contact_sheet.png"
    save_picture(contact_sheet(columns, DEMO_PROMPTS), sheet)
    table = Table("cache", "budget", "bytes", "seconds", "pictures/s", box=None, pad_edge=False)
    for name, run in runs.items():
        table.add_row(name, f"{run.budget:.1%}", show_bytes(run.cache_bytes), f"{run.seconds + run.decode_seconds:.1f}",
                      f"{run.pictures_per_second:.2f}")
    console.print(table)
    console.print(f"contact sheet: {sheet.resolve()}", markup=False, soft_wrap=True)


def _included_model_or_none() -> str | None:
    from .checkpoints import included_model

    try:
        return included_model()
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(app())
