"""The commands ``evaluate``, ``gallery`` and ``profile``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DEFAULT_BUDGET,
    PROMPTS_FILE,
    Backend,
    Device,
    Dtype,
    Guidance,
    Model,
    PolicyName,
    ProfileFile,
    PromptsFile,
    RowBuffer,
    Seed,
    app,
    choose_plans,
    console,
    load,
    load_profile,
    messages,
    one_line_errors,
)

if TYPE_CHECKING:
    from .evaluation.report import Result

FIDELITY_PROMPTS = 16

Plans = Annotated[list[Path] | None, typer.Option("--plan", help="Plan file; may be repeated.")]
Policies = Annotated[list[PolicyName] | None, typer.Option(
    "--policy", help="Make a plan by this rule; may be repeated. Default without --plan: full.")]
Budgets = Annotated[list[float] | None, typer.Option(
    "--budget", help=f"Share of the picture's tokens that each policy may keep; may be repeated. Default: "
                     f"{DEFAULT_BUDGET}.")]


class SuiteName(str, Enum):
    shapes = "shapes"
    fidelity = "fidelity"


@app.command()
@one_line_errors
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for pictures and results, with one folder per plan. A run that was "
                                           "stopped goes on when called again.")],
    suite: Annotated[SuiteName, typer.Option(help=(
        "shapes: draw the included prompts and count the pictures that show what was asked. fidelity: compare with the "
        "full cache, for any model."))] = SuiteName.shapes,
    model: Model = None,
    plan: Plans = None,
    policy: Policies = None,
    budget: Budgets = None,
    row_buffer: RowBuffer = None,
    profile: ProfileFile = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt (shapes).")] = 1,
    prompts_file: PromptsFile = None,
    limit: Annotated[int | None, typer.Option(min=1, help=(
        f"Only the first so many prompts. Default: all for shapes, {FIDELITY_PROMPTS} for fidelity."))] = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 25,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help=(
        "fidelity: also draw freely under every plan, for PSNR and SSIM."))] = True,
    plot: Annotated[Path | None, typer.Option(help="Also plot the results against the budget into this PNG file "
                                                   "(needs matplotlib).")] = None,
    page: Annotated[Path | None, typer.Option(help="Also put the table into this Markdown page, between the comments "
                                                   "<!-- SUITE --> and <!-- /SUITE -->.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure what plans do to pictures; writes results.json and table.md."""
    prompts = suite_prompts(suite, prompts_file, limit)
    pipe = load(model, device, dtype, backend)
    heads = load_profile(profile, model, policy or [], pipe)
    plans = choose_plans(pipe.shape, plan or [], policy or [], budget or [], row_buffer, heads)
    from .evaluation import fidelity, quality, report
    from .progress import progress_bar

    common: dict[str, Any] = {"guidance_scale": guidance, "batch_size": batch_size}
    results: dict[str, Result] = {}
    with progress_bar("drawing") as show:
        if suite is SuiteName.fidelity:
            results.update(fidelity.evaluate(pipe, plans, out, prompts=[prompt["prompt"] for prompt in prompts],
                                             pictures=pictures, progress=show, **common))
        else:
            for number, (name, chosen) in enumerate(plans.items()):
                results[name] = quality.evaluate(
                    pipe, chosen, out / name, prompts=prompts, seeds=seeds,
                    progress=lambda done, total: show(number * total + done, len(plans) * total), **common)  # noqa: B023
    facts = {"suite": suite.value, "prompts": len(prompts), "seeds": seeds}
    report.write(results, out, facts)
    if plot is not None:
        from .plots import save_curves

        save_curves(results, plot)
    if page is not None:
        report.into_page(results, page, suite.value)
    if as_json:
        print((out / "results.json").read_text(), end="")
    else:
        console.print(report.terminal(results))
        messages.print(f"pictures, results.json and table.md are in {out}", markup=False, soft_wrap=True)


@app.command()
@one_line_errors
def gallery(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw, one text per prompt.")] = None,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("gallery.png"),
    seed: Seed = 0,
    model: Model = None,
    plan: Plans = None,
    policy: Policies = None,
    budget: Budgets = None,
    row_buffer: RowBuffer = None,
    profile: ProfileFile = None,
    prompts_file: PromptsFile = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout.")] = False,
) -> None:
    """Draw the same prompts under several plans on one sheet: prompts down, plans across, one seed."""
    from .prompts import gather

    texts = [prompt.text for prompt in gather(prompts, prompts_file)]
    pipe = load(model, device, dtype, backend)
    heads = load_profile(profile, model, policy or [], pipe)
    plans = choose_plans(pipe.shape, plan or [], policy or [], budget or [], row_buffer, heads)
    from .images import contact_sheet, save_picture
    from .progress import progress_bar

    columns = {}
    with progress_bar("drawing") as show:
        for number, (name, chosen) in enumerate(plans.items()):
            columns[name] = pipe(
                texts, guidance_scale=guidance, seed=seed, plan=chosen, batch_size=batch_size,
                progress=lambda done, total: show(number * total + done, len(plans) * total))  # noqa: B023
    out.parent.mkdir(parents=True, exist_ok=True)
    # Small pictures are enlarged, those of a large model are not.
    save_picture(contact_sheet(columns, texts, zoom=max(1, 192 // columns[next(iter(columns))][0].width)), out)
    if as_json:
        print(json.dumps({"file": str(out), "prompts": texts, "plans": list(columns), "seed": seed}))
    else:
        console.print(str(out), markup=False, soft_wrap=True)


@app.command("profile")
@one_line_errors
def profile_heads(
    out: Annotated[Path, typer.Option(help="Folder for profile.safetensors and plots.")],
    model: Model = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts-file", "--prompts", help=PROMPTS_FILE)] = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the first so many prompts.")] = 16,
    radius: Annotated[int, typer.Option(min=0, help="Of the neighbourhood that the sparsity score leaves out, "
                                                    "tokens.")] = 1,
    tau: Annotated[float | None, typer.Option(min=0, max=1,
                                              help="Line in the plots. Default: the median score.")] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots (needs matplotlib).")] = True,
    seed: Seed = 0,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout.")] = False,
) -> None:
    """Measure what every head looks at and what evicting costs it, for the policies that need to know.

    Without --prompts-file, prompts of the shapes world that the suite of `evaluate` does not use.
    """
    from .prompts import calibration, read

    texts = [prompt.text for prompt in read(prompts_file)][:limit] if prompts_file else calibration(limit)
    if plots:
        from .extras import needs

        with needs("plot", "matplotlib"):
            import matplotlib  # noqa: F401  # before the long part, not after
    pipe = load(model, device, dtype, backend)
    from . import plots as plotting
    from .profiling import measure
    from .progress import progress_bar

    with progress_bar("profiling") as show:
        measured = measure(pipe, texts, guidance_scale=guidance, seed=seed, radius=radius, batch_size=batch_size,
                           progress=show)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "profile.safetensors"]
    measured.save(files[0])
    if plots:
        files += plotting.save_all(measured, out, tau)
    facts = {"files": [str(file) for file in files], "prompts": len(texts), "seconds": measured.meta["seconds"]}
    if as_json:
        print(json.dumps(facts))
        return
    for file in files:
        console.print(str(file), markup=False, soft_wrap=True)
    messages.print(f"{len(texts)} prompts in {measured.meta['seconds']} s")


def suite_prompts(suite: SuiteName, file: Path | None, limit: int | None) -> list[dict[str, Any]]:
    """GenEval metadata of the prompts to draw; the shapes suite can only judge what says what to include."""
    from .prompts import read, shapes_suite

    found = [prompt.metadata for prompt in read(file)] if file else shapes_suite()
    if suite is SuiteName.shapes:
        for number, prompt in enumerate(found, 1):
            if not {"tag", "include"} <= prompt.keys():
                raise ValueError(f'{file} line {number}: the shapes suite needs "tag" and "include", as in GenEval\'s '
                                 f"metadata, got {json.dumps(prompt)[:80]}")
    elif limit is None:
        limit = FIDELITY_PROMPTS
    return found[:limit]
