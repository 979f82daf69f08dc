"""The command ``gallery``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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
    Seed,
    check_plans_options,
    choose_plans,
    load,
    load_profile,
)
from .terminal import console


def gallery(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw, one text per prompt.")] = None,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("gallery.png"),
    seed: Seed = 0,
    model: Model = None,
    plan: Plans = None,
    policy: Policies = None,
    budget: Budgets = None,
    budget_bytes: BudgetsBytes = None,
    kv: Kvs = None,
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
    check_plans_options(plan, policy, budget, budget_bytes, row_buffer, profile, kv)
    from ssd_kernels.files import check_file

    from ..prompts import fitting, gather

    chosen = gather(prompts, prompts_file)
    check_file(out)
    pipe = load(model, device, dtype, backend)
    heads = load_profile(profile, model, policy or [], pipe, formats=kv or [])
    plans = choose_plans(pipe, plan or [], policy or [], budget_bytes or budget or [], row_buffer, heads,
                         in_bytes=bool(budget_bytes), formats=kv or [])
    texts = [prompt.text for prompt in fitting(pipe, chosen)]
    from ..images import contact_sheet, save_picture
    from ..progress import progress_bar

    columns = {}
    with progress_bar("drawing") as show:
        for number, (name, cache_plan) in enumerate(plans.items()):
            columns[name] = pipe(
                texts, guidance_scale=guidance, seed=seed, plan=cache_plan, batch_size=batch_size,
                progress=lambda done, total: show(number * total + done, len(plans) * total))  # noqa: B023
    out.parent.mkdir(parents=True, exist_ok=True)
    # Small pictures are enlarged, those of a large model are not.
    save_picture(contact_sheet(columns, texts, zoom=max(1, 192 // columns[next(iter(columns))][0].width)), out)
    if as_json:
        print(json.dumps({"file": str(out), "prompts": texts, "plans": list(columns), "seed": seed}))
    else:
        console.print(str(out), soft_wrap=True)
