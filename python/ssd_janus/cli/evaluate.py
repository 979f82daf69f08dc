"""The command ``evaluate``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    Backend,
    Budgets,
    Device,
    Dtype,
    Guidance,
    Model,
    Plans,
    Policies,
    ProfileFile,
    PromptsFile,
    RowBuffer,
    choose_plans,
    load,
    load_profile,
)
from .terminal import messages, print_table, table

if TYPE_CHECKING:
    from ..evaluation.report import Result

FIDELITY_PROMPTS = 16

class SuiteName(str, Enum):
    shapes = "shapes"
    fidelity = "fidelity"


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
    from ..evaluation import fidelity, quality, report
    from ..progress import progress_bar

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
        from ..plots import save_curves

        save_curves(results, plot)
    if page is not None:
        report.into_page(results, page, suite.value)
    if as_json:
        print((out / "results.json").read_text(), end="")
    else:
        head, rows = report.columns(results)
        print_table(table(rows, head))
        messages.print(f"pictures, results.json and table.md are in {out}", markup=False, soft_wrap=True)


def suite_prompts(suite: SuiteName, file: Path | None, limit: int | None) -> list[dict[str, Any]]:
    """GenEval metadata of the prompts to draw; the shapes suite can only judge what says what to include."""
    from ..prompts import read, shapes_suite

    found = [prompt.metadata for prompt in read(file)] if file else shapes_suite()
    if suite is SuiteName.shapes:
        for number, prompt in enumerate(found, 1):
            if not {"tag", "include"} <= prompt.keys():
                raise ValueError(f'{file} line {number}: the shapes suite needs "tag" and "include", as in GenEval\'s '
                                 f"metadata, got {json.dumps(prompt)[:80]}")
    elif limit is None:
        limit = FIDELITY_PROMPTS
    return found[:limit]
