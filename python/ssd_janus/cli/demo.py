"""The command ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssd_attach.units import show_bytes

from .options import (
    DEFAULT_BUDGET,
    Backend,
    Device,
    Dtype,
    Guidance,
    Seed,
    last_run,
    load,
)
from .terminal import console, messages, print_table, table

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline import RunStats

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


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the contact sheet.")] = Path("demo"),
    seed: Seed = 0,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
) -> None:
    """Draw the same prompts with the full cache and with a 20% plan, side by side on one sheet."""
    from ssd_kernels.files import check_folder

    check_folder(out)
    pipe = load(None, device, dtype, backend)
    from ssd_kernels import policies

    from ..images import contact_sheet, file_names, save_picture

    plans = {"full": pipe.shape.full_plan(), "20%": policies.heavy(pipe.shape, DEFAULT_BUDGET)}
    columns: dict[str, list[Image]] = {}
    runs: dict[str, RunStats] = {}
    for name, plan in plans.items():
        messages.print(f"{len(DEMO_PROMPTS)} pictures, {name} cache")
        pictures = pipe(DEMO_PROMPTS, guidance_scale=guidance, seed=seed, plan=plan, progress=True)
        runs[name] = last_run(pipe)
        columns[f"{name} cache"] = pictures
        folder = out / name.rstrip("%")
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, picture in zip(file_names(DEMO_PROMPTS, 1), pictures, strict=True):
            save_picture(picture, folder / file_name)
    sheet = out / "contact_sheet.png"
    save_picture(contact_sheet(columns, DEMO_PROMPTS), sheet)
    rows = [(name, f"{run.budget:.1%}", show_bytes(run.cache_bytes), f"{run.seconds + run.decode_seconds:.1f}",
             f"{run.pictures_per_second:.2f}") for name, run in runs.items()]
    print_table(table(rows, ("cache", "budget", "bytes", "seconds", "pictures/s")))
    console.print(f"contact sheet: {sheet.resolve()}", soft_wrap=True)
