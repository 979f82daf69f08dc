"""``ssd-janus``: draw pictures from the command line."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from PIL.Image import Image

    from ssd_kernels import CachePlan

    from .pipeline import Pipeline, RunStats
    from .shape import ModelShape

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Draw pictures with Janus, each attention head keeping its own few tokens.")
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)

DEFAULT_BUDGET = 0.2
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


class PolicyName(str, Enum):
    full = "full"
    window = "window"
    heavy = "heavy"
    mixed = "mixed"


class DtypeName(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Report what the user can put right in one line and exit with code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            if os.environ.get("SSD_JANUS_TRACEBACK"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            messages.print(f"error: {text}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Of weights and caches. Default: float32 on a CPU, else the "
                                                      "checkpoint's.")]
Backend = Annotated[str, typer.Option(help="Who computes the steps: auto, or a backend that `info` lists.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling; the same seed repeats the pictures.")]
Guidance = Annotated[float | None, typer.Option(help="Strength of classifier-free guidance; 1 turns it off. Default: "
                                                     "the model's own.")]


@app.command()
@_one_line_errors
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw, one text per prompt.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")],
    seed: Seed = 0,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a Janus checkpoint, such as deepseek-community/"
                                                   "Janus-Pro-1B. Default: the included model.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file: what each head keeps.")] = None,
    policy: Annotated[PolicyName | None, typer.Option(help="Make a plan by this rule. Default: full, nothing is "
                                                           "evicted.")] = None,
    budget: Annotated[float | None, typer.Option(help="Share of the picture's tokens that the policy may keep, row "
                                                      f"buffer included. Default: {DEFAULT_BUDGET}.")] = None,
    row_buffer: Annotated[int | None, typer.Option(min=0, help="Steps between evictions of the policy; 0 evicts at "
                                                               "every step. Default: one grid row.")] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per picture on stdout.")] = False,
) -> None:
    """Draw prompts and write PNG files."""
    _check_plan_options(plan, policy, budget, row_buffer)
    pipe = _load(model, device, dtype, backend)
    cache_plan = _plan(pipe.shape, plan, policy, budget, row_buffer)
    out.mkdir(parents=True, exist_ok=True)

    pictures = pipe(prompts, images_per_prompt, guidance, seed, cache_plan, batch_size=batch_size, progress=True)
    from .images import file_names, save_picture

    run = _last_run(pipe)
    names = file_names(prompts, images_per_prompt)
    scale = pipe.model.generation_config.guidance_scale if guidance is None else guidance
    for index, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        save_picture(picture, out / name)
        if as_json:
            record = {"file": str(out / name), "prompt": prompts[index // images_per_prompt],
                      "image": index % images_per_prompt, "seed": seed, "width": picture.width,
                      "height": picture.height, "plan_budget": round(run.budget, 4), "guidance_scale": scale,
                      "cache_bytes": run.cache_bytes, "full_cache_bytes": run.full_cache_bytes,
                      "pictures_per_second": round(run.pictures_per_second, 4), "backend": run.backend}
            print(json.dumps(record), flush=True)
        else:
            console.print(str(out / name), markup=False, soft_wrap=True)
    messages.print(_summary(run), markup=False, soft_wrap=True)


@app.command()
@_one_line_errors
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
@_one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the contact sheet.")] = Path("demo"),
    seed: Seed = 0,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
) -> None:
    """Draw the same prompts with the full cache and with a 20% plan, side by side on one sheet."""
    pipe = _load(None, device, dtype, backend)
    from . import policies
    from .images import contact_sheet, file_names, save_picture

    out.mkdir(parents=True, exist_ok=True)
    plans = {"full": pipe.shape.full_plan(), "20%": policies.heavy(pipe.shape, DEFAULT_BUDGET)}
    columns: dict[str, list[Image]] = {}
    runs: dict[str, RunStats] = {}
    for name, plan in plans.items():
        messages.print(f"{len(DEMO_PROMPTS)} pictures, {name} cache", markup=False)
        pictures = pipe(DEMO_PROMPTS, guidance_scale=guidance, seed=seed, plan=plan, progress=True)
        runs[name] = _last_run(pipe)
        columns[f"{name} cache"] = pictures
        folder = out / name.rstrip("%")
        folder.mkdir(exist_ok=True)
        for file_name, picture in zip(file_names(DEMO_PROMPTS, 1), pictures, strict=True):
            save_picture(picture, folder / file_name)
    sheet = out / "contact_sheet.png"
    save_picture(contact_sheet(columns, DEMO_PROMPTS), sheet)
    table = Table("cache", "budget", "bytes", "seconds", "pictures/s", box=None, pad_edge=False)
    for name, run in runs.items():
        table.add_row(name, f"{run.budget:.1%}", _bytes(run.cache_bytes), f"{run.seconds + run.decode_seconds:.1f}",
                      f"{run.pictures_per_second:.2f}")
    console.print(table)
    console.print(f"contact sheet: {sheet.resolve()}", markup=False, soft_wrap=True)


def _check_plan_options(plan: Path | None, policy: PolicyName | None, budget: float | None,
                        row_buffer: int | None) -> None:
    """Refuse combinations before the model is loaded."""
    given = [name for name, value in (("--policy", policy), ("--budget", budget), ("--row-buffer", row_buffer))
             if value is not None]
    if plan is not None and given:
        raise ValueError(f"--plan already says what to keep and cannot be combined with {', '.join(given)}")
    if policy is None and given:
        raise ValueError(f"{', '.join(given)} needs --policy, one of {', '.join(PolicyName.__members__)}")


def _plan(shape: ModelShape, plan: Path | None, policy: PolicyName | None, budget: float | None,
          row_buffer: int | None) -> CachePlan:
    from ssd_kernels import CachePlan

    from . import policies

    if plan is not None:
        return shape.check(CachePlan.load(plan))
    name = PolicyName.full if policy is None else policy
    if budget is None:
        budget = 1.0 if name is PolicyName.full else DEFAULT_BUDGET
    return policies.build(name.value, shape, budget, row_buffer)


def _load(model: str | None, device: str, dtype: DtypeName | None, backend: str) -> Pipeline:
    _quiet(local=model is None or Path(model).is_dir())
    with messages.status("loading the model"):
        import torch

        from .pipeline import Pipeline

        return Pipeline.from_pretrained(model, device=device, backend=backend,
                                        dtype=None if dtype is None else getattr(torch, dtype.value))


def _quiet(local: bool) -> None:
    """Keep libraries from talking over the output and, for local checkpoints, from asking the network."""
    if local:
        # Read once, when huggingface_hub is imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", message="ssd_kernels")
    warnings.showwarning = lambda message, *_: messages.print(f"note: {message}", markup=False, soft_wrap=True)
    logging.getLogger("torch").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if local:
        transformers_logging.disable_progress_bar()


def _included_model_or_none() -> str | None:
    from .checkpoints import included_model

    try:
        return included_model()
    except FileNotFoundError:
        return None


def _last_run(pipe: Pipeline) -> RunStats:
    if pipe.last_run is None:
        raise RuntimeError("the pipeline has drawn nothing")
    return pipe.last_run


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _summary(run: RunStats) -> str:
    return (f"{run.pictures} pictures in {run.seconds + run.decode_seconds:.1f} s "
            f"({run.pictures_per_second:.2f} pictures/s, backend {run.backend}); cache {_bytes(run.cache_bytes)}, "
            f"{run.cache_bytes / run.full_cache_bytes:.0%} of the full cache's {_bytes(run.full_cache_bytes)}")


if __name__ == "__main__":
    sys.exit(app())
