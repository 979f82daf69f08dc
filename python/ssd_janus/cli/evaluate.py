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
    BudgetsBytes,
    Device,
    Dtype,
    Guidance,
    Kvs,
    Model,
    Plans,
    Policies,
    ProfileFile,
    PromptsFile,
    RowBuffer,
    Weights,
    check_plans_options,
    choose_plans,
    load,
    load_profile,
)
from .terminal import messages, print_table, table

if TYPE_CHECKING:
    from ..evaluation.report import Result
    from ..prompts import FilePrompt

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
    budget_bytes: BudgetsBytes = None,
    kv: Kvs = None,
    row_buffer: RowBuffer = None,
    profile: ProfileFile = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt (shapes).")] = 1,
    prompts_file: PromptsFile = None,
    limit: Annotated[int | None, typer.Option(min=1, help=(
        f"Only the first so many prompts. Default: all for shapes, {FIDELITY_PROMPTS} for fidelity."))] = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    weights: Weights = None,
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
    for option, given, needed in (("--seeds", seeds != 1, suite is SuiteName.shapes),
                                  ("--no-pictures", not pictures, suite is SuiteName.fidelity)):
        if given and not needed:
            raise ValueError(f"{option} says nothing with --suite {suite.value}")
    check_plans_options(plan, policy, budget, budget_bytes, row_buffer, profile, kv)
    prompts = suite_prompts(suite, prompts_file, limit)
    from ssd_kernels.files import check_file, check_folder

    check_folder(out)
    if plot is not None:
        check_file(plot)
        from ..extras import needs

        with needs("plot", "matplotlib"):
            import matplotlib  # noqa: F401  # before the long part, not after
    pipe = load(model, device, dtype, backend, weights)
    heads = load_profile(profile, model, policy or [], pipe, formats=kv or [])
    plans = choose_plans(pipe, plan or [], policy or [], budget_bytes or budget or [], row_buffer, heads,
                         in_bytes=bool(budget_bytes), formats=kv or [])
    from ..evaluation import fidelity, quality, report
    from ..progress import progress_bar
    from ..prompts import fitting

    if page is not None:
        report.check_page(page, [suite.value])
    scenes = [prompt.metadata for prompt in fitting(pipe, prompts)]
    common: dict[str, Any] = {"guidance_scale": guidance, "batch_size": batch_size}
    if suite is SuiteName.shapes:
        for name, chosen in plans.items():
            quality.open_folder(pipe, chosen, out / name, prompts=scenes, **common)
    results: dict[str, Result] = {}
    with progress_bar("drawing") as show:
        if suite is SuiteName.fidelity:
            results.update(fidelity.evaluate(pipe, plans, out, prompts=[scene["prompt"] for scene in scenes],
                                             pictures=pictures, progress=show, **common))
        else:
            for number, (name, chosen) in enumerate(plans.items()):
                results[name] = quality.evaluate(
                    pipe, chosen, out / name, prompts=scenes, seeds=seeds,
                    progress=lambda done, total: show(number * total + done, len(plans) * total), **common)  # noqa: B023
    bytes_of = {name: each.byte_budget(pipe.shape.num_visual_tokens, head_dim=pipe.shape.head_dim, dtype=pipe.dtype)
                for name, each in plans.items()}
    facts = {"suite": suite.value, "prompts": len(prompts), "seeds": seeds, "byte_budgets": bytes_of}
    shares = bytes_of if any(each.kv_format != "auto" for each in plans.values()) else None
    report.write(results, out, facts, shares)
    if plot is not None:
        from ..plots import save_curves

        plot.parent.mkdir(parents=True, exist_ok=True)
        save_curves(results, plot)
    if page is not None:
        report.into_page(results, page, suite.value, shares)
    if as_json:
        print((out / "results.json").read_text(), end="")
    else:
        head, rows = report.columns(results, shares)
        print_table(table(rows, head))
        messages.print(f"pictures, results.json and table.md are in {out}", soft_wrap=True)


def suite_prompts(suite: SuiteName, file: Path | None, limit: int | None) -> list[FilePrompt]:
    """The prompts to draw; the shapes suite can only judge what says what to include."""
    from ..prompts import FilePrompt, passing, read, shapes_suite

    def check(prompt: FilePrompt) -> None:
        if not {"tag", "include"} <= prompt.metadata.keys():
            raise ValueError('the shapes suite needs "tag" and "include", as in GenEval\'s metadata, got '
                             f"{json.dumps(prompt.metadata)[:80]}")
        check_metadata(prompt.metadata)

    if suite is SuiteName.shapes:
        from ssd_shapes.suite import check as check_metadata
    if file is not None:
        found = read(file)
    else:
        found = [FilePrompt(f"{number:05d}", scene["prompt"], scene, number=number, where=f"prompt {number + 1}")
                 for number, scene in enumerate(shapes_suite())]
    if suite is SuiteName.shapes:
        passing(found, check)
    elif limit is None:
        limit = FIDELITY_PROMPTS
    return found[:limit]
