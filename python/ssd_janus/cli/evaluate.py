"""The command ``evaluate``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..ranks import Ranks, still_missing
from .options import (
    SAMPLING,
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
    Temperature,
    TopK,
    TopP,
    Weights,
    check_plans_options,
    choose_plans,
    load,
    load_profile,
)
from .presets import Preset, filled
from .terminal import messages, print_table, saying, table

if TYPE_CHECKING:
    from ..evaluation.folder import RunFolder
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
    seeds: Annotated[int | None, typer.Option(min=1, help="Pictures per prompt (shapes). Default: 1.")] = None,
    prompts_file: PromptsFile = None,
    limit: Annotated[int | None, typer.Option(min=1, help=(
        f"Only the first so many prompts. Default: all for shapes, {FIDELITY_PROMPTS} for fidelity."))] = None,
    preset: Preset = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
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
    """Measure what plans do to pictures; writes results.json and table.md.

    With RANK and WORLD_SIZE in the environment, as torchrun sets them, or in a step of Slurm, each process does its
    share of the batches in the same folder, and the last one to finish writes the results.
    """
    ranks = Ranks.here()
    for option, given, needed in (("--seeds", seeds is not None, suite is SuiteName.shapes),
                                  ("--no-pictures", not pictures, suite is SuiteName.fidelity)):
        if given and not needed:
            raise ValueError(f"{option} says nothing with --suite {suite.value}")
    check_plans_options(plan, policy, budget, budget_bytes, row_buffer, profile, kv)
    given = filled(preset, {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                            **({"seeds": seeds} if suite is SuiteName.shapes else {}),
                            **({"row_buffer": row_buffer} if policy else {})})
    guidance, seeds, row_buffer = given["guidance"], given.get("seeds") or 1, given.get("row_buffer")
    prompts = suite_prompts(suite, prompts_file, limit)
    from ssd_kernels.files import check_file, check_folder

    check_folder(out)
    if plot is not None:
        check_file(plot)
        from ..extras import needs

        with needs("plot", "matplotlib"):
            import matplotlib  # noqa: F401  # before the long part, not after
    pipe = load(model, device, dtype, backend, ranks, weights=weights,
                sampling={name: given[name] for name in SAMPLING})
    heads = load_profile(profile, model, policy or [], pipe, formats=kv or [])
    plans = choose_plans(pipe, plan or [], policy or [], budget_bytes or budget or [], row_buffer, heads,
                         in_bytes=bool(budget_bytes), formats=kv or [])
    from ..evaluation import fidelity, quality, report
    from ..progress import progress_bar
    from ..prompts import fitting

    if page is not None:
        report.check_page(page, [suite.value])
    scenes = [prompt.metadata for prompt in fitting(pipe, prompts)]
    texts = [scene["prompt"] for scene in scenes]
    folders: dict[str, RunFolder[Any]] = {}
    if suite is SuiteName.fidelity:
        folders.update(fidelity.open_folders(pipe, plans, out, prompts=texts, guidance_scale=guidance,
                                             batch_size=batch_size, pictures=pictures))
    else:
        for name, chosen in plans.items():
            folders[name] = quality.open_folder(pipe, chosen, out / name, prompts=scenes, guidance_scale=guidance,
                                                batch_size=batch_size)
    with progress_bar("drawing", ranks) as show:
        if suite is SuiteName.fidelity:
            fidelity.draw(pipe, plans, folders, prompts=texts, guidance_scale=guidance, pictures=pictures,
                          progress=show, ranks=ranks)
        else:
            for number, (name, chosen) in enumerate(plans.items()):
                quality.draw(pipe, chosen, folders[name], prompts=scenes, seeds=seeds, guidance_scale=guidance,
                             progress=lambda done, total: show(number * total + done, len(plans) * total),  # noqa: B023
                             ranks=ranks, before=number * len(folders[name].batches(seeds)))
    if not ranks.alone and (left := [file for folder in folders.values() for file in folder.missing(seeds)]):
        every = sum(len(folder.batches(seeds)) for folder in folders.values())
        saying(ranks)(still_missing(list(map(str, left)), every, "batches"))
        return
    results: dict[str, Result] = {}
    if suite is SuiteName.fidelity:
        results.update(fidelity.results(pipe, plans, folders))
    else:
        results.update({name: quality.result(pipe, chosen, folders[name], seeds) for name, chosen in plans.items()})
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
