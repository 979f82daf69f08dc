"""The command ``generate``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssd_attach.units import show_bytes

from ..ranks import Ranks
from .options import (
    SAMPLING,
    Backend,
    Budget,
    BudgetBytes,
    Device,
    Dtype,
    Guidance,
    Kv,
    LayoutName,
    Model,
    On,
    Parameters,
    PlanFile,
    Policy,
    ProfileFile,
    PromptsFile,
    RowBuffer,
    Seed,
    Temperature,
    TopK,
    TopP,
    Weights,
    Workers,
    check_plan_options,
    choose_plan,
    load,
    load_here,
    load_profile,
    policy_parameters,
    summary,
    together,
)
from .presets import Preset, filled
from .terminal import console, messages, print_table, saying, table

if TYPE_CHECKING:
    from ssd_kernels import CachePlan

    from ..pipeline import Pipeline, RunStats


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw, one text per prompt.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("pictures"),
    seed: Seed = 0,
    model: Model = None,
    plan: PlanFile = None,
    policy: Policy = None,
    budget: Budget = None,
    budget_bytes: BudgetBytes = None,
    kv: Kv = None,
    row_buffer: RowBuffer = None,
    parameter: Parameters = None,
    profile: ProfileFile = None,
    images_per_prompt: Annotated[int | None, typer.Option(min=1, help=(
        "Pictures of each prompt. Default: 1; 4 with the layouts geneval and dpg, as evaluators are used."))] = None,
    prompts_file: PromptsFile = None,
    layout: Annotated[LayoutName | None, typer.Option(
        help="Write the folders that the evaluators of GenEval or DPG-Bench read, or Parquet files with pictures and "
             "tokens. Prompts that have their pictures already are skipped, so a killed run goes on; pictures drawn "
             "with other settings are refused.")] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help=(
        "With --layout: draw anew what was drawn with other settings, and remove what other prompts left."))] = False,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help=(
        "Leave out prompts that are wrong or too long for the model, and draw the others."))] = False,
    preset: Preset = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    weights: Weights = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Most pictures drawn at once; fewer where memory is "
                                                        "short.")] = 8,
    on: On = None,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per picture on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also show what memory was used for, or "
                                                               "with --on what Ray says.")] = False,
) -> None:
    """Draw prompts and write PNG files.

    With RANK and WORLD_SIZE in the environment, as torchrun sets them, or in a step of Slurm, each process draws its
    share of the prompts into the same folder; pictures of the same settings that are there already are kept.
    """
    ranks = Ranks.here()
    say = saying(ranks)
    if on is None and workers is not None:
        raise ValueError("--workers says nothing without --on")
    if on is not None and not ranks.alone:
        raise ValueError(f"--on deals out the work by itself, and this process is {ranks}: unset RANK and WORLD_SIZE, "
                         "or start it without srun")
    check_plan_options(plan, policy, budget, budget_bytes, row_buffer, parameter, kv)
    parameters = policy_parameters(policy, parameter)
    if redraw and layout is None:
        raise ValueError("--redraw needs --layout; without, everything is drawn anew")
    given = filled(preset, {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                            "images_per_prompt": images_per_prompt, **({"row_buffer": row_buffer} if policy else {})})
    guidance, images_per_prompt, row_buffer = given["guidance"], given["images_per_prompt"], given.get("row_buffer")
    from ssd_kernels.files import check_folder

    from ..prompts import fitting, gather, passing

    def skip(message: str) -> None:
        if ranks.number == 0:
            say(f"{message}: left out")

    chosen = gather(prompts, prompts_file, skip if skip_invalid else None)
    check_folder(out)
    sampling = {name: given[name] for name in SAMPLING}
    painters = None
    if on is not None:
        from ..remote import OnRay, Source

        folder_or_id = str(Path(model).resolve()) if model is not None and Path(model).is_dir() else model
        source = Source(folder_or_id, device, dtype and dtype.value, backend, sampling,
                        weights and weights.value)
        painters = OnRay.at(on, source, workers, verbose, say)
    pipe = (load_here(model, device, dtype, sampling, weights) if on
            else load(model, device, dtype, backend, ranks, sampling=sampling, weights=weights))
    heads = load_profile(profile, model, [policy] if policy else [], pipe, formats=[kv])
    cache_plan = choose_plan(pipe, plan, policy, budget, row_buffer, heads, parameters,
                             budget_bytes=budget_bytes, kv=kv)
    chosen = fitting(pipe, chosen, skip if skip_invalid else None)
    from ..drawing import draw, units
    from ..engine import sampling_settings
    from ..layouts import LAYOUTS
    from ..parquet import Parquet

    folder = None if layout is None else {**LAYOUTS, "parquet": Parquet}[layout.value](out, images_per_prompt)
    images = (images_per_prompt or 1) if folder is None else folder.images
    if folder is not None:
        chosen = passing(chosen, folder.check, skip if skip_invalid else None)
        for line in folder.advice(chosen) if ranks.number == 0 else ():
            say(line)
    scale, drawn_by = pipe.guidance(guidance), sampling_settings(pipe.model)
    began = time.perf_counter()
    runs: list[RunStats] = []
    count = 0
    for drawn in draw(pipe, folder, out, chosen, images, guidance, seed, cache_plan, batch_size, redraw=redraw,
                      say=say, ranks=ranks, painters=painters):
        run, count = drawn.run, count + 1
        if not runs or runs[-1] is not run:
            runs.append(run)
        if as_json:
            record = {"file": str(drawn.file), "prompt": drawn.prompt, "image": drawn.image, "seed": drawn.seed,
                      "width": drawn.size[0], "height": drawn.size[1], "plan_budget": round(run.budget, 4),
                      "kv_format": cache_plan.kv_format, "guidance_scale": scale, "sampling": drawn_by,
                      "cache_bytes": run.cache_bytes,
                      "full_cache_bytes": run.full_cache_bytes,
                      "pictures_per_second": round(run.pictures_per_second, 4), "backend": run.backend}
            print(json.dumps(record), flush=True)
        else:
            console.print(str(drawn.file), soft_wrap=True)
    kept = sum(map(len, ranks.own(units(chosen, images, batch_size)))) * images - count
    done = summary(together(runs)) if runs and not kept and painters is None else f"{count} pictures drawn"
    if painters is not None and count:
        done += f" in {time.perf_counter() - began:.1f} s, by {painters}"
    messages.print(("" if ranks.alone else f"{ranks}: ") + done + (
        f", the other {kept} were there already" if kept else ""), soft_wrap=True)
    if verbose and runs and painters is None:
        _show_memory(pipe, cache_plan)


def _show_memory(pipe: Pipeline, plan: CachePlan) -> None:
    report = pipe.memory_report()
    rows = [("weights", show_bytes(report.weights), "always"),
            ("cache" if plan.kv_format == "auto" else f"cache, {plan.kv_format}", show_bytes(report.cache),
             "while tokens are drawn"),
            ("step buffers", f"at most {show_bytes(report.step)}", "while tokens are drawn"),
            ("decoding", show_bytes(report.decode), "afterwards, without the cache"),
            ("peak", show_bytes(report.peak), "of the two")]
    if report.device_peak is not None:
        rows.append(("measured peak", show_bytes(report.device_peak), "by torch, while tokens were drawn"))
    print_table(table(rows, ("memory", "bytes", "when")), messages)
